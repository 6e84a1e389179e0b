"""Folders of runs that somebody has edited by hand, and what a server might say."""

import json
import shutil

import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

import align_basemodel
import inference
from config import TASKS
from evaluator import evaluate_likelihood, evaluate_safety, evaluate_truth_and_info, report, select_answers, train_judge
from fuzz.harness import FUZZ, JSON, TEXTS, mutated, numbers_are_finite, outcome
from models import export, llama_moe

pytestmark = pytest.mark.slow

SHORT = ["--max_steps", 2, "--batch_size", 2, "--num_samples", 6, "--disable_tqdm", 1, "--dtype", "float32"]
ANSWERING = ["--num_samples", 2, "--max_new_tokens", 3, "--dtype", "float32"]
FUSED = "mix_moe_reg_00000_00000_00000_gate_01000"


def call(script, *argv):
    script.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def results(tmp_path_factory, judge_base_dir):
    """A results folder with each kind of thing in it."""
    folder = tmp_path_factory.mktemp("folders")
    place = ["--results_dir", folder]
    for task in TASKS:
        call(
            align_basemodel,
            "--task_name",
            task,
            "--base_model",
            judge_base_dir,
            "--data_source",
            "sample",
            *SHORT,
            *place,
        )
    call(llama_moe, *place)
    call(align_basemodel, "--moe_flag", 1, "--gate_loss_weight", 0.1, *SHORT, *place)
    for run in ("safety", FUSED):
        call(inference, "--cross_task", run, "--task_name", "safety", *ANSWERING, *place)
    call(train_judge, "--kind", "safety", "--base_model", judge_base_dir, "--data_source", "sample", *SHORT[:4],
         "--num_samples", 12, "--num_held_out", 8, "--disable_tqdm", 1, "--dtype", "float32", *place)  # fmt: skip
    call(
        evaluate_safety,
        "--task_name",
        "cross_safety",
        "--judge",
        folder / "judges" / "safety",
        "--dtype",
        "float32",
        *place,
    )
    call(evaluate_likelihood, "--run", f"safety,{FUSED}", "--num_samples", 2, "--dtype", "float32", *place)
    return folder


def edited_files(results) -> list[str]:
    """What a person may edit: every JSON and jsonl file that the commands wrote."""
    files = [path for path in results.rglob("*.json*") if "lock" not in path.name and "checkpoint-" not in str(path)]
    return sorted(str(path.relative_to(results)) for path in files if "tokenizer" not in path.name)


def commands(results) -> list[tuple]:
    judge = results / "judges" / "safety"
    return [
        (align_basemodel.main, "--moe_flag", 1, "--gate_loss_weight", 0.1, *SHORT),
        (llama_moe.main, "--output", results / "outputs" / "again"),
        (export.main, "--cross_task", FUSED, "--output", results / "export", "--verify", 0),
        (inference.main, "--cross_task", FUSED, "--task_name", "safety", *ANSWERING),
        (inference.main, "--cross_task", FUSED, "--task_name", "helpfulness", *ANSWERING),
        (evaluate_likelihood.main, "--run", f"safety,{FUSED}", "--num_samples", 2, "--dtype", "float32"),
        (evaluate_safety.main, "--task_name", "cross_safety", "--judge", judge, "--dtype", "float32"),
        (evaluate_safety.main, "--task_name", f"cross_{FUSED}", "--judge", judge, "--dtype", "float32"),
        (select_answers.main, "--task_name", "safety", "--answers", f"cross_safety,cross_{FUSED}"),
        (report.main, "--runs", f"safety,{FUSED}", "--reference", FUSED, "--show_answers", results),
    ]


@FUZZ
@given(data=st.data())
def test_folders_of_runs_edited_by_hand(data, results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited") / "results"
    shutil.copytree(results, folder)
    path = folder / data.draw(st.sampled_from(edited_files(results)))
    if data.draw(st.integers(0, 9)) == 0:
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[data.draw(st.integers(0, len(rows) - 1))] = mutated(data.draw, rows[0])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(mutated(data.draw, json.loads(path.read_text()))))
    for main, *argv in data.draw(st.lists(st.sampled_from(commands(folder)), min_size=2, max_size=3)):
        outcome(main, *argv, "--results_dir", folder)
    shutil.rmtree(folder.parent)


TOKENS = st.sampled_from([" yes", " no", "a"])
BODIES = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    st.dictionaries(
        st.sampled_from(["id", "object", "choices", "model", "usage", "error", "created"]),
        st.one_of(
            JSON,
            st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "text": st.one_of(TEXTS, JSON),
                        "index": JSON,
                        "finish_reason": st.one_of(st.sampled_from(["stop", "length", None]), JSON),
                        "message": st.one_of(st.fixed_dictionaries({"content": st.one_of(TEXTS, JSON)}), JSON),
                        "logprobs": st.one_of(
                            JSON,
                            st.fixed_dictionaries(
                                {
                                    "top_logprobs": st.one_of(
                                        JSON,
                                        st.lists(st.dictionaries(TOKENS, JSON), max_size=2),
                                    )
                                }
                            ),
                        ),
                    },
                ),
                max_size=2,
            ),
        ),
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


@pytest.mark.parametrize("asked", ["answers", "truth", "guard"])
@FUZZ
@given(body=BODIES)
def test_what_a_server_says(asked, body, results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(results / "inference", folder / "inference")
    truth = folder / "inference" / "truthfulness" / "test"
    shutil.copytree(folder / "inference" / "safety" / "test", truth)
    for path in truth.glob("*/outputs.jsonl"):
        path.write_text(path.read_text().replace('"task": "safety"', '"task": "truthfulness"'))
    with FakeServer(lambda request: {}) as server:
        server.faults[:] = [body] * 200
        served = ["--concurrency", 1]
        main, *argv = {
            "answers": (inference.main, "--task_name", "safety", "--cross_task", "served", "--data_source", "sample",
                        "--server_url", server.url, "--server_model", "m", "--num_samples", 2),
            "truth": (evaluate_truth_and_info.main, "--task_name", "cross_safety", "--mode", 0, "--judge", "m",
                      "--judge_url", server.url),
            "guard": (evaluate_safety.main, "--task_name", "cross_safety", "--judge", "m",
                      "--judge_protocol", "wildguard", "--judge_url", server.url),
        }[asked]  # fmt: skip
        outcome(main, *argv, *served, "--results_dir", folder)
    numbers_are_finite(folder)
    shutil.rmtree(folder)
