"""From records to token ids and from token ids to padded tensors: labels on the answer and its end mark only."""

from dataclasses import dataclass
from functools import cached_property

import torch

from config import RAW_CHAT, TASKS, UserError
from data.batching import pad
from data.prompts import RESPONSE_MARK, render_prompt
from data.sources import Record

IGNORED = -100  # the label of a position that is not trained


@dataclass
class Encoder:
    """Tokenises records. Prompt and answer are tokenised apart and joined, so that the border between them is exact.

    max_length: of prompt and answer together, in tokens. chat: ask by the tokenizer's own chat template.
    """

    tokenizer: object
    max_length: int
    chat: bool = False

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path} has no EOS token to end answers with")
        mark = len(self._answer_ids(RESPONSE_MARK))
        if mark + 2 > self.max_length:
            raise UserError(
                f"--max_length {self.max_length}: must be above {mark + 1}, the length of the response mark"
            )

    def _answer_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, record: Record) -> list[int]:
        """Token ids of the prompt, with the BOS token where the tokenizer adds one."""
        return prompt_ids(self.tokenizer, record, self.chat)

    @cached_property
    def _openings(self) -> tuple[int, int]:
        """Number of tokens of the template's fixed opening, without and with an input: what two prompts share."""

        def shared(a: list[int], b: list[int]) -> int:
            return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)

        def ids(instruction, input):
            return prompt_ids(self.tokenizer, Record("", "", instruction, input), self.chat)

        return shared(ids("Apples", ""), ids("7", "")), shared(ids("Apples", "?"), ids("7", "?"))

    def opening(self, record: Record) -> int:
        """Number of tokens of a record's prompt that are the template's opening."""
        return self._openings[1 if record.input.strip() else 0]

    def answer_ids(self, record: Record) -> list[int]:
        """Token ids of the answer and the EOS token after it; nothing of an empty answer."""
        answer = self._answer_ids(record.output)
        return [*answer, self.tokenizer.eos_token_id] if answer else []

    def encode(self, record: Record, room: int = 0) -> dict:
        """Token ids and labels of one sample, at most `max_length` of each.

        room: tokens to keep for an answer, if more than this one takes: the prompt is then cut as for a longer answer,
        so that all answers that are compared follow the same prompt.

        Returns id, input_ids, labels (IGNORED but on the answer and its EOS), opening (the number of leading tokens
        that belong to the template's opening), task, and cut ("", "prompt" or "answer"). Of a sample that is too
        long the prompt loses its beginning (but a BOS token), down to the response mark; an answer that still does
        not fit is cut and gets no EOS. Labels may be all IGNORED: see `encode_all`.
        """
        prompt, answer = self.prompt_ids(record), self.answer_ids(record)
        opening = self.opening(record)
        too_many = len(prompt) + max(len(answer), room) - self.max_length
        cut = ""
        if too_many > 0:
            cut, mark = "prompt", len(self._answer_ids(RESPONSE_MARK))
            prompt, opening = self.shortened(prompt, opening, too_many, kept=mark)
            if len(prompt) + len(answer) > self.max_length:
                cut, answer = "answer", answer[: self.max_length - len(prompt)]
        return {
            "id": record.id,
            "input_ids": prompt + answer,
            "labels": [IGNORED] * len(prompt) + answer,
            "opening": opening,
            "task": record.task,
            "cut": cut,
        }

    def shortened(self, prompt: list[int], opening: int, too_many: int, kept: int = 0) -> tuple[list[int], int]:
        """A prompt, and how many of its tokens are the template's opening, without `too_many` tokens of its beginning;
        a BOS token and the last `kept` ones stay."""
        bos = [token for token in prompt[:1] if token == self.tokenizer.bos_token_id]
        dropped = min(too_many, max(len(prompt) - len(bos) - kept, 0))
        return bos + prompt[len(bos) + dropped :], max(opening - dropped, len(bos)) if dropped else opening

    def encode_all(self, records: list[Record]) -> tuple[list[dict], dict[str, int]]:
        """Encode records; drop those without a label (an empty answer). Returns (samples, counts to be told)."""
        encoded = [self.encode(record) for record in records]
        samples = [sample for sample in encoded if any(label != IGNORED for label in sample["labels"])]
        counts = {
            "samples": len(samples),
            "dropped_without_answer": len(encoded) - len(samples),
            "cut_prompts": sum(sample["cut"] == "prompt" for sample in samples),
            "cut_answers": sum(sample["cut"] == "answer" for sample in samples),
        }
        return samples, counts


def prompt_ids(tokenizer, record: Record, chat: bool = False) -> list[int]:
    """Token ids of a record's prompt: the same in training, inference and scoring. Text that spells a special token
    is text. chat: by the tokenizer's own chat template; UserError without one."""
    if chat:
        return chat_ids(tokenizer, record)
    return text_ids(tokenizer, render_prompt(record.instruction, record.input))


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt's text, without the EOS that some tokenizers end every text with."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def chat_ids(tokenizer, record: Record) -> list[int]:
    """Token ids of a record as a user's turn, up to where the assistant's begins."""
    return chat_turn_ids(tokenizer, [("\n\n".join(filter(None, (record.instruction, record.input))), "")])


def chat_turn_ids(tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation, (what was said, the answer) of each turn, up to where the last answer begins. Only
    the chat template's own special tokens count as such: a conversation that spells one is tokenised piece by piece,
    which adds a mark of a word's beginning at each border where a tokenizer has such marks (Llama-2's)."""
    if tokenizer.chat_template is None:
        raise UserError(f"{RAW_CHAT}: the tokenizer of {tokenizer.name_or_path} has no chat template; leave it out")
    texts = [text for turn in turns for text in turn][:-1]
    if not any(spells_special_token(tokenizer, text) for text in texts):
        spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return tokenizer.apply_chat_template(spoken, tokenize=True, add_generation_prompt=True, return_dict=False)
    roles = [{"role": ("user", "assistant")[i % 2], "content": f"@@{i}@@"} for i in range(len(texts))]
    rest, ids = tokenizer.apply_chat_template(roles, tokenize=False, add_generation_prompt=True), []

    def add(part: str, split: bool) -> None:
        ids.extend(tokenizer(part, add_special_tokens=False, split_special_tokens=split)["input_ids"])

    for i, text in enumerate(texts):
        head, _, rest = rest.partition(f"@@{i}@@")
        add(head, False)
        add(text, True)
    add(rest, False)
    return ids


def spells_special_token(tokenizer, text: str) -> bool:
    """Whether a text has words that the tokenizer would take for one of its special tokens."""
    split, whole = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=s)["input_ids"] for s in (True, False)
    )
    return split != whole


def describe(counts: dict[str, int]) -> str:
    return (
        f"{counts['samples']} samples ({counts['cut_prompts']} prompts and {counts['cut_answers']} answers cut to "
        f"the maximal length, {counts['dropped_without_answer']} dropped without an answer)"
    )


@dataclass
class Collator:
    """Pads samples on the right to the longest of the batch; padding is marked by position, never by token id.

    Returns input_ids, attention_mask, labels, each (B, T); with `routing`, also task_ids (B,), a sample's place in
    `tasks` (-1: of a sample of none, which only fills up), and routing_mask (B, T), 1 on the real tokens that the
    gating loss averages over: those after the template's opening (gate_tokens "instruction") or "all".
    """

    routing: bool = False
    gate_tokens: str = "instruction"
    tasks: tuple[str, ...] = TASKS

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        input_ids, attention_mask = pad(ids, left=False)
        labels, _ = pad([sample["labels"] for sample in samples], left=False, value=IGNORED)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.routing:
            skipped = [0 if self.gate_tokens == "all" else sample["opening"] for sample in samples]
            mask = [[0] * skip + [1] * (len(row) - skip) for row, skip in zip(ids, skipped, strict=True)]
            batch["routing_mask"], _ = pad(mask, left=False)
            ids_of_tasks = [self.tasks.index(sample["task"]) if sample["task"] else -1 for sample in samples]
            batch["task_ids"] = torch.tensor(ids_of_tasks)
        return batch
