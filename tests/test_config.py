"""Flags, their checks and defaults, and the names of runs."""

import json
from itertools import combinations

import pytest
import torch
from conftest import run_script

import align_basemodel
import cli
import config
from align_basemodel import AlignArguments
from config import UserError, fused_run_name
from config import weight_text as text
from evaluator.evaluate_likelihood import LikelihoodArguments
from inference import InferArguments
from models import training_arguments
from models.training_arguments import TrainArguments

PLAIN = "mix_moe_reg_00000_00000_00000_gate_00000"


def align(*argv) -> AlignArguments:
    return cli.parse(list(argv), AlignArguments)


def infer(*argv) -> InferArguments:
    return cli.parse(list(argv), InferArguments)


def fused_name(*argv, seed=42) -> str:
    return fused_run_name(align("--moe_flag", "1", *argv), seed)


# ---- names of runs ---------------------------------------------------------------------------------------------------


def test_run_names_are_the_papers():
    assert fused_name() == PLAIN
    assert fused_name("--gate_loss_weight", "0.01") == "mix_moe_reg_00000_00000_00000_gate_00100"
    weights = ["--helpfulness_weight", "0.001", "--safety_weight", "0.02", "--truthfulness_weight", "1"]
    assert fused_name(*weights) == "mix_moe_reg_00010_00200_10000_gate_00000"
    assert fused_name("--task_name", "safety") == "safety_moe_reg_00000_00000_00000_gate_00000"


def test_small_weights_get_names_of_their_own():
    names = [fused_name("--gate_loss_weight", value) for value in ("1e-5", "4e-5", "0")]
    assert names == [PLAIN.replace("gate_00000", gate) for gate in ("gate_000001", "gate_000004", "gate_00000")]


def test_weight_text_is_injective():
    values = [0.0, 0.1, 0.01, 0.001, 0.0001, 1e-5, 4e-5, 1e-6, 1e-10, 0.00012, 0.12345, 0.5, 1 / 3]
    values += [1.0, 1.00001, 1.0001, 1.5, 2.0, 9.99999, 10.0, 10.0001, 10.00001, 100.0, 100.001, 123.456, 1234.56, 1e5]
    texts = [text(value) for value in values]
    same = [(a, b) for (a, s), (b, t) in combinations(zip(values, texts, strict=True), 2) if s == t]
    assert same == []
    assert not any(set(t) & set("/_ ") for t in texts)
    written = [text(value) for value in (0.1, 1.0, 10.0, 123.456, 10.0001)]
    assert written == ["01000", "10000", "100000", "1234560", "100001"]


@pytest.mark.parametrize(
    ("argv", "suffix"),
    [
        (["--expert_topk", "1"], "_topk_1"),
        (["--expert_topk", "2"], ""),
        (["--expert_topk", "3"], "_topk_3"),
        (["--train_router", "0"], "_router_frozen"),
        (["--train_experts", "0"], "_experts_frozen"),
        (["--tune_attention", "1"], "_attention_tuned"),
        (["--expert_topk", "3", "--answer_topk", "2"], "_topk_3_answer_topk_2"),
        (["--expert_dropout", "0.1"], "_expert_dropout_0.1"),
        (["--max_length", "200", "--router_learning_rate", "0.1", "--base_model", "x"], ""),
    ],
)
def test_method_flags_off_their_default_are_in_the_name(argv, suffix):
    assert fused_name(*argv) == PLAIN + suffix


@pytest.mark.parametrize(
    ("flag", "value"),
    [("gate_schedule", "linear"), ("gate_tokens", "all"), ("gate_gradient", "router"), ("gate_balance", "sample")],
)
def test_flags_of_the_gating_loss_off_their_default_are_in_the_name(flag, value):
    gated = PLAIN.replace("gate_00000", "gate_01000")
    assert fused_name("--gate_loss_weight", "0.1", f"--{flag}", value) == f"{gated}_{flag}_{value}"


def test_all_suffixes_together():
    argv = ["--expert_topk", "1", "--train_router", "0", "--tune_attention", "1", "--gate_tokens", "all"]
    suffixes = "_topk_1_router_frozen_attention_tuned_gate_tokens_all_seed_7"
    gated = PLAIN.replace("gate_00000", "gate_01000")
    assert fused_name("--gate_loss_weight", "0.1", *argv, seed=7) == gated + suffixes


def test_run_name_of_an_expert_and_by_hand():
    expert = align("--task_name", "truthfulness")
    assert align_basemodel.run_name(expert, TrainArguments()) == "truthfulness"
    assert align_basemodel.run_name(expert, TrainArguments(run_name="mine")) == "mine"
    for bad in ("raw", "a/b", "/tmp"):
        with pytest.raises(UserError, match=f"--run_name {bad}"):
            align_basemodel.run_name(expert, TrainArguments(run_name=bad))


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_align_takes_the_papers_flags_and_training_arguments():
    argv = (
        "--task_name mix --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01 --helpfulness_weight 0.001 "
        "--safety_weight 0.002 --truthfulness_weight 0.003 --learning_rate 1e-4 --max_steps 7 --seed 3 "
        "--gradient_accumulation_steps 2 --warmup_steps 5 --weight_decay 0.1 --run_name mine"
    )
    args, training = training_arguments.parse(argv.split(), AlignArguments)
    assert (args.task_name, args.moe_flag, args.expert_topk, args.gate_loss_weight) == ("mix", 1, 2, 0.01)
    assert args.all_drift_weights == {"helpfulness": 0.001, "safety": 0.002, "truthfulness": 0.003}
    assert args.trained_tasks == ("helpfulness", "safety", "truthfulness")
    assert (training.learning_rate, training.max_steps, training.seed) == (1e-4, 7, 3)
    assert (training.gradient_accumulation_steps, training.warmup_steps, training.weight_decay) == (2, 5, 0.1)
    assert training.run_name == "mine"


@pytest.mark.parametrize("task", ["helpfulness", "safety", "truthfulness"])
def test_align_takes_the_papers_commands(task):
    assert align("--moe_flag", "0", "--task_name", task).trained_tasks == (task,)
    fused = align("--moe_flag", "1", "--expert_topk", "2", "--gate_loss_weight", "0.01")  # as in its README
    assert (fused.task_name, fused.num_samples) == ("mix", -1)


def test_inference_takes_the_papers_flags():
    argv = "--task_name safety --dataset_type train --num_samples 50 --cross_task mine --checkpoint_number 1000"
    args = infer(*argv.split(), "--aligned_flag", "1")
    assert (args.task_name, args.dataset_type, args.num_samples) == ("safety", "train", 50)
    assert (args.cross_task, args.checkpoint_number, args.aligned_flag) == ("mine", 1000, 1)
    assert args.run == "mine"
    assert infer("--task_name", "safety").run == "safety"
    assert infer("--task_name", "safety", "--aligned_flag", "1").run == "safety"
    assert infer("--task_name", "safety", "--aligned_flag", "0").run == "raw"
    assert infer("--prompt", "Hi", "--cross_task", "mine").run == "mine"


def test_the_papers_defaults():
    args, training = training_arguments.parse(["--task_name", "safety"], AlignArguments)
    assert (args.rank, args.alpha, args.lora_dropout, args.max_length, args.num_samples) == (8, 4, 0.1, 300, -1)
    assert (args.moe_flag, args.gate_loss_weight, args.all_drift_weights["safety"]) == (0, 0, 0)
    assert (training.learning_rate, training.num_train_epochs, training.seed) == (5e-4, 3, 42)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 1)
    assert (training.lr_scheduler_type, training.optim[:5], training.warmup_steps) == ("linear", "adamw", 0)
    answers = infer("--task_name", "safety")
    assert (answers.temperature, answers.max_new_tokens, answers.seed) == (0.6, 512, 42)
    assert (answers.dataset_type, answers.num_samples) == ("test", -1)
    assert config.TASKS == ("helpfulness", "safety", "truthfulness")  # the order of the experts
    assert config.PAPER_BASE_MODEL == "meta-llama/Llama-2-7b-hf"


ALIGN = ["--task_name", "safety"]
BAD = (
    [
        (AlignArguments, flag, value)
        for flag, values in {
            "nonsense": ["7"],
            "gate_loss": ["0.01"],
            "moe": ["1"],
            "aligned_flag": ["1"],
            "rank": ["three", "1.5", "0", "-1"],
            "task_name": ["Honesty", "all"],
            "moe_flag": ["2", "yes"],
            "alpha": ["0", "-4", "nan"],
            "lora_dropout": ["1", "-0.1"],
            "max_length": ["15"],
            "num_samples": ["0", "-2"],
            "gate_loss_weight": ["-0.5", "nan", "inf", "much"],
            "helpfulness_weight": ["-0.5"],
            "safety_weight": ["inf"],
            "truthfulness_weight": ["nan"],
            "router_learning_rate": ["0", "-1"],
            "gate_tokens": ["none"],
            "train_router": ["2"],
            "tune_attention": ["-1"],
            "dtype": ["int8"],
        }.items()
        for value in values
    ]
    + [
        (InferArguments, flag, value)
        for flag, values in {
            "nonsense": ["7"],
            "checkpoint": ["3"],
            "task_name": ["mix"],
            "dataset_type": ["valid"],
            "aligned_flag": ["2"],
            "num_samples": ["0"],
            "batch_size": ["0"],
            "temperature": ["-0.1", "nan", "inf"],
            "max_new_tokens": ["0"],
            "checkpoint_number": ["last"],
        }.items()
        for value in values
    ]
    + [
        (LikelihoodArguments, flag, value)
        for flag, value in (("task_name", "mix"), ("num_samples", "0"), ("max_length", "15"), ("batch_size", "0"))
    ]
)


@pytest.mark.parametrize(("arguments", "flag", "value"), BAD)
def test_bad_flags_are_named_in_one_line(arguments, flag, value):
    with pytest.raises(UserError) as raised:
        cli.parse(["--task_name", "safety", f"--{flag}", value], arguments)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert f"--{flag}" in message and value in message


def test_training_arguments_own_complaints_are_one_line():
    for flag, value in (("lr_scheduler_type", "bent"), ("warmup_steps", "-1"), ("num_train_epochs", "many")):
        with pytest.raises(UserError) as raised:
            training_arguments.parse([*ALIGN, f"--{flag}", value], AlignArguments)
        assert len(str(raised.value).splitlines()) == 1 and value in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "argv", "told"),
    [
        (AlignArguments, [], "--task_name"),
        (AlignArguments, ["--task_name", "safety", "--rank"], "--rank: expected one argument"),
        (InferArguments, [], "--task_name"),
        (InferArguments, ["--prompt", "Hi"], "--cross_task"),
        (InferArguments, ["--prompt", " ", "--aligned_flag", "0"], "--prompt is empty"),
        (InferArguments, ["--task_name", "safety", "--cross_task", "x", "--aligned_flag", "0"], "--cross_task"),
    ],
)
def test_flags_that_do_not_go_together(arguments, argv, told):
    with pytest.raises(UserError, match=told):
        cli.parse(argv, arguments)


@pytest.mark.parametrize(
    ("argv", "ignored"),
    [
        (["--moe_flag", "1", "--rank", "8"], "--rank 8"),
        (["--moe_flag", "1", "--lora_dropout", "0"], "--lora_dropout 0.0"),
        (["--moe_flag", "1", "--attention_rank", "8"], "--attention_rank 8"),
        (["--moe_flag", "1", "--train_router", "0", "--router_learning_rate", "1"], "--router_learning_rate 1.0"),
        (["--task_name", "safety", "--gate_loss_weight", "0"], "--gate_loss_weight 0.0"),
        (["--task_name", "safety", "--tune_attention", "1", "--attention_alpha", "2"], "--tune_attention 1"),
    ],
)
def test_a_flag_that_would_be_ignored_is_an_error(argv, ignored):
    with pytest.raises(UserError, match=f"{ignored}: has an effect with --"):
        align(*argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gate_loss_weight", "0", "--gate_tokens", "all"], "--gate_tokens all: has no effect with"),
        (["--gate_loss_weight", "0", "--gate_gradient", "router"], "--gate_gradient router: has no effect with"),
        (["--gate_loss_weight", "0", "--gate_balance", "sample"], "--gate_balance sample: has no effect with"),
        (["--gate_loss_weight", "0", "--gate_schedule", "linear"], "--gate_schedule linear: has no effect with"),
        (["--gate_loss_weight", "1", "--train_router", "0", "--gate_gradient", "router"], "trains the router alone"),
    ],
)
def test_a_gating_loss_that_would_change_nothing_is_an_error(argv, said):
    with pytest.raises(UserError, match=said):
        align("--moe_flag", "1", *argv)


def test_samples_longer_than_the_bases_window_are_refused(base_dir, tmp_path, capsys):
    """Answers and scores are cut to it."""
    given = ["--task_name", "safety", "--base_model", str(base_dir), "--data_source", "sample"]
    with pytest.raises(SystemExit):
        align_basemodel.main([*given, "--max_length", "5000", "--results_dir", str(tmp_path / "results")])
    assert "--max_length 5000: must be at most " in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_attention_has_flags_of_its_own_that_are_recorded():
    default = align("--moe_flag", "1", "--tune_attention", "1")
    assert (default.attention_rank, default.attention_alpha, default.attention_dropout) == (8, 4, 0.1)
    given = ["--attention_rank", "2", "--attention_alpha", "3", "--attention_dropout", "0"]
    recorded = cli.effective_flags(align("--moe_flag", "1", "--tune_attention", "1", *given))
    assert {name: recorded[name] for name in recorded if "attention" in name} == {
        "tune_attention": 1,
        "attention_rank": 2,
        "attention_alpha": 3.0,
        "attention_dropout": 0.0,
    }
    assert "rank" not in recorded and "attention_rank" not in cli.effective_flags(align("--moe_flag", "1"))


# ---- what a user sees ------------------------------------------------------------------------------------------------


def test_command_turns_a_user_error_into_one_line_and_code_2(capsys):
    @cli.command
    def main(argv):
        raise {
            "wrong": UserError("--x 1: must be 2"),
            "stop": KeyboardInterrupt(),
            "gpu": torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "bug": ZeroDivisionError(),
        }[argv]

    for argv, code, line in (
        ("wrong", 2, "error: --x 1: must be 2\n"),
        ("stop", 130, "stopped: "),
        ("gpu", 2, "error: out of memory (CUDA out of memory. Tried); take a smaller --batch_size where"),
        ("cpu", 2, "error: out of memory (DefaultCPUAllocator"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        out, err = capsys.readouterr()
        assert stopped.value.code == code and out == "" and err.startswith(line) and err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # no bug is hidden
        main("bug")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["align_basemodel.py", *ALIGN, "--rank", "0"], "error: --rank 0: must be 1 or more"),
        (["inference.py", "--task_name", "safety", "--cross", "mine"], "error: unrecognized arguments: --cross mine"),
    ],
)
def test_scripts_stop_with_one_line_and_code_2(argv, told, tmp_path):
    run = run_script(config.ROOT / argv[0], *argv[1:], cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(told) and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


RECORD = """
import json, sys
from pathlib import Path
import align_basemodel, config
from models import training_arguments
from workspace import run_dir
folder = Path(sys.argv[1])
argv = ["--task_name", "safety", "--data_source", "sample", "--base_model", sys.argv[2]]
args, training = training_arguments.parse(argv, align_basemodel.AlignArguments)
arguments = align_basemodel.result_arguments(args, training)
everything = {**arguments, **json.loads(training.to_json_string()), **vars(args)}
for name in ("begun", "finished"):
    run_dir.begin(folder / name, "align_basemodel.py", everything, "")
run_dir.finish(folder / "finished", "align_basemodel.py", everything, {"seconds": 1}, {})
print(config.hf_token)
"""


@pytest.mark.slow
def test_hf_token_is_read_from_the_environment_and_never_written(tmp_path, base_dir):
    token = "hf_aTokenThatNobodyHas"
    run = run_script("-c", RECORD, tmp_path, base_dir, HF_TOKEN=token)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == token
    written = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    runs = {"begun/arguments.json", "finished/run.json"}
    assert set(written) == {*runs, "begun.lock", "begun.lock.json", "finished.lock"}
    for path in (written[name] for name in runs):
        assert json.loads(path.read_text())["run"]["arguments"]["rank"] == 8
        assert token not in path.read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train_router", "0", "--train_experts", "0"], "leave nothing to train"),
        (["--train_experts", "0", "--safety_weight", "1"], "--safety_weight 1.0: must be 0 with --train_experts 0"),
    ],
)
def test_a_fusion_trains_something_and_frozen_experts_do_not_drift(argv, said):
    with pytest.raises(UserError, match=said):
        align("--moe_flag", "1", *argv)
