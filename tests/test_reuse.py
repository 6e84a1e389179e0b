"""Kept rows: taken over where they were made and scored as they would be now, and said why not where they were not."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import run_script

import align_basemodel
from config import UserError
from evaluator import evaluate_likelihood, report, reuse
from evaluator.judges.labelled import judge_sha256
from evaluator.kept_runs import read_kept, save_run
from models import merging
from workspace.files import read_json, write_json

FUSED = "mix_moe_reg_00000_00000_00000_gate_01000"
SHORT = ["--max_steps", "2", "--batch_size", "4", "--num_samples", "4", "--disable_tqdm", "1", "--dtype", "float32"]
EXPERT = "align_basemodel.py --task_name safety " + " ".join(SHORT)
MERGE = "models/merging.py --method iso_c"
FUSION = "align_basemodel.py --moe_flag 1 --gate_loss_weight 0.1 " + " ".join(SHORT)


def call(script, *arguments):
    script.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def kept(tmp_path_factory, base_dir, adapter_dirs, fused_dir):
    """An expert, a merge, a fusion and the raw base, made, scored and kept by the commands; their results are gone."""
    root = tmp_path_factory.mktemp("reuse")
    results = root / "results"
    place, data = ["--results_dir", results], ["--data_source", "sample"]
    call(align_basemodel, "--task_name", "safety", "--base_model", base_dir, *data, *SHORT, *place)
    experts = f"safety,other={adapter_dirs[1]}"
    call(merging, "--method", "iso_c", "--experts", experts, *place)
    call(align_basemodel, "--moe_flag", 1, "--gate_loss_weight", 0.1, "--moe_dir", fused_dir, *data, *SHORT, *place)
    runs = f"raw,safety,merge_iso_c,{FUSED}"
    score = ["--base_model", base_dir, *data, "--num_samples", 3, "--dtype", "float32", *place]
    call(evaluate_likelihood, "--run", runs, *score)
    call(report, "--runs", runs, "--save", root / "kept", *place)
    shutil.rmtree(results)
    return root / "kept"


@pytest.fixture
def check(kept, base_dir, capsys):
    """(exit code, what was said) of reuse.py about a run and the command that would make it."""

    def run(name, made_by, *more, saved=kept):
        command = ["--run", name, "--saved", saved, "--base_model", base_dir, "--data_source", "sample"]
        command += ["--num_samples", 3, "--dtype", "float32", *(["--made_by", made_by] if made_by else []), *more]
        capsys.readouterr()
        try:
            call(reuse, *command)
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    run.saved = kept
    return run


WITH_DATA = " --data_source sample"
ROWS = {"raw": "", "safety": EXPERT + WITH_DATA, "merge_iso_c": MERGE, FUSED: FUSION + WITH_DATA}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_same_settings_is_taken_over(check, name):
    assert check(name, ROWS[name]) == (0, f"{name}: taken over from {check.saved}\n")


@pytest.mark.parametrize(
    "name, more, said",
    [
        ("safety", " --learning_rate 0.001", "learning_rate=0.0005, asked for is 0.001"),
        ("safety", " --seed 43", "seed=42, asked for is 43"),
        ("safety", " --rank 4", "rank=8, asked for is 4"),
        ("safety", " --task_name helpfulness", "task_name=safety, asked for is helpfulness"),
        (FUSED, " --helpfulness_weight 0.1", "helpfulness_weight=0.0, asked for is 0.1"),
        (FUSED, " --expert_topk 3", "expert_topk=2, asked for is 3"),
        ("merge_iso_c", " --scale 0.5", "scale=1.0, asked for is 0.5"),
        ("merge_iso_c", " --method tsv_m", "method=iso_c, asked for is tsv_m"),
    ],
)
def test_a_row_that_was_made_otherwise_is_not(check, name, more, said):
    code, text = check(name, ROWS[name] + more)
    assert code == reuse.NOT_ALIKE and said in text


def test_a_row_that_was_made_with_a_flag_of_later_versions_is_not_one_without_it(check, kept, tmp_path):
    shutil.copytree(kept, tmp_path / "kept")
    row = read_json(tmp_path / "kept" / f"{FUSED}.json")
    row["record"]["run"]["arguments"] |= {"expert_dropout": 0.2}
    write_json(tmp_path / "kept" / f"{FUSED}.json", row)
    code, text = check(FUSED, ROWS[FUSED], saved=tmp_path / "kept")
    assert code == reuse.NOT_ALIKE and "made with expert_dropout=0.2, asked for is 0.0" in text
    assert check(FUSED, ROWS[FUSED] + " --expert_dropout 0.2", saved=tmp_path / "kept")[0] == 0
    code, text = check(FUSED, ROWS[FUSED] + " --expert_dropout 0.2")
    assert code == reuse.NOT_ALIKE and "expert_dropout=None, asked for is 0.2" in text


def test_a_row_that_was_scored_otherwise_or_on_another_base_or_made_by_something_else_is_not(check, kept, tmp_path):
    code, text = check("safety", ROWS["safety"], "--num_samples", 4)
    assert code == reuse.NOT_ALIKE and "scored with num_samples=3, asked for is 4" in text
    for name in ROWS:  # the raw base by its scores' record, the others by their own
        changed = tmp_path / name
        shutil.copytree(kept, changed)
        row = read_json(changed / f"{name}.json")
        if row["record"]:
            row["record"]["run"]["arguments"]["base_sha256"] = "0"
        else:
            for result in row["metrics"].values():
                result["settings"]["base_sha256"] = "0"
        write_json(changed / f"{name}.json", row)
        code, text = check(name, ROWS[name], saved=changed)
        assert code == reuse.NOT_ALIKE and "base_sha256=0" in text
    changed = tmp_path / "cut"
    shutil.copytree(kept, changed)
    row = read_json(changed / "safety.json")
    for result in row["metrics"].values():
        result["settings"]["max_length"] = 64
    write_json(changed / "safety.json", row)
    code, text = check("safety", ROWS["safety"], saved=changed)
    assert code == reuse.NOT_ALIKE and "scored with max_length=64" in text
    code, text = check("safety", ROWS["merge_iso_c"])
    assert code == reuse.NOT_ALIKE and "was not made by models/merging.py" in text
    code, text = check("nowhere", ROWS["safety"])
    assert code == reuse.NOT_ALIKE and "it is not there" in text


def test_rows_scored_on_questions_held_apart_are_known(base_dir, tmp_path, capsys):
    place = ["--results_dir", tmp_path / "results"]
    score = ["--base_model", base_dir, "--data_source", "sample", "--dtype", "float32", "--dataset_type", "held_apart"]
    score += ["--num_samples", 3, "--num_trained", 4]
    call(evaluate_likelihood, "--run", "raw", *score, *place)
    save = ["--save", tmp_path / "kept", "--only_save", 1, "--dataset_type", "held_apart"]
    call(report, "--runs", "raw", *save, *place)
    call(reuse, "--run", "raw", "--saved", tmp_path / "kept", *score)
    for other, said in (("--num_trained", "num_trained=4, asked for is 5"), ("--num_samples", "num_samples=3")):
        with pytest.raises(SystemExit) as end:
            call(reuse, "--run", "raw", "--saved", tmp_path / "kept", *score, other, 5)
        assert end.value.code == reuse.NOT_ALIKE and said in capsys.readouterr().out


def test_rows_scored_without_comparisons_are_no_others(check, base_dir, tmp_path):
    score = ["--base_model", base_dir, "--data_source", "sample", "--num_samples", 3, "--dtype", "float32"]
    call(evaluate_likelihood, "--run", "raw", *score, "--comparisons", 0, "--results_dir", tmp_path / "results")
    call(report, "--runs", "raw", "--save", tmp_path, "--only_save", 1, "--results_dir", tmp_path / "results")
    assert check("raw", None, "--comparisons", 0, saved=tmp_path)[0] == 0
    assert check("raw", None, saved=tmp_path)[0] == reuse.NOT_ALIKE
    assert check("raw", None, "--comparisons", 0)[0] == reuse.NOT_ALIKE


def test_what_was_made_from_other_experts_is_not(check, kept, tmp_path):
    """The merge is of the kept expert and of an adapter from elsewhere, of which nothing is recorded."""
    code, text = check("merge_iso_c", MERGE, "--experts", "safety")
    assert code == reuse.NOT_ALIKE and "it was made from 2 experts" in text
    assert (
        "its expert other was made with nothing recorded"
        in check("merge_iso_c", MERGE, "--experts", "safety,safety")[1]
    )
    shutil.copytree(kept, tmp_path / "kept")
    merge = read_json(tmp_path / "kept" / "merge_iso_c.json")
    merge["record"]["meta"]["experts"].pop("other")
    write_json(tmp_path / "kept" / "merge_iso_c.json", merge)
    assert check("merge_iso_c", MERGE, "--experts", "safety", saved=tmp_path / "kept")[0] == 0
    expert = read_json(tmp_path / "kept" / "safety.json")
    expert["record"]["run"]["arguments"]["num_train_epochs"] = 7
    write_json(tmp_path / "kept" / "safety.json", expert)
    said = check("merge_iso_c", MERGE, "--experts", "safety", saved=tmp_path / "kept")[1]
    assert "its expert safety was made with num_train_epochs=" in said and "asked for is 7" in said
    assert "does not say how its experts were made" in check("safety", ROWS["safety"], "--experts", "safety")[1]
    assert "it has no embedding drift" in check(FUSED, ROWS[FUSED], "--drift", 1)[1]


BEGUN = "models/llama_moe.py --experts helpfulness,safety,truthfulness"


@pytest.mark.parametrize(
    "more, said",
    [
        ("", None),
        (" --router_init prototype", "router_init=None, asked for is prototype"),
        (" --routing prompt", "routing=None, asked for is prompt"),
        (" --expert_topk 3", "expert_topk=2, asked for is 3"),
        (" --seed 43", "seed=42, asked for is 43"),
    ],
)
def test_a_row_that_begins_with_another_fusion_is_not(check, more, said):
    code, text = check(FUSED, ROWS[FUSED], "--begun_by", BEGUN + more)
    assert (code, said is None or f"begins with what was made with {said}" in text) == (3 if said else 0, True)


def test_what_a_row_begins_with_is_compared_both_ways(check, kept, tmp_path):
    """A fusion that was kept with its routers from prompts is none of one from random routers."""
    shutil.copytree(kept, tmp_path / "kept")
    row = read_json(tmp_path / "kept" / f"{FUSED}.json")
    row["record"]["meta"]["fused"] |= {"router_init": "prototype", "num_prompts": 9}
    write_json(tmp_path / "kept" / f"{FUSED}.json", row)
    kept_so = {"saved": tmp_path / "kept"}
    text = check(FUSED, ROWS[FUSED], "--begun_by", BEGUN, **kept_so)[1]
    assert "router_init=prototype, asked for is random" in text
    as_kept = f"{BEGUN} --router_init prototype --num_prompts 9"
    assert check(FUSED, ROWS[FUSED], "--begun_by", as_kept, **kept_so)[0] == 0
    text = check(FUSED, ROWS[FUSED], "--begun_by", f"{as_kept} --num_trained 4", **kept_so)[1]
    assert "num_trained=None, asked for is 4" in text
    text = check("safety", ROWS["safety"], "--begun_by", BEGUN)[1]
    assert "does not say how what it begins with was made" in text


def test_changed_data_is_seen(check, kept, tmp_path):
    row = read_json(kept / "safety.json")
    row["record"]["run"]["arguments"]["data_sha256"] = {"safety_train.jsonl": "0"}
    write_json(tmp_path / "safety.json", row)
    assert "data_sha256" in check("safety", ROWS["safety"], saved=tmp_path)[1]
    row = read_json(kept / "safety.json")
    row["metrics"]["mc1"]["settings"]["data_sha256"] = {}
    write_json(tmp_path / "safety.json", row)
    assert "its mc1 was scored with data_sha256" in check("safety", ROWS["safety"], saved=tmp_path)[1]


def test_answers_are_asked_after_where_they_are_wanted(check, kept, tmp_path):
    wanted = ["--num_answered", 5, "--max_new_tokens", 16]
    assert "it has no flagged" in check("safety", ROWS["safety"], *wanted)[1]
    row = read_json(kept / "safety.json")
    answers = {"num_samples": 5, "max_new_tokens": 16, "dtype": "float32", "temperature": 0.6}
    for name, file in (
        ("flagged", "safety_test"),
        ("truth", "truthfulness_test"),
        ("information", "truthfulness_test"),
    ):
        likelihood = row["metrics"]["safety_nll_per_token" if name == "flagged" else "mc1"]["settings"]["data_sha256"]
        sums = {f"{file}.jsonl": likelihood[f"{file}.jsonl"]}
        row["metrics"][name] = {**row["metrics"]["mc1"], "settings": {"answers": {**answers, "data_sha256": sums}}}
    write_json(tmp_path / "safety.json", row)
    assert check("safety", ROWS["safety"], *wanted, saved=tmp_path)[0] == 0
    row["record"]["run"]["script"] = "select_answers.py"  # selected answers have no likelihoods
    row["metrics"] = {name: row["metrics"][name] for name in ("flagged", "truth", "information")}
    write_json(tmp_path / "safety.json", row)
    assert check("safety", "", *wanted, saved=tmp_path)[0] == 0
    del row["metrics"]["truth"]
    write_json(tmp_path / "safety.json", row)
    assert "it has no truth" in check("safety", "", *wanted, saved=tmp_path)[1]
    assert check("safety", "", *wanted, "--judged", "flagged", saved=tmp_path)[0] == 0
    wanted[-1] = 32
    assert "were made with max_new_tokens=16, asked for is 32" in check("safety", "", *wanted, saved=tmp_path)[1]


def test_scores_of_a_judge_that_learnt_from_other_rows_are_not_taken_over(check, kept, tiny_source, tmp_path):
    """Nothing is known of the judges of earlier versions."""
    row = read_json(kept / "safety.json")
    sums = {"safety_test.jsonl": row["metrics"]["safety_nll_per_token"]["settings"]["data_sha256"]["safety_test.jsonl"]}
    answers = {"num_samples": 5, "max_new_tokens": 16, "dtype": "float32", "temperature": 0.6, "data_sha256": sums}
    wanted = ["--num_answered", 5, "--max_new_tokens", 16, "--judged", "flagged"]
    of_sample, of_others = (judge_sha256("safety", str(source)) for source in ("sample", tiny_source))
    for recorded, more, differs in (
        ({}, (), False),
        ({"judge_data_sha256": None}, (), False),
        ({"judge_data_sha256": of_sample}, (), False),
        ({"judge_data_sha256": of_others}, (), True),
        ({"judge_data_sha256": of_others}, ("--judge_data_source", tiny_source), False),
        ({"judge_data_sha256": {}}, (), True),  # of the hub's
    ):
        for settings in (answers, {"by": "consensus"}):  # selected answers are judged like others
            judged = {**row["metrics"]["mc1"], "settings": {**recorded, "answers": settings}}
            write_json(tmp_path / "safety.json", row | {"metrics": row["metrics"] | {"flagged": judged}})
            code, text = check("safety", ROWS["safety"], *wanted, *more, saved=tmp_path)
            assert (code == reuse.NOT_ALIKE) == ("its flagged was judged with judge_data_sha256=" in text) == differs
    process = run_script("evaluator/reuse.py", "--judge_data_source", tiny_source, "--saved", kept, "--base_model", "b",
                         "--data_source", "sample")  # fmt: skip
    assert process.returncode == 2 and "has an effect with --num_answered only" in process.stderr


def test_a_mistake_is_no_difference(check, tmp_path, capsys):
    write_json(tmp_path / "safety.json", {"run": "other"})
    assert check("safety", ROWS["safety"], saved=tmp_path)[0] == 2
    for flags in ("--run raw", "--run raw --saved x --base_model b --data_source sample --num_answered 3"):
        process = run_script("evaluator/reuse.py", *flags.split())
        assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_a_kept_row_is_not_replaced_by_another_of_its_name(kept, tmp_path):
    """By itself it is, from whatever machine; by one of other settings, or with fewer scores, it is not."""
    shutil.copytree(kept, tmp_path / "kept")
    folder, run = tmp_path / "kept", read_kept(kept, FUSED)
    arguments = run.record["run"]["arguments"]

    def with_arguments(**changed):
        return replace(run, record=run.record | {"run": {"script": "", "arguments": arguments | changed}})

    save_run(folder, with_arguments(fused_sha256="of another machine"))
    few = {name: result for name, result in run.metrics.items() if name != "safe_preferred"}
    other = {name: replace(result, settings=result.settings | {"dtype": "x"}) for name, result in run.metrics.items()}
    for changed, said in (
        (with_arguments(seed=43), "made with seed=42, not 43"),
        (with_arguments(expert_dropout=0.1), "made with expert_dropout=None, not 0.1"),
        (replace(run, metrics=few), "with safe_preferred, which this one has not"),
        (replace(run, metrics=other), "scored with dtype float32 and x"),
    ):
        before = (folder / f"{FUSED}.json").read_bytes()
        with pytest.raises(UserError, match=said):
            save_run(folder, changed)
        assert (folder / f"{FUSED}.json").read_bytes() == before


def test_a_kept_raw_base_is_not_replaced_by_another(kept, tmp_path):
    """It has no record; its scores say which base it is."""
    folder, raw = shutil.copytree(kept, tmp_path / "kept"), read_kept(kept, "raw")
    save_run(folder, raw)
    other = {name: replace(one, settings=one.settings | {"base_sha256": "0"}) for name, one in raw.metrics.items()}
    with pytest.raises(UserError, match="of another base"):
        save_run(folder, replace(raw, metrics=other))


def test_what_is_kept_names_no_place_and_holds_no_text(kept, base_dir):
    for path in kept.iterdir():
        text = path.read_text()
        assert str(base_dir.parent) not in text and str(kept.parent) not in text
        json.loads(text)
