"""One more expert for a fused model that is aligned already: the others stay as they are, and so does the routing
among them. Its router row is what its task's prompts have for themselves (models/prototypes.py)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from data.encoding import Encoder
from models.adapters import Expert
from models.expert_ffn import PROJECTIONS, LowRankExperts
from models.mixture import MixtureForCausalLM, put_delta
from models.prototypes import OWN_LOGIT, mean_states, task_prompts, without_common


def fit_row(
    model: MixtureForCausalLM, encoder: Encoder, tasks: list[str], source: str, num_prompts: int, seed: int
) -> Tensor:
    """The routers' rows (L, D) of an expert for the last of `tasks`, beside a fused model's own for the others.

    In the fused model, as a router sees it: the mean state of the new task's prompts less that of all tasks', scaled so
    that it has OWN_LOGIT more than the likeliest of the other experts there.
    """
    states = torch.stack([mean_states(model, encoder, task_prompts(t, source, num_prompts, seed)) for t in tasks])
    directions = without_common(states - states.mean(0), states)[-1]  # (L, D)
    own = states[-1]  # (L, D)
    others = torch.stack([block.router.weight.float().cpu() for block in model.blocks])  # (L, E, D)
    best = (others @ own[:, :, None]).amax((1, 2)).clamp(min=0)  # (L,)
    return directions * ((best + OWN_LOGIT) / (directions * own).sum(-1))[:, None]


@torch.no_grad()
def add_expert(model: MixtureForCausalLM, expert: Expert, rows: Tensor) -> None:
    """Put an expert, already attached to the base, behind those of a fused model. rows: its routers' (L, D)."""
    known = {"name": expert.name, "task": expert.task, "rank": expert.rank}
    old = model.mixture
    rank = max(old.expert_rank, expert.rank)
    model.mixture = replace(old, experts=[*old.experts, known], expert_rank=rank)
    for number, block in enumerate(model.blocks):
        before = block.experts
        hidden, width = before.gate_proj_A.shape[-1], before.down_proj_A.shape[-1]
        block.experts = LowRankExperts(hidden, width, old.num_experts + 1, rank, before.activation).masters()
        for i, name in enumerate(PROJECTIONS):
            for side in "AB":
                kept = before.get_parameter(f"{name}_{side}")
                block.experts.get_parameter(f"{name}_{side}")[: old.num_experts, : old.expert_rank] = kept
            block.experts.scaling[i, : old.num_experts] = before.scaling[i]
            put_delta(block.experts, old.num_experts, i, expert.delta(number, name))
        block.router.weight = nn.Parameter(torch.cat([block.router.weight, rows[number][None]]))
    model.seal_base()
