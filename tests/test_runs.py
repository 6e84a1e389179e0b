"""runs/*.sh: flags that are refused before anything is run, and commands that their scripts take."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from cli import parse
from config import TASKS
from data import sources
from data.refusals import RefusalArguments
from data.split import SplitArguments
from evaluator.embedding_drift import DriftArguments
from evaluator.evaluate_likelihood import LikelihoodArguments
from evaluator.evaluate_safety import SafetyArguments
from evaluator.evaluate_truth_and_info import TruthArguments
from evaluator.kept_runs import read_kept
from evaluator.report import ReportArguments
from evaluator.select_answers import SelectArguments
from evaluator.sweeps import mean_nll
from inference import InferArguments

ARGUMENTS = {
    "data/refusals.py": RefusalArguments,
    "data/split.py": SplitArguments,
    "evaluator/embedding_drift.py": DriftArguments,
    "evaluator/evaluate_likelihood.py": LikelihoodArguments,
    "evaluator/evaluate_safety.py": SafetyArguments,
    "evaluator/evaluate_truth_and_info.py": TruthArguments,
    "evaluator/report.py": ReportArguments,
    "evaluator/select_answers.py": SelectArguments,
    "inference.py": InferArguments,
}
TRIES = ROOT / "docs" / "results" / "recipes" / "held_apart"
MAKERS = ("align_basemodel.py", "models/ensemble.py", "models/llama_moe.py", "models/merging.py")
STUB = """#!/bin/bash
[ "$1" != -c ] || {{ echo "Converting the embedded model"; exec {python} "$@"; }}
{{ printf '%s\\x1f' "$@"; echo; }} >> {log}
case "$*" in evaluator/reuse.py\\ --run\\ {anew}\\ *) exit 3 ;; esac
"""


def commands_of(script, flags, folder, anew="-"):
    """The commands that a script would run, each a list of words, by a python that only writes them down; `anew`: the
    row that is none of the kept ones."""
    log, stub = folder / "log", folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable, log=log, anew=anew))
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", ROOT / "runs" / script, *flags], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "count"),
    [
        ("comparison.sh", ["--judge_url", "http://localhost:1/v1", "--judge_model", "m"], 180),
        ("comparison.sh", ["--quick", "1"], 40),
        ("comparison.sh", ["--rivals", "0"], 40),
        ("recipes.sh", [], 80),
        ("recipes.sh", ["--half", "test", "--seeds", "42,43,44", "--rows", "mixed,fused_rate_2e-3_arrow"], 20),
        ("elsewhere.sh", [], 60),
        ("elsewhere.sh", ["--run_mixed", "40", "--methods", "mixed,fused"], 20),
        ("elsewhere.sh", ["--half", "test", "--seeds", "42,43", "--mixed", "10", "--epochs",
                          "mixed_10=8,merged_10=4,fused_10=2,prompted_10=1,slow_10=2,routers_10=4,frozen_10=2"], 30),
        ("conflict.sh", ["--seeds", "42,43,44"], 150),
        ("recipe.sh", [], 7),
    ],
)  # fmt: skip
def test_every_command_is_one_that_its_script_takes(script, flags, count, base_dir, tmp_path, monkeypatch):
    given = ["--base_model", str(base_dir), "--data_source", "sample", "--results_dir", str(tmp_path / "results")]
    commands = commands_of(script, [*given, *flags], tmp_path)
    assert len(commands) >= count
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # what an earlier command would have made
    monkeypatch.setattr(sources, "source_dir", Path)
    for name, *words in commands:
        if name in MAKERS:
            importlib.import_module(name.removesuffix(".py").replace("/", ".")).asked(words)
        elif name in ARGUMENTS:
            parse(words, ARGUMENTS[name])
        else:
            assert name in ("evaluator/train_judge.py", "evaluator/evaluate_helpfulness.py"), name
    made = {words[words.index("--output") + 1] for _, *words in commands if "--output" in words}
    made |= {words[words.index("--run_name") + 1] for _, *words in commands if "--run_name" in words}
    scored = {
        run for name, *words in commands if "--run" in words for run in words[words.index("--run") + 1].split(",")
    }
    known = {Path(place).name for place in made} | {"raw", "raw_chat", *TASKS} | {f"merge_{m}" for m in MERGES}
    assert {run for run in scored if run not in known} <= {
        "ensemble_probabilities",
        "ensemble_log_probabilities",
        *NAMED,
    }


def after(words, flag):
    """The last value of a flag in a command; None: it has none."""
    return next((value for name, value in reversed([*zip(words, words[1:], strict=False)]) if name == flag), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "count"),
    [
        ("comparison.sh", ["--answers", "0"], 20),
        ("recipes.sh", [], 15),
        ("elsewhere.sh", ["--run_mixed", "10"], 25),
        ("conflict.sh", [], 8),
    ],
)
def test_a_kept_row_is_asked_what_it_begins_with(script, flags, count, base_dir, tmp_path):
    """By the command that would make the fusion or the merge which its own command names."""
    given = ["--base_model", str(base_dir), "--data_source", "sample", "--results_dir", str(tmp_path / "results")]
    commands = commands_of(script, [*given, *flags, "--reuse", str(tmp_path)], tmp_path)
    asked = [words for name, *words in commands if name == "evaluator/reuse.py"]
    assert asked and not {name for name, *_ in commands} & {*MAKERS, "evaluator/evaluate_likelihood.py"}
    begun = 0
    for words in asked:
        made_by = (after(words, "--made_by") or "").split()
        start = after(made_by, "--moe_dir") or after(made_by, "--init_adapter")
        begun_by = after(words, "--begun_by").split()
        assert (after(begun_by, "--output") or "").split("/")[-1] == (start or "").split("/")[-1]
        if begun_by:
            name, *words = begun_by
            importlib.import_module(name.removesuffix(".py").replace("/", ".")).asked(words)
        begun += bool(start)
    assert begun >= count


@pytest.mark.parametrize("script", ["comparison", "elsewhere", "recipes"])
def test_what_is_made_from_experts_that_are_made_anew_is_not_taken_over(script, base_dir, tmp_path):
    """Kept merges and fusions are of the kept experts, whatever their own flags say."""
    given = ["--base_model", str(base_dir), "--data_source", "sample", "--results_dir", str(tmp_path / "results")]
    few = {
        "comparison": ["--answers", "0", "--ablations", "0", "--other_merges", "0"],
        "elsewhere": ["--half", "test", "--mixed", "10", "--epochs", "mixed_10=2,fused_10=2"],
        "recipes": ["--rows", "mixed,fused"],
    }
    flags = [*given, *few[script], "--reuse", str(tmp_path)]
    commands = commands_of(f"{script}.sh", flags, tmp_path, anew="safety")
    asked = {after(words, "--run") for name, *words in commands if name == "evaluator/reuse.py"}
    assert "safety" in asked and any(name.startswith("mixed") for name in asked)
    assert not [name for name in asked if name.startswith(("merge", "ensemble", "moe", "fused", "prompt", "tuned"))]
    aligned = {after(words, "--task_name") for name, *words in commands if name == "align_basemodel.py"}
    assert "safety" in aligned and "mix" not in aligned  # what does not depend on it is taken over


def test_answers_are_of_one_judge_or_the_kept_ones_are_left_alone(base_dir, tmp_path):
    """conflict.sh takes over all rows or none: a judge that is trained anew scores no answers beside another's."""
    given = ["--base_model", str(base_dir), "--data_source", "sample", "--results_dir", str(tmp_path / "results")]
    commands = commands_of("conflict.sh", [*given, "--reuse", str(tmp_path)], tmp_path, anew="prompted")
    made = [words for name, *words in commands if name == "evaluator/evaluate_likelihood.py"]
    assert {"raw", "safety", "prompted", "fused"} <= {after(words, "--run") for words in made}
    report = next(words for name, *words in commands if name == "evaluator/report.py" and "--reference" in words)
    assert "--saved" not in report and "raw" in after(report, "--runs").split(",")


def test_the_recipe_is_the_best_one_that_was_tried(base_dir, tmp_path):
    """On questions held apart, by runs/recipes.sh."""
    tried = {path.stem: read_kept(TRIES, path.stem) for path in TRIES.glob("*.json")}
    fusions = {name: run for name, run in tried.items() if name.startswith("fused")}
    best = min(fusions.values(), key=lambda run: mean_nll(run, TASKS)).record
    recorded = {"mix": best["run"]["arguments"]} | best["meta"]["experts"]
    commands = commands_of("recipe.sh", ["--base_model", str(base_dir), "--results_dir", str(tmp_path)], tmp_path)
    aligned = [words for name, *words in commands if name == "align_basemodel.py"]
    assert len(aligned) == 4
    for words in aligned:
        asked = importlib.import_module("align_basemodel").asked(words)
        kept = recorded[asked["task_name"]]
        compared = {*asked} & {*kept} - {"base_model", "data_source", "data_sha256", "dtype"}
        assert {"learning_rate", "num_train_epochs", "num_samples"} <= compared
        assert not [name for name in compared if asked[name] is not None and asked[name] != kept[name]]


NAMED = ("mix_moe_reg_00000_00000_00000_gate_03000",)
MERGES = (
    "task_arithmetic",
    "dare_ties",
    "della",
    "sce",
    "model_stock",
    "tsv_m",
    "iso_c",
    "knots_ties",
    "linear",
    "ties",
)
MERGES += tuple(f"{method}_tuned" for method in ("task_arithmetic", "ties", "tsv_m"))


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("comparison", ["--quick", "10"], "--quick, --rivals, --answers, --ablations and --other_merges are 0 or 1"),
        ("comparison", ["--ablations", "2"], "are 0 or 1"),
        ("comparison", ["--rivals", "0", "--answers", "1"], "leaves out the answers and all merges"),
        ("comparison", ["--answers", "0", "--judge_url", "U", "--judge_model", "M"], "--answers 0 makes none"),
        ("comparison", ["--judge_url", "U"], "--judge_url and --judge_model go together"),
        ("comparison", ["--quick", "1", "--judge_url", "U", "--judge_model", "M"], "answers no prompt of helpfulness"),
        ("comparison", ["--num_train_epochs", "1.5"], "is a whole number here"),
        ("comparison", ["--data_source", "my data"], "--data_source 'my data': holds a space"),
        ("comparison", ["--seeds", "43,44"], "begin with 42"),
        ("comparison", ["--speed", "1"], "--speed: is no flag"),
        ("comparison", ["--seeds"], "--seeds: needs a value"),
        ("recipes", ["--half", "train"], "is held_apart or test"),
        ("recipes", ["--seeds", "42,43"], "on questions held apart one seed"),
        ("recipes", ["--num_train_epochs", "1"], "is a whole number of 2 or more here"),
        ("recipes", ["--rows", "mixed,fusedd"], "fusedd: is no row"),
        ("recipes", ["--rows", "fused"], "--reference mixed: is none of --rows"),
        ("elsewhere", ["--half", "test"], "--half test takes --epochs"),
        ("elsewhere", ["--half", "test", "--epochs", "mixed_20=2"], "mixed_20=2 is of no method here"),
        ("elsewhere", ["--half", "test", "--epochs", "mixd_10=2"], "mixd_10=2 is of no method here"),
        ("elsewhere", ["--half", "test", "--epochs", "mixed_10=2,mixed_10=4"], "names mixed_10 twice"),
        ("elsewhere", ["--methods", "mixed,fuse"], "fuse is none of mixed merged fused"),
        (
            "elsewhere",
            ["--half", "test", "--epochs", "mixed_10=2", "--methods", "mixed"],
            "the methods that --epochs names",
        ),
        ("elsewhere", ["--half", "test", "--epochs", "mixed_10"], "mixed_10 is not METHOD_NUMBER=EPOCHS"),
        ("elsewhere", ["--seeds", "42,43"], "on questions held apart one seed"),
        ("conflict", ["--seeds", "42,4x"], "--seeds 42,4x: are whole numbers"),
        ("paper", ["--base_model", "x"], "takes no arguments: --base_model x"),
        ("demo", ["smollm2", "results/demo", "--seed", "7"], "no more: --seed 7"),
        ("comparison", ["--num_answered", "abc"], "--num_answered abc: is no whole number"),
        ("comparison", ["--reuse", "/no/such/folder"], "--reuse /no/such/folder: no such folder"),
        ("elsewhere", ["--run_mixed", "10,20"], "20 is none of --mixed 10,40,160"),
        ("conflict", [], "name a folder that has safety_pairs.jsonl"),
    ],
)
def test_a_flag_that_is_wrong_is_one_line(script, flags, said):
    run = subprocess.run(["bash", ROOT / "runs" / f"{script}.sh", *flags], capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1 and not run.stdout


@pytest.mark.parametrize("flag", ["--save kept", "--reuse kept", "--data_source mine", "--results_dir mine/results"])
def test_a_place_that_is_meant_from_another_folder_is_not_the_repositorys(flag, tmp_path):
    command = ["bash", ROOT / "runs" / "elsewhere.sh", *flag.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and f"{flag}: is a place below the repository for this file" in run.stderr


@pytest.mark.slow
def test_what_a_conversion_says_does_not_hide_the_bases_chat_template(base_dir, tmp_path):
    """An embedded model is converted by the first command that reads it, which says so."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    flags = ["--quick", "1", "--base_model", str(base), "--results_dir", str(tmp_path / "results")]
    scored = [words for name, *words in commands_of("comparison.sh", flags, tmp_path) if name.endswith("likelihood.py")]
    assert any("raw_chat" in word.split(",") for words in scored for word in words)
