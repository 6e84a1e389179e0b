"""The released code's moe.pt: a torch state dict in which every expert is a dense copy of the FFN.

Its keys are Llama's, but for the FFN of layer N, which is mlp.gate.weight (E, D), the router, and
mlp.experts.E.{gate,up,down}_proj.weight. Written by its models/llama_moe.py
(https://github.com/sftekin/h3fusion); such a file is offered there for download.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from config import UserError
from models import base
from models.expert_ffn import PROJECTIONS


def router_key(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def expert_key(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


class RecoveredExpert:
    """An expert recovered from a dense copy as base + low rank; `fuse` takes it like an adapter's `Expert`."""

    dtype = torch.float32

    def __init__(self, name: str, base_model: str, tasks: tuple[str, ...]):
        self.name, self.base_model = name, base_model
        self.task = name if name in tasks else None
        self.rank, self.residual, self.rounding = 1, 0.0, 0.0
        self.matrices: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, projection: str, dense: Tensor, base_weight: Tensor, max_rank: int) -> float:
        """Take dense - base of one module apart, in the dtype of `dense`; returns what is left, relative to dense.

        Keeps the largest rank, the largest such residual and the coarsest rounding of a dtype.
        """
        a, b, residual = low_rank_difference(dense, base_weight.to(dense.dtype), max_rank)
        self.matrices[layer, projection] = a, b
        self.rank, self.residual = max(self.rank, len(a)), max(self.residual, residual)
        self.rounding = max(self.rounding, torch.finfo(dense.dtype).eps)
        return residual

    def delta(self, layer: int, projection: str) -> tuple[Tensor, Tensor, float]:
        """(A (r, in), B (out, r), scaling) of one module; the scaling is within A and B."""
        return *self.matrices[layer, projection], 1.0


def low_rank_difference(dense: Tensor, base_weight: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """dense = base + B A by a truncated SVD: A (r, in), B (out, r) fp32, and ||dense - base - B A|| / ||dense||.

    Kept are the singular values, at most `max_rank`, that stand out of the rounding of `dense` to its dtype: errors
    of standard deviation s in an (m, n) matrix have none above s (sqrt(m) + sqrt(n)). One rounding of a weight w errs
    by 0.2 eps |w| on average over all w; a merge rounds its product, in an order that the processor chooses, and its
    sum, which came to 0.5 eps rms(w) where the change is larger than the base. Taken is twice that: s = eps rms(w).
    """
    delta = dense.double() - base_weight.double()
    left, values, right = torch.svd_lowrank(delta, q=min(max_rank + 8, *delta.shape), niter=4)
    size = dense.double().norm()
    edge = torch.finfo(dense.dtype).eps * size / math.sqrt(dense.numel()) * sum(map(math.sqrt, dense.shape))
    rank = min(int((values > edge).sum()), max_rank)
    root = values[:rank].sqrt()
    a, b = (right[:, :rank] * root).T.float(), (left[:, :rank] * root).float()
    residual = (delta - b.double() @ a.double()).norm() / size
    return a.contiguous(), b.contiguous(), float(residual)


def read_moe_pt(
    path: Path, base_model: str, base_config: PreTrainedConfig, names: list[str], tasks: tuple[str, ...], max_rank: int
) -> tuple[list[RecoveredExpert], list[Tensor]]:
    """The experts of a moe.pt, as low-rank deltas on `base_model`, and each layer's router (E, D), fp32.

    Each tensor counts in its own dtype, to which the base's is rounded. UserError if the file is no moe.pt of this
    base, or if an expert is not base + low rank: if its residual is above its dtype's eps, relative to its weights.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        num_experts = len(saved[router_key(0)])
        odd = [name for name, tensor in saved.items() if not tensor.is_floating_point()]
        odd += [name for name, tensor in saved.items() if not odd and not tensor.isfinite().all()]
    except Exception as error:  # a damaged file, or one of something else, fails in as many ways as there are
        raise UserError(f"--from_pt {path}: no moe.pt of the released code ({type(error).__name__})") from error
    if odd:
        raise UserError(f"--from_pt {path}: {odd[0]} holds what is no finite number")
    if num_experts != len(names):
        raise UserError(f"--experts {','.join(names)}: {path} holds {num_experts} experts; name them in its order")
    weights = base.load_base(base_model, base.own_dtype(base_config)).state_dict()
    check_base(path, saved, weights, num_experts, base_model)
    experts = [RecoveredExpert(name, base_model, tasks) for name in names]
    for layer in range(base_config.num_hidden_layers):
        for (number, expert), projection in ((e, p) for e in enumerate(experts) for p in PROJECTIONS):
            dense = saved[expert_key(layer, number, projection)]
            base_weight = weights[f"model.layers.{layer}.mlp.{projection}.weight"]
            residual = expert.add(layer, projection, dense, base_weight, max_rank)
            if residual > (eps := torch.finfo(dense.dtype).eps):
                raise UserError(
                    f"{path}: expert {expert.name} is not {base_model} + rank {max_rank}: what is left of {projection} "
                    f"in layer {layer} is {residual:.1e} of it (rounding to {dense.dtype}: {eps:.1e}). The released "
                    "code fuses onto Llama-2-7b-chat-hf; give the right --base_model, or a larger --max_rank"
                )
    for expert in experts:
        print(
            f"{expert.name}: rank {expert.rank} recovered, residual {expert.residual:.1e} of the weights "
            f"(rounding to the file's dtype: {expert.rounding:.1e})"
        )
    if same_experts(saved, base_config.num_hidden_layers, num_experts):
        print(
            "warning: all experts in the file are equal, as the released fusion makes them (it adds every delta to "
            "one shared tensor): the router has nothing to choose between"
        )
    return experts, [saved[router_key(layer)].float() for layer in range(base_config.num_hidden_layers)]


def check_base(path: Path, saved: dict, weights: dict, num_experts: int, base_model: str) -> None:
    """UserError unless the file is the base with its FFNs copied: the same keys and shapes, all other weights equal."""
    ffn = {name: weight for name, weight in weights.items() if ".mlp." in name}
    expected = {name: weight.shape for name, weight in weights.items() if name not in ffn}
    for name, weight in ffn.items():
        layer, projection = int(name.split(".")[2]), name.split(".")[4]
        expected.update({expert_key(layer, expert, projection): weight.shape for expert in range(num_experts)})
        expected[router_key(layer)] = (num_experts, len(weights["model.norm.weight"]))
    for name in sorted(set(expected) ^ set(saved)):
        raise UserError(
            f"{path}: does not fit {base_model}: {name} is {'missing' if name in expected else 'not its'}; "
            "give the --base_model it was fused onto"
        )
    for name, shape in expected.items():
        if saved[name].shape != tuple(shape):
            raise UserError(f"{path}: {name} is {tuple(saved[name].shape)}, {base_model} needs {tuple(shape)}")
        if name not in weights:
            continue
        dtype = saved[name].dtype
        if not torch.allclose(saved[name], weights[name].to(dtype), rtol=torch.finfo(dtype).eps):
            raise UserError(
                f"{path}: {name} is not {base_model}'s, but only the FFNs may differ from the base; "
                "give the --base_model it was fused onto"
            )


def same_experts(saved: dict, num_layers: int, num_experts: int) -> bool:
    """Whether every expert's weights are those of the first."""
    return all(
        torch.equal(saved[expert_key(layer, 0, projection)], saved[expert_key(layer, expert, projection)])
        for layer in range(num_layers)
        for projection in PROJECTIONS
        for expert in range(1, num_experts)
    )
