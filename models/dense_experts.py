"""The fused model written as a MixtralForCausalLM or Qwen3MoeForCausalLM: every expert a dense FFN, everything low-rank
merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from config import UserError
from models.causal_lm import save_generation_config
from models.expert_ffn import PROJECTIONS
from models.mixture import ATTENTION_PROJECTIONS, MixtureConfig, MixtureForCausalLM
from workspace.files import read_json, write_json


class Form(NamedTuple):
    """bases: model_type of the bases that it fits; moe: where a layer's mixture is; expert_names: of the projections of
    an expert; more_norms: the attention's own."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    bases: tuple[str, ...]
    moe: str
    expert_names: dict[str, str]
    more_norms: tuple[str, ...] = ()


FORMS = {
    "mixtral": Form(
        MixtralForCausalLM,
        MixtralConfig,
        ("llama", "mistral"),
        "block_sparse_moe",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    "qwen3_moe": Form(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        ("qwen3",),
        "mlp",
        {name: name for name in PROJECTIONS},
        ("self_attn.q_norm", "self_attn.k_norm"),
    ),
}
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def write_dense_experts(model: MixtureForCausalLM, tokenizer, folder: Path, form: str, dtype: str) -> None:
    """Write configuration, tokenizer and weights in `dtype` into `folder`, one shard per layer.

    form: a key of FORMS. UserError where the form has no place for something.
    """
    settings = form_config(model.mixture, form, dtype)
    save_config(settings, folder)
    save_generation_config(tokenizer, settings, folder)
    tokenizer.save_pretrained(folder)
    write_shards(model, FORMS[form], getattr(torch, dtype), folder)


def form_config(mixture: MixtureConfig, form: str, dtype: str) -> PreTrainedConfig:
    """The same model's configuration in a form; UserError where the form has no place for something."""
    settings, to = mixture.base, FORMS[form]
    if settings["model_type"] not in to.bases:
        fitting = [name for name, other in FORMS.items() if settings["model_type"] in other.bases]
        said = f"--to {fitting[0]}" if fitting else f"none of {', '.join(FORMS)}; use --to peft"
        raise UserError(f"--to {form}: the form of dense experts for a {settings['model_type']} base is {said}")
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            raise UserError(f"the base has {name}: --to {form} has no place for biases; use --to peft")
    layer_types = set(settings.get("layer_types") or ())
    if len(layer_types) > 1:
        raise UserError(f"the base's layers differ ({', '.join(sorted(layer_types))}), as --to {form}'s cannot")
    window = None if layer_types == {"full_attention"} else settings.get("sliding_window")
    own = {"sliding_window": window} if form == "mixtral" else {
        "moe_intermediate_size": settings["intermediate_size"],
        "norm_topk_prob": True,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }  # fmt: skip
    return to.config_class(
        **{name: settings[name] for name in SHARED_SETTINGS},
        **own,
        architectures=[to.model_class.__name__],
        num_local_experts=mixture.num_experts,
        num_experts_per_tok=mixture.num_experts_per_tok,
        output_router_logits=False,
        router_aux_loss_coef=0.0,
        dtype=dtype,
    )


def save_config(settings: PreTrainedConfig, folder: Path) -> None:
    """config.json, with the rope parameters also under the names that readers older than transformers 5 look for."""
    settings.save_pretrained(folder)
    rope = dict(settings.rope_parameters)
    old_names = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **old_names})


def write_shards(model: MixtureForCausalLM, form: Form, dtype: torch.dtype, folder: Path) -> None:
    """Safetensors and their index: a shard for the embeddings and one per layer, so that one at a time is in memory."""
    num_shards = len(model.blocks) + 1
    weight_map, total_size = {}, 0
    for number in range(num_shards):
        named = layer_weights(model, number - 1, form) if number else outer_weights(model)
        shard = {name: weight.detach().to(dtype).contiguous() for name, weight in named}
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total_size += sum(weight.nbytes for weight in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def outer_weights(model: MixtureForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, last norm, and the head unless it is the embeddings."""
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight
    yield "model.norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight


def layer_weights(model: MixtureForCausalLM, number: int, form: Form) -> Iterator[tuple[str, Tensor]]:
    """One layer's weights under the form's names on disk, everything low-rank merged."""
    prefix, layer = f"model.layers.{number}", model.model.layers[number]
    for name in ("input_layernorm", "post_attention_layernorm", *form.more_norms):
        yield f"{prefix}.{name}.weight", layer.get_submodule(name).weight
    for name in ATTENTION_PROJECTIONS:
        yield f"{prefix}.self_attn.{name}.weight", merged_attention(layer.self_attn.get_submodule(name))
    yield f"{prefix}.{form.moe}.gate.weight", layer.mlp.router.weight
    for expert in range(model.mixture.num_experts):
        for name in PROJECTIONS:
            weight = layer.mlp.experts.merged(expert, name, layer.mlp.get_submodule(name).weight)
            yield f"{prefix}.{form.moe}.experts.{expert}.{form.expert_names[name]}.weight", weight


def merged_attention(module: nn.Module) -> Tensor:
    """The weight of a projection, with its LoRA where the fusion tuned the attention."""
    if isinstance(module, nn.Linear):
        return module.weight
    return module.base_layer.weight + module.get_delta_weight("default")
