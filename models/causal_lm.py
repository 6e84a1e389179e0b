"""Causal language models whose FFN is gate, up and down: which families fit, and a training loss that is computed where
labels are, and nowhere else."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from config import UserError
from data.encoding import IGNORED
from models.expert_ffn import ACTIVATIONS, PROJECTIONS
from models.router import recorded_router_logits

# model_type of the families that the tests hold: fused models equal a mixture of merged experts, all commands run
VERIFIED = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma 3 (text)"}
PROBE_TOLERANCE = 1e-2  # relative: of bfloat16; another formula is off by its whole size


def is_verified(config: PreTrainedConfig) -> bool:
    """Whether a model is of the form that the tests hold its family by: no cap on its logits, which are its head's."""
    return config.model_type in VERIFIED and getattr(config, "final_logit_softcapping", None) is None


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal language model of a configuration. UserError for a configuration that has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config.model_type} models have no causal language model in transformers")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without weights (on the meta device)."""
    with torch.device("meta"):
        return model_class_of(config)(deepcopy(config))  # a model writes into its configuration


def why_unfit(model: PreTrainedModel) -> str | None:
    """What keeps the mixture from replacing a model's FFNs, for a person; None where nothing does."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        return "it has no model.layers below a head"
    for number, layer in enumerate(layers):
        children = dict(getattr(layer, "mlp", nn.Module()).named_children())
        linear = {name for name, child in children.items() if isinstance(child, nn.Linear)}
        if linear != set(PROJECTIONS) or set(children) - linear != {"act_fn"}:
            names = ", ".join(children) or "nothing"
            return (
                f"the FFN of its layer {number} has {names}, where gate_proj, up_proj, down_proj and act_fn are needed"
            )
        if activation_name(layer.mlp.act_fn) is None:
            name = type(layer.mlp.act_fn).__name__
            return f"its activation is {name}; the mixture has {' and '.join(ACTIVATIONS)}"
    return None


def activation_name(module: nn.Module) -> str | None:
    """The key of ACTIVATIONS that an FFN's act_fn is; None for another function."""
    if isinstance(module, nn.SiLU):
        return "silu"
    return next((name for name in ACTIVATIONS if type(module) is type(ACT2FN[name])), None)


def why_computes_otherwise(model: PreTrainedModel) -> str | None:
    """Of a family that no test holds: what its forward does beside FFN = down(act(gate) up) and logits = head(states),
    found by running both on one input; None where it does nothing else."""
    mlp = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, mlp.gate_proj.in_features, generator=generator).to(model.device, model.dtype)
    with torch.inference_mode():
        if differ(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))):
            return "its FFN is not down(act(gate) up)"
    return why_scored_otherwise(model)


@torch.inference_mode()
def why_scored_otherwise(model: PreTrainedModel) -> str | None:
    """What a model's logits are beside head(states), found by running both on one input; None where nothing."""
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        return "it has no model below a head of these names"
    ids = torch.arange(3, device=model.device)[None]
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    if differ(model(input_ids=ids, use_cache=False).logits, model.lm_head(states)):
        return "its logits are not those of its head alone"
    return None


def differ(first: Tensor, second: Tensor) -> bool:
    return bool((first - second.to(first.device)).float().norm() > PROBE_TOLERANCE * first.float().norm())


def end_ids(tokenizer, others: int | list[int] | None) -> list[int]:
    """The tokens that end an answer: EOS, and others that a configuration names beside it."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *([others] if isinstance(others, int) else others or [])]))


def save_generation_config(tokenizer, config: PreTrainedConfig, folder: Path) -> None:
    """Write generation_config.json of an export: an answer ends with the tokenizer's EOS, as it was trained to, and
    with whatever else the base's configuration names."""
    ends = end_ids(tokenizer, getattr(config, "eos_token_id", None))
    GenerationConfig(
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=getattr(config, "pad_token_id", None),
    ).save_pretrained(folder)


def answer_log_probs(hidden: Tensor, lm_head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labelled tokens.

    hidden (B, T, D), labels (B, T) with IGNORED elsewhere. The logits of a vocabulary of V are the largest tensor of
    a small model's training step, so only the M labelled positions get them.
    Returns (log_probs (M,) fp32, rows (M,): the sample each belongs to), in order of sample and position.
    """
    labels = labels[:, 1:]  # position t predicts token t + 1
    labelled = labels != IGNORED  # (B, T-1)
    logits = lm_head(hidden[:, :-1][labelled]).float()  # (M, V)
    log_probs = -F.cross_entropy(logits, labels[labelled], reduction="none")
    return log_probs, labelled.nonzero()[:, 0]


def multiply_head_once(lm_head: nn.Module) -> None:
    """Make a head's input contiguous from now on.

    Of a frozen weight and a slice (the last position), PyTorch makes a batched product, with a copy of the weight for
    every sample: gigabytes and seconds at each prompt.
    """
    lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


class AnswerLoss:
    """Put before a causal language model's class: with `labels`, `forward` returns the loss alone and never the logits
    of the prompt."""

    def __init__(self, config):
        super().__init__(config)
        multiply_head_once(self.lm_head)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        output_router_logits=False,
        **kwargs,
    ):
        """As the family's forward (`generate` reads its argument names); with `labels` (B, T): loss = cross-entropy
        summed over the labelled tokens, divided by `num_items_in_batch` (default: their number), `logits` None, and
        `router_logits` if asked for by output_router_logits=True."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep)
        with recorded_router_logits(self if output_router_logits else nn.Module()) as router_logits:
            hidden = self.model(**inputs).last_hidden_state
        log_probs, _ = answer_log_probs(hidden, self.lm_head, labels)
        num_items = num_items_in_batch if num_items_in_batch is not None else max(len(log_probs), 1)
        return MoeCausalLMOutputWithPast(loss=-log_probs.sum() / num_items, router_logits=tuple(router_logits) or None)


@cache
def answer_loss_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A family's causal language model with the loss of AnswerLoss."""
    return type(f"AnswerLoss{model_class.__name__}", (AnswerLoss, model_class), {})
