"""A start for the routers without training: at each layer, what the prompts of an expert's task have for themselves."""

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from data.batching import batches_by_length, pad
from data.encoding import Encoder
from data.sources import Record, draw, prompt_of, read_rows, trainable_rows
from models import base

# The logit that a task's own mean state gets from its prototype; of three tasks that are as far from each other, the
# others' prototypes give it half of that, negative: 0.91 of the softmax is the own one's.
OWN_LOGIT = 2.0


def task_prompts(task: str, source: str, num_prompts: int, seed: int) -> list[Record]:
    """`num_prompts` different training prompts of a task, drawn with `seed`."""
    rows = {prompt_of(row): row for row in trainable_rows(task, read_rows(task, "train", source))}
    chosen = draw(list(rows.values()), num_prompts, seed)
    asked = [(row["id"], row.get("instruction") or row.get("prompt") or row["question"]) for row in chosen]
    return [Record(id, task, text, row.get("input", "")) for (id, text), row in zip(asked, chosen, strict=True)]


@torch.inference_mode()
def mean_states(model: LlamaForCausalLM, encoder: Encoder, prompts: list[Record], batch_size: int = 8) -> Tensor:
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
        model.model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        tokens += int(counted.sum())
    for hook in hooks:
        hook.remove()
    return states / tokens


def prototype_routers(states: Tensor) -> list[Tensor]:
    """states (E, L, D), the mean states of each expert's task -> each layer's router (E, D).

    A prototype is the mean state less that of all tasks, without what is left along the latter (a router has no bias to
    take it off), scaled so that on average its own mean state has the logit OWN_LOGIT.
    """
    common = states.mean(0)  # (L, D)
    centred = states - common
    along = (centred * common).sum(-1, keepdim=True) / common.square().sum(-1, keepdim=True)
    prototypes = centred - along * common
    own_logits = (prototypes * states).sum(-1).mean(0)  # (L,)
    scaled = prototypes * (OWN_LOGIT / own_logits)[:, None]
    return [scaled[:, layer].contiguous() for layer in range(scaled.shape[1])]


def fit_routers(
    tasks: list[str], base_model: str, source: str, num_prompts: int, seed: int, dtype: str
) -> list[Tensor]:
    """Each layer's router (E, D) for experts of these tasks, by `num_prompts` training prompts each."""
    from models.loading import device  # which loads what this helps to make

    model = (
        base.load_weights(LlamaForCausalLM, base_model, base.load_base_config(base_model), dtype).to(device()).eval()
    )
    encoder = Encoder(base.load_tokenizer(base_model), model.config.max_position_embeddings)
    states = [mean_states(model, encoder, task_prompts(task, source, num_prompts, seed)) for task in tasks]
    return prototype_routers(torch.stack(states))
