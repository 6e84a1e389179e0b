"""Rows of data, of any kind."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import align_basemodel
import inference
from data.encoding import IGNORED, Encoder
from data.sources import Record
from evaluator import evaluate_likelihood, train_judge
from fuzz.harness import FUZZ, JSON, LOOK_ALIKES, TEXTS, lines_of, mutated, numbers_are_finite, outcome

pytestmark = pytest.mark.slow

GOOD = {
    "helpfulness": {"instruction": "Name a river.", "input": "", "output": "The Rhine."},
    "safety": {"prompt": "How?", "response": "No.", "is_safe": True, "category": []},
    "truthfulness": {
        "question": "Why?",
        "best_answer": "b",
        "correct_answers": ["b", "c"],
        "incorrect_answers": ["w", "x"],
    },
}
FILES = ("helpfulness", "safety", "truthfulness")


@st.composite
def rows_of_task(draw, task: str) -> list:
    """Two rows as they should be, and one with something changed, or of anything."""
    good = [{"id": f"{task}-{i}", **GOOD[task]} for i in range(2)]
    if task == "safety":
        good[1]["is_safe"] = False
    odd = draw(st.one_of(st.just(None), JSON)) if draw(st.integers(0, 9)) == 0 else mutated(draw, good[0])
    if isinstance(odd, dict) and draw(st.booleans()):
        odd["id"] = "odd"
        for column, value in odd.items():
            if column != "id" and isinstance(value, str) and draw(st.booleans()):
                odd[column] = draw(TEXTS)
    return [*good, odd]


@pytest.mark.parametrize("task", FILES)
@FUZZ
@given(data=st.data())
def test_rows(task, data, base_dir, tmp_path_factory):
    """Scored, answered and trained on: all of them, or none and one line with file and row."""
    folder = tmp_path_factory.mktemp("rows")
    rows = data.draw(rows_of_task(task))
    for half in ("train", "test"):
        (folder / f"{task}_{half}.jsonl").write_text(lines_of(rows), encoding="utf-8")
    common = ["--base_model", base_dir, "--data_source", folder, "--results_dir", folder / "results"]
    common += ["--dtype", "float32"]
    scripts = {
        "score": (evaluate_likelihood.main, ["--run", "raw", "--task_name", task]),
        "answer": (inference.main, ["--task_name", task, "--aligned_flag", 0, "--max_new_tokens", 2]),
        "train": (align_basemodel.main, ["--task_name", task, "--max_steps", 1, "--disable_tqdm", 1]),
    }
    main, flags = scripts[data.draw(st.sampled_from(["score", "score", "answer", "train"]))]
    said = outcome(main, *flags, *common)
    if said:
        assert f"{task}_" in said or "--data_source" in said, said
    if (folder / "results").exists():
        numbers_are_finite(folder / "results")
    for path in folder.glob("results/inference/*/*/*/outputs.jsonl"):
        prompts = {json.dumps([row.get(name) for name in ("instruction", "prompt", "question")]) for row in rows}
        assert path.read_bytes().count(b"\n") == (len(prompts) if task == "safety" else len(rows))


@FUZZ
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)), between=st.booleans())
def test_files_of_anything(content, between, base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    good = lines_of([{"id": "1", **GOOD["helpfulness"]}]).encode()
    (folder / "helpfulness_test.jsonl").write_bytes(good + content + b"\n" + good if between else content)
    flags = ["--run", "raw", "--task_name", "helpfulness", "--base_model", base_dir, "--data_source", folder]
    said = outcome(evaluate_likelihood.main, *flags, "--results_dir", folder / "results", "--dtype", "float32")
    if said:
        assert "helpfulness_test.jsonl" in said


@FUZZ
@given(texts=st.tuples(TEXTS, TEXTS, TEXTS), more=st.sampled_from(LOOK_ALIKES))
def test_no_text_moves_the_border_of_an_answer(texts, more, tokenizer):
    """The labels are the answer's tokens and EOS, and spell the answer, whatever prompt and answer look like."""
    instruction, input, output = (text.encode("utf-8", "replace").decode() for text in texts)
    output = (output + more).encode("utf-8", "replace").decode()
    record = Record("1", "helpfulness", instruction, input, output)
    encoder = Encoder(tokenizer, 100_000)
    sample = encoder.encode(record)
    prompt = len(encoder.prompt_ids(record))
    assert sample["labels"][:prompt] == [IGNORED] * prompt
    answer = sample["labels"][prompt:]
    assert answer == sample["input_ids"][prompt:] and IGNORED not in answer
    if output:
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in answer[:-1]
        assert tokenizer.decode(answer[:-1]) == output
        assert tokenizer.bos_token_id not in answer
    assert encoder.encode(Record("1", "helpfulness", instruction, input))["input_ids"] == sample["input_ids"][:prompt]


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_a_megabyte_in_one_row(column, base_dir, tmp_path, capsys):
    """It is cut to the model's window, which is told."""
    row = {"id": "1", **GOOD["helpfulness"], column: "word " * 210_000}
    (tmp_path / "helpfulness_test.jsonl").write_text(lines_of([row]))
    flags = ["--run", "raw", "--task_name", "helpfulness", "--base_model", base_dir, "--data_source", tmp_path]
    evaluate_likelihood.main([str(word) for word in (*flags, "--results_dir", tmp_path, "--dtype", "float32")])
    assert "cut 1" in capsys.readouterr().out


@FUZZ
@given(data=st.data())
def test_rows_of_a_judges_training(data, judge_base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    rows = [
        {"id": f"{i}", "prompt": f"How {i}?", "response": "No." * (i % 3 + 1), "is_safe": bool(i % 2), "category": []}
        for i in range(12)
    ]
    rows[data.draw(st.integers(0, 11))] = mutated(data.draw, rows[0])
    for half in ("train", "test"):
        (folder / f"safety_{half}.jsonl").write_text(lines_of(rows), encoding="utf-8")
    flags = ["--kind", "safety", "--base_model", judge_base_dir, "--data_source", folder, "--max_steps", 1]
    flags += ["--disable_tqdm", 1, "--dtype", "float32", "--results_dir", folder / "results"]
    said = outcome(train_judge.main, *flags)
    if said:
        assert "safety_" in said or "--num_" in said or "--data_source" in said, said
    if (folder / "results").exists():
        numbers_are_finite(folder / "results")
