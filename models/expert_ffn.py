"""The shared-base mixture of experts: one frozen FFN, E low-rank experts, one pass through each base matrix.

Every expert i is the same gated FFN plus LoRA deltas s_i B_i A_i. For one token x with routing weights w_i
(zero for the experts not selected) and the base's activation a, SiLU or GELU in its tanh form:

    g_i = W_g x + s_i B_i^g A_i^g x         W_g x and W_u x do not depend on i: computed once
    u_i = W_u x + s_i B_i^u A_i^u x
    h_i = a(g_i) * u_i
    y   = W_d (sum_i w_i h_i) + sum_i w_i s_i B_i^d A_i^d h_i        W_d is linear: applied once

which is exactly the mixture of the E dense merged FFNs, at the three base products of one of them. A token has K slots,
one per selected expert. The A and B of all experts lie side by side in one matrix each; a slot's A x is zero in the
columns of every expert but its own, so that one product serves all tokens, whoever they chose, and shapes are static.
Plain autograd would keep g_i, u_i, a(g_i) and h_i of every slot; the backward below keeps W_g x and W_u x and
computes the rest again.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models import four_bit

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
aten = torch.ops.aten


class Activation(NamedTuple):
    """value: a(x); value_: the same in place; times_slope: (gradient, x) -> gradient a'(x)."""

    value: Callable[[torch.Tensor], torch.Tensor]
    value_: Callable[[torch.Tensor], torch.Tensor]
    times_slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


Bias = torch.Tensor | None
BaseWeights = tuple[torch.Tensor, Bias, torch.Tensor, Bias, torch.Tensor, Bias]  # of gate, up and down

# By the names that transformers' configurations have for them
ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_, aten.silu_backward),
    "gelu_pytorch_tanh": Activation(
        *(partial(function, approximate="tanh") for function in (F.gelu, aten.gelu_, aten.gelu_backward))
    ),
}


class SharedBaseFFN(torch.autograd.Function):
    """y (N, D) of the identity above, and its gradients for x, the routing weights and the experts' matrices.

    x (N, D); top_k_weights (N, K) fp32, each row summing to 1; own (K, N, E R): 1 in the columns of the slot's expert,
    else 0 (in training with dropout some of the 1 are 0, the others 1 / (1 - p)); base = (W_g (F, D), b_g, W_u, b_u,
    W_d (D, F), b_d), biases or None, all frozen; of all experts side by side a_in = s A of gate, then of up (2 E R, D),
    b_gate and b_up = B^T (E R, F), a_down = A (E R, F), b_down = s B^T (E R, D); activation: a key of ACTIVATIONS. All
    but top_k_weights are in one dtype, which all runs in, as in a dense FFN.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        top_k_weights: torch.Tensor,
        own: torch.Tensor,
        base: BaseWeights,
        a_in: torch.Tensor,
        b_gate: torch.Tensor,
        b_up: torch.Tensor,
        a_down: torch.Tensor,
        b_down: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        weight_gate, bias_gate, weight_up, bias_up, weight_down, bias_down = base
        gate = F.linear(x, weight_gate, bias_gate)  # (N, F)
        up = F.linear(x, weight_up, bias_up)  # (N, F)
        matrices = a_in, b_gate, b_up, a_down
        ax_gate, ax_up, hidden, ah = _slots(x, gate, up, top_k_weights, own, *matrices, activation)
        y = F.linear(_mix(hidden, top_k_weights), weight_down, bias_down).addmm_(ah, b_down)
        ctx.activation = activation
        ctx.save_for_backward(
            x,
            top_k_weights,
            own,
            gate,
            up,
            ax_gate,
            ax_up,
            ah,
            weight_gate,
            weight_up,
            weight_down,
            a_in,
            b_gate,
            b_up,
            a_down,
            b_down,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (
            x,
            top_k_weights,
            own,
            gate,
            up,
            ax_gate,
            ax_up,
            ah,
            weight_gate,
            weight_up,
            weight_down,
            a_in,
            b_gate,
            b_up,
            a_down,
            b_down,
        ) = ctx.saved_tensors
        weights = _per_slot(top_k_weights, x.dtype)
        gate = (ax_gate @ b_gate).add_(gate)  # g_i (K, N, F)
        up = (ax_up @ b_up).add_(up)
        activation = ACTIVATIONS[ctx.activation]
        activated = activation.value(gate)
        hidden = activated * up
        grad_ah = grad_y @ b_down.T * own  # (K, N, E R)
        grad_hidden = (grad_ah @ a_down).add_(grad_y @ weight_down)  # dh_i / w_i: the one product with W_d
        needs_experts = any(ctx.needs_input_grad[4:9])
        grad_a_down = _over_tokens(grad_ah * weights, hidden) if needs_experts else None
        grad_weights = hidden.mul_(grad_hidden).sum(-1).T.to(top_k_weights.dtype)
        grad_up = activated.mul_(grad_hidden)  # du_i / w_i, as grad_gate is dg_i / w_i
        grad_gate = activation.times_slope(grad_hidden.mul_(up), gate)
        shares = own * weights
        grad_ax = torch.cat([_sum_slots(grad_gate @ b_gate.T * shares), _sum_slots(grad_up @ b_up.T * shares)], dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _mix(grad_gate, top_k_weights) @ weight_gate
            grad_x.addmm_(_mix(grad_up, top_k_weights), weight_up).addmm_(grad_ax, a_in)
        if not needs_experts:
            return grad_x, grad_weights, *[None] * 8
        grad_b_gate, grad_b_up = _over_tokens(ax_gate * weights, grad_gate), _over_tokens(ax_up * weights, grad_up)
        grad_experts = grad_ax.T @ x, grad_b_gate, grad_b_up, grad_a_down, ah.T @ grad_y
        return grad_x, grad_weights, None, None, *grad_experts, None


def _slots(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    top_k_weights: torch.Tensor,
    own: torch.Tensor,
    a_in: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    a_down: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A x of gate and of up (K, N, E R), h_i (K, N, F), and w_i A_i^d h_i of all experts (N, E R)."""
    ax_gate, ax_up = (ax * own for ax in (x @ a_in.T).chunk(2, dim=1))
    hidden = ACTIVATIONS[activation].value_((ax_gate @ b_gate).add_(gate))
    hidden.mul_((ax_up @ b_up).add_(up))
    return ax_gate, ax_up, hidden, _sum_slots(hidden @ a_down.T * (own * _per_slot(top_k_weights, x.dtype)))


def _per_slot(top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) -> (K, N, 1)."""
    return top_k_weights.T[:, :, None].to(dtype)


def _sum_slots(parts: torch.Tensor) -> torch.Tensor:
    """(K, N, ...) -> (N, ...). Much faster on a CPU than sum(0)."""
    return reduce(torch.add, parts)


def _mix(parts: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i part_i, as a running mean: (K, N, F), (N, K) with rows summing to 1 -> (N, F)."""
    shares = _per_slot(top_k_weights / top_k_weights.cumsum(-1), parts.dtype)
    mixed = parts[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        mixed = torch.lerp(mixed, part, share)
    return mixed


def _over_tokens(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(K, N, P), (K, N, Q) -> (P, Q)."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


class LowRankExperts(nn.Module):
    """The LoRA deltas of E experts on the three FFN projections of one layer.

    For projection p: `{p}_A` (E, R, in) and `{p}_B` (E, R, out), which is B transposed: the experts' B then lie side by
    side in memory. `scaling` (3, E), a float64 buffer: alpha / r or alpha / sqrt(r) of each expert and projection; None
    where it is multiplied into the matrices.
    R is the largest rank: a smaller expert's matrices end in zeros, which get zero gradients (each of A and B
    multiplies the other's) and so stay zero.
    """

    gate_proj_A: torch.Tensor
    up_proj_A: torch.Tensor
    down_proj_A: torch.Tensor
    gate_proj_B: torch.Tensor
    up_proj_B: torch.Tensor
    down_proj_B: torch.Tensor
    scaling: torch.Tensor

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, rank: int, activation: str = "silu"):
        super().__init__()
        self.activation = activation  # of the base: a key of ACTIVATIONS
        self.dropout = 0.0  # in training: how often a token's A x loses one of its R numbers, the same in all three
        for projection in PROJECTIONS:
            sizes = (hidden_size, intermediate_size)
            size_in, size_out = sizes if projection != "down_proj" else sizes[::-1]
            self.register_parameter(f"{projection}_A", nn.Parameter(torch.zeros(num_experts, rank, size_in)))
            self.register_parameter(f"{projection}_B", nn.Parameter(torch.zeros(num_experts, rank, size_out)))
        self.register_buffer("scaling", torch.ones(len(PROJECTIONS), num_experts, dtype=torch.float64))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LowRankExperts":
        """As nn.Module has it; on a device without float64 (MPS) the scalings are fp32."""
        scaling = self._buffers.pop("scaling")
        super()._apply(fn, recurse)
        if scaling is not None:
            try:
                scaling = fn(scaling)
            except TypeError:
                scaling = fn(scaling.float())
        self._buffers["scaling"] = scaling
        return self

    def masters(self) -> "LowRankExperts":
        """Itself with fp32 matrices, as they are trained, whatever dtype the model around them has."""
        scaling = self.scaling.double()
        self.float().scaling = scaling
        return self

    def fold_scaling(self, dtype: torch.dtype) -> None:
        """For inference: multiply the scalings in and round the matrices to `dtype`, once and not at each call."""
        with torch.no_grad():
            for projection, scaling in zip(PROJECTIONS, self.scaling.float(), strict=True):
                side = "B" if projection == "down_proj" else "A"  # as in side_by_side
                self.get_parameter(f"{projection}_{side}").mul_(scaling[:, None, None])
        self.to(dtype).scaling = torch.ones_like(self.scaling, dtype=torch.float64)

    def matrices(self, projection: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A (E, R, in), B (E, out, R)) of one projection, B a view of its parameter."""
        return self.get_parameter(f"{projection}_A"), self.get_parameter(f"{projection}_B").mT

    def merged(self, expert: int, projection: str, base_weight: torch.Tensor) -> torch.Tensor:
        """W + s_i B_i A_i of one projection, (out, in), in the dtype of the expert."""
        a, b = self.matrices(projection)
        scaling = self.scaling[PROJECTIONS.index(projection), expert].item()
        return torch.addmm(base_weight.to(a.dtype), b[expert], a[expert], alpha=scaling)

    def side_by_side(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The low-rank operands of SharedBaseFFN: each matrix of all experts as one, the scalings in those that meet
        x and y, which are the smaller ones."""
        scales: Any = (1, 1, 1)
        if self.scaling is not None:
            scales = self.scaling.to(self.gate_proj_A.dtype)[:, :, None, None]
        a_in = torch.stack((self.gate_proj_A * scales[0], self.up_proj_A * scales[1])).flatten(0, 1)
        matrices = a_in, self.gate_proj_B, self.up_proj_B, self.down_proj_A, self.down_proj_B * scales[2]
        return [matrix.flatten(0, 1).to(dtype) for matrix in matrices]

    def own_columns(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """top_k_index (N, K) -> (K, N, E R), which columns of what stands side by side are the slot's expert's."""
        num_experts, rank = self.gate_proj_A.shape[:2]
        expert_of_column = torch.arange(num_experts, device=top_k_index.device).repeat_interleave(rank)
        return top_k_index.T.contiguous()[:, :, None] == expert_of_column  # in memory slot by slot, as products like it

    def forward(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
    ) -> torch.Tensor:
        """x (N, D), top_k_index and top_k_weights (N, K), the three base nn.Linear -> (N, D)."""
        linears = gate_proj, up_proj, down_proj
        frozen = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in frozen):
            raise ValueError("the base FFN of the mixture must be frozen: no gradient is formed for its weights")
        device_type = x.device.type
        drops = self.training and self.dropout > 0
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device_type) or drops):
            return self.without_gradient(x, top_k_index, top_k_weights, gate_proj, up_proj, down_proj)
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        weights = [four_bit.dense_weight(linear).to(x.dtype) for linear in linears]
        biases = [linear.bias if linear.bias is None else linear.bias.to(x.dtype) for linear in linears]
        base = tuple(chain.from_iterable(zip(weights, biases, strict=True)))
        with torch.autocast(device_type, enabled=False):
            own = F.dropout(self.own_columns(top_k_index).to(x.dtype), self.dropout, self.training)
            operands = x, top_k_weights, own, base, *self.side_by_side(x.dtype), self.activation
            with four_bit.dequantised_again(linears, weights):
                return SharedBaseFFN.apply(*operands)

    def without_gradient(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
    ) -> torch.Tensor:
        """As `forward`. The base's linear layers are called, whatever an engine has put in their place."""
        a_in, b_gate, b_up, a_down, b_down = self.side_by_side(x.dtype)
        own = self.own_columns(top_k_index).to(x.dtype)
        matrices = a_in, b_gate, b_up, a_down
        *_, hidden, ah = _slots(x, gate_proj(x), up_proj(x), top_k_weights, own, *matrices, self.activation)
        return down_proj(_mix(hidden, top_k_weights)).addmm_(ah, b_down)
