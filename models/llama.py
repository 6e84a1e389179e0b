"""A Llama whose training loss is computed where labels are, and nowhere else."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from data.encoding import IGNORED


def answer_log_probs(hidden: Tensor, lm_head: torch.nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
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


def multiply_head_once(lm_head: torch.nn.Module) -> None:
    """Make a head's input contiguous from now on.

    Of a frozen weight and a slice (the last position), PyTorch makes a batched product, with a copy of the weight for
    every sample: gigabytes and seconds at each prompt.
    """
    lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


class AnswerLossLlama(LlamaForCausalLM):
    """LlamaForCausalLM; with `labels`, `forward` returns the loss alone and never the logits of the prompt."""

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
        **kwargs,
    ):
        """As LlamaForCausalLM.forward (`generate` reads its argument names); with `labels` (B, T): loss =
        cross-entropy summed over the labelled tokens, divided by `num_items_in_batch` (default: their number),
        `logits` None, and `router_logits` if asked for by output_router_logits=True."""
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
        outputs = self.model(**inputs)
        log_probs, _ = answer_log_probs(outputs.last_hidden_state, self.lm_head, labels)
        num_items = num_items_in_batch if num_items_in_batch is not None else max(len(log_probs), 1)
        return MoeCausalLMOutputWithPast(loss=-log_probs.sum() / num_items, router_logits=outputs.get("router_logits"))
