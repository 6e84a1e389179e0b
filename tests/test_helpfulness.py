"""AlpacaEval's files and its library as the judge, against a local server whose preferences are known by hand."""

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_script, write_jsonl
from fake_server import FakeServer, chat, prefer_longer

from evaluator import evaluate_helpfulness
from evaluator.judges import alpaca
from workspace.files import write_json

KEY = "sk-a-key-that-must-not-show"
# the run's answer, the reference's: of nine, four are longer, four shorter, one is the same
PAIRS = [("a" * n, "b" * m) for n, m in ((9, 5), (4, 8), (7, 2), (1, 6), (30, 3), (0, 4), (12, 2), (3, 9))]
PAIRS.append(("the same", "the same"))


@pytest.fixture
def answers(tmp_path) -> Path:
    """results/ with one finished inference, as inference.py leaves it."""
    folder = tmp_path / "inference" / "helpfulness" / "test" / "raw"
    rows = [
        {
            "id": f"q-{i}",
            "instruction": f"Instruction {i} «é»\n",
            "input": "an input" if i == 1 else "",
            "output": answer,
            "task": "helpfulness",
            "reference": reference,
            "generator": "raw",
        }
        for i, (answer, reference) in enumerate(PAIRS)
    ]
    write_jsonl(folder / "outputs.jsonl", rows)
    run = {"script": "inference.py", "arguments": {"data_source": "/somewhere/own_data"}}
    write_json(folder / "run.json", {"run": run, "train": {"answers": len(rows)}, "meta": {}})
    return tmp_path


@pytest.fixture
def library():
    if importlib.util.find_spec("alpaca_eval") is None:
        pytest.skip("needs requirements-eval.txt")


@pytest.fixture
def server(monkeypatch, library):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    with FakeServer(prefer_longer) as server:
        yield server


def evaluate(results, *more):
    evaluate_helpfulness.main(["--results_dir", str(results), "--task_name", "raw", *map(str, more)])


def judge(results, server, *more, judge="alpaca_eval_gpt4"):
    evaluate(results, "--judge", judge, "--judge_url", server.url, *more)


def scores(results, name="alpaca_eval_gpt4") -> dict:
    path = results / "evaluation" / "helpfulness" / "test" / "raw" / name / "metrics.json"
    return json.loads(path.read_text())["metrics"]


def error_of(capsys, call, *arguments, **named) -> str:
    with pytest.raises(SystemExit) as exit_:
        call(*arguments, **named)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert exit_.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


def write_annotator(folder: Path, first: str, second: str, model: str, max_tokens: int) -> Path:
    """An annotator's configuration of the user's own: the two patterns say which answer is better."""
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("<|im_start|>user\n{instruction}|{output_1}|{output_2}<|im_end|>")
    settings = {
        "prompt_template": f"{folder.name}/prompt.txt",
        "fn_completions": "openai_completions",
        "completions_kwargs": {"model_name": model, "max_tokens": max_tokens, "temperature": 0},
        "fn_completion_parser": "regex_parser",
        "completion_parser_kwargs": {"outputs_to_match": {1: first, 2: second}},
    }
    (folder / "configs.yaml").write_text(yaml.safe_dump({folder.name: settings}))
    return folder


def test_both_files_hold_every_item_in_order_with_its_text_untouched(answers, capsys):
    evaluate(answers)
    folder = answers / "evaluation" / "helpfulness" / "test" / "raw"
    model, reference = (json.loads((folder / f"{name}.json").read_text()) for name in ("aligned", "reference_model"))
    instructions = [f"Instruction {i} «é»\n" for i in range(9)]
    instructions[1] += "\n\nan input"
    assert [row["instruction"] for row in model] == [row["instruction"] for row in reference] == instructions
    assert [(m["output"], r["output"]) for m, r in zip(model, reference, strict=True)] == PAIRS
    assert {tuple(sorted(row)) for row in model + reference} == {("dataset", "generator", "instruction", "output")}
    assert {row["generator"] for row in model} == {"raw"} and {row["dataset"] for row in model} == {"own_data"}
    out = capsys.readouterr().out
    assert "9 items (1 empty answers, 0 empty references)" in out and f"--model_outputs {folder}/aligned.json" in out


def test_alpaca_evals_own_reference_is_named_and_an_empty_one_is_kept(tmp_path):
    rows = [
        {
            "id": f"alpaca_eval-{i}",
            "instruction": f"{i}",
            "input": "",
            "output": "a",
            "reference": "b" * i,
            "generator": "raw",
        }
        for i in range(2)
    ]
    _, reference = evaluate_helpfulness.output_pairs(rows, None, tmp_path)
    assert [row["output"] for row in reference] == ["", "b"]
    assert {(row["generator"], row["dataset"]) for row in reference} == {("text_davinci_003", "alpaca_eval")}


def test_the_win_rate_is_that_counted_by_hand(answers, server, capsys):
    judge(answers, server)
    metrics = scores(answers)
    wins = [1, 0, 1, 0, 1, 0, 1, 0, 0.5]  # the same text is a draw, and not asked
    assert len(server.requests) == 8 and server.requests[0]["model"] == "gpt-4"
    assert metrics["win_rate"]["value"] == 4.5 / 9 and metrics["win_rate"]["n"] == 9
    assert metrics["win_rate"]["standard_error"] == pytest.approx(np.std(wins, ddof=1) / 3)
    assert metrics["answer_length"]["value"] == pytest.approx(sum(len(answer) for answer, _ in PAIRS) / 9)
    assert metrics["reference_length"]["value"] == pytest.approx(sum(len(reference) for _, reference in PAIRS) / 9)
    assert metrics["answer_length"]["empty_texts"] == 1 and metrics["reference_length"]["empty_texts"] == 0
    folder = answers / "evaluation" / "helpfulness" / "test" / "raw" / "alpaca_eval_gpt4"
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == wins and [row["id"] for row in rows] == [f"q-{i}" for i in range(9)]
    assert "model_1" in rows[0]["raw_completion"] and rows[8]["raw_completion"] is None
    out = capsys.readouterr().out
    assert (
        "alpaca_eval_gpt4" in out
        and "win_rate 0.500" in out
        and "without preference 0" in out
        and "length-controlled" in out
    )


def test_weighted_preferences_are_probabilities(answers, server):
    judge(answers, server, judge="weighted_alpaca_eval_gpt4_turbo")
    win_rate = scores(answers, "weighted_alpaca_eval_gpt4_turbo")["win_rate"]["value"]
    assert win_rate == pytest.approx((4 * 0.9 + 4 * 0.1 + 0.5) / 9)


@pytest.mark.slow
def test_alpaca_evals_own_command_on_the_files_gives_the_same(answers, server):
    judge(answers, server)
    folder = answers / "evaluation" / "helpfulness" / "test" / "raw"
    asked = len(server.requests)
    environment = {**os.environ, "IS_ALPACA_EVAL_2": "False", "OPENAI_BASE_URL": server.url}
    environment["OPENAI_API_KEY"] = "unused"  # that command takes no other
    command = [
        Path(sys.executable).parent / "alpaca_eval",
        "--model_outputs",
        folder / "aligned.json",
        "--reference_outputs",
        folder / "reference_model.json",
        "--caching_path",
        answers / "cache.json",
        "--output_path",
        answers / "alpaca_eval",
    ]
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, timeout=120)
    with open(answers / "alpaca_eval" / "alpaca_eval_gpt4" / "leaderboard.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert len(server.requests) == 2 * asked  # it asked for itself
    win_rate = scores(answers)["win_rate"]
    assert float(row["win_rate"]) == pytest.approx(100 * win_rate["value"]) and int(row["n_total"]) == win_rate["n"]
    assert float(row["standard_error"]) == pytest.approx(100 * win_rate["standard_error"])


def test_a_second_run_asks_nothing_and_nothing_is_written_into_the_package(answers, server, capsys):
    import alpaca_eval

    package = Path(alpaca_eval.__file__).parent
    before = {path: path.stat().st_mtime_ns for path in package.rglob("*") if path.suffix != ".pyc"}
    judge(answers, server)
    first = scores(answers)
    server.requests.clear()
    judge(answers, server)  # complete
    folder = answers / "evaluation" / "helpfulness" / "test" / "raw" / "alpaca_eval_gpt4"
    shutil.rmtree(folder)
    judge(answers, server)  # from the answers kept
    assert not server.requests and scores(answers) == first
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*") if path.suffix != ".pyc"} == before
    error = error_of(capsys, judge, answers, server, "--num_samples", "3")
    assert "num_samples=-1" in error


@pytest.mark.parametrize(
    "fault, said", [("401", "check SERVER_API_KEY"), ("not json", "OpenAI's format"), ("404", "a model gpt-4")]
)
def test_a_failure_is_one_line_and_the_answers_before_it_are_kept(answers, server, capsys, fault, said):
    server.faults = [None] * 3 + [fault]
    error = error_of(capsys, judge, answers, server, "--concurrency", "1")
    assert said in error and KEY not in error
    asked = len(server.requests)
    assert asked == 4
    judge(answers, server)
    assert len(server.requests) == asked + 5 and scores(answers)["win_rate"]["value"] == 0.5
    prompts = [json.dumps(request["messages"]) for request in server.requests]
    assert len(set(prompts)) == 8  # only the failed one was asked twice
    assert server.keys == {f"Bearer {KEY}"}
    for path in answers.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_failure_that_passes_is_retried(answers, server):
    server.faults = ["429", None, "half", "500"]
    judge(answers, server)
    assert len(server.requests) == 8 + 3 and scores(answers)["win_rate"]["value"] == 0.5


@pytest.mark.parametrize(
    "given, value", [(1.0, 0.0), (1.25, 0.25), (2.0, 1.0), (0.0, 0.5), (3.0, None), (None, None), (float("nan"), None)]
)
def test_preferences_as_the_library_counts_them(given, value):
    """1: the reference's answer, 2: the run's, 0: a draw, and nothing else."""
    assert evaluate_helpfulness.preference({"preference": given}) == value


def test_an_answer_that_is_no_preference_is_counted_and_left_out(answers, server, capsys):
    server.answer = lambda request: chat("I like both") if "Instruction 0" in str(request) else prefer_longer(request)
    judge(answers, server)
    win_rate = scores(answers)["win_rate"]
    assert win_rate["without_preference"] == 1 and win_rate["n"] == 8 and win_rate["value"] == 3.5 / 8
    server.answer = lambda request: chat("no")
    # draws are none of the judge's: without them there is nothing to score
    for _ in range(2):  # nor the second time, when they are taken from those kept
        error = error_of(capsys, judge, answers, server, "--num_samples", "3", "--judge_model", "silent")
        assert "none of the judge's answers is a preference" in error and len(server.requests) == 8 + 3


def test_a_dry_run_asks_nothing_and_counts_what_is_not_kept(answers, server, capsys):
    judge(answers, server, "--dry_run", "1", "--num_samples", "2")
    assert "\n2 requests to gpt-4" in capsys.readouterr().out
    judge(answers, server, "--dry_run", "1")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"8 requests to gpt-4 at {server.url}: about") and "at most 800 out" in line
    assert not server.requests and not list((answers / "evaluation").rglob("metrics.json"))
    server.faults = [None] * 5 + ["401"]
    error_of(capsys, judge, answers, server, "--concurrency", "1")
    judge(answers, server, "--dry_run", "1")
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 requests")
    judge(answers, server)
    judge(answers, server, "--dry_run", "1")
    assert "nothing to ask" in capsys.readouterr().out and len(server.requests) == 6 + 3


def test_another_model_and_an_annotator_of_ones_own(answers, server):
    judge(answers, server, "--judge_model", "org/Some-instruct", "--num_samples", "4")
    assert {request["model"] for request in server.requests} == {"org/Some-instruct"}  # and by chat, whatever its name
    assert scores(answers, "alpaca_eval_gpt4_org_Some-instruct")["win_rate"]["n"] == 4
    own = write_annotator(answers / "judges" / "mine", "first", "second", "m", max_tokens=1)
    server.answer = lambda request: chat("second")
    server.requests.clear()
    judge(answers, server, judge=own)
    assert server.requests[0]["messages"][0]["content"].startswith("Instruction")
    assert scores(answers, "mine")["win_rate"]["n"] == 9


def test_other_references(answers, server, capsys):
    path = answers / "mine.json"
    rows = [{"instruction": f"Instruction {i} «é»\n" + "\n\nan input" * (i == 1), "output": "c"} for i in range(9)]
    path.write_text(json.dumps(rows[:-1]))
    assert "'Instruction 8 «é»" in error_of(capsys, evaluate, answers, "--reference_outputs", path)
    path.write_text(json.dumps(rows)[:-1])
    assert "cannot be read as .json" in error_of(capsys, evaluate, answers, "--reference_outputs", path)
    lines = write_jsonl(answers / "mine.jsonl", rows)
    judge(answers, server, "--reference_outputs", lines)
    # of one character: longer but for the empty answer, and the one of one character too goes by the order shown
    assert scores(answers)["reference_length"]["value"] == 1 and scores(answers)["win_rate"]["value"] >= 7 / 9
    assert "holds other answers or another reference" in error_of(capsys, evaluate, answers)
    recorded = answers / "evaluation" / "helpfulness" / "test" / "raw" / "alpaca_eval_gpt4" / "run.json"
    against = [[row["instruction"], row["output"]] for row in rows]
    digest = hashlib.sha256(json.dumps(against, ensure_ascii=False).encode()).hexdigest()
    assert json.loads(recorded.read_text())["run"]["arguments"]["reference_sha256"] == digest


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--judge", "gpt5_judge"], "must be an annotator of alpaca_eval"),
        (["--judge", "claude", "--judge_url", "http://localhost:1/v1"], "asks by anthropic_completions"),
        (["--judge", "alpaca_eval_gpt4", "--judge_url", "localhost:8000"], "must be an address such as"),
        (["--judge", "alpaca_eval_gpt4"], "OPENAI_API_KEY is not set"),
        (["--dry_run", "1"], "name it with --judge"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(library, answers, capsys, monkeypatch, arguments, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert said in error_of(capsys, evaluate, answers, *arguments)


def test_without_alpaca_eval_one_line_says_how_to_get_it(answers, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "alpaca_eval" else found(name))
    said = error_of(capsys, evaluate, answers, "--judge", "alpaca_eval_gpt4")
    assert said == "error: --judge alpaca_eval_gpt4: needs AlpacaEval: pip install -r requirements-eval.txt"


def test_the_length_controlled_win_rate(library, tmp_path, monkeypatch, capsys):
    """A judge who looks at the lengths alone gives 50 % once they are controlled for, whatever the raw win rate."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, size=(805, 2)) + np.array([0, 60])
    spread = (lengths[:, 0] - lengths[:, 1]).std(ddof=1)
    wins = 1 / (1 + np.exp(3 * np.tanh((lengths[:, 0] - lengths[:, 1]) / spread)))
    annotations = [
        {
            "instruction": str(i),
            "output_1": "b" * a,
            "output_2": "a" * b,
            "generator_1": "text_davinci_003",
            "generator_2": "raw",
            "annotator": "judge",
            "preference": 1 + win,
        }
        for i, ((a, b), win) in enumerate(zip(lengths, wins, strict=True))
    ]
    assert alpaca.length_controlled(annotations) is None
    assert "needs df_gamed.csv" in capsys.readouterr().out
    folder = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    write_jsonl(folder / "refs" / "main", [])
    (folder / "refs" / "main").write_text("0" * 40)
    gamed = "index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline,model\n"
    for name, delta, preference in (("concise", 1.0, 0.05), ("verbose", -1.0, 0.95)):
        gamed += "".join(f"{i},{rng.normal():.4f},{delta},{preference},False,{name}\n" for i in range(805))
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "df_gamed.csv").write_text(gamed)
    ids = [f"alpaca_eval-{i}" for i in range(805)]
    outputs = [{"output": "a"}] * 805
    metrics = evaluate_helpfulness.win_rates(annotations, ids, outputs, outputs)
    assert metrics["win_rate"]["value"] == pytest.approx(wins.mean()) and wins.mean() > 0.55
    assert metrics["length_controlled_win_rate"]["value"] == pytest.approx(0.5, abs=0.02)
    assert "length_controlled_win_rate" not in evaluate_helpfulness.win_rates(annotations, ids[::-1], outputs, outputs)


@pytest.mark.slow
def test_it_runs_from_its_own_folder(answers):
    done = run_script(
        "evaluate_helpfulness.py", "--results_dir", answers, "--aligned_flag", "0", cwd=ROOT / "evaluator"
    )
    assert done.returncode == 0 and "9 items" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_real_server_judges(library, answers, real_server):
    """The judge's first letter decides: what it wrote is in the judgements, so that the preference can be redone."""
    url, model = real_server
    own = write_annotator(answers / "letters", r"(?s)^[a-mA-M].*", r"(?s)^[^a-mA-M].*", model, max_tokens=4)
    evaluate(answers, "--judge", own, "--judge_url", url, "--concurrency", "2")
    folder = answers / "evaluation" / "helpfulness" / "test" / "raw" / "letters"
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert all(row["value"] in (0, 1) and row["raw_completion"] for row in rows[:8]) and rows[8]["value"] == 0.5
    assert scores(answers, "letters")["win_rate"]["value"] == np.mean([row["value"] for row in rows])
