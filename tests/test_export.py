"""The fused model in other programs' forms: read back by those programs' own code, and refused where it differs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script, save_adapter, tiny_config
from openai import OpenAI
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM

import align_basemodel
from config import UserError
from data.prompts import render_prompt
from models import base, behaviour, dense_experts, export, llama_moe
from models.adapters import Expert
from models.causal_lm import save_generation_config
from models.expert_ffn import PROJECTIONS
from models.loading import load_run
from models.released import low_rank_difference

BASES = {
    "tied, grouped queries": {},
    "untied, all heads, scaled rope": dict(
        tie_word_embeddings=False,
        num_key_value_heads=4,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
    ),
}


@pytest.fixture(scope="module", params=BASES)
def fused(request, tmp_path_factory, tokenizer):
    """A fused model of three experts of mixed ranks, on a base with or without tied embeddings."""
    root = tmp_path_factory.mktemp("fused")
    torch.manual_seed(11)
    LlamaForCausalLM(tiny_config(**BASES[request.param])).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    save_adapter(root / "helpfulness", root / "base", 1, r=3, lora_alpha=7)
    save_adapter(root / "safety", root / "base", 2, r=6, lora_alpha=4, use_rslora=True)
    save_adapter(
        root / "truthfulness",
        root / "base",
        3,
        r=2,
        rank_pattern={"layers.1.mlp.up_proj": 5},
        alpha_pattern={"down_proj": 9},
        target_modules=["up_proj", "down_proj"],
    )
    llama_moe.main(["--experts_dir", str(root), "--output", str(root / "moe")])
    return root / "moe"


def with_attention(fused, folder):
    """A copy of a fused model whose attention has LoRA on it."""
    model, _ = load_run(fused, dtype="float32")
    model.add_attention_lora(rank=2, alpha=3, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "run.json").write_text((fused / "run.json").read_text())
    return folder


def failed(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        export.main([str(a) for a in arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("attention", [False, True])
def test_mixtral_alone_gives_our_logits(fused, tmp_path, attention):
    fused = with_attention(fused, tmp_path / "tuned") if attention else fused
    export.main(["--cross_task", str(fused), "--to", "mixtral", "--output", str(tmp_path / "mixtral")])
    ours, _ = load_run(fused, dtype="float32")
    theirs, report = MixtralForCausalLM.from_pretrained(
        tmp_path / "mixtral", dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report.values())
    ids = torch.randint(2, 600, (2, 40))
    ours.double(), theirs.double()
    ours.set_attn_implementation("sdpa")
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() < 1e-4
    assert (logits(ours, ids) - logits(ours, ids.flip(1))).abs().max() > 1


def test_the_checkpoint_is_mixtrals_on_disk(fused, tmp_path, capsys):
    arguments = [
        "--cross_task",
        str(fused),
        "--to",
        "mixtral",
        "--output",
        str(tmp_path / "mixtral"),
        "--dtype",
        "bfloat16",
    ]
    export.main(arguments)
    assert "verified" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "mixtral.lock"]
    settings = json.loads((tmp_path / "mixtral" / "config.json").read_text())
    base = json.loads((fused.parent / "base" / "config.json").read_text())
    assert settings["architectures"] == ["MixtralForCausalLM"] and settings["model_type"] == "mixtral"
    assert (settings["num_local_experts"], settings["num_experts_per_tok"], settings["sliding_window"]) == (3, 2, None)
    for name in (
        "rope_parameters",
        "rms_norm_eps",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "max_position_embeddings",
        "eos_token_id",
        "bos_token_id",
    ):
        assert settings[name] == base[name], name
    assert (
        settings["rope_theta"] == base["rope_parameters"]["rope_theta"]
    )  # where older readers look, whose default is 1e6
    assert (settings["rope_scaling"] or {}).get("factor") == base["rope_parameters"].get("factor")
    index = json.loads((tmp_path / "mixtral" / "model.safetensors.index.json").read_text())
    expert = "model.layers.2.block_sparse_moe.experts.1.w%d.weight"
    shapes = {
        expert % 1: [48, 32],
        expert % 2: [32, 48],
        expert % 3: [48, 32],
        "model.layers.0.block_sparse_moe.gate.weight": [3, 32],
    }
    for name, shape in shapes.items():
        with safe_open(tmp_path / "mixtral" / index["weight_map"][name], "pt") as file:
            assert file.get_slice(name).get_shape() == shape and file.get_slice(name).get_dtype() == "BF16"
    assert ("lm_head.weight" in index["weight_map"]) == (not base["tie_word_embeddings"])
    files = sorted({*index["weight_map"].values()})
    assert len(files) == 4  # a shard of embeddings and one for each of the three layers
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in files for t in load_file(tmp_path / "mixtral" / file).values()
    )
    assert "### Instruction:" in (tmp_path / "mixtral" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "mixtral").eos_token == "</s>"
    export.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert "dtype=bfloat16" in failed([*arguments[:-1], "float16"], capsys)


def test_an_answer_of_an_export_ends_with_what_it_was_trained_to_end_with(tmp_path, tokenizer):
    """The tokenizer's EOS, also where the base's configuration names others."""
    for given, written in ((1, 1), (None, 1), (0, [1, 0]), ([5, 1], [1, 5])):
        save_generation_config(tokenizer, tiny_config(eos_token_id=given), tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == written


@pytest.mark.parametrize("spoilt", ["input_layernorm", "experts.2.w2", "gate"])
def test_a_corrupted_weight_fails_the_export_and_leaves_nothing(fused, tmp_path, capsys, monkeypatch, spoilt):
    written = dense_experts.layer_weights

    def corrupted(model, number, form):
        for name, weight in written(model, number, form):
            yield name, weight * 1.1 if number == 1 and f"{spoilt}.weight" in name else weight

    monkeypatch.setattr(dense_experts, "layer_weights", corrupted)
    error = failed(["--cross_task", fused, "--to", "mixtral", "--output", tmp_path / "out" / "mixtral"], capsys)
    assert "is not the model" in error and "greedy tokens" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mixtral.lock"]


@pytest.mark.parametrize("source, attention", [("helpfulness", True), ("safety", False), ("truthfulness", False)])
def test_an_expert_comes_back_as_the_adapter_it_was(fused, tmp_path, source, attention):
    run = with_attention(fused, tmp_path / "tuned") if attention else fused
    export.main(["--cross_task", str(run), "--to", "peft", "--expert", source, "--output", str(tmp_path / "out")])
    given, base_config = Expert(fused.parent / source), tiny_config()
    given.attach(base_config)
    llama = LlamaForCausalLM.from_pretrained(fused.parent / "base")
    model = PeftModel.from_pretrained(llama, tmp_path / "out").base_model.model
    for number, layer in enumerate(model.model.layers):
        for projection in PROJECTIONS:
            delta, module = given.delta(number, projection), layer.mlp.get_submodule(projection)
            if delta is None:
                assert isinstance(module, torch.nn.Linear)
                continue
            assert torch.equal(module.lora_A["default"].weight, delta[0])  # same rank: the padding is gone
            assert torch.equal(module.lora_B["default"].weight, delta[1])
            assert module.scaling["default"] == delta[2]
        assert isinstance(layer.self_attn.q_proj, torch.nn.Linear) != attention
    if not attention:
        again = Expert(tmp_path / "out")
        again.attach(base_config)
        assert (again.task, again.rank, again.base_model) == (source, given.rank, given.base_model)


def test_an_expert_of_another_name_comes_back_with_its_task(base_dir, tmp_path):
    base = ["--base_model", base_dir, "--data_source", "sample", "--num_samples", "2", "--max_steps", "1"]
    place = ["--results_dir", tmp_path]
    align_basemodel.main([str(flag) for flag in ["--task_name", "safety", "--batch_size", 2, *base, *place]])
    save_adapter(tmp_path / "outputs" / "helpfulness", base_dir, 1)
    llama_moe.main(["--experts", f"calm={tmp_path}/outputs/safety,helpfulness", "--results_dir", str(tmp_path)])
    out = ["--expert", "calm", "--output", str(tmp_path / "out"), "--results_dir", str(tmp_path)]
    export.main(["--cross_task", "moe", "--to", "peft", *out])
    assert Expert(tmp_path / "out").task == "safety"


def test_a_wrong_scaling_fails_the_adapter(fused, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "alpha_of", lambda scaling, rank: scaling * rank * 1.1)
    arguments = ["--cross_task", fused, "--to", "peft", "--expert", "safety", "--output", tmp_path / "out"]
    assert "is not the model" in failed(arguments, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]


def released_ffn(x, state, layer, top_k):
    """The released code's mixture for one layer: experts one by one on the tokens that chose them."""
    prefix = f"model.layers.{layer}.mlp"
    probs, chosen = F.linear(x, state[f"{prefix}.gate.weight"]).softmax(-1).topk(top_k)
    probs, y = probs / probs.sum(-1, keepdim=True), torch.zeros_like(x)
    for expert in range(3):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up, down = (state[f"{prefix}.experts.{expert}.{p}.weight"] for p in PROJECTIONS)
        hidden = F.silu(x[token] @ gate.T) * (x[token] @ up.T)
        y.index_add_(0, token, probs[token, slot, None] * (hidden @ down.T))
    return y


def test_moe_pt_is_the_released_layout_and_reads_back(fused, tmp_path, capsys):
    export.main(["--cross_task", str(fused), "--to", "pt", "--output", str(tmp_path / "moe.pt")])
    state = torch.load(tmp_path / "moe.pt", weights_only=True)
    base = LlamaForCausalLM.from_pretrained(fused.parent / "base").state_dict()
    assert {key for key in state if ".mlp." not in key} == {key for key in base if ".mlp." not in key}
    assert len([key for key in state if ".mlp." in key]) == 3 * (1 + 3 * 3)
    ours, _ = load_run(fused, dtype="float32")
    x = torch.randn(20, 32)
    for number, block in enumerate(ours.blocks):
        assert torch.allclose(released_ffn(x, state, number, 2), block(x), atol=1e-4)
    capsys.readouterr()
    llama_moe.main(
        [
            "--from_pt",
            str(tmp_path / "moe.pt"),
            "--base_model",
            str(fused.parent / "base"),
            "--output",
            str(tmp_path / "moe"),
        ]
    )
    assert "equal" not in capsys.readouterr().out
    again, _ = load_run(tmp_path / "moe", dtype="float32")
    ids = torch.randint(2, 600, (2, 20))
    assert (logits(ours, ids) - logits(again, ids)).abs().max() < 1e-4
    assert all(torch.equal(a.router.weight, b.router.weight) for a, b in zip(ours.blocks, again.blocks, strict=True))
    for recovered, true in zip(again.mixture.experts, ours.mixture.experts, strict=True):
        assert true["rank"] <= recovered["rank"] <= true["rank"] + 2, true["name"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape, rank", [((48, 32), 6), ((32, 200), 3)])
def test_the_rank_of_a_difference_stands_out_of_its_rounding(dtype, shape, rank):
    """Whatever the order of the sum, which is what differs between processors: each order rounds differently."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(*shape, generator=generator).mul(0.02).to(dtype)
        b, a = (torch.randn(*s, generator=generator) for s in ((shape[0], rank), (rank, shape[1])))
        for order in (torch.arange(rank), torch.randperm(rank, generator=generator)):
            dense = base.float()
            for i in order:  # rounds after every term, and so more often than any product
                dense = (dense + torch.outer(b[:, i], a[i])).to(dtype).float()
            low_a, low_b, residual = low_rank_difference(dense.to(dtype), base, 16)
            assert rank <= len(low_a) <= rank + 2 and residual < torch.finfo(dtype).eps
            change = dense - base.float() - low_b @ low_a
            assert change.norm() < 2 * torch.finfo(dtype).eps * dense.norm()


def test_each_tensor_of_a_moe_pt_counts_in_its_own_dtype(fused, tmp_path):
    """An fp32 router beside half-precision weights, on a base of either precision."""
    export.main(["--cross_task", str(fused), "--to", "pt", "--output", str(tmp_path / "whole.pt")])
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    torch.save({k: v if ".mlp.gate." in k else v.half() for k, v in state.items()}, tmp_path / "moe.pt")
    arguments = ["--from_pt", tmp_path / "moe.pt", "--base_model", fused.parent / "base", "--output", tmp_path / "moe"]
    llama_moe.main(list(map(str, arguments)))
    ours, _ = load_run(fused, dtype="float32")
    again, _ = load_run(tmp_path / "moe", dtype="float32")
    for a, b in zip(ours.blocks, again.blocks, strict=True):
        assert torch.equal(a.router.weight, b.router.weight)
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
        assert (a(x) - b(x)).norm() < 1e-2 * a(x).norm()


def test_half_precision_moe_pt_is_recovered_to_its_rounding(fused, tmp_path, capsys):
    export.main(["--cross_task", str(fused), "--to", "pt", "--dtype", "float16", "--output", str(tmp_path / "moe.pt")])
    base = LlamaForCausalLM.from_pretrained(fused.parent / "base").half()  # the released base is half precision too
    base.save_pretrained(tmp_path / "base")
    arguments = ["--from_pt", str(tmp_path / "moe.pt"), "--output", str(tmp_path / "moe")]
    AutoTokenizer.from_pretrained(fused.parent / "base").save_pretrained(tmp_path / "base")
    export_ = torch.load(tmp_path / "moe.pt", weights_only=True)
    llama_moe.main([*arguments, "--base_model", str(tmp_path / "base"), "--max_rank", "8"])
    again, _ = load_run(tmp_path / "moe", dtype="float32")
    for number, block in enumerate(again.blocks):
        weight = block.experts.merged(1, "up_proj", block.up_proj.weight)
        dense = export_[f"model.layers.{number}.mlp.experts.1.up_proj.weight"].float()
        assert (weight - dense).norm() / dense.norm() < 1e-3


def test_a_dense_expert_or_another_base_is_refused(fused, tmp_path, capsys):
    export.main(["--cross_task", str(fused), "--to", "pt", "--output", str(tmp_path / "moe.pt")])

    def refused(*more):
        with pytest.raises(SystemExit) as exit_:
            llama_moe.main(["--from_pt", str(tmp_path / "moe.pt"), "--output", str(tmp_path / "moe"), *more])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    base = ["--base_model", str(fused.parent / "base")]
    assert "rank 3" in refused(*base, "--max_rank", "3")  # the experts' ranks are 3, 6 and 5
    assert "holds 3 experts" in refused(*base, "--experts", "a,b")
    torch.manual_seed(5)
    other = LlamaForCausalLM.from_pretrained(fused.parent / "base")
    other.model.layers[0].self_attn.q_proj.weight.data.normal_()
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(fused.parent / "base").save_pretrained(tmp_path / "other")
    assert "only the FFNs may differ" in refused("--base_model", str(tmp_path / "other"))
    (tmp_path / "moe.pt").write_bytes(b"no state dict")
    assert "no moe.pt" in refused(*base)


def test_equal_experts_are_told(fused, tmp_path, capsys):
    export.main(["--cross_task", str(fused), "--to", "pt", "--output", str(tmp_path / "moe.pt")])
    state = torch.load(tmp_path / "moe.pt", weights_only=True)
    equal = {k: state[k.replace(".experts.1.", ".experts.0.").replace(".experts.2.", ".experts.0.")] for k in state}
    torch.save(equal, tmp_path / "moe.pt")
    llama_moe.main(
        [
            "--from_pt",
            str(tmp_path / "moe.pt"),
            "--base_model",
            str(fused.parent / "base"),
            "--output",
            str(tmp_path / "moe"),
        ]
    )
    assert "experts in the file are equal" in capsys.readouterr().out


def test_a_fused_folder_without_its_run_record_is_exported_and_a_file_is_no_folder(fused_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fused_dir / name, bare)
    arguments = ["--cross_task", str(bare), "--to", "peft", "--expert", "safety", "--output"]
    export.main([*arguments, str(tmp_path / "adapter")])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(SystemExit):
        export.main([*arguments, str(bare / "config.json")])
    assert "is a file; name a folder" in capsys.readouterr().err


def test_the_bases_own_dtype_is_the_default(fused, tmp_path):
    half = LlamaForCausalLM.from_pretrained(fused.parent / "base").half()
    for name in ("base", "helpfulness", "safety", "truthfulness"):
        shutil.copytree(fused.parent / name, tmp_path / name)
    half.save_pretrained(tmp_path / "base")
    model, _ = load_run(fused, dtype="float32")
    model.mixture.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "moe")  # without a run record: the base is as the configuration names it
    export.main(["--cross_task", str(tmp_path / "moe"), "--to", "mixtral", "--output", str(tmp_path / "mixtral")])
    assert json.loads((tmp_path / "mixtral" / "config.json").read_text())["dtype"] == "float16"
    shards = [load_file(path) for path in (tmp_path / "mixtral").glob("*.safetensors")]
    assert {weight.dtype for shard in shards for weight in shard.values()} == {torch.float16}
    export.main(["--cross_task", str(tmp_path / "moe"), "--to", "pt", "--output", str(tmp_path / "moe.pt")])
    state = torch.load(tmp_path / "moe.pt", weights_only=True)
    assert {weight.dtype for weight in state.values()} == {torch.float16}


def test_without_the_check_nothing_is_read_back(fused_dir, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("was read back")

    monkeypatch.setattr(export, "compare", refuse)
    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", refuse)
    load_weights = CountedCalls(base.load_weights)
    monkeypatch.setattr(base, "load_weights", load_weights)
    arguments = ["--cross_task", str(fused_dir), "--to", "mixtral", "--output", str(tmp_path / "mixtral")]
    export.main([*arguments, "--verify", "0"])
    assert load_weights.calls == 1
    assert "not verified" in capsys.readouterr().out
    assert "--verify 0" in failed(arguments, capsys)  # what was never checked does not pass for checked
    peft = ["--cross_task", str(fused_dir), "--to", "peft", "--expert", "safety", "--output", str(tmp_path / "peft")]
    export.main([*peft, "--verify", "0"])
    assert load_weights.calls == 2 and (tmp_path / "peft" / "adapter_model.safetensors").exists()


class CountedCalls:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_a_near_tie_is_not_held_against_an_export():
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, :2] = torch.tensor([1.0, 1.0 - 1e-5])  # a tie within the tolerance
    logits[0, 1, :2] = torch.tensor([1.0, 0.5])
    ours = behaviour.Behaviour([[0] * 3], logits)
    turned = logits.clone()
    turned[0, 0, :2] = torch.tensor([1.0 - 1e-5, 1.0])
    summary = behaviour.compare(ours, behaviour.Behaviour(ours.texts, turned), "float32")
    assert "1 of 1 greedy tokens" in summary
    turned[0, 1, :2] = torch.tensor([0.5, 1.0])
    with pytest.raises(UserError, match="0 of 1 greedy tokens"):
        behaviour.compare(ours, behaviour.Behaviour(ours.texts, turned), "float32")


@pytest.mark.slow
def test_two_exports_do_not_mix_and_a_killed_ones_leftovers_are_removed_by_the_next(fused_dir, tmp_path):
    """Killed with SIGKILL in the middle of its shards."""
    arguments = ["--cross_task", str(fused_dir), "--to", "mixtral", "--output", str(tmp_path / "mixtral")]
    stuck = f"""
import time
from models import dense_experts, export
written = dense_experts.layer_weights
def slowly(model, number, form):
    yield from written(model, number, form)
    time.sleep(600 if number == 1 else 0)
dense_experts.layer_weights = slowly
export.main({arguments!r})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", stuck], cwd=ROOT, env=environment)
    try:
        partial = tmp_path / "mixtral.partial"
        while len(list(partial.glob("*.safetensors"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        second = run_script("models/export.py", *arguments)
        assert second.returncode == 2 and "is being written by process" in second.stderr
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial.is_dir()
    (partial / "torn").touch()
    third = run_script("models/export.py", *arguments)
    assert third.returncode == 0 and "verified" in third.stdout, third.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "mixtral.lock"]
    assert not (tmp_path / "mixtral" / "torn").exists()


def test_mistakes_are_one_line(fused_dir, base_dir, tmp_path, capsys):
    out = ["--output", tmp_path / "x"]
    assert "--cross_task" in failed([], capsys)
    assert "not a fused model" in failed(["--cross_task", base_dir, *out], capsys)
    assert "--expert" in failed(["--cross_task", fused_dir, "--to", "peft", *out], capsys)
    peft = ["--cross_task", fused_dir, "--to", "peft", "--expert", "safety", *out]
    assert "--dtype float16" in failed([*peft, "--dtype", "float16"], capsys)
    assert "--verify 1" in failed(["--cross_task", fused_dir, "--to", "pt", "--verify", "1", *out], capsys)
    assert "--base_model" in failed(["--cross_task", fused_dir, "--base_model", tmp_path, *out], capsys)
    assert "helpfulness, safety, truthfulness" in failed(
        ["--cross_task", fused_dir, "--to", "peft", "--expert", "humour", *out], capsys
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").touch()
    assert "no run of this project" in failed(["--cross_task", fused_dir, *out], capsys)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_script_runs_from_its_own_folder(fused_dir, tmp_path):
    result = run_script("export.py", "--cross_task", fused_dir, "--output", tmp_path / "m", cwd=ROOT / "models")
    assert result.returncode == 0, result.stderr
    assert re.search(r"verified: .* (\d+) of \1 greedy tokens", result.stdout)


@pytest.mark.slow
def test_a_server_of_the_export_answers_as_ours_does(fused, tmp_path):
    """`transformers serve` on loopback, asked by the OpenAI client: greedy answers to six prompts."""
    pytest.importorskip("fastapi", reason="pip install -r requirements-dev.txt")
    export.main(["--cross_task", str(fused), "--to", "mixtral", "--output", str(tmp_path / "mixtral")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        tmp_path / "mixtral",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        model, tokenizer = load_run(fused, dtype="float32")
        texts = behaviour.greedy_texts(model, behaviour.tokenized(tokenizer)[:6])
        largest = behaviour.behaviour(model, texts).logits.topk(2).values  # (P, T, 2)
        for instruction, text, gaps in zip(
            behaviour.INSTRUCTIONS, texts, (largest[..., 0] - largest[..., 1]).tolist(), strict=False
        ):
            answer = client.completions.create(
                model=str(tmp_path / "mixtral"),
                prompt=render_prompt(instruction),
                temperature=0,
                max_tokens=behaviour.NEW_TOKENS,
            )
            tokens = text[-behaviour.NEW_TOKENS :]
            ended = tokens.index(1) if 1 in tokens else len(tokens)  # the server stops at EOS
            decided = next((i for i, gap in enumerate(gaps) if gap < 1e-3), len(gaps))  # a tie may go either way
            expected = tokenizer.decode(tokens[: min(ended, decided)], skip_special_tokens=True)
            assert answer.choices[0].text.startswith(expected)
            assert decided < ended or answer.choices[0].text == expected
    finally:
        server.terminate()
        server.wait(30)
