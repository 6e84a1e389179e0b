"""The comparison of whole runs: its numbers against the judgements they come from."""

import copy
import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
from comparison_runs import FUSED, FUSIONS, RUNS, call, results, row_of, table, write_verdicts
from safetensors.torch import load_file, save_file

from config import TASKS, UserError
from evaluator import comparison, report
from evaluator.kept_runs import read_kept, what_is_lost, without_places
from evaluator.metrics import JUDGED
from evaluator.page_words import base_name, verdict
from evaluator.results_folder import cost_of_run, read_run_scores, read_usage
from evaluator.run_scores import Result, RunScores, check_score
from evaluator.sweeps import Alike

__all__ = ["results", "table"]  # fixtures


def test_seconds_are_said_to_be_of_the_machines_that_they_are_of(results):
    runs = {name: read_run_scores(results, name, "test", None) for name in ("helpfulness", "safety", FUSED)}
    device = runs["safety"].record["meta"]["device"]
    assert report.cost_table(runs).count(f"on {device}; torch ") == 1
    elsewhere = runs["safety"].record | {"meta": runs["safety"].record["meta"] | {"device": "a GPU"}}
    said = report.cost_table(runs | {"safety": replace(runs["safety"], record=elsewhere)})
    assert f"on {device}; torch " in said and f"(helpfulness, {FUSED})" in said
    assert "On a GPU; torch " in said and "(safety)." in said


def test_near_duplicates_are_of_the_test_half(results, capsys):
    command = ["--runs", "raw", "--data_source", "sample", "--results_dir", results]
    with pytest.raises(SystemExit):
        call(report, *command, "--dataset_type", "held_apart")
    assert "--data_source: near-duplicates are counted" in capsys.readouterr().err


def test_every_run_is_a_row_of_its_kind(table):
    kinds = {row["run"]: row["kind"] for row in table["rows"]}
    expected = {"raw": "raw", **dict.fromkeys(TASKS, "expert"), "mixed": "mixed", "merge_linear": "merge"}
    expected |= {"merge_iso_c": "merge", "ensemble_probabilities": "ensemble", "moe": "fused", "consensus": "ensemble"}
    assert kinds == expected | dict.fromkeys(FUSIONS, "fused")
    assert table["reference"] == FUSED and row_of(table, FUSED)["paired"] == {}
    assert row_of(table, "consensus")["metrics"]["mean_nll_per_token"] is None  # what selects has no likelihood
    assert row_of(table, "mixed")["seeds"] == [42, 43] and row_of(table, "raw")["seeds"] == []


def items(results, run, task):
    path = results / "evaluation" / task / "test" / run / "likelihood" / "judgements.jsonl"
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["metric"] == "nll_per_token"]


def test_the_numbers_are_those_of_the_judgements(results, table):
    def nll(run, task):
        rows = items(results, run, task)
        return -sum(row["log_prob"] for row in rows) / sum(row["tokens"] for row in rows)

    for run in ("raw", "merge_linear", FUSED):
        metrics = row_of(table, run)["metrics"]
        for task in TASKS:
            assert metrics[f"{task}_nll_per_token"]["value"] == pytest.approx(nll(run, task))
        assert metrics["mean_nll_per_token"]["value"] == pytest.approx(sum(nll(run, task) for task in TASKS) / 3)
        assert metrics["mean_nll_per_token"]["higher_is_better"] is False
    of_seeds = [sum(nll(run, task) for task in TASKS) / 3 for run in ("mixed", "mixed_seed_43")]
    mixed = row_of(table, "mixed")["metrics"]["mean_nll_per_token"]
    assert mixed["of_seeds"] == pytest.approx(of_seeds) and mixed["value"] == pytest.approx(sum(of_seeds) / 2)
    difference = row_of(table, "raw")["paired"]["safety_nll_per_token"]["difference"]
    assert difference == pytest.approx(nll(FUSED, "safety") - nll("raw", "safety"))


def test_the_answer_tells_rivals_from_the_other_fusions():
    def row(run, kind, difference=None, p_holm=None, width=0.01):
        interval = None if difference is None else [difference - width, difference + width]
        of_mean = {"difference": difference, "interval": interval, "p_holm": p_holm}
        paired = {"mean_nll_per_token": of_mean} if p_holm is not None else {}
        return {"run": run, "kind": kind, "metrics": dict.fromkeys(paired, {}), "paired": paired}

    rows = [row("fused", "fused"), row("raw", "raw", -0.8, 0.001), row("mixed", "mixed", 0.1, 0.049)]
    assert verdict({"reference": "fused", "rows": rows}) == (
        "By the likelihood of held-out answers the fused model (fused) is better than 1 of 2 rivals, and worse than "
        "mixed (paired, p < 0.05 after Holm's correction and an interval without 0)."
    )
    rows += [row("top_1", "fused", -0.1, 0.001), row("top_3", "fused", -0.1, 0.05), row("consensus", "ensemble")]
    rows += [row("frozen", "fused", -0.1, 0.001, width=0.11)]
    assert verdict({"reference": "fused", "rows": rows}) == (
        "By the likelihood of held-out answers the fused model (fused) is better than 1 of 2 rivals, and worse than "
        "mixed; and better than 1 of 3 other fusions, and not certainly better or worse than top_3, frozen "
        "(paired, p < 0.05 after Holm's correction and an interval without 0)."
    )
    assert verdict({"reference": "mixed", "rows": [row("mixed", "mixed"), row("mixed_8", "mixed", -0.1, 0.01)]}) == (
        "By the likelihood of held-out answers mixed is better than 1 of 1 other mixed runs "
        "(paired, p < 0.05 after Holm's correction and an interval without 0)."
    )
    assert "no likelihoods" in verdict({"reference": "fused", "rows": [row("fused", "fused")]})
    of_other_seeds = {**row("safety", "expert"), "metrics": {"mean_nll_per_token": {}}}
    assert "Not compared, having no seed in common with it: safety." in verdict(
        {"reference": "fused", "rows": [*rows, of_other_seeds]}
    )
    alone = [{**one, "paired": {}, "metrics": {"mean_nll_per_token": {}}} for one in rows[:2]]
    assert "no two rows of one seed" in verdict({"reference": "fused", "rows": alone})


@pytest.mark.parametrize(("variants", "count"), [(False, 8), (True, 2)])
def test_p_is_corrected_over_the_rivals_and_apart_from_them_over_the_other_fusions(table, variants, count):
    tested = [
        row["paired"]["mean_nll_per_token"]
        for row in table["rows"]
        if "mean_nll_per_token" in row["paired"] and (row["kind"] == "fused") == variants
    ]
    assert len(tested) == count
    smallest = min(tested, key=lambda difference: difference["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, count * smallest["p"]))
    assert all(difference["p"] <= difference["p_holm"] <= 1 for difference in tested)


def test_what_each_run_costs(results, table):
    expert, merged, fused = (row_of(table, run)["cost"] for run in ("safety", "merge_linear", FUSED))
    assert expert["trained_parameters"] == 3 * 3 * 8 * 80 and expert["optimiser_steps"] == 4
    assert merged["trained_parameters"] is None and merged["bytes_on_disk"] > expert["bytes_on_disk"]
    assert fused["new_tokens_per_second"] > 0 and row_of(table, "raw")["cost"]["new_tokens_per_second"] > 0
    assert merged["new_tokens_per_second"] is None
    # the tiny base: 3 layers of 32 wide, 48 in the FFN, 4 heads of 8 and 2 of keys and values, 600 words
    dense = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 600 * 32
    low_rank = 3 * 3 * 8 * (32 + 48)  # of one expert of rank 8
    of_token = {row["run"]: row["cost"]["relative_cost_of_a_token"] for row in table["rows"]}
    assert of_token["raw"] == of_token["safety"] == of_token["mixed"] == of_token["merge_linear"] == 1
    assert of_token[FUSED] == pytest.approx((dense + 2 * low_rank + 3 * 32 * 3) / dense)
    assert of_token["ensemble_probabilities"] == pytest.approx(3 * (dense + low_rank) / dense)
    assert of_token["consensus"] == 3


def test_the_raw_base_has_no_record_though_it_has_answered(results, table):
    """Selected answers have theirs under the run's own name, as the raw base has its answers."""
    assert read_run_scores(results, "raw", "test").record is None
    assert read_run_scores(results, "consensus", "test").record["run"]["script"] == "select_answers.py"


def test_speed_is_the_mean_of_the_answers_that_have_one(tmp_path):
    for task, speed in (("helpfulness", 10.0), ("safety", None), ("truthfulness", 20.0)):
        folder = tmp_path / "inference" / task / "test" / "cross_x"
        folder.mkdir(parents=True)
        run = {"script": "inference.py", "arguments": {}}
        (folder / "run.json").write_text(
            json.dumps({"run": run, "train": {"new_tokens_per_second": speed}, "meta": {}})
        )
    assert cost_of_run(tmp_path, "x", None, "test")["new_tokens_per_second"] == 15.0


def test_seconds_are_of_the_seeds_that_the_first_seeds_device_made():
    costs = {42: ("one", 10.0), 43: ("two", 90.0), 44: ("one", 20.0)}
    seeds = {
        seed: RunScores("mixed", {"meta": {"device": device}}, {"training_seconds": took, "optimiser_steps": None}, {})
        for seed, (device, took) in costs.items()
    }
    row = comparison.Row("mixed", "mixed", seeds)
    assert comparison.cost(row) == {"training_seconds": 15.0, "optimiser_steps": None}


def test_runs_that_were_scored_on_other_items_are_not_compared(results, capsys, tmp_path):
    changed = tmp_path / "results"
    for task in TASKS:
        for run in ("raw", FUSED):
            folder = results / "evaluation" / task / "test" / run / "likelihood"
            target = changed / folder.relative_to(results)
            target.mkdir(parents=True)
            for path in folder.iterdir():
                (target / path.name).write_text(path.read_text())
    (changed / "outputs" / FUSED).mkdir(parents=True)
    (changed / "outputs" / FUSED / "run.json").write_text((results / "outputs" / FUSED / "run.json").read_text())
    path = changed / "evaluation" / "safety" / "test" / "raw" / "likelihood" / "judgements.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), "id": "another"}) + "\n" + rest)
    with pytest.raises(SystemExit):
        call(report, "--runs", f"raw,{FUSED}", "--results_dir", changed)
    assert "were scored on different items (safety_nll_per_token)" in capsys.readouterr().err


def test_runs_are_compared_by_one_judge(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    command = ["--runs", f"safety,{FUSED}", "--results_dir", results]
    write_verdicts(results, "safety", "judge", "1", [1, 0, 1])
    ours = write_verdicts(results, FUSED, "judge", "1", [0, 0, 1])
    call(report, *command)
    row = row_of(json.loads((results / "report" / "table.json").read_text()), "safety")
    assert row["paired"]["flagged"]["difference"] == pytest.approx(-1 / 3)
    shutil.rmtree(ours)
    for judges, said in (
        ((("judge", "2"),), "were scored by different judges (flagged)"),
        ((("judge", "1"), ("b", "1")), "several judges"),
    ):
        for judge, version in judges:
            write_verdicts(results, FUSED, judge, version, [0, 0, 1])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            call(report, *command)
        assert said in capsys.readouterr().err
        shutil.rmtree(ours)


def test_what_an_expert_answers_without_its_name_is_its_own(results, tmp_path, capsys):
    """inference.py --task_name safety: the safety expert's, and no other's."""
    results = shutil.copytree(results, tmp_path / "results")
    shutil.move(results / "inference/safety/test/cross_safety", results / "inference/safety/test/aligned")
    write_verdicts(results, "safety", "judge", "1", [1, 0, 1], directory="aligned")
    write_verdicts(results, FUSED, "judge", "1", [0, 0, 1])
    command = ["--runs", f"helpfulness,safety,{FUSED}", "--show_answers", results, "--results_dir", results]
    call(report, *command)
    table = json.loads((results / "report" / "table.json").read_text())
    assert row_of(table, "safety")["paired"]["flagged"]["difference"] == pytest.approx(-1 / 3)
    assert "flagged" not in row_of(table, "helpfulness")["metrics"]
    assert row_of(table, "safety")["cost"]["new_tokens_per_second"] > 0
    assert "<h4>safety</h4>" in (results / "report" / "index.html").read_text()
    write_verdicts(results, "safety", "judge", "1", [1, 0, 1])
    with pytest.raises(SystemExit):
        call(report, *command)
    assert "of several answers or by several judges (cross_safety/judge, aligned/judge)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["judge_version", "judge_model", "annotator_sha256", "reference_sha256"])
def test_verdicts_of_another_rule_or_annotator_are_not_compared(results, tmp_path, capsys, name):
    results = shutil.copytree(results, tmp_path / "results")
    for run, value in (("safety", "1"), (FUSED, "2")):
        folder = write_verdicts(results, run, "judge", "1", [1, 0, 1])
        record = {"run": {"script": "evaluate_safety.py", "arguments": {name: value}}}
        (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        call(report, "--runs", f"safety,{FUSED}", "--results_dir", results)
    assert f"with {name} " in capsys.readouterr().err


def test_answers_to_other_data_are_not_compared(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    for run in ("safety", FUSED):
        write_verdicts(results, run, "judge", "1", [1, 0, 1])
    path = results / "inference" / "safety" / "test" / "cross_safety" / "run.json"
    record = json.loads(path.read_text())
    record["run"]["arguments"]["data_sha256"] = {"safety_test.jsonl": "0"}
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        call(report, "--runs", f"safety,{FUSED}", "--results_dir", results)
    assert "with answers' data_sha256 " in capsys.readouterr().err


def test_runs_of_two_bases_are_not_compared(results):
    """A merge is scored as a base of its own, and is of the base that it was made from."""
    runs = {name: read_run_scores(results, name, "test", None) for name in ("raw", "safety", "merge_linear", FUSED)}
    assert len({run.base_sha256 for run in runs.values()}) == 1
    comparison.compare(runs, FUSED)
    raw = runs["raw"]
    of_another = {name: replace(one, settings=one.settings | {"base_sha256": "0"}) for name, one in raw.metrics.items()}
    with pytest.raises(UserError, match="raw and safety are of different bases"):
        comparison.compare(runs | {"raw": replace(raw, metrics=of_another)}, FUSED)


@pytest.mark.parametrize(
    ("setting", "said"),
    [("base_sha256", "raw and helpfulness are of different bases"), ("dtype", "with dtype float16 and float32")],
)
def test_likelihoods_of_one_table_are_alike_without_a_fusion_too(results, tmp_path, capsys, setting, said):
    """The flags' defaults: the raw base and the experts. Nothing is written before the refusal."""
    results = shutil.copytree(results, tmp_path / "results")
    for path in (results / "evaluation").glob("*/test/raw/likelihood/run.json"):
        record = json.loads(path.read_text())
        record["run"]["arguments"][setting] = "float16"
        path.write_text(json.dumps(record))
    shutil.rmtree(results / "report", ignore_errors=True)
    with pytest.raises(SystemExit):
        call(report, "--results_dir", results)
    assert said in capsys.readouterr().err and not (results / "report").exists()


def test_two_versions_of_a_judge_are_two_columns(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    for run, version in (("safety", "1"), ("truthfulness", "2")):
        write_verdicts(results, run, "judge", version, [1, 0, 1])
    call(report, "--runs", "", "--results_dir", results)
    header = next(line for line in (results / "report/table.md").read_text().splitlines() if "| answers" in line)
    assert "flagged ↓ (judge, 1)" in header and "flagged ↓ (judge, 2)" in header


def test_a_score_of_answers_that_are_no_longer_there_is_refused(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    folder = write_verdicts(results, FUSED, "judge", "1", [1, 0, 1])
    record = {"run": {"script": "evaluate_safety.py", "arguments": {"answers_sha256": "0"}}}
    (folder / "run.json").write_text(json.dumps(record))
    for runs in (FUSED, ""):
        with pytest.raises(SystemExit):
            call(report, "--runs", runs, "--results_dir", results)
        assert "is a score of other answers than" in capsys.readouterr().err
    outputs = results / "inference" / "safety" / "test" / f"cross_{FUSED}" / "outputs.jsonl"
    record["run"]["arguments"]["answers_sha256"] = hashlib.sha256(outputs.read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    call(report, "--runs", FUSED, "--results_dir", results)


def test_a_score_that_was_not_finished_stands_in_no_table(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    for run in ("safety", FUSED):
        folder = write_verdicts(results, run, "judge", "1", [1, 0, 1])
    (folder / "run.json").unlink()
    call(report, "--runs", "", "--results_dir", results)
    table = (results / "report" / "table.md").read_text()
    assert "| safety |" in table and FUSED not in table


def test_scores_and_answers_of_other_weights_are_not_one_row(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    path = results / "inference" / "safety" / "test" / f"cross_{FUSED}" / "run.json"
    record = json.loads(path.read_text())
    assert record["run"]["arguments"]["weights_sha256"]
    record["run"]["arguments"]["weights_sha256"] = "0"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        call(report, "--runs", FUSED, "--results_dir", results)
    assert "are of different weights" in capsys.readouterr().err


def test_the_scores_of_a_run_that_was_made_anew_are_not_its_own(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    path = results / "outputs" / "safety" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path)
    with pytest.raises(SystemExit):
        call(report, "--runs", f"safety,{FUSED}", "--results_dir", results)
    assert "are of different weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.05}, "with learning_rate 0.0005 and 0.05"),
        ({"lora_bias": 1}, "with lora_bias None and 1"),
        ({"task_name": "safety"}, "are of different kinds"),
    ],
)
def test_what_a_name_calls_seeds_of_one_run_is_made_alike(results, changed, said):
    runs = {name: read_run_scores(results, name, "test", None) for name in ("mixed", "mixed_seed_43", FUSED)}
    comparison.compare(runs, FUSED)
    record = copy.deepcopy(runs["mixed_seed_43"].record)
    record["run"]["arguments"] |= changed
    runs["mixed_seed_43"] = replace(runs["mixed_seed_43"], record=record)
    with pytest.raises(UserError, match=f"mixed and mixed_seed_43.*{said}"):
        comparison.compare(runs, FUSED)


def test_one_run_under_two_names_is_not_two_seeds(results):
    runs = {name: read_run_scores(results, name, "test", None) for name in ("mixed", FUSED)}
    again = replace(runs["mixed"], name="mixed_seed_43")
    with pytest.raises(UserError, match="mixed_seed_43: was made with seed 42"):
        comparison.compare(runs | {"mixed_seed_43": again}, FUSED)


def test_a_kept_row_does_not_stand_for_a_run_made_otherwise(results, tmp_path, capsys):
    call(report, "--runs", FUSED, "--save", tmp_path / "kept", "--only_save", 1, "--results_dir", results)
    here = tmp_path / "here" / "outputs" / FUSED
    here.mkdir(parents=True)
    record = json.loads((results / "outputs" / FUSED / "run.json").read_text())
    command = ["--runs", FUSED, "--saved", tmp_path / "kept", "--results_dir", tmp_path / "here"]
    (here / "run.json").write_text(json.dumps(record))
    call(report, *command)
    for setting, value in (("expert_dropout", 0.3), ("learning_rate", 0.05)):  # one that is recorded where it is given
        other = copy.deepcopy(record)
        other["run"]["arguments"][setting] = value
        (here / "run.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit):
            call(report, *command)
        assert f"{FUSED}: made here with {setting}={value}, kept with" in capsys.readouterr().err


def test_words_that_are_no_verdict_are_left_out_of_both_runs(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    write_verdicts(results, "safety", "guard", "1", [1, 0, None, 1])
    write_verdicts(results, FUSED, "guard", "1", [0, None, 1, 1])
    call(report, "--runs", f"safety,{FUSED}", "--results_dir", results)
    table = json.loads((results / "report" / "table.json").read_text())
    paired = row_of(table, "safety")["paired"]["flagged"]
    assert paired["n"] == 2 and paired["difference"] == pytest.approx((0 + 1 - 1 - 1) / 2)
    assert row_of(table, "safety")["metrics"]["flagged"]["n"] == 3


def test_what_a_judges_errors_leave_is_said_of_each_seed(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    write_verdicts(results, FUSED, "judge", "1", [1, 0, 1])
    for run, value in (("mixed", 0.25), ("mixed_seed_43", None)):
        path = write_verdicts(results, run, "judge", "1", [1, 0, 1]) / "metrics.json"
        scores = json.loads(path.read_text())
        scores["metrics"]["flagged"]["corrected"] = dict(
            value=value, interval=None, n_labelled=9, sensitivity=0.8, specificity=0.9
        )
        path.write_text(json.dumps(scores))
    call(report, "--runs", f"mixed,mixed_seed_43,{FUSED}", "--results_dir", results)
    table = json.loads((results / "report" / "table.json").read_text())
    assert row_of(table, "mixed")["metrics"]["flagged"]["corrected_of_seeds"] == [0.25, None]
    assert "corrected, each seed: 0.250, not correctable" in (results / "report" / "index.html").read_text()


def test_a_share_over_several_seeds_stays_one(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    for run in ("mixed", "mixed_seed_43", FUSED):
        write_verdicts(results, run, "judge", "1", [0, 0, 0, 0, 0, 0, 0, 0, 0, run == "mixed"])
    runs = {name: read_run_scores(results, name, "test", None) for name in ("mixed", "mixed_seed_43", FUSED)}
    low, high = row_of(comparison.compare(runs, FUSED), "mixed")["metrics"]["flagged"]["interval"]
    assert 0 <= low <= 0.05 <= high <= 1


def test_scores_of_other_precision_or_length_are_not_compared(results, tmp_path, capsys):
    results = shutil.copytree(results, tmp_path / "results")
    for name, value in (("dtype", "bfloat16"), ("max_length", 300)):
        path = results / "evaluation" / "safety" / "test" / "raw" / "likelihood" / "run.json"
        before = path.read_text()
        record = json.loads(before)
        record["run"]["arguments"][name] = value
        path.write_text(json.dumps(record))
        with pytest.raises(SystemExit):
            call(report, "--runs", f"raw,{FUSED}", "--results_dir", results)
        assert f"with {name} " in capsys.readouterr().err
        path.write_text(before)


def test_rows_are_compared_over_the_seeds_that_both_have(results, table):
    """A row of one seed is not compared with the mean of three of another: the seeds' luck is no difference."""

    def values(run):
        return {row["id"]: -row["log_prob"] for row in items(results, run, "safety")}

    runs = ["mixed", "mixed_seed_43", "safety", FUSED]
    call(report, "--runs", ",".join(runs), "--reference", "mixed", "--results_dir", results)
    row = row_of(json.loads((results / "report" / "table.json").read_text()), "safety")
    paired = row["paired"]["safety_nll_per_token"]
    tokens = sum(row["tokens"] for row in items(results, "safety", "safety"))
    ours, theirs = values("mixed"), values("safety")
    assert paired["seeds"] == [42]
    assert paired["difference"] == pytest.approx(sum(ours[id] - theirs[id] for id in ours) / tokens)


def test_answers_of_one_seed_stand_in_a_row_of_several(results, tmp_path):
    """Likelihoods are of every seed; answers may be of one, and are then compared as such."""
    results = shutil.copytree(results, tmp_path / "results")
    write_verdicts(results, "mixed", "judge", "1", [1, 1, 0])
    write_verdicts(results, FUSED, "judge", "1", [0, 1, 0])
    runs = f"mixed,mixed_seed_43,{FUSED}"
    call(report, "--runs", runs, "--results_dir", results)
    row = row_of(json.loads((results / "report" / "table.json").read_text()), "mixed")
    assert row["metrics"]["flagged"]["value"] == pytest.approx(2 / 3) and "of_seeds" not in row["metrics"]["flagged"]
    assert len(row["metrics"]["mean_nll_per_token"]["of_seeds"]) == 2
    for path in (results / "evaluation").glob("*/test/mixed_seed_43/likelihood/metrics.json"):
        path.unlink()
    with pytest.raises(SystemExit):
        call(report, "--runs", runs, "--results_dir", results)


def test_what_was_forgotten_is_scored_on_general_text(results, table):
    raw = row_of(table, "raw")["metrics"]["general_nll_per_token"]
    assert raw["n"] == 6 and raw["value"] > 0 and not raw["higher_is_better"]
    assert "general_nll_per_token" in row_of(table, "merge_linear")["paired"]


def test_a_question_that_a_judge_was_asked_is_kept_by_its_id(results, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    folder = write_verdicts(results, "safety", "judge", "1", [1, 0, 1])
    target = results / "evaluation" / "truthfulness" / "test" / "cross_safety" / "truth"
    shutil.copytree(folder, target)
    scores = json.loads((target / "metrics.json").read_text())
    scores["metrics"] = {"truth": scores["metrics"]["flagged"]}
    (target / "metrics.json").write_text(json.dumps(scores))
    asked = ("Do owls sleep?", "Is tin a metal?", "Do owls sleep?")
    rows = [{"id": f"q{i}", "question": text, "answer": "Yes.", "value": 1.0} for i, text in enumerate(asked)]
    (target / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(report, "--runs", "safety", "--save", tmp_path / "kept", "--only_save", 1, "--results_dir", results)
    kept = (tmp_path / "kept" / "safety.json").read_text()
    assert "owls" not in kept and json.loads(kept)["metrics"]["truth"]["questions"] == ["q0", "q1", "q0"]


@pytest.mark.slow
def test_runs_can_be_kept_for_others_and_compared_without_their_folders(results, table, tmp_path):
    runs = ",".join([*RUNS, FUSIONS[1], "consensus"])
    keep = ["--save", tmp_path / "kept"]
    call(report, "--runs", runs, "--reference", FUSED, *keep, "--results_dir", results)
    kept = {path.stem for path in (tmp_path / "kept").iterdir()}
    assert kept == {*RUNS, FUSIONS[1], "consensus"}
    text = "".join(path.read_text() for path in (tmp_path / "kept").iterdir())
    assert str(results) not in text and str(results.parent) not in text  # no path of this machine
    path = results / "inference" / "safety" / "test" / "cross_safety" / "outputs.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["instruction"] not in text  # no text of the data
    other = tmp_path / "other"
    call(report, "--runs", runs, "--reference", FUSED, "--saved", tmp_path / "kept", "--results_dir", other)
    assert json.loads((other / "report" / "table.json").read_text()) == table
    with pytest.raises(SystemExit):
        call(report, "--runs", f"{runs},nowhere", "--saved", tmp_path / "kept", "--results_dir", other)


def test_no_place_is_kept_of_what_a_run_was_made_from():
    arguments = {"base_model": "/home/me/base", "data_source": "/home/me/data", "data_sha256": {"a.jsonl": "1"}}
    meta = {part: arguments for part in ("fused", "init")} | {"experts": {"safety": arguments}, "drawn": [arguments]}
    kept = without_places({"run": {"script": "a.py", "arguments": arguments}, "train": {}, "meta": meta})
    assert "/home" not in json.dumps(kept) and kept["meta"]["drawn"][0]["data_source"] == "data"


def test_a_sweep_is_over_the_tasks_of_the_table(results):
    """A fusion that is scored on a fourth task, too, stands in both with its mean over three."""
    runs = {name: read_run_scores(results, name, "test") for name in FUSIONS}
    scores = runs[FUSED].metrics
    fourth = {"politeness_nll_per_token": scores["safety_nll_per_token"]}
    runs[FUSED] = replace(runs[FUSED], metrics=scores | fourth)
    table, alike = comparison.compare(runs, FUSED), Alike(runs, FUSED)
    points = [*alike.gammas(), *alike.points("gate_loss_weight", alike.mean_nll)]
    assert [run for *_, run in points] == [FUSED, *FUSIONS]
    for _, mean, run in points:
        assert mean == pytest.approx(row_of(table, run)["metrics"]["mean_nll_per_token"]["value"])


def test_a_seed_in_a_name():
    assert comparison.split_seed("mixed_r24_seed_43") == ("mixed_r24", 43)
    assert comparison.split_seed("safety") == ("safety", 42)
    assert comparison.split_seed("fused_seed_7_bias_safety_-1") == ("fused_bias_safety_-1", 7)
    assert comparison.split_seed("fused_bias_safety_off") == ("fused_bias_safety_off", 42)


def test_a_seed_is_the_recorded_one_where_the_name_has_none(results):
    def by_seed(name, script, seed, **experts):
        record = {"run": {"script": script, "arguments": {"seed": seed}}, "meta": {"experts": experts}}
        return comparison.seed_of(name, record)

    assert by_seed("safety", "align_basemodel.py", 43) == 43
    assert by_seed("safety_seed_44", "align_basemodel.py", 44) == 44
    assert by_seed("moe", "llama_moe.py", 43) == 43
    assert by_seed("merge_dare_ties", "merging.py", 42, safety={"seed": 43}, helpfulness={"seed": 43}) == 43
    assert by_seed("merge", "merging.py", 42, safety={"seed": 43}, helpfulness={"seed": 44}) == 42
    assert comparison.seed_of("raw", None) == 42
    runs = {name: read_run_scores(results, name, "test", None) for name in ("safety", FUSED)}
    again = replace(runs["safety"], name="safety_seed_42")
    with pytest.raises(UserError, match="safety and safety_seed_42: are of one seed, 42"):
        comparison.compare(runs | {"safety_seed_42": again}, FUSED)


@pytest.mark.parametrize(
    "edit",
    [
        {"value": None},
        {"value": "much"},
        {"value": float("nan")},
        {"cut": None},
        {"without_answer": []},
        {"n": None},
        {"interval": []},
        {"interval": [1.0]},
        {"interval": [1.0, None]},
        {"corrected": {"value": "much"}},
        {"corrected": {"value": 0.5, "interval": [0.1]}},
        {"corrected": 5},
        {"unit": None},
    ],
)
def test_a_score_that_is_none_is_refused(edit):
    score = {"value": 1.5, "n": 3, "interval": [1.0, 2.0], "unit": "nats", "higher_is_better": False, "cut": 0}
    check_score({**score, "corrected": {"value": None, "reason": "no"}}, [1.0, 2.0])
    check_score({**score, "interval": None}, [])
    with pytest.raises((ValueError, TypeError, AttributeError)):
        check_score({**score, **edit}, [1.0, 2.0])


@pytest.mark.parametrize(
    "weight", [None, [[0.5, None]], [[0.5]], [None, [0.5, 0.5]], [[0.5, float("inf")]], [["much", 0]]]
)
def test_a_routing_that_is_none_is_refused(tmp_path, weight):
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"experts": ["a", "b"], "weight": [[0.25, 0.75]]}))
    assert read_usage(path)["weight"] == [[0.25, 0.75]]
    path.write_text(json.dumps({"experts": ["a", "b"], "weight": weight}))
    with pytest.raises(UserError, match="routing.json: is not as this project writes it"):
        read_usage(path)


def test_a_kept_row_that_was_edited_is_refused(results, tmp_path):
    call(report, "--runs", FUSED, "--save", tmp_path, "--only_save", 1, "--results_dir", results)
    path = tmp_path / f"{FUSED}.json"
    whole = path.read_text()
    assert read_kept(tmp_path, FUSED).metrics
    for edit in ('"value": "much"', '"value": null'):
        path.write_text(re.sub(r'"value": [-0-9.e]+', edit, whole, count=1))
        with pytest.raises(UserError, match="is not as this project writes it"):
            read_kept(tmp_path, FUSED)


def test_two_runs_without_a_common_verdict_are_not_paired():
    def row(name, values):
        scored = Result(["a", "b"], values, [1.0, 1.0], ["a", "b"], ["judge", "1"], {}, {"value": 1.0, "n": 1})
        return comparison.Row(name, "mixed", {42: RunScores(name, None, {}, {JUDGED[0].name: scored})})

    assert comparison.paired(row("one", [1.0, None]), row("other", [None, 1.0]), JUDGED[0], TASKS) is None
    assert comparison.paired(row("one", [1.0, 0.0]), row("other", [None, 1.0]), JUDGED[0], TASKS)["difference"] == -1


def test_a_kept_row_is_not_replaced_by_one_without_its_routing():
    kept = RunScores("moe", None, {}, {}, routing={"safety": [[0.5, 0.5]]})
    assert what_is_lost(kept, RunScores("moe", None, {}, {})) == "with the routing of safety, which this one has not"
    assert what_is_lost(kept, kept) is None


def test_the_page_names_the_base_whichever_run_comes_first():
    records = [{"run": {"arguments": arguments}} for arguments in ({}, {"base_model": "some/base"})]
    assert base_name({"best_of_3": records[0], "raw": None, "moe": records[1]}) == "base"
