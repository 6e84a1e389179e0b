"""A start for the routers without training: at each layer, what the prompts of an expert's task have for themselves, or
what the expert itself changes most."""

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from config import UserError
from data.batching import batches_by_length, pad
from data.encoding import Encoder
from data.sources import Record, draw, prompt_of, read_rows, trainable_rows
from models import base
from models.adapters import Expert
from models.prompt_routing import routed_by_prompt

# The logit that a task's own mean state gets from its prototype; of three tasks that are as far from each other, the
# others' prototypes give it half of that, negative: 0.91 of the softmax is the own one's.
LEAST_DIFFERENCE = 1e-4  # between tasks, of the length of a mean state
OWN_LOGIT = 2.0


def task_prompts(task: str, source: str, num_prompts: int, seed: int, num_trained: int = -1) -> list[Record]:
    """`num_prompts` different training prompts of a task, drawn with `seed`; num_trained: of the rows alone that an
    alignment on so many with this seed draws, so that none is held apart from it."""
    trained = draw(trainable_rows(task, read_rows(task, "train", source)), num_trained, seed)
    rows = {prompt_of(row): row for row in trained}
    chosen = draw(list(rows.values()), num_prompts, seed)
    asked = [(row["id"], row.get("instruction") or row.get("prompt") or row["question"]) for row in chosen]
    return [Record(id, task, text, row.get("input", "")) for (id, text), row in zip(asked, chosen, strict=True)]


@torch.inference_mode()
def mean_states(model: PreTrainedModel, encoder: Encoder, prompts: list[Record], batch_size: int = 8) -> Tensor:
    """(L, D) fp32: what enters each layer's FFN, as a router sees it, averaged over the prompts' tokens after the
    template's opening."""
    samples = [encoder.encode(record) for record in prompts]
    states = torch.zeros(len(model.model.layers), model.config.hidden_size)
    counted = torch.empty(0)

    def add(layer: int):
        def hook(_, inputs):
            states[layer] += inputs[0][counted].float().sum(0).cpu()

        return hook

    hooks = [layer.mlp.register_forward_pre_hook(add(i)) for i, layer in enumerate(model.model.layers)]
    tokens = 0
    batches = batches_by_length(samples, lambda sample: len(sample["input_ids"]), batch_size)
    for batch in tqdm(batches, desc=f"states of {prompts[0].task}", unit="batch"):
        ids, mask = pad([sample["input_ids"] for sample in batch], left=False)
        openings = torch.tensor([sample["opening"] for sample in batch])
        counted = (mask.bool() & (torch.arange(ids.shape[1]) >= openings[:, None])).to(model.device)
        with routed_by_prompt(model, counted):
            model.model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        tokens += int(counted.sum())
    for hook in hooks:
        hook.remove()
    return states / tokens


def prototype_routers(states: Tensor) -> list[Tensor]:
    """states (E, L, D), the mean states of each expert's task -> each layer's router (E, D).

    A prototype is the mean state less that of all tasks.
    """
    centred = states - states.mean(0)
    difference, length = (x.norm(dim=-1).amax(0) for x in (centred, states))  # (L,) each
    if (difference < LEAST_DIFFERENCE * length).any():  # what is left is rounding
        raise UserError("the tasks' prompts have the same mean states: no router can be made from them")
    return scaled_routers(centred, states)


def arrow_routers(states: Tensor, directions: Tensor) -> list[Tensor]:
    """As `prototype_routers`, of unit `directions` (E, L, D) in place of centred states. Arrow's own logit is |v x|,
    which a linear router does not have: here the mean state of an expert's task says which way v points."""
    points = (without_common(directions, states) * states).sum(-1, keepdim=True).sign()
    return scaled_routers(directions * points, states)


def without_common(directions: Tensor, states: Tensor) -> Tensor:
    """Directions (E, L, D) without what lies along the mean of all states (E, L, D): a router has no bias to take the
    logit of that off."""
    common = states.mean(0)  # (L, D)
    along = (directions * common).sum(-1, keepdim=True) / common.square().sum(-1, keepdim=True)
    return directions - along * common


def scaled_routers(directions: Tensor, states: Tensor) -> list[Tensor]:
    """Directions and states (E, L, D) -> each layer's router (E, D): without what is common, and scaled so that on
    average a task's mean state has the logit OWN_LOGIT for its own expert."""
    routers = without_common(directions, states)
    own_logits = (routers * states).sum(-1).mean(0)  # (L,)
    scaled = routers * (OWN_LOGIT / own_logits)[:, None]
    return [scaled[:, layer].contiguous() for layer in range(scaled.shape[1])]


def most_changed_input(deltas: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The unit input (in,) to which changes s B A, one below the other, answer most: the first right singular vector
    (Arrow, Ostapenko et al. 2024, arXiv 2405.11157), by the QR of each B. deltas: (A (r, in), B (out, r), s)."""
    rows = [scaling * torch.linalg.qr(b.double()).R @ a.double() for a, b, scaling in deltas]
    return torch.linalg.svd(torch.cat(rows), full_matrices=False).Vh[0].float()


def fit_routers(
    tasks: list[str],
    base_model: str,
    source: str,
    num_prompts: int,
    seed: int,
    dtype: str,
    experts: list[Expert] | None = None,
    num_trained: int = -1,
) -> list[Tensor]:
    """Each layer's router (E, D) for experts of these tasks, by `num_prompts` training prompts each; with the experts
    themselves, by Arrow. num_trained: as task_prompts takes it."""
    from models.loading import device  # which loads what this helps to make

    model = base.load_base(base_model, dtype).to(device()).eval()
    encoder = Encoder(base.load_tokenizer(base_model), model.config.max_position_embeddings)
    prompts = [task_prompts(task, source, num_prompts, seed, num_trained) for task in tasks]
    states = [mean_states(model, encoder, of_task) for of_task in prompts]
    if experts is None:
        return prototype_routers(torch.stack(states))
    directions = [
        torch.stack([most_changed_input(input_side(expert, layer)) for layer in range(len(states[0]))])
        for expert in experts
    ]
    return arrow_routers(torch.stack(states), torch.stack(directions))


def input_side(expert: Expert, layer: int) -> list[tuple[Tensor, Tensor, float]]:
    """What an expert changes of the projections that read an FFN's input. UserError for an expert that changes none."""
    deltas = [delta for name in ("gate_proj", "up_proj") if (delta := expert.delta(layer, name)) is not None]
    if not deltas:
        raise UserError(f"--router_init arrow: {expert.name} leaves gate and up of layer {layer} as they are")
    return deltas
