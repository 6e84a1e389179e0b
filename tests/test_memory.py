"""The estimate of an alignment's memory: what autograd keeps is counted exactly, the whole is near the measured."""

import json
import re

import pytest
import torch
from conftest import run_script

import align_basemodel
from config import UserError
from models import alignment, base, memory, training_arguments
from models.memory import Memory

SMALL = ["--data_source", "sample", "--num_samples", "4", "--max_length", "64", "--batch_size", "2"]
TOTAL = re.compile(r"in all, one process +([\d.]+) +([\d.]+)")


def parsed(*argv):
    args, training = training_arguments.parse([*SMALL, "--use_cpu", "1", *argv], align_basemodel.AlignArguments)
    align_basemodel.resolve_sources(args)
    return args, training


def kept_by_a_real_forward(model, size, length, compute_dtype, drifts=False):
    """The bytes that autograd keeps of a forward that is computed, parameters and what the drift starts from apart."""
    model.train()
    start = model.start_of_fusion() if drifts else []
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *(t for s in start for t in s.values()))}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    decoder = getattr(model, "get_base_model", lambda: model)().model
    ids = torch.zeros(size, length, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
        outputs = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        drift = model.drift(start) if drifts else None
    del outputs, drift
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["expert", "fusion", "fusion with drift"])
def test_what_autograd_keeps_is_counted_without_computing_it(stage, dtype, base_dir, fused_dir):
    drifts = stage == "fusion with drift"
    if stage == "expert":
        args, training = parsed("--task_name", "safety", "--base_model", str(base_dir), "--dtype", dtype)
        real = alignment.expert_model(args, training)
        empty = alignment.expert_model(args, training, memory.empty_base)
    else:
        args, training = parsed("--moe_flag", "1", "--moe_dir", str(fused_dir), "--dtype", dtype)
        real = alignment.mixture_model(args, training)
        empty = alignment.mixture_model(args, training, memory.empty_fused)
    counted = memory.count(empty, (2, 24, 10), training, drifts)
    kept = kept_by_a_real_forward(real, 2, 24, base.pick_dtype(dtype), drifts)
    assert counted.activations == pytest.approx(kept, rel=0.02)
    assert counted.checkpointed < 0.8 * counted.activations
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    start = sum(p.numel() for block in real.blocks for p in block.experts.parameters()) if stage != "expert" else 0
    assert counted.trained == 16 * trained + 4 * start  # fp32: matrix, gradient, two states of Adam
    assert counted.base == sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    assert counted.logits == 10 * 600 * 12


def test_the_largest_batch_is_that_of_the_longest_samples():
    ignored = -100
    samples = [
        {"input_ids": [1] * 5, "labels": [ignored] * 3 + [1, 1]},
        {"input_ids": [1] * 9, "labels": [ignored] * 5 + [1] * 4},
        {"input_ids": [1] * 7, "labels": [ignored] * 6 + [1]},
    ]
    assert memory.largest_batch(samples, 2) == (2, 9, 5)
    assert memory.largest_batch(samples, 8) == (3, 9, 7)


def test_a_cpus_total_has_the_interpreter_and_the_heaps_gaps():
    counted = Memory(base=1000, trained=100, activations=40, checkpointed=10, logits=6)
    assert counted.total(checkpointing=False, on_cpu=False) == 1146
    assert counted.total(checkpointing=True, on_cpu=False) == 1116
    of_process = memory.INTERPRETER_BYTES + memory.HEAP_GAPS * 146
    assert counted.total(checkpointing=False, on_cpu=True) == 1146 + of_process
    assert counted.total(checkpointing=True, on_cpu=True) == 1116 + of_process


@pytest.mark.parametrize("stage", ["expert", "fusion"])
def test_the_command_loads_no_weights_and_writes_nothing(stage, base_dir, fused_dir, tmp_path, monkeypatch, capsys):
    def loaded(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base, "load_weights", loaded)
    monkeypatch.chdir(tmp_path)
    flags = {
        "expert": ["--task_name", "safety", "--base_model", str(base_dir)],
        "fusion": ["--moe_flag", "1", "--moe_dir", str(fused_dir), "--helpfulness_weight", "0.1"],
    }[stage]
    align_basemodel.main([*SMALL, *flags, "--estimate", "1", "--results_dir", str(tmp_path / "results")])
    said = capsys.readouterr().out
    plain, checkpointed = map(float, TOTAL.search(said).groups())
    assert "2 samples of 64 tokens" in said and 0.5 < checkpointed <= plain < 0.7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dtype", "nf4"], "no 4-bit weights"),
        (["--optim", "adafactor"], "not of --optim adafactor"),
        (["--torch_compile", "true"], "no compiled step"),
    ],
)
def test_what_is_not_counted_is_refused_in_one_line(argv, said, base_dir):
    args, training = parsed("--task_name", "safety", "--base_model", str(base_dir), *argv)
    with pytest.raises(UserError, match=said) as refused:
        alignment.estimate(args, training)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_the_estimate_is_near_the_peak_of_a_real_training(checkpointing, tmp_path):
    """One epoch of SmolLM2, in which the batch of the longest samples comes once."""
    command = ["align_basemodel.py", "--task_name", "helpfulness", "--base_model", "smollm2", "--data_source", "sample"]
    command += ["--num_samples", 28, "--batch_size", 4, "--max_steps", 7, "--dtype", "float32", "--save_strategy", "no"]
    command += ["--results_dir", tmp_path, "--gradient_checkpointing", checkpointing]
    estimate = run_script(*command, "--estimate", 1)
    trained = run_script(*command)
    assert estimate.returncode == trained.returncode == 0, estimate.stderr + trained.stderr
    peak = json.loads((tmp_path / "outputs" / "helpfulness" / "run.json").read_text())["train"]["peak_memory_bytes"]
    assert float(TOTAL.search(estimate.stdout)[1 + checkpointing]) * 1e9 == pytest.approx(peak, rel=0.15)
