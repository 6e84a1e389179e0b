"""Routing by prompt: each router chooses its experts once per sample, where the paper's chooses for every token.

A fusion made with `llama_moe.py --routing prompt` says so in its configuration. Whoever runs it says where its prompts
stand, within `routed_by_prompt`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.router import Router, route


def by_prompt(model: nn.Module) -> bool:
    """Whether a model is a fusion that is routed by prompt."""
    mixture = getattr(model, "mixture", None)
    return mixture is not None and mixture.routing == "prompt"


def prompt_mask(prompts: Sequence[range], length: int) -> Tensor:
    """(B, T) bool: where each row's prompt stands, in rows of `length` tokens."""
    columns = torch.arange(length)
    return torch.stack([(columns >= prompt.start) & (columns < prompt.stop) for prompt in prompts])


@contextmanager
def routed_by_prompt(model: nn.Module, of_prompt: Tensor) -> Iterator[None]:
    """Within it each router of a model that is routed by prompt chooses by the mean of its logits over the positions
    `of_prompt` (B, T); of a row without any, which only fills up a step, the logits are 0. Without gradients the first
    pass chooses for the later ones too, which are the tokens of an answer, one by one. Any other model is left as it
    is."""
    logits_of: dict[Router, Tensor] = {}

    def choose(router: Router, _, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        per_token = output[0].unflatten(0, (len(of_prompt), -1))  # (B, T, E)
        if torch.is_grad_enabled() or router not in logits_of:
            counted = of_prompt.to(per_token.device)[..., None]  # (B, T, 1)
            total = per_token.where(counted, 0).sum(1, keepdim=True)
            mean = total / counted.sum(1, keepdim=True).clamp(min=1)
            logits_of[router] = mean.clamp(min=torch.finfo(mean.dtype).min)  # of an expert that is off
        logits = logits_of[router].expand_as(per_token).flatten(0, 1)  # (N, E)
        return logits, *route(logits, router.top_k)

    routers = [module for module in model.modules() if isinstance(module, Router)] if by_prompt(model) else []
    hooks = [router.register_forward_hook(choose) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
