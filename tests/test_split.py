"""Training questions dealt out between experts, those who fuse, and nobody."""

import json
import shutil

import pytest
from conftest import ROOT, write_jsonl

from config import TASKS
from data import split
from data.sources import prompt_of, read_jsonl, read_rows, safety_comparisons, truthfulness_comparisons
from evaluator import evaluate_likelihood

SAMPLE = ROOT / "data" / "sample"
FLAGS = ["--data_source", "sample", "--mixed", "2,5", "--num_held_apart", "4"]
PARTS = ("experts", "mixed_2", "mixed_5")


def questions(folder, half) -> dict[str, set]:
    return {task: {prompt_of(row) for row in read_rows(task, half, str(folder))} for task in TASKS}


def test_no_question_is_dealt_out_twice(tmp_path):
    split.main([*FLAGS, "--output", str(tmp_path / "parts")])
    trained = {part: questions(tmp_path / "parts" / part, "train") for part in PARTS}
    held_apart = questions(tmp_path / "parts" / "mixed_2", "held_apart")
    for task, everything in questions("sample", "train").items():
        of_experts, few, more = (trained[part][task] for part in PARTS)
        assert (len(few), len(more), len(held_apart[task])) == (2, 5, 4) and few < more
        assert not of_experts & more and not of_experts & held_apart[task] and not more & held_apart[task]
        assert of_experts | more | held_apart[task] == everything
    for part in PARTS:
        assert questions(tmp_path / "parts" / part, "held_apart") == held_apart
        for path in SAMPLE.glob("*.jsonl"):
            if "_train" not in path.name:
                assert (tmp_path / "parts" / part / path.name).read_bytes() == path.read_bytes()
    ids = json.loads((tmp_path / "parts" / "split.json").read_text())["ids"]
    rows = [row for task in TASKS for row in read_rows(task, "train", "sample")]
    assert {id for part in ids if part != "mixed_2" for task in TASKS for id in ids[part][task]} == {
        row["id"] for row in rows
    }


def test_every_row_of_a_question_goes_with_it_and_one_seed_draws_the_same(tmp_path):
    rows = read_jsonl(SAMPLE / "safety_train.jsonl", {})
    folder = shutil.copytree(SAMPLE, tmp_path / "data")
    again = [{**row, "id": f"{row['id']}-again", "response": "No."} for row in rows]
    write_jsonl(folder / "safety_train.jsonl", rows + again)
    pairs = [{"id": f"pair-{i}", "prompt": row["prompt"], "safe": "No.", "unsafe": "So."} for i, row in enumerate(rows)]
    new = {"id": "new", "prompt": "Where is the key to my neighbour's shed?", "safe": "No.", "unsafe": "Here."}
    write_jsonl(folder / "safety_pairs.jsonl", [*pairs, new])
    flags = ["--data_source", str(folder), *FLAGS[2:]]
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split.main([*flags, "--output", str(tmp_path / name), "--seed", str(seed)])
        drawn.append([row["id"] for row in read_rows("safety", "train", str(tmp_path / name / "mixed_5"))])
        for part in PARTS:  # a prompt that somebody may have learnt from is compared nowhere
            assert [one.id for one in safety_comparisons("test", str(tmp_path / name / part))] == ["new"]
    split.main([*flags, "--output", str(tmp_path / "c"), "--seed", "2"])
    with pytest.raises(SystemExit):
        split.main([*flags, "--output", str(tmp_path / "c"), "--seed", "3"])
    assert drawn[0] == drawn[1] != drawn[2]
    assert {id for id in drawn[0] if not id.endswith("-again")} == {
        id.removesuffix("-again") for id in drawn[0] if id.endswith("-again")
    }


def test_a_question_that_any_part_is_trained_on_is_asked_in_none(tmp_path):
    """By multiple choice; the published file has both halves' questions."""
    folder = shutil.copytree(SAMPLE, tmp_path / "data")
    trained = [*dict.fromkeys(row["question"] for row in read_jsonl(folder / "truthfulness_train.jsonl", {}))]
    choices = {"choices": ["Yes.", "No."], "labels": [1, 0]}
    asked = [*trained, "Is the moon made of cheese?"]
    rows = [{"idx": i, "question": one, "mc1_targets": choices, "mc2_targets": choices} for i, one in enumerate(asked)]
    write_jsonl(folder / "truthfulness_mc.jsonl", rows)
    split.main(["--data_source", str(folder), *FLAGS[2:], "--output", str(tmp_path / "parts")])
    for part in PARTS:
        kept = (tmp_path / "parts" / part / "truthfulness_mc.jsonl").read_text().splitlines()
        assert [json.loads(line)["question"] for line in kept] == asked[-1:]
        assert len(truthfulness_comparisons("test", str(tmp_path / "parts" / part))[0]) == 1


def test_what_was_held_apart_is_scored(tmp_path, base_dir):
    split.main([*FLAGS, "--output", str(tmp_path / "parts")])
    score = ["--run", "raw", "--base_model", str(base_dir), "--dtype", "float32", "--dataset_type", "held_apart"]
    evaluate_likelihood.main(
        [*score, "--data_source", str(tmp_path / "parts" / "mixed_2"), "--results_dir", str(tmp_path)]
    )
    for task in TASKS:
        folder = tmp_path / "evaluation" / task / "held_apart" / "raw" / "likelihood"
        score = json.loads((folder / "metrics.json").read_text())["metrics"]["nll_per_token"]
        assert score.get("questions", score["n"]) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name the data with --data_source"),
        (["--data_source", "hub", "--output", "X"], "name the data with --data_source"),
        (["--data_source", "sample", "--output", "X", "--mixed", "3,0"], "--mixed 3,0: must be whole numbers above 0"),
        (["--data_source", "sample", "--output", "X", "--mixed", "4000"], "leave the expert none; take fewer"),
        (["--data_source", "sample", "--output", "."], "holds something else than this would write"),
        (["--data_source", "nowhere", "--output", "X"], "--data_source nowhere: must be"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        split.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "X").exists()
