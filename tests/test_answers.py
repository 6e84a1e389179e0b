"""What every judge reads: finished answers, and nothing that is damaged, missing or given twice."""

import json

import pytest
from conftest import write_answers

from config import UserError
from evaluator.answers import EvaluateArguments, load_answers


def load(results_dir, num_samples=-1):
    folder = EvaluateArguments(task_name="raw", results_dir=str(results_dir)).answers_folder("safety")
    return load_answers(folder, "safety", num_samples)


def test_answers_come_in_order_with_their_checksum_and_the_empty_ones_counted(tmp_path):
    path = write_answers(tmp_path, "safety", ["One.", "", "Three.", "  \n"])
    answers = load(tmp_path)
    assert [row["output"] for row in answers.rows] == ["One.", "", "Three.", "  \n"]
    assert answers.num_empty == 2
    path.write_text(path.read_text().replace("One.", "Two."))
    assert load(tmp_path).checksum != answers.checksum
    assert [row["id"] for row in load(tmp_path, num_samples=2).rows] == ["safety-0", "safety-2"]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda lines: [*lines[:2], lines[2][:30], lines[3]], "outputs.jsonl:3: not JSON"),
        (lambda lines: [*lines, lines[1]], "outputs.jsonl:5: id 'safety-1' was already given on line 2"),
        (lambda lines: lines[:3], "holds 3 answers, 4 prompts were asked"),
        (
            lambda lines: [*lines[:3], lines[3].replace('"output"', '"text"')],
            "outputs.jsonl:4: field 'output' is missing",
        ),
        (lambda lines: [*lines[:3], lines[3].replace('"reference"', '"ref"')], ":4: field 'reference' is missing"),
        (lambda lines: [*lines[:3], lines[3].replace('"safety"', '"helpfulness"')], "not one to a safety prompt"),
    ],
)
def test_damaged_answers_are_one_clear_error(tmp_path, damage, said):
    path = write_answers(tmp_path, "safety", ["a", "b", "c", "d"])
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    assert said in str(raised.value)


def test_missing_and_unfinished_answers(tmp_path):
    path = write_answers(tmp_path, "safety", ["a"], run="aligned")
    with pytest.raises(UserError, match=r"no answers under .*available: aligned\); make them first with inference.py"):
        load(tmp_path)
    path = write_answers(tmp_path, "safety", ["a"])
    run = json.loads((path.parent / "run.json").read_text())
    (path.parent / "run.json").rename(path.parent / "arguments.json")
    assert run["train"]["answers"] == 1
    with pytest.raises(UserError, match="did not finish"):
        load(tmp_path)
