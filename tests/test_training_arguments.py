"""Trainer's arguments: one decision about the precision, one place for every field of TrainingArguments."""

from dataclasses import fields

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

import align_basemodel
from align_basemodel import AlignArguments
from config import UserError
from evaluator import train_judge
from models import base, training_arguments
from models.training_arguments import TrainArguments

EXPERT = ["--task_name", "safety", "--data_source", "sample", "--base_model", "tiny"]


def parsed(*argv):
    return training_arguments.parse([*EXPERT, *argv], AlignArguments)


@pytest.fixture
def recorded(base_dir):
    """What run.json compares, of a command line."""

    def result_arguments(*argv):
        return align_basemodel.result_arguments(*parsed("--base_model", str(base_dir), *argv))

    return result_arguments


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--bf16", "1"], ["--bf16", "true"], ["--bf16"], ["--dtype", "bfloat16"]])
def test_every_spelling_of_bfloat16_is_one_setting(argv, recorded):
    args, training = parsed(*argv)
    assert (args.dtype, training.bf16, training.fp16, training.mixed_precision) == ("bfloat16", True, False, "bf16")
    assert recorded(*argv) == recorded("--dtype", "bfloat16")
    judge = ["--kind", "truth", *argv]
    judge_args, judge_training = training_arguments.parse(
        judge, train_judge.JudgeArguments, train_judge.JudgeTrainArguments
    )
    assert (judge_args.dtype, judge_training.mixed_precision) == ("bfloat16", "bf16")


@pytest.mark.parametrize("argv", [["--dtype", "float32"], ["--bf16", "0"]])
def test_float32_has_no_mixed_precision(argv):
    args, training = parsed(*argv)
    assert (args.dtype, training.mixed_precision) == ("float32", "no")


@pytest.mark.parametrize(
    "argv",
    [
        ["--bf16", "1", "--dtype", "float32"],
        ["--bf16", "0", "--dtype", "bfloat16"],
        ["--bf16", "1", "--fp16", "1"],
        ["--fp16", "1", "--dtype", "bfloat16"],
    ],
)
def test_contradictions_are_errors(argv):
    with pytest.raises(UserError, match="contradicts"):
        parsed(*argv)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")
def test_float16_needs_a_gpu_and_gets_a_gradient_scaler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        parsed("--fp16", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="needs a GPU"):
        parsed("--fp16", "1", "--use_cpu", "1")
    assert training_arguments.resolve_precision("auto", None, True) == "float16"
    monkeypatch.undo()
    mixed_precision = TrainArguments(output_dir="unused", fp16=True).mixed_precision
    assert mixed_precision == "fp16"
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("cuda")))
    assert isinstance(Accelerator(mixed_precision=mixed_precision).scaler, torch.amp.GradScaler)


def test_accelerates_own_setting_may_not_contradict(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="--dtype decides"):
        parsed("--dtype", "float32")
    assert parsed("--dtype", "bfloat16")[1].mixed_precision == "bf16"


# ---- the batch -------------------------------------------------------------------------------------------------------

JUDGE = ["--kind", "truth", "--data_source", "sample"]


@pytest.mark.parametrize(
    "classes, argv",
    [
        ((AlignArguments, TrainArguments), EXPERT),
        ((train_judge.JudgeArguments, train_judge.JudgeTrainArguments), JUDGE),
    ],
)
def test_batch_size_is_one_flag_with_two_names(classes, argv):
    def parse(*more):
        return training_arguments.parse([*argv, *more], *classes)[1].per_device_train_batch_size

    assert parse("--batch_size", "3") == parse("--per_device_train_batch_size", "3") == 3
    for long in (["--per_device_train_batch_size", "4"], ["--per-device-train-batch-size=4"]):
        with pytest.raises(UserError, match="give one of them"):
            parse("--batch_size", "3", *long)


def test_of_several_gpus_one_process_uses_one(monkeypatch):
    """transformers would take them all, by DataParallel."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert TrainingArguments(output_dir="unused").n_gpu == 4
    training = TrainArguments(output_dir="unused", per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert (training.n_gpu, training.train_batch_size, training.effective_batch_size) == (1, 3, 6)
    assert training.parallel_mode == ParallelMode.NOT_PARALLEL
    told = training.describe_batch()
    assert told.startswith("6 samples per step (1 x 3 x 2") and "3 GPUs stand idle: torchrun --nproc_per_node 4" in told


# ---- every field -----------------------------------------------------------------------------------------------------


def test_every_field_of_transformers_is_compared_recorded_free_or_refused():
    """A field that a new transformers brings is to be put where it belongs."""
    refused = [name for names in training_arguments.REFUSED.values() for name in names]
    groups = (training_arguments.COMPARED, training_arguments.RECORDED, training_arguments.FREE, refused)
    assert sorted(name for group in groups for name in group) == sorted(f.name for f in fields(TrainingArguments))


def test_every_field_that_would_be_ignored_is_refused_by_name():
    settings = vars(training_arguments.TrainParser(TrainArguments).parse_args([]))
    training_arguments.refuse_ignored(settings, TrainArguments)
    for reason, names in training_arguments.REFUSED.items():
        for name in names:
            with pytest.raises(UserError) as raised:
                training_arguments.refuse_ignored(settings | {name: "another"}, TrainArguments)
            assert str(raised.value) == f"--{name}: {reason}; leave it out"


@pytest.mark.parametrize(
    "argv", ["--label_smoothing_factor 0.1", "--output_dir x", "--data_seed 3", "--do_train", "--eval_strategy steps"]
)
def test_a_field_that_would_be_ignored_is_refused_on_the_command_line(argv):
    with pytest.raises(UserError, match=f"{argv.split()[0]}: .*; leave it out"):
        parsed(*argv.split())


def test_sharding_is_refused_where_accelerate_would_ignore_it():
    with pytest.raises(UserError, match="--fsdp shards over GPUs"):
        parsed("--fsdp", "full_shard", "--use_cpu", "1")


@pytest.mark.parametrize(
    "name, value", [("lr_scheduler_kwargs", '{"num_cycles": 2}'), ("optim_args", "a=1"), ("adam_beta2", "0.98")]
)
def test_what_changes_the_result_is_compared(name, value, recorded):
    default, changed = recorded(), recorded(f"--{name}", value)
    assert {key for key in default if default[key] != changed[key]} == {name}


def test_the_effective_batch_is_compared_and_how_it_is_made_up_recorded(recorded):
    whole, split = (parsed("--batch_size", size, *more) for size, more in BATCHES)
    compared = [recorded("--batch_size", size, *more) for size, more in BATCHES]
    assert compared[0] == compared[1] and compared[0]["effective_batch_size"] == 8
    changed = {key for key, value in whole[1].recorded().items() if split[1].recorded()[key] != value}
    assert changed == {"per_device_train_batch_size", "gradient_accumulation_steps", *CHECKPOINTING}


CHECKPOINTING = {f"{kind}_checkpointing{kwargs}" for kind in ("activation", "gradient") for kwargs in ("", "_kwargs")}
BATCHES = [("8", []), ("2", ["--gradient_accumulation_steps", "4", "--gradient_checkpointing", "1"])]


@pytest.mark.parametrize(
    ("features", "used", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX512", torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": True}, "DEFAULT", torch.float32),
        ({"avx512_bf16": True}, "AVX512", torch.float32),
        ({}, "AVX2", torch.float32),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_with_amx_only(features, used, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert base.pick_dtype("auto") == base.pick_dtype("nf4") == dtype
    assert base.pick_dtype("bfloat16") == torch.bfloat16
