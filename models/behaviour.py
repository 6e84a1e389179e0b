"""What a model says along fixed prompts, to tell whether two forms of one model are the same function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from config import UserError
from data.prompts import render_prompt

INSTRUCTIONS = (
    "Name three birds.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about rain.",
    "Is it safe to mix bleach and vinegar?",
    "Who wrote Hamlet?",
    "Explain what a router does.",
    "Count to ten.",
)
NEW_TOKENS = 16
# Allowed difference of the logits from ours, both computed in fp32. float32: the largest of all. Half precision
# rounds the merged weights: relative to the norm, median of the prompts, since rounding may turn a router's choice.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass
class Behaviour:
    """What a model says of P texts: `texts`, each its prompt's tokens and NEW_TOKENS more, and the logits (P, T, V),
    fp32, from which each of those T = NEW_TOKENS follows."""

    texts: list[list[int]]
    logits: Tensor


def tokenized(tokenizer) -> list[list[int]]:
    """The tokens of the prompts that a model is asked."""
    return [tokenizer(render_prompt(text))["input_ids"] for text in INSTRUCTIONS]


@torch.inference_mode()
def greedy_texts(model, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt with NEW_TOKENS of the model's greedy continuation, one prompt at a time."""
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        texts.append(answer[0].tolist())
    return texts


@torch.inference_mode()
def behaviour(model, texts: list[list[int]]) -> Behaviour:
    """The model's logits along given texts. All models see the same tokens: one token that two models choose otherwise,
    for a tie, does not make all that follows differ."""
    logits = [model(input_ids=torch.tensor([text])).logits[0, -NEW_TOKENS - 1 : -1].float() for text in texts]
    return Behaviour(texts, torch.stack(logits))


def compare(ours: Behaviour, theirs: Behaviour, dtype: str) -> str:
    """One line that says how close the export is; UserError if it is not close enough for the dtype it is kept in.

    In float32 also each greedy token must be ours, where our two largest logits differ by more than the two errors that
    the tolerance allows. Of half precision, whose error has no largest value, the share is only told.
    """
    difference = theirs.logits - ours.logits  # (P, T, V)
    largest = ours.logits.topk(2).values  # (P, T, 2)
    if dtype == "float32":
        size, measure = difference.abs().max(), "at most"
        decided = largest[..., 0] - largest[..., 1] > 2 * TOLERANCES[dtype]  # (P, T)
    else:
        size = (difference.norm(dim=(1, 2)) / ours.logits.norm(dim=(1, 2))).median()
        measure, decided = "relative, median of the prompts:", torch.ones_like(largest[..., 0], dtype=torch.bool)
    same = int((theirs.logits.argmax(-1) == ours.logits.argmax(-1))[decided].sum())
    summary = (
        f"logits differ by {measure} {size:.1e} in fp32, {same} of {int(decided.sum())} greedy tokens are the same"
    )
    if not size <= TOLERANCES[dtype] or (dtype == "float32" and same < decided.sum()):
        needed = f"{TOLERANCES[dtype]:.0e}" + (" and every token" if dtype == "float32" else "")
        raise UserError(f"the export is not the model, and was not kept: {summary}; needed: {needed}")
    return f"verified: {summary}"
