"""Answers by a model that runs here: the prompts, the sampling and the end of an answer."""

import torch
from transformers import GenerationConfig

from config import RAW_CHAT, UserError
from data.batching import pad
from data.encoding import Encoder
from data.prompts import STOP_STRING
from data.sources import Record
from models.causal_lm import end_ids
from models.prompt_routing import by_prompt, prompt_mask, routed_by_prompt


def generate(model, tokenizer, batch: list[Record], args, seed: int) -> list[dict]:
    """One answer per record: sampled at --temperature from the whole distribution, or greedy at 0.

    Ends at EOS or before a new "### Instruction:". The same seed and batch give the same answers. args: temperature,
    max_new_tokens, cache_implementation and run, as inference.py's flags have them.
    """
    window = prompt_window(model, args.max_new_tokens)
    encoder = Encoder(tokenizer, window, args.run == RAW_CHAT)
    prompts, openings = [], []
    for record in batch:
        ids = encoder.prompt_ids(record)
        prompt, opening = encoder.shortened(ids, encoder.opening(record), max(len(ids) - window, 0))
        prompts.append(prompt), openings.append(opening)
    answers, ends = [], end_tokens(model, tokenizer, args.run == RAW_CHAT)
    generated = generate_tokens(model, tokenizer, prompts, openings, args, seed)
    for record, tokens in zip(batch, generated, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        ended, tokens = end is not None, tokens[:end]
        text, mark, _ = tokenizer.decode(tokens, skip_special_tokens=True).partition(STOP_STRING)
        answers.append(answer_row(record, text, len(tokens), stopped=ended or bool(mark)))
    return answers


def end_tokens(model, tokenizer, chat: bool) -> list[int]:
    """What ends an answer: EOS, and in the base's own chat format whatever its generation config names beside it (of
    Gemma the end of a turn)."""
    others = model.generation_config.eos_token_id if chat and model.generation_config else None
    return end_ids(tokenizer, others)


def prompt_window(model, max_new_tokens: int) -> int:
    """How many tokens of a prompt fit beside an answer. UserError where that is next to nothing."""
    window = model.config.max_position_embeddings - max_new_tokens
    if window < 32:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: leaves no room for the prompt in the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    return window


@torch.inference_mode()
def generate_tokens(
    model, tokenizer, prompts: list[list[int]], openings: list[int], args, seed: int, streamer=None
) -> list[list[int]]:
    """The tokens after each prompt, with an EOS and what fills up behind it. openings: how many tokens of each prompt
    are the template's opening; streamer: one of transformers', which gets the tokens as they come."""
    ids, mask = pad(prompts, left=True, value=tokenizer.eos_token_id)
    sampling = {"temperature": args.temperature, "top_k": 0, "top_p": 1.0} if args.temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        eos_token_id=end_tokens(model, tokenizer, args.run == RAW_CHAT),
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        stop_strings=[STOP_STRING],
        cache_implementation=args.cache_implementation,
        **sampling,
    )
    if by_prompt(model):
        settings.disable_compile = True  # a static cache's: the choice is made outside of what would be compiled
    length = ids.shape[1]
    starts = [length - len(prompt) + opening for prompt, opening in zip(prompts, openings, strict=True)]
    torch.manual_seed(seed)
    with routed_by_prompt(model, prompt_mask([range(start, length) for start in starts], length)):
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            tokenizer=tokenizer,
            streamer=streamer,
        )
    return generated[:, ids.shape[1] :].tolist()


def answer_row(record: Record, text: str, new_tokens: int | None, stopped: bool) -> dict:
    """A line of outputs.jsonl, but for its generator."""
    return {
        "id": record.id,
        "instruction": record.instruction,
        "input": record.input,
        "output": text.strip(),
        "task": record.task,
        "reference": record.output,
        "new_tokens": new_tokens,
        "finish_reason": "stop" if stopped else "length",
    }


def answered_record(row: dict) -> Record:
    """The record of a line of outputs.jsonl, with the answer that was given."""
    return Record(row["id"], row["task"], row["instruction"], row["input"], row["output"])
