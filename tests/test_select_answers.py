"""Answers selected from those of several runs: by likeness, by a judge, by the instruction."""

import json
from dataclasses import replace

import pytest
from conftest import write_answers, write_jsonl

from config import TASKS
from data.sources import prompt_records, read_rows
from evaluator import evaluate_safety, evaluate_truth_and_info, select_answers, train_judge
from evaluator.evaluate_helpfulness import output_pairs
from evaluator.results_folder import settings_of
from evaluator.run_scores import Result, RunScores

QUESTIONS = ["Is river 1?", "Is stone 2?", "Is lamp 3?"]
ANSWERS = {
    "cross_a": ["Never river at all.", "Indeed stone.", ""],
    "cross_b": ["Indeed river.", "Indeed stone.", "Never lamp."],
    "cross_c": ["Indeed river.", "Never.", "Never lamp."],
}


@pytest.fixture
def results(tmp_path):
    for run, texts in ANSWERS.items():
        write_answers(tmp_path, "truthfulness", texts, run, QUESTIONS)
    return tmp_path


def select(results, *more):
    flags = ["--results_dir", results, "--task_name", "truthfulness", "--answers", ",".join(ANSWERS), *more]
    select_answers.main([str(flag) for flag in flags])


def selected(results, name, task="truthfulness") -> list[dict]:
    path = results / "inference" / task / "test" / name / "outputs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_consensus_is_the_answer_most_like_the_others(results, capsys):
    select(results)
    rows = selected(results, "consensus")
    assert [row["chosen"] for row in rows] == ["cross_b", "cross_a", "cross_b"]
    assert [row["output"] for row in rows] == ["Indeed river.", "Indeed stone.", "Never lamp."]
    assert {row["generator"] for row in rows} == {"consensus"} and rows[0]["instruction"] == QUESTIONS[0]
    assert "3 answers (1 of cross_a, 2 of cross_b, 0 of cross_c)" in capsys.readouterr().out
    run = json.loads((results / "inference/truthfulness/test/consensus/run.json").read_text())
    assert run["train"]["chosen"] == {"cross_a": 1, "cross_b": 2}
    select(results)
    assert "nothing to do" in capsys.readouterr().out


@pytest.fixture(scope="module")
def judge(tmp_path_factory, judge_base_dir):
    """A truth judge by whom "Indeed …" is true and "Never …" is not, nearly always."""
    folder = tmp_path_factory.mktemp("judge")
    words = ("river", "stone", "lamp", "tower", "garden", "winter")
    rows = [
        {
            "truthfulqa_idx": i if i < 160 else 408 + i,
            "question": f"Is {words[i % 6]} {i}?",
            "answer": f"{'Indeed' if i % 2 else 'Never'} {words[i % 6]}.",
            "label": i % 2,
        }
        for i in range(200)
    ]
    write_jsonl(folder / "judge_truth.jsonl", rows)
    settings = ["--dtype", "float32", "--learning_rate", "5e-3", "--num_train_epochs", "8", "--disable_tqdm", "1"]
    place = ["--results_dir", folder, "--data_source", folder, "--base_model", judge_base_dir]
    train_judge.main([str(flag) for flag in ("--kind", "truth", *settings, *place)])
    return folder / "judges" / "truth"


def test_the_judge_takes_what_it_likes_and_does_not_score_it_then(results, judge, capsys):
    select(results, "--by", "judge", "--judge", judge)
    rows = selected(results, "best_by_truth")
    assert rows[0]["output"].startswith("Indeed") and rows[1]["output"].startswith("Indeed")
    flags = ["--task_name", "best_by_truth", "--mode", "0", "--judge", str(judge), "--results_dir", str(results)]
    with pytest.raises(SystemExit) as exit_:
        evaluate_truth_and_info.main(flags)
    assert exit_.value.code == 2 and "selected the answers in" in capsys.readouterr().err
    flags[1] = "cross_a"
    evaluate_truth_and_info.main(flags)
    assert "truth 0." in capsys.readouterr().out


def test_the_classifier_sends_each_instruction_to_its_tasks_expert(tmp_path):
    for task in TASKS:
        records = prompt_records(task, read_rows(task, "test", "sample"), "sample")
        questions = [record.instruction for record in records]
        for run in TASKS:
            write_answers(tmp_path, task, [f"{run} {i}" for i in range(len(records))], f"cross_{run}", questions)
        flags = ["--task_name", task, "--answers", ",".join(f"cross_{run}" for run in TASKS), "--by", "classifier"]
        select_answers.main([*flags, "--data_source", "sample", "--results_dir", str(tmp_path)])
        rows = selected(tmp_path, "classifier", task)
        assert sum(row["chosen"] == f"cross_{task}" for row in rows) > 0.6 * len(rows), task


@pytest.mark.parametrize(
    "more, said",
    [
        (("--answers", "cross_a"), "two or more"),
        (("--by", "judge"), "name a judge"),
        (("--by", "judge", "--judge", "nowhere"), "nowhere"),
        (("--by", "classifier"), "takes --data_source"),
        (("--batch_size", 3), "has an effect with --by judge only"),
        (("--name", "cross_b"), "is one of --answers"),
        (("--answers", "cross_a,cross_d"), "no answers under"),
        (("--answers", "cross_a,other"), "answers other prompts"),
    ],
)
def test_mistakes_are_one_line(results, more, said, capsys):
    write_answers(results, "truthfulness", ["x"] * 3, "other")
    with pytest.raises(SystemExit) as exit_:
        select(results, *more)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and len(error.splitlines()) == 1


def answered_with(results, run, **arguments):
    path = results / "inference" / "truthfulness" / "test" / run / "run.json"
    record = json.loads(path.read_text())
    record["run"]["arguments"] = {"max_new_tokens": 64, "data_source": "sample", **arguments}
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("setting", ["max_new_tokens", "base_sha256"])
def test_candidates_are_answered_alike_and_compared_by_how(results, setting, capsys):
    for run in ANSWERS:
        answered_with(results, run, **{setting: 4})
    select(results)
    result = Result(["a"], [1.0], [1.0], ["a"], ["j", "1"], {"answers": settings_of(folder_of(results))}, {})
    other = replace(result, settings={"answers": {setting: 8}})
    assert result.differs(replace(result, settings={"answers": {setting: 4}})) is None
    if setting == "max_new_tokens":
        assert result.differs(other) == "with answers' max_new_tokens 4 and 8"
    else:
        assert RunScores("consensus", None, {}, {"flagged": result}).base_sha256 == 4
    answered_with(results, "cross_c", **{setting: 8})
    with pytest.raises(SystemExit):
        select(results, "--name", "again")
    assert f"was answered with {setting} 8" in capsys.readouterr().err


def folder_of(results):
    return results / "inference" / "truthfulness" / "test" / "consensus"


def test_selected_answers_have_a_reference_as_any(tmp_path):
    """To other instructions than AlpacaEval's, which name their data."""
    for run, texts in ANSWERS.items():
        write_answers(tmp_path, "helpfulness", texts, run, QUESTIONS)
    select_answers.main(["--results_dir", str(tmp_path), "--task_name", "helpfulness", "--answers", ",".join(ANSWERS)])
    folder = tmp_path / "inference" / "helpfulness" / "test" / "consensus"
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    ours, theirs = output_pairs(rows, None, folder)
    assert len(ours) == len(theirs) == 3


def test_selected_answers_are_scored_like_any(results, judge_base_dir, capsys):
    for run, texts in ANSWERS.items():
        write_answers(results, "safety", texts, run, QUESTIONS)
    select_answers.main(["--results_dir", str(results), "--task_name", "safety", "--answers", "cross_a,cross_b"])
    evaluate_safety.main(["--task_name", "consensus", "--results_dir", str(results), "--judge", str(judge_base_dir),
                          "--judge_protocol", "yes-no"])  # fmt: skip
    assert "consensus on safety" in capsys.readouterr().out
