"""The base's weights in 4 bits (NF4, by bitsandbytes): dense only for the length of one product, never kept so."""

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from config import UserError

PACKAGE = "bitsandbytes==0.50.2"


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes for a base in NF4 whose products run in `dtype`; UserError without the package."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--dtype nf4: get 4-bit weights with: pip install {PACKAGE}")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def keep_order(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights anew at the first product without gradients, as it does on CPUs with
    AVX-512's bfloat16: into an order that neither dequantising nor autograd knows."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_trainable(model: PreTrainedModel) -> None:
    """Let the Trainer train what in `model` is not quantised, which it allows to PEFT's adapters only, and keep the
    base's precision, which is each command's own, out of the saved configuration."""
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)


def is_quantized(linear: nn.Linear) -> bool:
    return hasattr(linear.weight, "quant_state")


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) of a linear layer, dequantised if it is in 4 bits. ValueError for a layer that is more than
    its weight, or whose weight is in another form."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"the mixture trains on the weights of its base's FFN alone, and would ignore what {type(linear).__name__} "
            "adds to them: leave gate_proj, up_proj and down_proj out (of LoRA's target_modules)"
        )
    if not is_quantized(linear):
        dense = linear.weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if linear.weight.is_meta or not dense:
            form = "are offloaded" if linear.weight.is_meta else f"are {linear.weight.dtype}"
            raise ValueError(
                f"the weights of the mixture's base {form}: with gradients only dense ones and NF4 are taken"
            )
        return linear.weight
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "the 4-bit weights were packed for inference, as bitsandbytes does on this CPU at the first product "
            "without gradients: train a freshly loaded model"
        )
    functional = importlib.import_module("bitsandbytes.functional")  # not asked of those who have no use for it
    return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def dequantised_again(linears: Sequence[nn.Linear], weights: Sequence[Tensor]) -> AbstractContextManager:
    """Within it, autograd saves a 4-bit linear in place of its dense weight, and makes the dense one again. Of linears
    that are not in 4 bits: no change."""
    pairs = [(linear, weight) for linear, weight in zip(linears, weights, strict=True) if is_quantized(linear)]
    if not pairs:
        return nullcontext()
    linear_of_address = {weight.data_ptr(): linear for linear, weight in pairs}

    def unpack(saved: Tensor | tuple[nn.Linear, torch.dtype]) -> Tensor:
        return saved if isinstance(saved, Tensor) else dense_weight(saved[0]).to(saved[1])

    def pack(tensor: Tensor) -> Tensor | tuple[nn.Linear, torch.dtype]:
        linear = linear_of_address.get(tensor.data_ptr())
        return tensor if linear is None else (linear, tensor.dtype)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
