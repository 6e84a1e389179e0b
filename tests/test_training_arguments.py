"""Trainer's arguments: one decision about the precision, one place for every field of TrainingArguments."""

import pytest
import torch
from accelerate import Accelerator

import align_basemodel
from align_basemodel import AlignArguments
from config import UserError
from evaluator import train_judge
from models import training_arguments
from models.training_arguments import TrainArguments

EXPERT = ["--task_name", "safety", "--data_source", "sample", "--base_model", "tiny"]


def parsed(*argv):
    return training_arguments.parse([*EXPERT, *argv], AlignArguments)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--bf16", "1"], ["--bf16", "true"], ["--bf16"], ["--dtype", "bfloat16"]])
def test_every_spelling_of_bfloat16_is_one_setting(argv):
    args, training = parsed(*argv)
    assert (args.dtype, training.bf16, training.fp16, training.mixed_precision) == ("bfloat16", True, False, "bf16")
    expected = align_basemodel.result_arguments(*parsed("--dtype", "bfloat16"))
    assert align_basemodel.result_arguments(args, training) == expected
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
    for long in (["--per_device_train_batch_size", "4"], ["--per_device_train_batch_size=4"]):
        with pytest.raises(UserError, match="give one of them"):
            parse("--batch_size", "3", *long)
