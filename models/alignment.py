"""What an alignment trains, and on what, by the flags of align_basemodel.py (`args`): samples, models, trainers, and an
estimate of their memory."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from config import UserError
from data.encoding import Collator, Encoder, describe
from data.sources import answer_records, draw, read_rows, trainable_rows
from models import base, memory
from models.adapters import add_lora, load_adapter
from models.expert_ffn import PROJECTIONS
from models.mixture import MixtureForCausalLM, load_fused, read_mixture
from models.trainer import AlignmentTrainer, MixtureTrainer
from models.training_arguments import TrainArguments


def training_samples(args, seed: int, tokenizer) -> list[dict]:
    """The encoded training samples of the run's tasks; prints how many they are and what was cut or dropped."""
    encoder = Encoder(tokenizer, args.max_length)
    samples = []
    for task in args.trained_tasks:
        rows = trainable_rows(task, read_rows(task, "train", args.data_source))
        encoded, counts = encoder.encode_all(answer_records(task, draw(rows, args.num_samples, seed)))
        print(f"{task}: {describe(counts)}")
        samples += encoded
    if not samples:
        raise UserError(f"--data_source {args.data_source}: no sample has an answer to learn")
    return samples


def expert_model(args, training: TrainArguments, load: Callable = base.load_base) -> PeftModel:
    """The base with a new LoRA on its FFNs. load: as models.adapters.add_lora has it."""
    return add_lora(args, list(PROJECTIONS), training.seed, load)


def mixture_model(args, training: TrainArguments, load: Callable = load_fused) -> MixtureForCausalLM:
    """The fused model, of which that is trained which the flags say. load: what makes it of (folder, base_model,
    dtype)."""
    mixture = read_mixture(Path(args.moe_dir))
    if mixture.routing == "prompt":
        check_by_prompt(args, training)
    if mixture.attention_lora and args.tune_attention:
        raise UserError(
            f"--tune_attention 1: --moe_dir {args.moe_dir} has LoRA on its attention, which would begin anew; leave "
            "the flag out (it stays as it is), or begin with a fusion without"
        )
    model = load(Path(args.moe_dir), args.base_model, args.dtype)
    model.set_top_k(args.expert_topk, recorded=args.answer_topk)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):  # of an earlier alignment
        layer.requires_grad_(False)
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = nn.Identity()
    if args.tune_attention:
        torch.manual_seed(training.seed)
        model.add_attention_lora(args.attention_rank, args.attention_alpha, args.attention_dropout)
    for block in model.blocks:
        block.router.weight.requires_grad_(bool(args.train_router))
        block.experts.requires_grad_(bool(args.train_experts))
        block.router.gate_gradient = args.gate_gradient
        block.experts.dropout = args.expert_dropout or 0.0
    return model


def check_by_prompt(args, training: TrainArguments) -> None:
    """UserError for what does not go with routing by prompt."""
    if (args.gate_tokens, args.gate_gradient) != ("instruction", "all"):
        raise UserError(
            f"--moe_dir {args.moe_dir}: is routed by prompt, as its gating loss sees it; leave --gate_tokens and "
            "--gate_gradient out"
        )
    of_fsdp = (training.fsdp_config or {}).get("activation_checkpointing")
    of_accelerate = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"  # its yaml's, by its launcher
    if training.activation_checkpointing or training.gradient_checkpointing or of_fsdp or of_accelerate:
        raise UserError(
            "--activation_checkpointing (or FSDP's): computes layers again after the choice by prompt is over; leave "
            "it out"
        )
    if training.torch_compile:
        raise UserError(
            f"--torch_compile: --moe_dir {args.moe_dir} is routed by prompt, which is not compiled; leave it out"
        )


def estimate(args, training: TrainArguments) -> str:
    """--estimate 1: what the run would take of memory, on this machine and, if that has none, on a GPU."""
    memory.check_countable(training, args.dtype)
    samples = training_samples(args, training.seed, base.load_tokenizer(args.base_model))
    batch = memory.largest_batch(samples, training.per_device_train_batch_size)
    make, empty = (mixture_model, memory.empty_fused) if args.moe_flag else (expert_model, memory.empty_base)
    kinds = ("sdpa",) if torch.cuda.is_available() else ("eager", "sdpa")
    models = {kind: make(args, training, partial(empty, attention=kind)) for kind in kinds}
    drifts = args.moe_flag and any(args.all_drift_weights.values())
    counts = {kind: memory.count(model, batch, training, drifts) for kind, model in models.items()}
    return memory.describe(counts, batch)


def expert_trainer(args, training: TrainArguments, samples: list[dict]) -> Trainer:
    """A Trainer of LoRA on the FFN of the base, its attention frozen."""
    model = expert_model(args, training)
    if args.init_adapter:
        load_adapter(model, Path(args.init_adapter), args.rank, args.alpha)
    return AlignmentTrainer(model, training, train_dataset=samples, data_collator=Collator())


def mixture_trainer(args, training: TrainArguments, samples: list[dict]) -> Trainer:
    """A Trainer of the fused model's router and experts, its base frozen."""
    return MixtureTrainer(
        mixture_model(args, training),
        args=training,
        train_dataset=samples,
        data_collator=Collator(routing=True, gate_tokens=args.gate_tokens, tasks=args.trained_tasks),
        tasks=args.trained_tasks,
        gate_loss_weight=args.gate_loss_weight,
        gate_balance=args.gate_balance,
        gate_schedule=args.gate_schedule,
        drift_weights=args.all_drift_weights,
        router_learning_rate=args.router_learning_rate,
    )
