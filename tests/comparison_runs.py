"""A small comparison, made by the commands themselves, for the tests of its numbers and of its page."""

import json

import pytest
from conftest import run_script

import align_basemodel
import inference
from config import TASKS
from evaluator import evaluate_likelihood, report, select_answers
from models import ensemble, llama_moe, merging

SHORT = ["--max_steps", "4", "--batch_size", "4", "--num_samples", "8", "--disable_tqdm", "1", "--dtype", "float32"]
FUSED = "mix_moe_reg_00000_00000_00000_gate_01000"
RUNS = ["raw", *TASKS, "mixed", "mixed_seed_43", "merge_linear", "merge_iso_c", "ensemble_probabilities", "moe", FUSED]
FUSIONS = [FUSED, "mix_moe_reg_00000_00000_00000_gate_05000"]


def call(script, *arguments):
    script.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory, base_dir):
    """A small comparison, by the commands themselves."""
    results = tmp_path_factory.mktemp("comparison")
    place = ["--results_dir", results]
    base = ["--base_model", base_dir, "--data_source", "sample", *SHORT, *place]
    for task in TASKS:
        call(align_basemodel, "--task_name", task, *base)
    for seed, name in ((42, "mixed"), (43, "mixed_seed_43")):
        call(align_basemodel, "--task_name", "mix", "--rank", 24, "--run_name", name, "--seed", seed, *base)
    call(merging, "--method", "linear", *place)
    assert run_script("models/merging.py", "--method", "iso_c", *place).returncode == 0  # whose command is recorded
    call(ensemble, *place)
    call(llama_moe, *place)
    for gate in (0.1, 0.5):
        call(align_basemodel, "--moe_flag", 1, "--gate_loss_weight", gate, "--logging_steps", 1, *SHORT, *place)
    scored = ",".join([*RUNS, FUSIONS[1]])
    call(evaluate_likelihood, "--run", scored, "--num_samples", 6, "--dtype", "float32", *place)
    answer = ["--task_name", "safety", "--num_samples", 3, "--max_new_tokens", 5, "--dtype", "float32", *place]
    for run in (*TASKS, FUSED):
        call(inference, "--cross_task", run, *answer)
    call(inference, "--aligned_flag", 0, "--base_model", base_dir, "--data_source", "sample", *answer)
    answers = ",".join(f"cross_{task}" for task in TASKS)
    call(select_answers, "--task_name", "safety", "--answers", answers, *place)
    return results


@pytest.fixture(scope="module")
def table(results):
    write_report(results)
    return json.loads((results / "report" / "table.json").read_text())


def write_report(results):
    runs = ",".join([*RUNS, FUSIONS[1], "consensus"])
    call(report, "--runs", runs, "--reference", FUSED, "--show_answers", results, "--results_dir", results)


def row_of(table, run):
    return next(row for row in table["rows"] if row["run"] == run)


def write_verdicts(results, run, judge, version, values, directory=None):
    folder = results / "evaluation" / "safety" / "test" / (directory or f"cross_{run}") / judge
    folder.mkdir(parents=True)
    judgements = [{"metric": "flagged", "id": f"q{i}", "value": value} for i, value in enumerate(values)]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judgements))
    read = [value for value in values if value is not None]
    metric = {"value": sum(read) / len(read), "n": len(read), "interval": None, "unit": "share"}
    scores = {"run": run, "judge": {"name": judge, "version": version}, "metrics": {"flagged": metric}}
    (folder / "metrics.json").write_text(json.dumps(scores))
    (folder / "run.json").write_text('{"run": {"script": "evaluate_safety.py", "arguments": {}}}')
    return folder
