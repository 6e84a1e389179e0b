"""The auxiliary losses of the fusion, as pure functions: L = L_SFT + lambda * L_gate + sum_i gamma_i * drift_i."""

import torch
from torch import Tensor


def mean_routing_probs(router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Routing probabilities of each sample, averaged over layers and over its masked-in tokens.

    router_logits: one (B*T, E) per layer, fp32; mask (B, T), 1 on the tokens that count. Returns (B, E).
    """
    probs = torch.stack([logits.softmax(-1) for logits in router_logits]).mean(0)  # (B*T, E)
    probs = probs.view(*mask.shape, -1)  # (B, T, E)
    weights = mask.to(probs.dtype)[:, :, None]
    return (probs * weights).sum(1) / weights.sum(1)


def gate_loss(routing_probs: Tensor, expert_of_sample: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    """L_gate = mean over samples of -w log q[expert of the sample's task].

    routing_probs (B, E), expert_of_sample (B,), sample_weights w (B,) (default 1 each: the plain mean).
    """
    losses = -routing_probs.gather(1, expert_of_sample[:, None]).squeeze(1).log()
    return (losses if sample_weights is None else losses * sample_weights).mean()


def routing_hits(routing_probs: Tensor, expert_of_sample: Tensor) -> Tensor:
    """(B,) bool: the sample's mean routing probability is highest for its own task's expert."""
    return routing_probs.argmax(1) == expert_of_sample


def low_rank_change(a: Tensor, b: Tensor, a_start: Tensor, b_start: Tensor, scaling: Tensor) -> Tensor:
    """|| s (B A - B0 A0) ||_F of each expert, (E,), without forming a weight.

    a, a_start (E, R, in); b, b_start (E, out, R); scaling (E,). With dB = B - B0 and dA = A - A0 the change is
    [dB, B0] [A; dA], and ||P Q||_F^2 = sum (P^T P) o (Q Q^T): two 2R x 2R Gram matrices. Every term carries a
    difference, so it is exactly 0, with gradient 0, where nothing has changed, and loses no digits nearby.
    """
    left = torch.cat((b - b_start, b_start), dim=2)  # (E, out, 2R)
    right = torch.cat((a, a - a_start), dim=1)  # (E, 2R, in)
    squared = ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp(min=0)
    changed = squared > 0
    norm = torch.where(changed, squared, 1).sqrt()  # sqrt has no gradient at 0: keep it away from there
    return scaling.abs().to(norm.dtype) * torch.where(changed, norm, 0)
