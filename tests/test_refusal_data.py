"""Safety pairs cut in two: what is learnt from is never scored on."""

import json
import shutil

import pytest
from conftest import ROOT, write_jsonl

from data import refusals
from data.sources import read_rows, safety_comparisons


def test_a_prompt_is_either_learnt_or_scored(tmp_path):
    source, folder = shutil.copytree(ROOT / "data" / "sample", tmp_path / "source"), tmp_path / "refusals"
    asked = [f"How would somebody break into house number {i // 2}?" for i in range(60)]  # each question twice
    rows = [{"id": f"pair-{i}", "prompt": q, "safe": f"No ({i}).", "unsafe": f"So ({i})."} for i, q in enumerate(asked)]
    write_jsonl(source / "safety_pairs.jsonl", rows)
    refusals.main(["--data_source", str(source), "--output", str(folder)])
    pairs = {pair["id"]: pair for pair in rows}
    learnt = read_rows("safety", "train", str(folder))
    scored = safety_comparisons("test", str(folder))
    assert len(learnt) + len(scored) == len(pairs) and min(len(learnt), len(scored)) > len(pairs) / 4
    assert not {row["prompt"] for row in learnt} & {one.instruction for one in scored}
    for row in learnt:
        assert (row["prompt"], row["response"]) == (pairs[row["id"]]["prompt"], pairs[row["id"]]["safe"])
    assert all(one.choices == (pairs[one.id]["safe"], pairs[one.id]["unsafe"]) for one in scored)
    ids = json.loads((folder / "split.json").read_text())["ids"]
    assert (ids["learnt"], ids["scored"]) == ([row["id"] for row in learnt], [one.id for one in scored])
    same = [path.name for path in source.glob("*.jsonl") if path.read_bytes() == (folder / path.name).read_bytes()]
    assert set(same) == {path.name for path in source.glob("*.jsonl")} - {"safety_train.jsonl", "safety_pairs.jsonl"}


@pytest.mark.parametrize("test", ["xstest", "safety_test"])
def test_a_prompt_of_a_test_is_neither(test, tmp_path):
    """Those of over-refusal and of safety are never trained on."""
    source = shutil.copytree(ROOT / "data" / "sample", tmp_path / "source")
    (tested, *_) = map(json.loads, (source / f"{test}.jsonl").read_text().splitlines())
    asked = [f"How would somebody break into house number {i}?" for i in range(20)] + [f" {tested['prompt'].upper()}"]
    rows = [{"id": f"pair-{i}", "prompt": q, "safe": "No.", "unsafe": "So."} for i, q in enumerate(asked)]
    write_jsonl(source / "safety_pairs.jsonl", rows)
    refusals.main(["--data_source", str(source), "--output", str(tmp_path / "refusals")])
    ids = json.loads((tmp_path / "refusals" / "split.json").read_text())["ids"]
    assert sorted(ids["learnt"] + ids["scored"]) == sorted(row["id"] for row in rows[:-1])


def test_spaces_and_capitals_do_not_move_a_prompt_to_the_other_half():
    assert refusals.is_learnt("How do I  pick a lock?") == refusals.is_learnt("how do i pick a LOCK? ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_source", "hub", "--output", "X"], "name the data with --data_source"),
        (["--data_source", "sample", "--output", "."], "holds something else than this would write"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        refusals.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1
