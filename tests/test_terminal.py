"""A prompt, a comparison and a conversation in the terminal."""

import builtins

import pytest

import inference
from data.encoding import prompt_ids
from data.prompts import STOP_STRING
from data.sources import Record
from models import terminal
from models.generation import generate
from models.loading import load_run

GREEDY = ["--temperature", "0", "--max_new_tokens", "12", "--dtype", "float32"]


def say(monkeypatch, *lines):
    """Type these lines, then end the input."""
    said = iter(lines)

    def read(prompt):
        print(prompt, end="")
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def greedy_answer(folder, instruction):
    model, tokenizer = load_run(folder, dtype="float32")
    args = inference.InferArguments(prompt="-", cross_task="x", temperature=0.0, max_new_tokens=12)
    return generate(model, tokenizer, [Record("", "", instruction)], args, 42)[0]["output"]


def test_a_conversation_streams_the_answers_and_names_the_experts(fused_dir, monkeypatch, capsys):
    say(monkeypatch, "Name three birds.", "", "/new", "Name three birds.")
    inference.main(["--chat", "1", "--cross_task", str(fused_dir), *GREEDY])
    out = capsys.readouterr().out
    answer = terminal.printable(greedy_answer(fused_dir, "Name three birds."))
    assert out.count(answer) == 2 and answer and out.count("experts used: helpfulness") == 2


def test_a_turn_is_read_with_those_before_it(fused_dir, monkeypatch, capsys):
    asked = []
    real = terminal.generate_tokens
    monkeypatch.setattr(terminal, "generate_tokens", lambda *args: asked.append(args[2][0]) or real(*args))
    say(monkeypatch, "Name three birds.", "And three fish?", "/quit", "not reached")
    inference.main(["--chat", "1", "--cross_task", str(fused_dir), *GREEDY])
    _, tokenizer = load_run(fused_dir, dtype="float32")
    first, second = (tokenizer.decode(ids) for ids in asked)
    assert asked[0] == prompt_ids(tokenizer, Record("", "", "Name three birds."))
    assert second.startswith(first) and second.count(STOP_STRING) == 2 and second.endswith("### Response:")
    assert "not reached" not in capsys.readouterr().out


def test_turns_that_no_longer_fit_are_left_out_and_it_is_said(fused_dir, monkeypatch, capsys):
    say(monkeypatch, *["Name birds, as many as you know, one below the other, please. " * 2] * 9)
    inference.main(["--chat", "1", "--cross_task", str(fused_dir), *GREEDY])
    assert "no longer fit the model's window" in capsys.readouterr().out


def test_an_answer_ends_on_the_screen_where_a_new_instruction_would_begin(tokenizer, capsys):
    streamer = terminal.AnswerStreamer(tokenizer)
    for text in ("Gulls", ", auks.\n### ", "### Inst", "ruction:\nName", " more"):
        streamer.on_finalized_text(text)
    streamer.on_finalized_text("", stream_end=True)
    assert streamer.answer == "Gulls, auks.\n### " and capsys.readouterr().out == "Gulls, auks.\n### \n"
    again = terminal.AnswerStreamer(tokenizer)
    again.on_finalized_text("a #")
    assert capsys.readouterr().out == "a "  # what may be the beginning of the mark waits
    again.on_finalized_text("1", stream_end=True)
    assert again.answer == "a #1"


def test_what_a_model_wrote_cannot_steer_the_terminal():
    assert terminal.printable("a\x1b[31mred\x07\n\tä日") == "a\\x1b[31mred\\x07\n\tä日"


def test_runs_answer_one_below_the_other(fused_dir, adapter_dirs, base_dir, capsys):
    runs = ["raw", str(adapter_dirs[0]), str(fused_dir)]
    inference.main(
        ["--prompt", "Name three birds.", "--compare", ",".join(runs), "--base_model", str(base_dir), *GREEDY]
    )
    out = capsys.readouterr().out
    blocks = out.split("── ")[1:]
    assert [block.splitlines()[0] for block in blocks] == runs
    for block, path in zip(blocks[1:], (adapter_dirs[0], fused_dir), strict=True):
        assert terminal.printable(greedy_answer(path, "Name three birds.")) in block
    assert "experts used" in blocks[2] and "experts used" not in blocks[0] + blocks[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--chat", "1"], "--chat 1 with --cross_task RUN"),
        (["--chat", "1", "--cross_task", "x", "--prompt", "hello"], "--prompt hello: does not go with --chat 1"),
        (["--chat", "1", "--cross_task", "x", "--task_name", "safety"], "does not go with --chat 1"),
        (["--compare", "raw,x"], "what to answer with --prompt"),
        (["--compare", "raw", "--cross_task", "x", "--prompt", "hello"], "does not go with --compare"),
        (["--compare", "raw", "--task_name", "safety", "--prompt", "hello"], "does not go with --compare"),
        (["--chat", "1", "--cross_task", "x", "--num_samples", "3"], "--num_samples 3: does not go with --chat 1"),
    ],
)
def test_what_cannot_go_together_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        inference.main(arguments)
    assert said in capsys.readouterr().err
