"""Adapters and files of the released code that somebody else has made."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzz.harness import FUZZ, JSON, NUMBERS, TEXTS, mutated, outcome
from models import export, llama_moe

pytestmark = pytest.mark.slow

DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]


def changed(data, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name with one thing in them changed."""
    tensors, name = dict(tensors), data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["gone", "renamed", "shape", "dtype", "not finite", "huge", "empty", "another"]))
    one = tensors[name].clone()
    if how == "gone":
        del tensors[name]
    elif how == "renamed":
        tensors[data.draw(TEXTS).encode("utf-8", "replace").decode() or "x"] = tensors.pop(name)
    elif how == "shape":
        tensors[name] = one[..., :-1].contiguous() if data.draw(st.booleans()) else one[None].contiguous()
    elif how == "dtype":
        tensors[name] = one.to(data.draw(st.sampled_from(DTYPES)))
    elif how == "not finite":
        one.view(-1)[data.draw(st.integers(0, one.numel() - 1))] = data.draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf")])
        )
        tensors[name] = one
    elif how == "huge":
        tensors[name] = one * 1e38
    elif how == "empty":
        tensors[name] = torch.empty(0)
    else:
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_C.weight"] = one
    return tensors


def fused_is_finite(folder) -> None:
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.isfinite().all(), name


@FUZZ
@given(data=st.data())
def test_tensors_of_an_adapter(data, adapter_dirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensors")
    adapter = shutil.copytree(adapter_dirs[1], folder / "safety")
    weights = adapter / "adapter_model.safetensors"
    save_file(changed(data, load_file(weights)), weights, metadata={"format": "pt"})
    experts = f"helpfulness={adapter_dirs[0]},safety={adapter}"
    said = outcome(llama_moe.main, "--experts", experts, "--output", folder / "moe", "--results_dir", folder)
    if said:
        assert str(adapter) in said, said
    else:
        fused_is_finite(folder / "moe")


@FUZZ
@given(data=st.data())
def test_the_configuration_of_an_adapter(data, adapter_dirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    adapter = shutil.copytree(adapter_dirs[1], folder / "safety")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        settings = mutated(data.draw, settings)
    text = json.dumps(settings)
    if data.draw(st.integers(0, 9)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    (adapter / "adapter_config.json").write_text(text)
    experts = f"helpfulness={adapter_dirs[0]},safety={adapter}"
    said = outcome(llama_moe.main, "--experts", experts, "--output", folder / "moe", "--results_dir", folder)
    if not said:
        fused_is_finite(folder / "moe")


@pytest.fixture(scope="module")
def moe_pt(tmp_path_factory, fused_dir):
    path = tmp_path_factory.mktemp("pt") / "moe.pt"
    export.main(["--cross_task", str(fused_dir), "--to", "pt", "--output", str(path)])
    return path


@FUZZ
@given(data=st.data())
def test_a_file_of_the_released_code(data, moe_pt, base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    state = torch.load(moe_pt, weights_only=True)
    kind = data.draw(st.sampled_from(["tensors", "tensors", "tensors", "values", "object", "bytes"]))
    if kind == "tensors":
        state = changed(data, state)
    elif kind == "values":
        state[data.draw(st.sampled_from(sorted(state)))] = data.draw(st.one_of(NUMBERS, st.text(max_size=5), st.none()))
    elif kind == "object":
        state = data.draw(JSON)
    path = folder / "moe.pt"
    torch.save(state, path)
    if kind == "bytes":
        whole = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(whole[: data.draw(st.integers(1, len(whole)))] if data.draw(st.booleans()) else whole)
    flags = ["--from_pt", path, "--base_model", base_dir, "--output", folder / "moe", "--results_dir", folder]
    said = outcome(llama_moe.main, *flags)
    if said:
        assert "moe.pt" in said or "--experts" in said, said
    else:
        fused_is_finite(folder / "moe")


def test_a_pickle_with_code_in_it_is_not_run(base_dir, tmp_path, capsys):
    import pickle

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "broken_into"), "w"))

    (tmp_path / "moe.pt").write_bytes(pickle.dumps({"model.layers.0.mlp.gate.weight": Payload()}))
    flags = ["--from_pt", tmp_path / "moe.pt", "--base_model", base_dir, "--output", tmp_path / "moe"]
    assert "moe.pt" in outcome(llama_moe.main, *flags, "--results_dir", tmp_path)
    torch.save({"model.layers.0.mlp.gate.weight": Payload()}, tmp_path / "moe.pt")
    assert "moe.pt" in outcome(llama_moe.main, *flags, "--results_dir", tmp_path)
    assert not (tmp_path / "broken_into").exists()
