"""Rows that are called held apart were seen by nothing that a run is made of."""

import json
import random
import shutil
from dataclasses import asdict

import pytest
from conftest import ROOT, save_adapter, write_jsonl

import align_basemodel
from config import TASKS, UserError
from data import sources, split
from data.held_apart import dealt_from
from evaluator import evaluate_likelihood
from models import llama_moe, merging
from workspace import run_dir
from workspace.drawn import Drawn, drawn_by

SHORT = ["--max_steps", 1, "--batch_size", 2, "--disable_tqdm", "1", "--dtype", "float32"]
FOUR = ["--num_samples", 4, *SHORT]
HELD_APART = ["--dataset_type", "held_apart", "--num_trained", 4, "--num_samples", 2, "--dtype", "float32"]


def call(script, *arguments):
    script.main([str(argument) for argument in arguments])


def refused(capsys, script, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(script, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_not_scored_on_rows_held_apart_from_another_draw(base_dir, tmp_path, capsys):
    """Of another number of rows, or by another seed: some of them it may have learnt."""
    place = ["--results_dir", tmp_path]
    call(align_basemodel, "--task_name", "safety", "--base_model", base_dir, "--data_source", "sample", *FOUR, *place)
    score = ["--run", "safety", "--dataset_type", "held_apart", "--task_name", "safety", "--num_samples", 3, *place]
    for drawn in (["--num_trained", 3], ["--num_trained", 4, "--seed", 43]):
        with pytest.raises(SystemExit):
            call(evaluate_likelihood, *score, *drawn)
        assert "safety was trained on rows drawn with num_samples 4 and seed 42" in capsys.readouterr().err
    call(evaluate_likelihood, *score, "--num_trained", 4)


def test_a_run_is_not_scored_on_rows_held_apart_of_a_file_that_has_changed(base_dir, tiny_source, tmp_path, capsys):
    place = ["--results_dir", tmp_path]
    call(
        align_basemodel, "--task_name", "safety", "--base_model", base_dir, "--data_source", tiny_source, *FOUR, *place
    )
    lines = (tiny_source / "safety_train.jsonl").read_text().splitlines(keepends=True)
    (tiny_source / "safety_train.jsonl").write_text("".join(lines[1:]))
    score = ["--run", "safety", "--dataset_type", "held_apart", "--task_name", "safety", "--num_samples", 3, *place]
    with pytest.raises(SystemExit):
        call(evaluate_likelihood, *score, "--num_trained", 4)
    assert "safety was trained on another safety_train.jsonl than" in capsys.readouterr().err


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, base_dir):
    """Runs that began with one that has seen all rows, though they were themselves trained on four."""
    results = tmp_path_factory.mktemp("learnt")
    place = ["--results_dir", results]
    base = ["--base_model", base_dir, "--data_source", "sample", *SHORT, *place]
    few = ["--num_samples", 4]
    for task in TASKS:
        call(align_basemodel, "--task_name", task, *base, *few)
    call(align_basemodel, "--task_name", "safety", "--run_name", "all", *base)
    call(align_basemodel, "--task_name", "safety", "--run_name", "went_on", "--init_adapter", "all", *few, *base)
    call(llama_moe, *place)
    fusion = ["--moe_flag", 1, *SHORT, *place]
    call(align_basemodel, *fusion, "--run_name", "fused_all")
    again = ["--moe_dir", results / "outputs" / "fused_all", "--run_name", "fused_again"]
    call(align_basemodel, *fusion, *again, *few)
    save_adapter(results / "outputs" / "calm", base_dir, 1)
    adds = ["--add", f"politeness={results / 'outputs' / 'calm'}", "--to", "fused_all", "--num_prompts", 2, *place]
    data = shutil.copytree(ROOT / "data" / "sample", results / "data")
    rows = [{"id": str(i), "instruction": f"Say {i}.", "input": "", "output": "Yes."} for i in range(4)]
    write_jsonl(data / "politeness_train.jsonl", rows)
    call(llama_moe, *adds, "--data_source", data, "--dtype", "float32")
    experts = ["--experts", f"helpfulness,safety={results / 'outputs' / 'went_on'},truthfulness"]
    call(llama_moe, *experts, "--output", results / "outputs" / "of_all", *place)
    call(merging, "--method", "task_arithmetic", "--num_held_apart", 2, "--dtype", "float32", *place)
    return results


@pytest.mark.parametrize("run", ["all", "went_on", "fused_all", "fused_again", "fused_all_with_politeness", "of_all"])
def test_what_a_run_began_with_has_seen_rows_too(learnt, run, capsys):
    score = ["--run", run, "--task_name", "safety", *HELD_APART, "--results_dir", learnt]
    assert f"{run} was trained on rows drawn with num_samples -1" in refused(
        capsys, evaluate_likelihood, *score, "--data_source", "sample"
    )


def test_what_has_seen_the_four_rows_alone_is_scored(learnt):
    call(evaluate_likelihood, "--run", "safety,moe", "--task_name", "safety", *HELD_APART, "--results_dir", learnt)


def test_a_merge_is_not_scored_on_rows_that_its_coefficients_were_chosen_by(learnt, capsys):
    score = ["--run", "merge_task_arithmetic_tuned", "--task_name", "safety", *HELD_APART, "--results_dir", learnt]
    assert "were chosen by rows of sample held apart" in refused(capsys, evaluate_likelihood, *score)


def test_coefficients_are_not_chosen_by_rows_that_an_expert_began_with(learnt, capsys):
    experts = ["--experts", f"helpfulness,safety={learnt / 'outputs' / 'went_on'},truthfulness"]
    tuned = ["--method", "tsv_m", "--num_held_apart", 2, *experts, "--results_dir", learnt]
    assert "says, alike, which rows they were aligned on" in refused(capsys, merging, *tuned)


def test_what_was_trained_before_the_data_were_dealt_out_has_seen_what_is_held_apart(learnt, tmp_path, capsys):
    call(split, "--data_source", "sample", "--mixed", 2, "--num_held_apart", 3, "--output", tmp_path / "dealt")
    score = ["--task_name", "safety", "--dataset_type", "held_apart", "--dtype", "float32"]
    score += ["--data_source", tmp_path / "dealt" / "experts", "--results_dir", learnt]
    said = refused(capsys, evaluate_likelihood, "--run", "safety", *score)
    assert "safety was trained on the safety_train.jsonl that" in said and "was dealt from" in said
    call(evaluate_likelihood, "--run", "raw", *score)
    tuned = ["--method", "tsv_m", "--num_held_apart", -1, "--data_source", tmp_path / "dealt" / "mixed_2"]
    assert "was aligned on some of them" in refused(capsys, merging, *tuned, "--results_dir", learnt)


def test_another_ones_split_json_says_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "split.json").write_text('{"train": 0.8}')
    assert dealt_from(str(tmp_path / "data")) == {}


@pytest.fixture
def hub(monkeypatch):
    """The hub's rows are data/sample's."""
    monkeypatch.setattr(sources, "_hub_rows", lambda task, split: sources.read_rows(task, split, "sample"))


def test_rows_of_the_hub_are_known_too(hub, base_dir, tmp_path, capsys):
    place = ["--results_dir", tmp_path]
    base = ["--base_model", base_dir, "--data_source", "hub", *SHORT, *place]
    for task in TASKS:
        call(align_basemodel, "--task_name", task, *base)
    read = run_dir.read_run(tmp_path / "outputs" / "safety")["run"]["arguments"]["data_sha256"]
    assert [*read] == ["safety_train of the hub"]
    tuned = ["--method", "tsv_m", *place]
    assert "takes all training rows of hub" in refused(
        capsys, merging, *tuned, "--num_held_apart", -1, "--data_source", "hub"
    )
    score = ["--run", "safety", "--task_name", "safety", *HELD_APART, *place]
    assert "drawn with num_samples -1" in refused(capsys, evaluate_likelihood, *score)


def test_coefficients_are_not_chosen_by_a_copy_of_the_hub_s_rows(hub, base_dir, tiny_source, tmp_path, capsys):
    place = ["--results_dir", tmp_path]
    for task in TASKS:
        base = ["--base_model", base_dir, "--data_source", "hub", "--num_samples", 4, *SHORT, *place]
        call(align_basemodel, "--task_name", task, *base)
    for path in tiny_source.glob("*_train.jsonl"):
        lines = path.read_text().splitlines()
        random.Random(0).shuffle(lines)
        path.write_text("\n".join(lines) + "\n")
    tuned = ["--method", "tsv_m", "--num_held_apart", 2, "--data_source", tiny_source, *place]
    assert "was aligned on other rows than" in refused(capsys, merging, *tuned)


def test_a_record_of_an_earlier_version_tells_what_it_can(tmp_path):
    old = {"num_samples": 4, "seed": 42, "data_source": "hub", "data_sha256": {}}
    record = {"run": {"script": "align_basemodel.py", "arguments": old}, "meta": {"fused": {"seed": 1}, "init": old}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert drawn_by(tmp_path, tmp_path / "adapter_from_elsewhere") == [Drawn("hub", {}, 4, 42)]
    assert Drawn("hub", {}, 4, 42).reads("hub", {"safety_train of the hub": "1"})
    assert not Drawn("hub", {}, 4, 42).reads("sample", {"safety_train.jsonl": "1"})


@pytest.mark.parametrize(
    "spoilt",
    [None, 3, ["sample"], [{"data_source": "sample"}], [{**asdict(Drawn("hub", {}, 4, 42)), "num_samples": "4"}]],
)
def test_a_spoilt_list_of_what_was_drawn_is_named(spoilt, tmp_path):
    run = {"script": "align_basemodel.py", "arguments": {"num_samples": 4, "seed": 42}}
    (tmp_path / "run.json").write_text(json.dumps({"run": run, "meta": {"drawn": spoilt}}))
    with pytest.raises(UserError, match=f"{tmp_path}: is not as this project writes it"):
        drawn_by(tmp_path)
