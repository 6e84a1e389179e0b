"""Truth and information: p(" yes") against a hand-written forward pass, empty answers, products, kept judgements."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tokenizer, run_script, write_answers
from fake_server import FakeServer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import cli
from config import UserError
from evaluator import evaluate_truth_and_info, report
from evaluator.evaluate_truth_and_info import TruthArguments
from evaluator.judges.local import load_causal, yes_no_ids, yes_probabilities
from evaluator.judges.protocols import YES_NO, clean_answer, fill
from workspace import client

ANSWERS = ["Ice floats.", "", "Nobody knows why. " * 12, "No.", "A: It does.\n\nQ: And why?\nA: No idea."]
CLEANED = ["Ice floats.", "", ("Nobody knows why. " * 12).strip(), "No.", "It does."]


def text_of(kind, i):
    return f"Q: Question number {i}?\nA: {CLEANED[i]}\n{'True' if kind == 'truth' else 'Helpful'}:"


def by_hand(folder, text):
    """One text, no batch, no padding: softmax of the last position over the whole vocabulary."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    (yes,) = tokenizer(" yes")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    return (logits[yes].exp() / logits.exp().sum()).item()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_yes_is_as_likely_as_a_forward_pass_says(judge_base_dir, batch_size):
    model, tokenizer = load_causal(str(judge_base_dir), torch.float32)
    texts = [text_of("truth", i) for i in (0, 2, 3, 4)]
    actual = dict(yes_probabilities(model, tokenizer, texts, batch_size))
    expected = [by_hand(judge_base_dir, text) for text in texts]
    assert [actual[text] for text in texts] == pytest.approx(expected, rel=1e-3)
    assert max(expected) > 1.5 * min(expected)  # the test can tell them apart


def flags(mode, judge, results_dir, *more):
    values = {"task_name": "raw", "mode": mode, "judge": judge, "results_dir": results_dir}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + [*more]


def run(mode, judge, results_dir, *more):
    precision = () if judge == "openai" else ("--dtype", "float32")
    evaluate_truth_and_info.main(flags(mode, judge, results_dir, *precision, *more))


def read(folder, name="metrics.json"):
    text = (folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def test_both_modes_and_their_products(tmp_path, judge_base_dir, monkeypatch, capsys):
    """The threshold lies between the judge's probabilities, so that answers differ; products are worked out here."""
    write_answers(tmp_path, "truthfulness", ANSWERS)
    p = {kind: [by_hand(judge_base_dir, text_of(kind, i)) for i in range(5)] for kind in ("truth", "information")}
    p["truth"][1], p["information"][1] = 1.0, 0.0  # the empty answer: true, and informing of nothing
    threshold = 0.99 * float(np.median(p["truth"]))
    monkeypatch.setattr(evaluate_truth_and_info, "THRESHOLD", threshold)
    run(0, judge_base_dir, tmp_path)
    assert "truth_and_information" not in capsys.readouterr().out
    run(1, judge_base_dir, tmp_path)
    folder = tmp_path / "evaluation" / "truthfulness" / "test" / "raw"
    names = {"truth": "truth_tiny-judge", "information": "information_tiny-judge"}
    values = {}
    for kind, name in names.items():
        rows = read(folder / name, "judgements.jsonl")
        assert [row["p"] for row in rows] == pytest.approx(p[kind], rel=1e-3)
        assert [row["answer"] for row in rows] == CLEANED
        values[kind] = [float(x >= threshold) for x in p[kind]]
        metric = read(folder / name)["metrics"][kind]
        assert metric["value"] == pytest.approx(np.mean(values[kind])) and (metric["n"], metric["empty_answers"]) == (
            5,
            1,
        )
    assert len(set(values["truth"])) == 2
    joint = read(folder / "truth_tiny-judge_x_information_tiny-judge")["metrics"]
    expected = np.mean([a * b for a, b in zip(values["truth"], values["information"], strict=True)])
    assert joint["truth_and_information"]["value"] == pytest.approx(expected)
    product = np.mean(values["truth"]) * np.mean(values["information"])
    assert joint["product_of_means"]["value"] == pytest.approx(product)
    out = capsys.readouterr().out
    assert "truth_and_information" in out and "n = 5), empty answers 1" in out
    report.main(["--runs", "", "--results_dir", str(tmp_path)])
    header = (tmp_path / "report" / "table.md").read_text().splitlines()[0]
    assert "truth ↑ (tiny-judge)" in header and "truth × information ↑ (tiny-judge, tiny-judge)" in header


def test_scores_of_other_answers_are_not_combined(tmp_path, judge_base_dir, capsys):
    write_answers(tmp_path, "truthfulness", ANSWERS)
    run(0, judge_base_dir, tmp_path)
    write_answers(tmp_path, "truthfulness", [*ANSWERS[:4], "Another."])
    run(1, judge_base_dir, tmp_path)
    assert "truth_and_information" not in capsys.readouterr().out
    with pytest.raises(SystemExit):  # and the first score is not overwritten by one of the new answers
        run(0, judge_base_dir, tmp_path)
    assert "answers_sha256" in capsys.readouterr().err


def test_two_models_of_a_server_are_two_judges(tmp_path, monkeypatch, capsys):
    """Though the judge that they stand in for has one name; and a joint score does not outlive its halves."""
    write_answers(tmp_path, "truthfulness", ANSWERS[:1])

    def sure_or_not(request):
        likely = -0.1 if request["model"] == "sure" else -3.0
        return {"text": " yes", "logprobs": {"tokens": [" yes"], "top_logprobs": [{" yes": likely, " no": -1.0}]}}

    monkeypatch.setenv("SERVER_API_KEY", "a-key")
    folder = tmp_path / "evaluation" / "truthfulness" / "test" / "raw"
    with FakeServer(sure_or_not) as server:
        for model, value in (("sure", 1.0), ("unsure", 0.0)):
            command = ["--task_name", "raw", "--mode", "0", "--judge_url", server.url, "--judge_model", model]
            evaluate_truth_and_info.main([*command, "--results_dir", str(tmp_path)])
            assert read(folder / f"truth_{model}")["metrics"]["truth"]["value"] == value
            assert read(folder / f"truth_{model}")["judge"]["name"] == model


def test_a_joint_score_does_not_outlive_what_it_was_made_of(tmp_path, judge_base_dir, capsys):
    write_answers(tmp_path, "truthfulness", ANSWERS)
    run(0, judge_base_dir, tmp_path)
    run(1, judge_base_dir, tmp_path)
    path = tmp_path / "evaluation" / "truthfulness" / "test" / "raw" / "truth_tiny-judge" / "judgements.jsonl"
    path.write_text(path.read_text().replace('"value": 1.0', '"value": 0.0'))
    with pytest.raises(SystemExit):
        run(1, judge_base_dir, tmp_path)
    assert "holds a run with judgements_sha256" in capsys.readouterr().err


def test_probabilities_that_are_none_are_no_verdict(tmp_path, judge_base_dir, capsys):
    write_answers(tmp_path, "truthfulness", ANSWERS)
    model = LlamaForCausalLM.from_pretrained(judge_base_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(judge_base_dir).save_pretrained(folder)
    with pytest.raises(SystemExit):
        run(0, folder, tmp_path)
    assert "gives probabilities that are not finite in float32" in capsys.readouterr().err


def test_an_answer_is_cleaned_as_the_judges_were_trained():
    assert clean_answer("A: Yes.\n\n  Indeed.") == "Yes. Indeed."
    assert clean_answer("Yes.\nQ: Another?\nA: No.") == "Yes."
    assert clean_answer("One line.\nAnother line.") == "One line.\nAnother line."
    assert clean_answer("The FAQ: read it.") == "The FAQ: read it."
    assert clean_answer(" \n ") == "" == clean_answer("Q: What?")
    assert fill(YES_NO["information"], "Why?", "So.") == "Q: Why?\nA: So.\nHelpful:"


# ---- " yes" as one token ---------------------------------------------------------------------------------------------


def sentencepiece_like(vocabulary_has_yes: bool) -> PreTrainedTokenizerFast:
    """A BPE whose spaces are "▁", as Llama's sentencepiece has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = ["True: yes no", "Helpful: yes no"] * 50 if vocabulary_has_yes else ["True: y e s n o"] * 50
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_yes_is_found_in_either_kind_of_tokenizer(judge_base_dir):
    spaced = PreTrainedTokenizerFast.from_pretrained(judge_base_dir)
    assert spaced.convert_ids_to_tokens(yes_no_ids(spaced, "True:")) == ["Ġyes", "Ġno"]
    pieces = sentencepiece_like(True)
    assert pieces.convert_ids_to_tokens(yes_no_ids(pieces, "True:")) == ["▁yes", "▁no"]


@pytest.mark.parametrize("tokenizer", [sentencepiece_like(False), make_tokenizer()])
def test_a_tokenizer_without_such_a_token_is_an_error(tokenizer):
    with pytest.raises(UserError, match="makes no single token of ' yes' after 'True:'"):
        yes_no_ids(tokenizer, "True:")


# ---- engines on a server ---------------------------------------------------------------------------------------------


def test_openai_engines_are_named_by_flag_or_in_the_script(tmp_path, monkeypatch, capsys):
    write_answers(tmp_path, "truthfulness", ANSWERS)
    asked = []
    monkeypatch.setattr(client, "make_client", lambda url, concurrency: (url, concurrency))
    monkeypatch.setattr(
        client,
        "yes_probabilities",
        lambda _, engine, texts: asked.append(engine) or ((text, 0.9 if "Ice" in text else 0.2) for text in texts),
    )
    with pytest.raises(SystemExit):
        run(1, "openai", tmp_path)
    assert "--judge_model, or informative_engine_name in this script" in capsys.readouterr().err
    monkeypatch.setattr(evaluate_truth_and_info, "informative_engine_name", "ft:info")
    run(1, "openai", tmp_path)
    run(0, "openai", tmp_path, "--judge_model", "ft:truth")
    assert asked == ["ft:info", "ft:truth"]
    folder = tmp_path / "evaluation" / "truthfulness" / "test" / "raw"
    assert read(folder / "information_ft_info")["metrics"]["information"]["value"] == pytest.approx(1 / 5)
    assert read(folder / "truth_ft_truth")["metrics"]["truth"]["value"] == pytest.approx(2 / 5)  # with the empty one


def test_dry_run_asks_and_writes_nothing(tmp_path, judge_base_dir, capsys):
    write_answers(tmp_path, "truthfulness", ANSWERS)
    run(0, "openai", tmp_path, "--judge_model", "ft:davinci-002:x", "--dry_run", "1")
    assert "4 requests to ft:davinci-002:x" in capsys.readouterr().out
    run(0, judge_base_dir, tmp_path, "--dry_run", "1")
    assert "no server is asked" in capsys.readouterr().out and not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    "judge, more, said",
    [
        ("tiny", ["--concurrency", "4"], "--concurrency 4: is for a judge on a server"),
        ("tiny", ["--judge_model", "m"], "--judge_model m: is for a judge on a server"),
        ("openai", ["--batch_size", "4"], "--batch_size 4: is for a judge on this machine"),
        ("openai", ["--dtype", "auto"], "--dtype auto: is for a judge on this machine"),
        (
            "tiny",
            ["--judge_url", "http://localhost:1", "--batch_size", "16"],
            "--batch_size 16: is for a judge on this",
        ),
        ("trained", ["--judge_url", "http://localhost:1"], "a judge of train_judge.py runs on this machine"),
    ],
)
def test_a_flag_that_would_be_ignored_is_an_error_that_names_it(tmp_path, judge, more, said):
    """Also one that is given its default value: the user thinks that it has an effect."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "judge.json").write_text("{}")
    with pytest.raises(UserError) as raised:
        cli.parse(flags(0, tmp_path / judge if judge == "trained" else judge, tmp_path, *more), TruthArguments)
    assert said in str(raised.value) and "leave it out" in str(raised.value)


def test_flags_that_are_not_given_have_their_documented_values(tmp_path):
    args = cli.parse(flags(0, "some/judge", tmp_path), TruthArguments)
    assert (args.batch_size, args.dtype, args.concurrency) == (16, "auto", None)
    on_server = cli.parse(flags(1, "openai", tmp_path), TruthArguments)
    assert (on_server.batch_size, on_server.dtype, on_server.concurrency) == (None, None, 8)


# ---- kept judgements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, said", [([], "--mode 0 (truth)"), (["--mode", "0"], "no answers under")])
def test_no_mode_and_no_answers_are_one_line(tmp_path, arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate_truth_and_info.main(["--results_dir", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate_truth_and_info.py", "evaluate_safety.py", "train_judge.py"])
def test_the_scripts_run_from_the_root_and_from_their_folder(tmp_path, script):
    for cwd, name in ((ROOT, f"evaluator/{script}"), (ROOT / "evaluator", script)):
        done = run_script(name, "--results_dir", tmp_path, cwd=cwd)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_judgement_goes_on_from_its_cache(tmp_path, judge_base_dir, monkeypatch):
    """A real process, killed as soon as a few judgements are kept; the same command asks for the others only."""
    total = 3000
    write_answers(tmp_path, "truthfulness", [f"Answer number {i}." for i in range(total)])
    command = [
        sys.executable,
        "evaluate_truth_and_info.py",
        "--task_name",
        "raw",
        "--mode",
        "0",
        "--judge",
        str(judge_base_dir),
        "--results_dir",
        str(tmp_path),
        "--dtype",
        "float32",
        "--batch_size",
        "1",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT / "evaluator", stderr=subprocess.DEVNULL, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    cache = tmp_path / "evaluation" / "judgements.sqlite"
    deadline = time.monotonic() + 120
    while kept(cache) < 20 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = kept(cache)
    assert 20 <= before < total
    asked = []
    real = evaluate_truth_and_info.yes_probabilities

    def counted(*more, wanted):
        asked.extend(wanted)
        return real(*more, wanted=wanted)

    monkeypatch.setattr(evaluate_truth_and_info, "yes_probabilities", counted)
    run(0, judge_base_dir, tmp_path)
    assert len(asked) == total - before
    rows = read(tmp_path / "evaluation/truthfulness/test/raw/truth_tiny-judge", "judgements.jsonl")
    assert len(rows) == total and len({row["id"] for row in rows}) == total


def kept(cache: Path) -> int:
    try:
        return (
            sqlite3.connect(f"file:{cache}?mode=ro", uri=True).execute("SELECT count(*) FROM judgement").fetchone()[0]
        )
    except sqlite3.OperationalError:  # not there yet
        return 0
