"""Answers: batching, stopping, order, seeds, resuming, and the routing picture."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, decode, needs_attention_in_bfloat16
from fake_server import FakeServer
from tokenizers import processors

import inference
from data import sources
from data.prompts import render_prompt
from data.sources import Record
from inference import InferArguments
from models.loading import load_run
from models.router import route
from models.routing import routing_usage, token_routing

TEXTS = ("Hi", "Why do cats purr when they sleep near a warm stove in winter?", "Name a river.", "What is a sonnet?")
RECORDS = [Record(str(i), "safety", text) for i, text in enumerate(TEXTS)]


def arguments(tmp_path, base_dir, source, *more):
    return [
        "--task_name",
        "safety",
        "--results_dir",
        str(tmp_path),
        "--base_model",
        str(base_dir),
        "--data_source",
        str(source),
        "--max_new_tokens",
        "8",
        "--batch_size",
        "4",
        "--num_samples",
        "10",
        *more,
    ]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_greedy_answers_do_not_depend_on_the_batch(fused_dir):
    model, tokenizer = load_run(fused_dir, dtype="float32")
    args = InferArguments(task_name="safety", temperature=0.0, max_new_tokens=10)
    together = inference.generate(model, tokenizer, RECORDS, args, seed=0)
    for record, answer in zip(RECORDS, together, strict=True):
        (alone,) = inference.generate(model, tokenizer, [record], args, seed=1)
        assert alone == answer


@needs_attention_in_bfloat16
@pytest.mark.parametrize("aligned", [False, True])
def test_no_product_with_a_frozen_weight_copies_it_once_per_sample(fused_dir, adapter_dirs, aligned):
    """What PyTorch does for a frozen weight and an input that is a slice: at 49,152 words and a batch of 32, 1.8 GB."""
    model, tokenizer = load_run(adapter_dirs[1] if aligned else fused_dir, dtype="bfloat16")
    args = InferArguments(task_name="safety", temperature=0.0, max_new_tokens=3)
    with torch.profiler.profile(record_shapes=True) as profile:
        inference.generate(model, tokenizer, RECORDS, args, seed=0)
    copied = {tuple(event.input_shapes[0][1:]) for event in profile.events() if event.name == "aten::copy_"}
    weights = {tuple(p.T.shape) for p in model.parameters() if p.dim() == 2 and not p.requires_grad}
    assert not copied & weights


def test_a_static_cache_gives_the_same_answers(fused_dir):
    model, tokenizer = load_run(fused_dir, dtype="float32")
    answers = [
        inference.generate(model, tokenizer, RECORDS, args, seed=0)
        for args in (
            InferArguments(task_name="safety", temperature=0.0, max_new_tokens=10, cache_implementation=cache)
            for cache in ("dynamic", "static")
        )
    ]
    assert answers[0] == answers[1]


def test_sampling_is_seeded(fused_dir):
    model, tokenizer = load_run(fused_dir, dtype="float32")
    args = InferArguments(task_name="safety", max_new_tokens=12)
    first, again, other = (inference.generate(model, tokenizer, RECORDS, args, seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    "emitted, output, reason",
    [
        (["A", " fox", "</s>", "B"], "A fox", "stop"),
        (["A", " fox", "\n\n", "### Instruction:", "B"], "A fox", "stop"),
        (["A", " fox", " ran"], "A fox ran", "length"),
    ],
)
def test_answers_end_at_eos_or_at_a_new_instruction(base_dir, emitted, output, reason, monkeypatch):
    model, tokenizer = load_run(base_dir, dtype="float32")
    tokens = [t for text in emitted for t in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def generate(input_ids, **_):
        return torch.cat((input_ids, torch.tensor([tokens])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    args = InferArguments(task_name="safety", max_new_tokens=50)
    (answer,) = inference.generate(model, tokenizer, RECORDS[:1], args, seed=0)
    assert (answer["output"], answer["finish_reason"]) == (output, reason)


def test_the_base_by_its_chat_template_ends_where_its_generation_config_says(base_dir, monkeypatch):
    """Of Gemma a turn ends at another token than EOS."""
    model, tokenizer = load_run(None, str(base_dir), "float32")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.generation_config.eos_token_id = [1, 40]
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat((input_ids, torch.tensor([[50, 40, 60]])), 1)
    )
    for run, expected in (("raw_chat", [50]), ("x", [50, 40, 60])):
        args = inference.InferArguments(prompt="-", cross_task=run, max_new_tokens=8)
        (answer,) = inference.generate(model, tokenizer, RECORDS[:1], args, seed=0)
        assert answer["output"] == tokenizer.decode(expected).strip()


def test_the_bases_own_settings_of_generation_are_not_ours(base_dir, tmp_path):
    """Answers come from the whole distribution: a base that ships a repetition penalty and a threshold is asked
    without."""
    with_own = shutil.copytree(base_dir, tmp_path / "with-own")
    settings = {"eos_token_id": [1, 40], "repetition_penalty": 1.9, "min_p": 0.5, "num_beams": 2, "top_k": 1}
    (with_own / "generation_config.json").write_text(json.dumps(settings))
    answers = []
    for folder in (base_dir, with_own):
        model, tokenizer = load_run(folder, dtype="float32")
        for temperature in (0.0, 0.6):
            args = InferArguments(task_name="safety", temperature=temperature, max_new_tokens=30)
            answers.append(inference.generate(model, tokenizer, RECORDS, args, seed=0))
    assert answers[:2] == answers[2:] and model.generation_config.eos_token_id == [1, 40]


def test_a_prompt_beyond_the_window_keeps_its_bos(base_dir, monkeypatch):
    """As in training and scoring."""
    model, tokenizer = load_run(base_dir, dtype="float32")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    seen = []

    def generate(input_ids, **_):
        seen.append(input_ids)
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    args = InferArguments(task_name="safety", max_new_tokens=20)
    record = Record("long", "safety", "word " * 900, "", "")
    inference.generate(model, tokenizer, [record], args, seed=0)
    window = model.config.max_position_embeddings - 20
    whole = tokenizer(render_prompt(record.instruction, ""))["input_ids"]
    assert seen[0].tolist() == [[0, *whole[1 - window :]]]


@pytest.mark.parametrize(
    "flags",
    [["--dtype", "bfloat16"], ["--batch_size", "3"], ["--cache_implementation", "static"], ["--concurrency", "3"]],
)
def test_what_a_server_or_this_machine_would_ignore_is_refused(flags, capsys):
    served = ["--server_url", "http://localhost:1/v1", "--server_model", "m"] if "--concurrency" not in flags else []
    with pytest.raises(SystemExit):
        inference.main(["--task_name", "safety", "--aligned_flag", "0", *served, *flags])
    assert f"error: {' '.join(flags)}: " in capsys.readouterr().err


def test_generation_stops_at_the_stop_string(base_dir):
    """A model that always says "### Instruction:" is stopped by it, long before --max_new_tokens."""
    model, tokenizer = load_run(base_dir, dtype="float32")
    wanted = tokenizer("### Instruction:", add_special_tokens=False)["input_ids"]
    calls = []

    def forward(input_ids=None, **kwargs):
        logits = torch.zeros(len(input_ids), 1, model.config.vocab_size)
        logits[:, :, wanted[len(calls) % len(wanted)]] = 50.0
        calls.append(1)
        return type("Out", (dict,), {"__getattr__": dict.get})(
            logits=logits, past_key_values=kwargs.get("past_key_values")
        )

    model.forward = forward
    args = InferArguments(task_name="safety", max_new_tokens=200, temperature=0.0)
    (answer,) = inference.generate(model, tokenizer, RECORDS[:1], args, seed=0)
    assert answer["output"] == "" and answer["finish_reason"] == "stop" and len(calls) < 40


def test_a_run_writes_every_answer_in_its_prompts_order_and_is_repeatable(tmp_path, base_dir, fused_dir, tiny_source):
    for name in ("one", "two"):
        inference.main(arguments(tmp_path / name, base_dir, tiny_source, "--cross_task", str(fused_dir)))
    folder = tmp_path / "one" / "inference" / "safety" / "test" / "cross_moe"
    assert sorted(p.name for p in folder.iterdir()) == ["outputs.jsonl", "run.json"]
    rows = read(folder / "outputs.jsonl")
    prompts = [json.loads(line) for line in (tiny_source / "safety_test.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys(row["prompt"] for row in prompts))
    assert [row["instruction"] for row in rows] == [p for p in order if p in {row["instruction"] for row in rows}]
    assert set(rows[0]) == {
        "id",
        "instruction",
        "input",
        "output",
        "task",
        "reference",
        "new_tokens",
        "finish_reason",
        "generator",
    }
    assert {row["generator"] for row in rows} == {"cross_moe"}
    other = tmp_path / "two" / "inference" / "safety" / "test" / "cross_moe" / "outputs.jsonl"
    assert other.read_bytes() == (folder / "outputs.jsonl").read_bytes()
    seen = tmp_path / "one" / "observation" / "safety" / "test" / "cross_moe"
    assert sorted(p.name for p in seen.iterdir()) == ["routing.json", "routing.png", "tokens.json"]
    assert (seen / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", ["half a line", "half a batch"])
def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path, base_dir, tiny_source, damage, capsys):
    command = arguments(tmp_path, base_dir, tiny_source, "--aligned_flag", "0")
    inference.main(command)
    folder = tmp_path / "inference" / "safety" / "test" / "raw"
    whole = (folder / "outputs.jsonl").read_bytes()
    # as it stood when killed: arguments.json instead of run.json, some lines short
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    (folder / "arguments.json").write_text(json.dumps({"run": run["run"]}))
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:5]) + (lines[5][:20] if damage == "half a line" else lines[5])
    (folder / "outputs.jsonl").write_bytes(kept)
    capsys.readouterr()
    inference.main(command)
    assert (folder / "outputs.jsonl").read_bytes() == whole
    inference.main(command)
    assert "nothing to do" in capsys.readouterr().out


def test_other_arguments_do_not_overwrite(tmp_path, base_dir, tiny_source, capsys):
    inference.main(arguments(tmp_path, base_dir, tiny_source, "--aligned_flag", "0"))
    before = (tmp_path / "inference/safety/test/raw/outputs.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        inference.main(arguments(tmp_path, base_dir, tiny_source, "--aligned_flag", "0", "--temperature", "0"))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "temperature=0.6" in error and len(error.splitlines()) == 1
    assert (tmp_path / "inference/safety/test/raw/outputs.jsonl").read_bytes() == before


def test_prompt_answers_in_the_terminal_with_the_experts_used(tmp_path, fused_dir, capsys):
    inference.main(
        [
            "--prompt",
            "Name a tree.",
            "--cross_task",
            str(fused_dir),
            "--max_new_tokens",
            "5",
            "--results_dir",
            str(tmp_path),
        ]
    )
    out = capsys.readouterr().out
    assert "experts used: helpfulness" in out and "truthfulness" in out
    assert not any(tmp_path.iterdir())


def test_routing_is_counted_by_tokens_not_by_calls(fused_dir):
    """One long and one short text in a batch: padding adds nothing, and each token counts once."""
    model, tokenizer = load_run(fused_dir, dtype="float32")
    texts = [("A", "b"), ("Does the quick brown fox jump over the lazy dog?", "Again and again and again.")]
    answered = [Record(str(i), "safety", prompt, "", answer) for i, (prompt, answer) in enumerate(texts)]
    usage = routing_usage(model, tokenizer, answered, batch_size=2, progress=False)
    total, tokens = 0, 0
    for prompt, answer in texts:
        ids = torch.tensor([tokenizer(render_prompt(prompt))["input_ids"] + tokenizer(answer)["input_ids"]])
        with torch.no_grad():
            _, logits = decode(model, input_ids=ids)
        chosen = [route(x, 2) for x in logits]
        weights = [torch.zeros(ids.shape[1], 3).scatter(1, index, weight) for index, weight in chosen]
        total = total + torch.stack(weights).sum(1)
        tokens += ids.shape[1]
    assert usage["tokens"] == tokens
    assert torch.allclose(torch.tensor(usage["weight"]), total / tokens, atol=1e-5)
    assert torch.tensor(usage["weight"]).sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert torch.tensor(usage["selected"]).sum(1).tolist() == pytest.approx([2.0] * 3, abs=1e-6)


def test_the_tokens_of_an_answer_have_their_own_weights(fused_dir):
    model, tokenizer = load_run(fused_dir, dtype="float32")
    record = Record("a", "safety", "May I feed bread to ducks?", "", "Better not: oats suit them.")
    pieces = token_routing(model, tokenizer, record)
    assert "".join(text for text, _ in pieces) == record.output
    prompt, whole = (
        routing_usage(model, tokenizer, [one], 1, progress=False) for one in (replace(record, output=""), record)
    )
    assert len(pieces) == whole["tokens"] - prompt["tokens"]
    sums = [torch.tensor(usage["weight"]).mean(0) * usage["tokens"] for usage in (prompt, whole)]
    ours = torch.tensor([weights for _, weights in pieces]).sum(0)
    assert ours.tolist() == pytest.approx((sums[1] - sums[0]).tolist(), abs=0.001 * len(pieces))
    strange = replace(record, task="xstest", output="Oats — or 🦆 peas.")  # pieces of one character stand together
    assert "".join(text for text, _ in token_routing(model, tokenizer, strange)) == strange.output


def test_a_pad_token_or_none_gives_the_same_answers_and_routing(fused_dir, tokenizer, padded_tokenizer):
    """Llama-2 has no pad token, SmolLM2's is its EOS."""
    model, _ = load_run(fused_dir, dtype="float32")
    args = InferArguments(task_name="safety", temperature=0.0, max_new_tokens=10)
    outcomes = []
    for one in (tokenizer, padded_tokenizer):
        rows = inference.generate(model, one, RECORDS, args, seed=0)
        answered = [inference.answered_record(row) for row in rows]
        outcomes.append((rows, routing_usage(model, one, answered, batch_size=4, progress=False)))
    assert tokenizer.pad_token_id is None and outcomes[0] == outcomes[1]


def test_a_routing_picture_that_fails_is_a_warning_and_is_drawn_the_next_time(
    tmp_path, base_dir, fused_dir, tiny_source, monkeypatch, capsys
):
    command = [*arguments(tmp_path, base_dir, tiny_source), "--cross_task", str(fused_dir)]

    def fail(*_):
        raise ValueError("no fonts")

    with monkeypatch.context() as patch:
        patch.setattr(inference, "draw_heat_map", fail)
        inference.main(command)
    folder = tmp_path / "inference/safety/test/cross_moe"
    assert sorted(p.name for p in folder.iterdir()) == ["outputs.jsonl", "run.json"]
    assert "warning: the answers are complete" in (error := capsys.readouterr().err) and "no fonts" in error
    answers = (folder / "outputs.jsonl").read_bytes()
    inference.main(command)
    observed = tmp_path / "observation/safety/test/cross_moe"
    assert sorted(p.name for p in observed.iterdir()) == ["routing.json", "routing.png", "tokens.json"]
    assert (folder / "outputs.jsonl").read_bytes() == answers


OF_US = ("--batch_size", "4")  # a server batches as it likes


@pytest.fixture
def server_arguments(tmp_path, base_dir, tiny_source):
    def of(url, model="tiny", *more):
        return [
            *(word for word in arguments(tmp_path, base_dir, tiny_source, "--aligned_flag", "0") if word not in OF_US),
            "--server_url",
            url,
            "--server_model",
            model,
            *more,
        ]

    return of


def test_a_servers_answers_are_of_the_weights_that_lie_here(base_dir, adapter_dirs, tmp_path, capsys):
    """Of a run that was trained anew they are not its answers."""
    adapter = shutil.copytree(adapter_dirs[1], tmp_path / "outputs" / "served")
    with FakeServer(lambda request: {"text": " Yes."}) as server:
        asked = ["--task_name", "safety", "--cross_task", "served", "--data_source", "sample", "--num_samples", "2"]
        asked += ["--server_url", server.url, "--server_model", "m", "--results_dir", str(tmp_path)]
        inference.main(asked)
        inference.main(asked)
        assert "is complete: nothing to do" in capsys.readouterr().out and len(server.requests) == 2
        shutil.copy(adapter_dirs[2] / "adapter_model.safetensors", adapter)
        with pytest.raises(SystemExit):
            inference.main(asked)
    assert "weights_sha256" in capsys.readouterr().err and len(server.requests) == 2


SERVER = """
import sys, time
from fake_server import FakeServer

def answer(request):
    with open(sys.argv[1], "a+") as asked:
        asked.seek(0)
        if sys.argv[2] == "A" and len(asked.readlines()) >= 3:
            time.sleep(600)  # until it is killed
        print(repr(request["prompt"]), file=asked, flush=True)
    return {"text": f" {sys.argv[2]}: {request['prompt'][-30:]}"}

server = FakeServer(answer)
print(server.url, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_server_process_that_is_killed_midway_loses_nothing(tmp_path, base_dir):
    """Two real servers, one of them killed: every prompt is answered, and none again that had an answer."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path / name), name], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": path})
        for name in "AB"
    ]  # fmt: skip
    urls = ",".join(server.stdout.readline().strip() for server in servers)
    flags = ["--aligned_flag", 0, "--base_model", base_dir, "--data_source", "sample", "--num_samples", 60]
    flags += ["--max_new_tokens", 8, "--concurrency", 2, "--server_url", urls, "--server_model", "m"]
    command = [sys.executable, ROOT / "inference.py", "--task_name", "safety", *flags, "--results_dir", tmp_path]
    outputs = tmp_path / "inference" / "safety" / "test" / "raw" / "outputs.jsonl"
    try:
        asking = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        while asking.poll() is None and not (outputs.exists() and '"A: ' in outputs.read_text()):
            time.sleep(0.05)
        servers[0].kill()
        _, said = asking.communicate(timeout=300)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert asking.returncode == 0 and said.count("the others go on") == 1, said
    rows, asked = read(outputs), [(tmp_path / name).read_text().splitlines() for name in "AB"]
    assert len(rows) == 60 and {row["output"].split(":")[0].strip() for row in rows} == {"A", "B"}
    answered_by_b = sum(row["output"].strip().startswith("B") for row in rows)
    assert len(asked[1]) == len(set(asked[1])) == answered_by_b  # what A had answered was not asked of B
    assert (outputs.parent / "run.json").exists()


def test_a_server_answers_into_the_same_files_and_a_failed_run_asks_only_the_rest(tmp_path, server_arguments, capsys):
    def shout(request):
        goes_on = "\n\n### Instruction:\nMore" if "\nIs" in request["prompt"] else ""
        return {"text": f" {request['prompt'][-30:]}{goes_on}", "finish_reason": "length"}

    outputs = tmp_path / "inference" / "safety" / "test" / "raw" / "outputs.jsonl"
    with FakeServer(shout) as server:
        server.faults = [None] * 4 + ["401"] * 20
        with pytest.raises(SystemExit):
            inference.main(server_arguments(server.url, "tiny", "--concurrency", "1"))
        assert "SERVER_API_KEY" in capsys.readouterr().err
        assert len(read(outputs)) == 4 and not (outputs.parent / "run.json").exists()
        server.faults, before = [], len(server.requests)
        inference.main(server_arguments(server.url))
        rows = read(outputs)
        assert len(server.requests) - before == len(rows) - 4 > 0
        request = server.requests[-1]
        inference.main(server_arguments(server.url))  # complete: asks nothing
        assert server.requests[-1] is request
    assert {k: request[k] for k in ("model", "max_tokens", "temperature", "top_p", "seed", "stop")} == {
        "model": "tiny",
        "max_tokens": 8,
        "temperature": 0.6,
        "top_p": 1.0,
        "seed": 42,
        "stop": ["### Instruction:"],
    }
    local = sources.prompt_records("safety", sources.read_rows("safety", "test", str(tmp_path / "source")), "")
    assert [row["id"] for row in rows] == [record.id for record in sources.spread(local, 10)]
    for row in rows:
        assert row["output"] == render_prompt(row["instruction"])[-30:].strip()
        assert row["finish_reason"] == ("stop" if row["instruction"].startswith("Is") else "length")
        assert set(row) == {
            "id",
            "instruction",
            "input",
            "output",
            "task",
            "reference",
            "new_tokens",
            "finish_reason",
            "generator",
        }
    with pytest.raises(SystemExit):
        inference.main(server_arguments("http://127.0.0.1:9/v1", "another"))
    assert "server_model=tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server_answers_as_the_model_does_here(tmp_path, base_dir, server_arguments, real_server):
    url, name = real_server
    inference.main(server_arguments(url, name, "--temperature", "0", "--concurrency", "2"))
    rows = read(tmp_path / "inference" / "safety" / "test" / "raw" / "outputs.jsonl")
    model, tokenizer = load_run(base_dir, dtype="float32")
    args = InferArguments(task_name="safety", temperature=0.0, max_new_tokens=8)
    for row in rows:
        (local,) = inference.generate(model, tokenizer, [Record(row["id"], "safety", row["instruction"])], args, 0)
        assert row["output"] == local["output"]


def test_another_seeds_answers_have_a_directory_of_their_own():
    names = [
        inference.directory_name(InferArguments(task_name="safety", cross_task="x/moe", **more))
        for more in ({}, {"seed": 7}, {"seed": 7, "checkpoint_number": 3})
    ]
    assert names == ["cross_moe", "cross_moe_sample_7", "cross_moe_3_sample_7"]


def test_a_prompt_that_is_no_text_is_one_line(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--prompt", "caf\udce9?"])
    assert "--prompt: is not UTF-8" in capsys.readouterr().err
