"""The shared-base mixture of experts: one frozen FFN, E low-rank experts, one pass through each base matrix.

Every expert i is the same Llama FFN plus LoRA deltas s_i B_i A_i. For one token x with routing weights w_i
(zero for the experts not selected):

    g_i = W_g x + s_i B_i^g A_i^g x         W_g x and W_u x do not depend on i: computed once
    u_i = W_u x + s_i B_i^u A_i^u x
    h_i = silu(g_i) * u_i
    y   = W_d (sum_i w_i h_i) + sum_i w_i s_i B_i^d A_i^d h_i        W_d is linear: applied once

which is exactly the mixture of the E dense merged FFNs, at the three base products of one of them. A token has K slots,
one per selected expert. The A and B of all experts lie side by side in one matrix each; a slot's A x is zero in the
columns of every expert but its own, so that one product serves all tokens, whoever they chose, and shapes are static.
Plain autograd would keep g_i, u_i, silu(g_i) and h_i of every slot; the backward below keeps W_g x and W_u x and
computes the rest again.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SharedBaseFFN(torch.autograd.Function):
    """y (N, D) of the identity above, and its gradients for x, the routing weights and the experts.

    x (N, D); top_k_index (N, K) distinct experts of each token and top_k_weights (N, K) fp32, each row summing to 1;
    base = (W_g (F, D), b_g, W_u, b_u, W_d (D, F), b_d), biases or None, all frozen; per projection A (E, R, in) and
    B (E, out, R) in any dtype; scaling (3, E). All runs in the dtype of x, as in a dense FFN.
    """

    @staticmethod
    def forward(ctx, x, top_k_index, top_k_weights, scaling, base, *matrices):
        weight_gate, bias_gate, weight_up, bias_up, weight_down, bias_down = base
        a_in, b_gate, b_up, a_down, b_down = _side_by_side(x.dtype, scaling, *matrices)
        own, weights = _slots(x.dtype, top_k_index, top_k_weights, matrices[0].shape)
        gate = F.linear(x, weight_gate, bias_gate)  # (N, F)
        up = F.linear(x, weight_up, bias_up)  # (N, F)
        ax_gate, ax_up = (x @ a_in.T).view(len(x), 2, 1, -1).permute(1, 2, 0, 3) * own  # each (K, N, E R)
        hidden = F.silu((ax_gate @ b_gate).add_(gate), inplace=True)  # (K, N, F)
        hidden.mul_((ax_up @ b_up).add_(up)).mul_(weights)  # w_i h_i
        ah = _sum_slots(hidden @ a_down.T * own)  # w_i A_i^d h_i of all experts (N, E R)
        y = F.linear(_sum_slots(hidden), weight_down, bias_down).addmm_(ah, b_down)
        ctx.save_for_backward(x, top_k_index, top_k_weights, scaling, gate, up, ax_gate, ax_up, ah,
                              weight_gate, weight_up, weight_down, *matrices)  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x, top_k_index, top_k_weights, scaling, gate, up, ax_gate, ax_up, ah,
         weight_gate, weight_up, weight_down, *matrices) = ctx.saved_tensors  # fmt: skip
        a_in, b_gate, b_up, a_down, b_down = _side_by_side(x.dtype, scaling, *matrices)
        own, weights = _slots(x.dtype, top_k_index, top_k_weights, matrices[0].shape)
        gate = (ax_gate @ b_gate).add_(gate)  # g_i (K, N, F)
        up = (ax_up @ b_up).add_(up)
        silu = F.silu(gate)
        hidden = silu * up
        grad_ah = grad_y @ b_down.T * own  # (K, N, E R)
        grad_hidden = (grad_ah @ a_down).add_(grad_y @ weight_down)  # dh_i / w_i: the one product with W_d
        needs_experts = any(ctx.needs_input_grad[5:])
        if needs_experts:
            grad_a_down = _over_tokens(grad_ah * weights, hidden)
        grad_weights = hidden.mul_(grad_hidden).sum(-1, dtype=top_k_weights.dtype).T
        grad_hidden.mul_(weights)
        grad_up = silu.mul_(grad_hidden)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
        grad_ax = torch.cat([_sum_slots(grad_gate @ b_gate.T * own), _sum_slots(grad_up @ b_up.T * own)], dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (_sum_slots(grad_gate) @ weight_gate).addmm_(_sum_slots(grad_up), weight_up).addmm_(grad_ax, a_in)
        if not needs_experts:
            return grad_x, None, grad_weights, *[None] * 8
        grad_a_gate, grad_a_up = (grad_ax.T @ x).chunk(2)
        grads = (grad_a_gate, _over_tokens(ax_gate, grad_gate), grad_a_up, _over_tokens(ax_up, grad_up),
                 grad_a_down, ah.T @ grad_y)  # fmt: skip
        return grad_x, None, grad_weights, None, None, *_per_expert(grads, scaling, matrices)


def _side_by_side(dtype, scaling, a_gate, b_gate, a_up, b_up, a_down, b_down):
    """All experts' A of gate and up (2 E R, D); s B^T of gate, of up (E R, F); A of down (E R, F), s B^T of down
    (E R, D)."""

    def scaled(b, scale):
        return (b * scale.to(b.dtype)[:, None, None]).to(dtype).mT.flatten(0, 1)

    a_in = torch.stack((a_gate, a_up)).flatten(0, 2).to(dtype)
    a_down = a_down.flatten(0, 1).to(dtype)
    return a_in, scaled(b_gate, scaling[0]), scaled(b_up, scaling[1]), a_down, scaled(b_down, scaling[2])


def _per_expert(grads, scaling, matrices):
    """The gradients of what stood side by side, (E R, in or out), as those of A (E, R, in) and B (E, out, R)."""
    for i, (grad, matrix) in enumerate(zip(grads, matrices, strict=True)):
        num_experts = len(matrix)
        grad = grad.unflatten(0, (num_experts, -1)).to(matrix.dtype)
        yield grad if i % 2 == 0 else grad.mT * scaling[i // 2].to(matrix.dtype)[:, None, None]


def _slots(dtype, top_k_index, top_k_weights, shape):
    """(K, N, E R) 1 in the columns of the slot's own expert, else 0; (K, N, 1) routing weights."""
    num_experts, rank = shape[:2]
    expert_of_column = torch.arange(num_experts, device=top_k_index.device).repeat_interleave(rank)
    own = top_k_index.T[:, :, None] == expert_of_column
    return own.to(dtype), top_k_weights.T[:, :, None].to(dtype)


def _sum_slots(parts):
    """(K, N, ...) -> (N, ...). Much faster on a CPU than sum(0)."""
    return reduce(torch.add, parts)


def _over_tokens(left, right):
    """(K, N, P), (K, N, Q) -> (P, Q)."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


class LowRankExperts(nn.Module):
    """The LoRA deltas of E experts on the three FFN projections of one layer.

    For projection p: `{p}_A` (E, R, in), `{p}_B` (E, out, R); `scaling` (3, E), a float64 buffer: alpha / r or
    alpha / sqrt(r) of each expert and projection. R is the largest rank: a smaller expert's matrices end in zeros,
    which get zero gradients (each of A and B multiplies the other's) and so stay zero.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, rank: int):
        super().__init__()
        for projection in PROJECTIONS:
            sizes = (hidden_size, intermediate_size)
            size_in, size_out = sizes if projection != "down_proj" else sizes[::-1]
            self.register_parameter(f"{projection}_A", nn.Parameter(torch.zeros(num_experts, rank, size_in)))
            self.register_parameter(f"{projection}_B", nn.Parameter(torch.zeros(num_experts, size_out, rank)))
        self.register_buffer("scaling", torch.ones(len(PROJECTIONS), num_experts, dtype=torch.float64))

    def masters(self) -> "LowRankExperts":
        """Itself with fp32 matrices, as they are trained, whatever dtype the model around them has."""
        scaling = self.scaling.double()
        self.float().scaling = scaling
        return self

    def matrices(self, projection: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(A (E, R, in), B (E, out, R)) of one projection."""
        return self.get_parameter(f"{projection}_A"), self.get_parameter(f"{projection}_B")

    def merged(self, expert: int, projection: str, base_weight: torch.Tensor) -> torch.Tensor:
        """W + s_i B_i A_i of one projection, (out, in), in the dtype of the expert."""
        a, b = self.matrices(projection)
        scaling = self.scaling[PROJECTIONS.index(projection), expert].item()
        return torch.addmm(base_weight.to(a.dtype), b[expert], a[expert], alpha=scaling)

    def forward(self, x, top_k_index, top_k_weights, gate_proj, up_proj, down_proj):
        """x (N, D), top_k_index and top_k_weights (N, K), the three base nn.Linear -> (N, D)."""
        base = (gate_proj.weight, gate_proj.bias, up_proj.weight, up_proj.bias, down_proj.weight, down_proj.bias)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in base):
            raise ValueError("the base FFN of the mixture must be frozen: no gradient is formed for its weights")
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x, base = x.to(dtype), tuple(tensor if tensor is None else tensor.to(dtype) for tensor in base)
        with torch.autocast(device_type, enabled=False):
            matrices = [matrix for projection in PROJECTIONS for matrix in self.matrices(projection)]
            return SharedBaseFFN.apply(x, top_k_index, top_k_weights, self.scaling, base, *matrices)
