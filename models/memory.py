"""What an alignment takes of memory, counted from the configuration: nothing is loaded, nothing is computed."""

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cli import NF4
from config import UserError
from data.encoding import IGNORED
from models import base
from models.causal_lm import answer_loss_class, model_class_of
from models.mixture import MixtureForCausalLM, mixture_class, read_mixture, with_mixture
from models.training_arguments import TrainArguments

# Resident once align_basemodel.py has its imports, tokenizer and samples (CPython 3.11, PyTorch 2.13, Linux, x86)
INTERPRETER_BYTES = 545_000_000
# Gaps in the C library's heap (cli.keep_freed_memory keeps them) for each byte that a step without checkpointing holds.
# With it they are as many: what is kept of each layer lies between what was freed.
HEAP_GAPS = 0.5
LOGIT_BYTES = 12  # of one in the backward pass: its log-probability and the gradients of that and of itself, all fp32
ADAM_STATES = {"adamw_torch_fused": 2, "adamw_torch": 2, "sgd": 0}  # fp32 numbers per trained one


class Memory(NamedTuple):
    """Bytes of one process: the frozen base; trained matrices with gradients, Adam's states and the fused start;
    what the decoder keeps for the backward pass, without and with gradient checkpointing; logits at labels."""

    base: int
    trained: int
    activations: int
    checkpointed: int
    logits: int

    def working(self, checkpointing: bool) -> int:
        """All but the base."""
        return self.trained + (self.checkpointed if checkpointing else self.activations) + self.logits

    def total(self, checkpointing: bool, on_cpu: bool) -> float:
        """On a CPU with the interpreter and the heap's gaps; on a GPU what PyTorch allocates there."""
        of_process = INTERPRETER_BYTES + self.heap_gaps if on_cpu else 0
        return self.base + self.working(checkpointing) + of_process

    @property
    def heap_gaps(self) -> float:
        return HEAP_GAPS * self.working(checkpointing=False)


def check_countable(training: TrainArguments, dtype: str) -> None:
    """UserError for what this count does not know: 4 bits, other optimisers, compiling, sharding, several processes."""
    optimiser = training.optim.value
    if dtype == NF4:
        raise UserError("--estimate 1: counts no 4-bit weights; docs/performance.md has figures of --dtype nf4")
    if optimiser not in ADAM_STATES:
        raise UserError(f"--estimate 1: counts the states of {', '.join(ADAM_STATES)}, not of --optim {optimiser}")
    if training.torch_compile:
        raise UserError("--estimate 1: counts no compiled step; leave --torch_compile out")
    if training.fsdp or training.deepspeed or training.world_size > 1:
        raise UserError("--estimate 1: counts one process that holds a whole model; run it without a launcher")


def empty_base(base_model: str, dtype: str, with_class=answer_loss_class, attention: str | None = None):
    """As base.load_base, on the meta device: a model without weights."""
    base_config = deepcopy(base.load_base_config(base_model))
    base_config._attn_implementation = attention or base.training_attention()
    with torch.device("meta"):
        return with_class(model_class_of(base_config))(base_config).to(base.pick_dtype(dtype))


def largest_batch(samples: list[dict], batch_size: int) -> tuple[int, int, int]:
    """(samples B, tokens of the longest T, labels of all) of the `batch_size` longest samples."""
    longest = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)[:batch_size]
    labels = sum(label != IGNORED for sample in longest for label in sample["labels"][1:])
    return len(longest), len(longest[0]["input_ids"]), labels


def empty_fused(folder: Path, base_model: str, dtype: str, attention: str | None = None) -> MixtureForCausalLM:
    """As mixture.load_fused, on the meta device."""
    return with_mixture(empty_base(base_model, dtype, mixture_class, attention), read_mixture(folder))


def count(model: nn.Module, batch: tuple[int, int, int], training: TrainArguments, drifts: bool = False) -> Memory:
    """The memory of a training step on a batch as `largest_batch` has it. model: on the meta device, its frozen and
    trained parameters told apart; drifts: whether the loss has the experts' drift."""
    size, length, labels = batch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    fused = isinstance(model, MixtureForCausalLM)
    of_start = sum(p.nbytes for block in model.blocks for p in block.experts.parameters()) if fused else 0
    vocabulary = model.config.vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors of a CPU, with its autocast, that hold no numbers
        model.to_empty(device="cpu").train()
        activations = kept_bytes(model, size, length, training, drifts)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        checkpointed = kept_bytes(model, size, length, training, drifts)
    return Memory(
        base=sum(parameter.nbytes for parameter in frozen),
        trained=sum(p.nbytes * 2 + p.numel() * 4 * ADAM_STATES[training.optim.value] for p in trained) + of_start,
        activations=activations,
        # the layer whose forward is done again has its own
        checkpointed=checkpointed + activations // model.config.num_hidden_layers,
        logits=labels * vocabulary * LOGIT_BYTES,
    )


def kept_bytes(model: nn.Module, size: int, length: int, training: TrainArguments, drifts: bool) -> int:
    """The bytes that autograd keeps of a forward of the decoder on ids (B, T): each piece of memory once, parameters
    left out."""
    decoder = getattr(model, "get_base_model", lambda: model)().model
    start = model.start_of_fusion() if drifts else []
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *(t for s in start for t in s.values()))}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    ids = torch.zeros(size, length, dtype=torch.long)
    compute_dtype = torch.bfloat16 if training.bf16 else torch.float16
    with (
        torch.autocast("cpu", compute_dtype, enabled=training.bf16 or training.fp16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)  # noqa: F841 (its graph)
        drift = model.drift(start) if drifts else None  # noqa: F841
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def describe(counts: dict[str, Memory], batch: tuple[int, int, int]) -> str:
    """The estimate as lines: `counts` by the kind of attention, the first one of this machine's."""
    size, length, labels = batch
    own, on_cpu = next(iter(counts.values())), len(counts) > 1
    rows = [
        ("base, frozen", own.base, own.base),
        ("trained matrices, gradients, optimiser, start of the fusion", own.trained, own.trained),
        ("activations", own.activations, own.checkpointed),
        ("logits at labels", own.logits, own.logits),
    ]
    if on_cpu:
        rows.append(("Python and its libraries", INTERPRETER_BYTES, INTERPRETER_BYTES))
        rows.append(("gaps in the C library's heap", own.heap_gaps, own.heap_gaps))
    rows.append(("in all, one process", *(own.total(checkpointing, on_cpu) for checkpointing in (False, True))))
    if on_cpu:
        gpu = counts["sdpa"]
        rows.append(("on a GPU (fused attention)", gpu.total(False, False), gpu.total(True, False)))
    lines = [f"Estimated memory at {size} samples of {length} tokens, {labels} of them with a label, in GB:"]
    lines.append(f"{'':60}{'plain':>8}  --gradient_checkpointing 1")
    return "\n".join(lines + [f"{name:60}{plain / 1e9:8.2f}{again / 1e9:10.2f}" for name, plain, again in rows])
