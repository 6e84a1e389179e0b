"""The router of a mixture's layer: which experts a token is sent to, and with which weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def route(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """router_logits (N, E) fp32 -> top_k_index, top_k_weights (N, K): softmax, its top-k kept and renormalised."""
    top_k_weights, top_k_index = router_logits.softmax(-1).topk(top_k, dim=-1)
    return top_k_index, top_k_weights / top_k_weights.sum(-1, keepdim=True)


class Router(nn.Module):
    """Linear router, without a bias of its own. Its logits and softmax are fp32 whatever the model's dtype.

    The logits it returns are for the gating loss: with `gate_gradient` "all" that loss trains the routers and the
    experts below them, as the paper's sum of losses does; with "router" the routers' own weights and nothing else.
    """

    bias: Tensor | None
    off: Tensor | None

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate_gradient = "all"
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        for name in ("bias", "off"):  # (E,), (E,) bool: models/expert_bias.py's, which no checkpoint has
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> router_logits (N, E), top_k_index (N, K), top_k_weights (N, K)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            router_logits = F.linear(x.to(dtype), self.weight.to(dtype))  # (N, E)
            if self.bias is not None and self.off is not None:
                router_logits = (router_logits + self.bias).masked_fill(self.off, torch.finfo(dtype).min)
            top_k_index, top_k_weights = route(router_logits, self.top_k)
            if self.gate_gradient == "router" and x.requires_grad:
                router_logits = F.linear(x.detach().to(dtype), self.weight.to(dtype))
        return router_logits, top_k_index, top_k_weights


class RowRouter(nn.Module):
    """Sends the first n-th of a batch's rows to the first expert, and so on; it has no logits."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> tuple[None, Tensor, Tensor]:
        """x (N, D) -> None, top_k_index and top_k_weights (N, 1)."""
        index = torch.arange(self.num_experts, device=x.device).repeat_interleave(len(x) // self.num_experts)
        return None, index[:, None], torch.ones(len(x), 1, device=x.device)


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The router logits (N, E) of each layer that runs within it, in order; none of a model without routers."""
    logits: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda _, inputs, output: logits.append(output[0])) for router in routers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()
