"""--device_map: a base spread by accelerate, the mixture beside it; the same answers and scores."""

import pytest
import torch
from accelerate import dispatch_model

import inference
from cli import parse
from config import UserError
from data.encoding import Encoder
from data.sources import Record
from evaluator import evaluate_likelihood
from evaluator.scoring import score_answers, score_texts
from inference import InferArguments
from models import base
from models.generation import generate
from models.loading import load_run
from models.routing import routing_usage

RECORDS = [Record(str(i), "safety", f"Say {word}.", "", f"{word} it is.") for i, word in enumerate(("no", "maybe yes"))]
LAYERS = {f"model.layers.{number}": "cpu" for number in range(3)}
IN_PARTS = {"model.embed_tokens": "cpu", **LAYERS, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture
def hooked(monkeypatch):
    """Loads a base as accelerate lays it over several devices, with its hooks on every part, here all on the CPU."""
    load_weights = base.load_weights

    def load(*arguments):
        *others, device_map = arguments
        assert device_map == IN_PARTS
        model = load_weights(*others, device_map)
        return dispatch_model(model, IN_PARTS, main_device="cpu", force_hooks=True)

    monkeypatch.setattr(base, "load_weights", load)


def everything(model, tokenizer):
    """Logits, likelihoods, greedy answers and, of a fused model, its routing."""
    greedy = ["--temperature", "0", "--max_new_tokens", "6"]
    args = parse(["--prompt", "x", "--aligned_flag", "0", *greedy], InferArguments)
    logits = model(input_ids=torch.tensor([[5, 17, 300, 42]])).logits
    scored = score_answers(model, Encoder(tokenizer, 64), RECORDS, 2, model.device, "test")
    texts = score_texts(model, tokenizer, ["One text.", "And another one."], 64, 2, model.device)
    usage = routing_usage(model, tokenizer, RECORDS, 2, progress=False) if hasattr(model, "mixture") else None
    answers = [answer["output"] for answer in generate(model, tokenizer, RECORDS, args, 0)]
    return logits.tolist(), [one.log_probs.tolist() for one in scored.values()], texts, usage, answers


@pytest.mark.parametrize("kind", ["raw", "expert", "fused"])
def test_a_run_in_parts_answers_and_scores_as_in_one(kind, base_dir, adapter_dirs, fused_dir, hooked, monkeypatch):
    path = {"raw": None, "expert": adapter_dirs[1], "fused": fused_dir}[kind]
    parts, tokenizer = load_run(path, str(base_dir), "float32", device_map=IN_PARTS)
    if kind != "expert":  # of a base on a CPU, PEFT sets hooks of its own
        assert all(hasattr(parts.get_submodule(part), "_hf_hook") for part in IN_PARTS)
    monkeypatch.undo()
    whole, _ = load_run(path, str(base_dir), "float32")
    assert everything(parts, tokenizer) == everything(whole, tokenizer)


def test_routers_and_experts_lie_beside_their_layer(fused_dir):
    model, _ = load_run(fused_dir, dtype="float32", device_map={"": "cpu"})
    for block in model.blocks:
        assert {parameter.device for parameter in block.parameters()} == {block.gate_proj.weight.device}


def test_a_base_that_does_not_fit_is_refused(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_disk = {**IN_PARTS, "model.layers.2": "disk"}
    with pytest.raises(UserError, match="does not fit on the GPUs"):
        load_run(None, str(base_dir), "float32", device_map=on_disk)


@pytest.mark.parametrize("main", [inference.main, evaluate_likelihood.main])
def test_without_a_gpu_it_would_be_ignored_and_is_refused(main, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    named = ["--task_name", "safety"] if main is inference.main else ["--run", "raw"]
    with pytest.raises(SystemExit) as stopped:
        main([*named, "--device_map", "auto"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: --device_map auto: ") and error.count("\n") == 1


def test_of_a_servers_model_it_is_refused():
    server = ["--server_url", "http://localhost:8000/v1", "--server_model", "m"]
    with pytest.raises(UserError, match="--device_map auto: is of a model that runs here"):
        parse(["--task_name", "safety", *server, "--device_map", "auto"], InferArguments)
