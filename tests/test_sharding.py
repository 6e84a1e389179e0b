"""Sharded training (FSDP2) of an expert and of a fusion: what two processes compute and save is what one does."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, free_port
from safetensors.torch import load_file

TERMS = ("sft", "gate", "drift")


def losses(model, start, ids, labels):
    """The terms of the fusion's loss, unweighted."""
    from models.losses import gate_loss, mean_routing_probs

    outputs = model(input_ids=ids, labels=labels, output_router_logits=True)
    probs = mean_routing_probs(outputs.router_logits, torch.ones_like(ids))
    gate = gate_loss(probs, torch.tensor([0, 2]))
    return outputs.loss, gate, model.drift(start)


def moved(folder, base_dir, dtype):
    """A fused model whose experts have moved since the fusion, and where they were."""
    from models.mixture import load_fused

    model = load_fused(folder, str(base_dir), dtype).train()
    start = model.start_of_fusion()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.experts.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, start


def expert(folder, base_dir, dtype):
    """An expert, as align_basemodel.py trains it."""
    from peft import PeftModel

    from models.base import load_base

    return PeftModel.from_pretrained(load_base(str(base_dir), dtype), folder, is_trainable=True).train()


def work_on_expert(rank, port, folder, base_dir, dtype, results):
    """One of two processes, as in `work`: an expert's loss, gradients and the whole adapter."""
    sys.path.insert(0, str(ROOT))
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(2, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    alone, model = (expert(folder, base_dir, dtype) for _ in range(2))
    for module in (*alone.modules(), *model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = alone(input_ids=ids, labels=labels).loss
    expected.backward()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    actual = model(input_ids=ids, labels=labels).loss
    actual.backward()
    worst, grads = {"loss": float((actual - expected).abs())}, dict(alone.named_parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    worst["gradient"] = max(
        float((p.grad.full_tensor() - grads[name].grad).abs().max() / grads[name].grad.abs().max().clamp(min=1e-12))
        for name, p in trained
    )
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # as the Trainer saves an adapter
        saved, whole = get_peft_model_state_dict(alone), get_peft_model_state_dict(model, state_dict=gathered)
        assert list(saved) == list(whole)
        worst["weights"] = max(float((saved[name] - whole[name]).abs().max()) for name in saved)
        results.put((worst, len(trained)))
    dist.destroy_process_group()


def work(rank, port, folder, base_dir, dtype, out, results):
    """One of two processes: the same batch on both, so that FSDP's mean of the gradients is one process's gradient."""
    sys.path.insert(0, str(ROOT))
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(2, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    alone, start = moved(folder, base_dir, dtype)
    expected = losses(alone, start, ids, labels)
    (expected[0] + 0.3 * expected[1] + (torch.tensor([0.01, 0.02, 0.05]) * expected[2]).sum()).backward()
    model, start = moved(folder, base_dir, dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.blocks[0].experts.gate_proj_A, DTensor)
    actual = losses(model, start, ids, labels)
    (actual[0] + 0.3 * actual[1] + (torch.tensor([0.01, 0.02, 0.05]) * actual[2]).sum()).backward()
    worst = {name: float((a - b).abs().max()) for name, a, b in zip(TERMS, actual, expected, strict=True)}
    grads = dict(alone.named_parameters())
    worst["gradient"] = 0.0
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        difference = (parameter.grad.full_tensor() - grads[name].grad).abs().max()
        worst["gradient"] = max(worst["gradient"], float(difference / grads[name].grad.abs().max()))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    worst["weights"] = max(float((whole[name] - p).abs().max()) for name, p in alone.named_parameters())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # as the Trainer saves a fusion
        written = [Path(out) / name for name in ("sharded", "whole")]
        model.save_pretrained(written[0], state_dict=gathered)
        alone.save_pretrained(written[1])
        sharded, whole = (load_file(folder / "model.safetensors") for folder in written)
        assert list(sharded) == list(whole)
        worst["file"] = max(float((sharded[name].double() - whole[name].double()).abs().max()) for name in whole)
    fresh = model.start_of_fusion()
    worst["start"] = max(float((fresh[0][n] - p).abs().max()) for n, p in alone.blocks[0].experts.named_parameters())
    if rank == 0:
        results.put((worst, len(trained), [float(x) for x in actual[2]]))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])  # experts are fp32 on both
def test_two_shards_train_as_one_model(fused_dir, base_dir, dtype, tolerance, tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(work, (free_port(), fused_dir, base_dir, dtype, str(tmp_path), results), nprocs=2)
    worst, num_trained, drift = results.get()
    assert num_trained == 3 * 7 and min(drift) > 0.01
    assert all(value < tolerance for value in worst.values()), worst


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_two_shards_train_as_one_expert(adapter_dirs, base_dir, dtype, tolerance):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work_on_expert, (free_port(), adapter_dirs[1], base_dir, dtype, results), nprocs=2)
    worst, num_trained = results.get()
    assert num_trained == 3 * 3 * 2 and all(value < tolerance for value in worst.values()), worst
