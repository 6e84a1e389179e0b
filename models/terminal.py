"""A model in the terminal: one answer, several runs' answers side by side, a conversation."""

from pathlib import Path

from transformers import TextStreamer

from config import RAW_CHAT
from data.encoding import Encoder, chat_turn_ids, text_ids
from data.prompts import STOP_STRING, render_prompt
from data.sources import Record
from models.expert_bias import ExpertBias
from models.generation import answered_record, generate, generate_tokens, prompt_window
from models.loading import is_fused, load_on_device
from models.routing import routing_usage, token_usage, usage_line

PROMPT, NEW, END = "> ", "/new", "/quit"


def printable(text: str) -> str:
    """Text that a terminal takes for nothing but text: other control characters are written out."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def answer_prompt(args, path: Path | None, base_model: str, bias: ExpertBias | None) -> None:
    """Answer --prompt; of a fused model, say how much each expert was used."""
    model, tokenizer = load_on_device(args, path, base_model, bias)
    (answer,) = generate(model, tokenizer, [Record("prompt", "", args.prompt)], args, args.seed)
    print(printable(answer["output"]))
    if is_fused(path):
        print(usage_line(routing_usage(model, tokenizer, [answered_record(answer)], 1, progress=False)))


class AnswerStreamer(TextStreamer):
    """Prints an answer as it comes, up to where a new instruction would begin."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.held, self.answer, self.stopped = "", "", False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.held += text
        before, mark, _ = self.held.partition(STOP_STRING)
        if self.stopped:
            if stream_end:
                print()
            return
        self.stopped = bool(mark)
        # what may be the beginning of the stop string waits
        waiting = next((n for n in range(len(STOP_STRING), 0, -1) if before.endswith(STOP_STRING[:n])), 0)
        ready = before if mark or stream_end else before[: len(before) - waiting]
        self.held = "" if mark or stream_end else before[len(ready) :]
        self.answer += ready
        print(printable(ready), end="\n" if stream_end else "", flush=True)


def converse(args, path: Path | None, base_model: str, bias: ExpertBias | None) -> None:
    """A conversation, streamed: each turn is read with those before it, as far as they fit. Of a fused model
    each answer is followed by the experts that it used."""
    model, tokenizer = load_on_device(args, path, base_model, bias)
    window = prompt_window(model, args.max_new_tokens)
    print(f"{NEW} begins again, {END} (or the end of input) ends.")
    turns: list[tuple[str, str]] = []
    while True:
        try:
            said = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if said == END:
            return
        if said == NEW:
            turns = []
        if not said or said == NEW:
            continue
        kept = [*turns, (said, "")]
        while len(ids := turn_ids(tokenizer, kept, args.run == RAW_CHAT)) > window and len(kept) > 1:
            kept = kept[1:]
        if len(kept) <= len(turns):
            print(f"(the first {len(turns) + 1 - len(kept)} turns no longer fit the model's window)")
        streamer, encoder = AnswerStreamer(tokenizer), Encoder(tokenizer, window)
        opening = encoder.opening(Record("", "", said))
        prompt, opening = encoder.shortened(ids, opening, max(len(ids) - window, 0))
        seed = args.seed + len(turns)
        (answer,) = generate_tokens(model, tokenizer, [prompt], [opening], args, seed, streamer)
        turns.append((said, streamer.answer.strip()))
        if is_fused(path):  # over the conversation, as it was read
            read = prompt + answer[:-1], range(opening, len(prompt))
            print(usage_line(token_usage(model, [read], 1, progress=False)))


def turn_ids(tokenizer, turns: list[tuple[str, str]], chat: bool) -> list[int]:
    """Token ids of a conversation whose last answer is to come: by the chat template, or by the prompt that the runs
    were aligned on, one turn after the other."""
    if chat:
        return chat_turn_ids(tokenizer, turns)
    opening = render_prompt("").partition(STOP_STRING)[0]
    text = opening + "\n\n".join(
        render_prompt(said).removeprefix(opening) + (f" {answer}" if answer else "") for said, answer in turns
    )
    return text_ids(tokenizer, text)


def compare_runs(args, runs: list[tuple[str, Path | None, str]]) -> None:
    """Several runs' answers to --prompt, one below the other. runs: (name, folder, base model) of each."""
    for name, path, base_model in runs:
        print(f"── {name}")
        args.cross_task = name  # raw_chat asks by the chat template
        answer_prompt(args, path, base_model, None)
        print()
