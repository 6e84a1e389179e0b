"""The fused model against three models merged by PEFT itself and mixed by hand."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FFN, save_adapter, tiny_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import align_basemodel
from config import TASKS, UserError
from models import llama_moe
from models.adapters import Expert
from models.expert_ffn import PROJECTIONS
from models.loading import load_run
from models.mixture import load_fused
from models.router import route
from workspace.files import sha256


def merged_models(base_dir, adapter_dirs):
    """The three aligned models, each merged by PEFT in float64."""
    for folder in adapter_dirs:
        model = LlamaForCausalLM.from_pretrained(base_dir).double()
        yield PeftModel.from_pretrained(model, folder).double().merge_and_unload().eval()


def dense_logits(base_dir, adapter_dirs, routers, top_k, ids, of_prompt=None):
    """Logits of the mixture, computed with a loop over dense experts in every layer; of_prompt: a mask for each sample,
    over whose tokens the router's logits are averaged first."""
    merged = list(merged_models(base_dir, adapter_dirs))
    model = merged[0]

    def mixture(layer):
        def forward(x):
            logits = F.linear(x, routers[layer])
            if of_prompt is not None:
                logits = torch.stack(
                    [row[mask].mean(0).expand_as(row) for row, mask in zip(logits, of_prompt, strict=True)]
                )
            probs = logits.softmax(-1)
            kept, chosen = probs.topk(top_k)
            kept = kept / kept.sum(-1, keepdim=True)
            outputs = torch.stack([other.model.layers[layer].mlp.original_forward(x) for other in merged], dim=-2)
            picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
            return (kept[..., None] * picked).sum(-2)

        return forward

    for other in merged:
        for layer in other.model.layers:
            layer.mlp.original_forward = layer.mlp.forward
    for number, layer in enumerate(model.model.layers):
        layer.mlp.forward = mixture(number)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 4}])
def test_fused_from_disk_equals_the_mixture_of_merged_experts(
    tmp_path, adapter_dirs, base_dir, tokenizer, top_k, changes
):
    if changes:
        torch.manual_seed(7)
        base_dir = tmp_path / "base"
        LlamaForCausalLM(tiny_config(**changes)).save_pretrained(base_dir)
        tokenizer.save_pretrained(base_dir)
        ranks = {"helpfulness": 3, "safety": 1, "truthfulness": 5}
        adapter_dirs = [
            save_adapter(tmp_path / name, base_dir, seed=rank, r=rank, use_rslora=rank == 3)
            for name, rank in ranks.items()
        ]
    llama_moe.main(
        ["--experts_dir", str(adapter_dirs[0].parent), "--output", str(tmp_path / "moe"), "--expert_topk", str(top_k)]
    )
    model, _ = load_run(tmp_path / "moe", dtype="float32")
    assert model.mixture.num_experts_per_tok == top_k
    model.double().set_attn_implementation("sdpa")
    ids = torch.randint(2, 600, (2, 11))
    routers = [block.router.weight.detach() for block in model.blocks]
    with torch.no_grad():
        ours = model(ids).logits
    reference = dense_logits(base_dir, adapter_dirs, routers, top_k, ids)
    assert (ours - reference).abs().max() < 1e-10
    assert reference.abs().max() > 0.1


def test_identical_experts_equal_the_aligned_model_whatever_the_router_says(tmp_path, base_dir, adapter_dirs):
    for name in ("a", "b", "c"):
        save_adapter(tmp_path / name, base_dir, seed=5)
    llama_moe.main(["--experts_dir", str(tmp_path), "--experts", "a,b,c", "--output", str(tmp_path / "moe")])
    model, _ = load_run(tmp_path / "moe", dtype="float32")
    (dense,) = merged_models(base_dir, [tmp_path / "a"])
    model.double().set_attn_implementation("sdpa")
    ids = torch.randint(2, 600, (2, 9))
    for seed in range(3):
        torch.manual_seed(seed)
        for block in model.blocks:
            torch.nn.init.normal_(block.router.weight)
        with torch.no_grad():
            assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-10


def test_the_three_experts_differ_and_are_peft_deltas(fused_dir, adapter_dirs):
    model, _ = load_run(fused_dir, dtype="float32")
    for number, block in enumerate(model.blocks):
        for p, projection in enumerate(PROJECTIONS):
            a, b = block.experts.matrices(projection)
            deltas = block.experts.scaling[p].float()[:, None, None] * (b @ a)
            assert min((deltas[i] - deltas[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1
            for i, folder in enumerate(adapter_dirs):
                weights = load_file(folder / "adapter_model.safetensors")
                key = f"base_model.model.model.layers.{number}.mlp.{projection}.lora_%s.weight"
                peft_b, peft_a = weights[key % "B"], weights[key % "A"]
                # alpha / r; safety: rslora, alpha / sqrt(r); truthfulness: rank 6 and alpha 9 by pattern
                rank = {0: 4, 1: 8, 2: 6 if (number, projection) == (1, "up_proj") else 2}[i]
                alpha = {0: 6, 1: 4, 2: 9 if projection == "down_proj" else 4}[i]
                scaling = alpha / rank**0.5 if i == 1 else alpha / rank
                assert len(peft_a) == rank
                assert torch.allclose(deltas[i], scaling * (peft_b @ peft_a), atol=1e-5)


def test_the_folder_holds_router_and_experts_only(fused_dir, base_dir):
    assert sorted(p.name for p in fused_dir.iterdir()) == ["config.json", "model.safetensors", "run.json"]
    saved = load_file(fused_dir / "model.safetensors")
    assert all(".mlp.router." in key or ".mlp.experts." in key for key in saved)
    # per layer: router (3, 32), scaling (3, 3), and A, B of rank 8 for 3 experts on 32 -> 48, 32 -> 48, 48 -> 32
    assert sum(t.numel() for t in saved.values()) == 3 * (3 * 32 + 9 + 3 * 3 * 8 * (32 + 48))
    settings = json.loads((fused_dir / "config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base_dir)
    assert [e["task"] for e in settings["experts"]] == ["helpfulness", "safety", "truthfulness"]
    assert [e["rank"] for e in settings["experts"]] == [4, 8, 6]


@pytest.mark.parametrize("damage", ["missing", "transposed"])
def test_a_file_that_does_not_fit_its_configuration_is_refused(tmp_path, fused_dir, damage):
    folder = shutil.copytree(fused_dir, tmp_path / "moe")
    tensors, key = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.up_proj_B"
    tensor = tensors.pop(key)
    save_file(tensors | ({key: tensor.mT.contiguous()} if damage == "transposed" else {}), folder / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {key}\\); fuse again"):
        load_run(folder)


def test_fusing_again_says_so_and_other_arguments_are_refused(fused_dir, adapter_dirs, capsys):
    arguments = ["--experts_dir", str(adapter_dirs[0].parent), "--output", str(fused_dir)]
    before = (fused_dir / "model.safetensors").read_bytes()
    llama_moe.main(arguments)
    assert "already fused" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        llama_moe.main([*arguments, "--expert_topk", "1"])
    assert exit_.value.code == 2
    assert "expert_topk=2" in capsys.readouterr().err
    assert (fused_dir / "model.safetensors").read_bytes() == before


def test_two_experts_and_half_precision_on_disk(tmp_path, adapter_dirs):
    llama_moe.main(
        [
            "--experts_dir",
            str(adapter_dirs[0].parent),
            "--experts",
            "truthfulness,helpfulness",
            "--output",
            str(tmp_path / "moe"),
            "--save_dtype",
            "float16",
        ]
    )
    saved = load_file(tmp_path / "moe" / "model.safetensors")
    assert {t.dtype for key, t in saved.items() if key.endswith(("_A", "_B"))} == {torch.float16}
    model, _ = load_run(tmp_path / "moe", dtype="float32")
    assert model.mixture.expert_of_task == {"truthfulness": 0, "helpfulness": 1}
    assert {p.dtype for b in model.blocks for p in b.experts.parameters()} == {torch.float32}


def test_cached_generation_equals_uncached_and_padding_changes_nothing(fused_dir):
    model, tokenizer = load_run(fused_dir, dtype="float32")
    model.double().set_attn_implementation("sdpa")  # eager attention's softmax is fp32, whose range ends before fp64's
    prompts = [
        tokenizer(text)["input_ids"] for text in ("Name three birds.", "Why is the sky blue at noon and red later?")
    ]
    length = max(map(len, prompts))
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1)
        cached, uncached = (
            model.generate(ids, use_cache=use, **settings)[0, len(prompt) :].tolist() for use in (True, False)
        )
        assert cached == uncached
        alone.append(cached)
    ids = torch.tensor([[1] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=1)[:, length:]
    for row, expected in zip(batch.tolist(), alone, strict=True):
        assert row[: len(expected)] == expected


REFUSED = {
    "use_dora": dict(use_dora=True),
    "bias": dict(bias="lora_only"),
    "q_proj": dict(target_modules=[*FFN, "q_proj"]),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "lora_bias": dict(lora_bias=True),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_a_mixture_cannot_represent_is_refused_by_name(tmp_path, base_dir, adapter_dirs, named):
    save_adapter(tmp_path / "odd", base_dir, 1, **REFUSED[named])
    with pytest.raises(UserError, match=named):
        Expert(tmp_path / "odd").attach(tiny_config())


def test_a_changed_base_weight_init_is_refused(tmp_path, base_dir):
    folder = save_adapter(tmp_path / "odd", base_dir, 1)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="pissa"):
        Expert(folder)


def test_experts_of_different_bases_or_shapes_are_refused(tmp_path, base_dir, adapter_dirs, tokenizer, capsys):
    other = tmp_path / "other-base"
    LlamaForCausalLM(tiny_config(intermediate_size=64)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    save_adapter(tmp_path / "x", base_dir, 1), save_adapter(tmp_path / "y", other, 1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        llama_moe.main(["--experts_dir", str(tmp_path), "--experts", "x,y", "--output", str(tmp_path / "m")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "different bases" in error and len(error.splitlines()) == 1
    with pytest.raises(UserError, match=r"is \(\d+, \d+\), the base needs"):
        Expert(tmp_path / "y").attach(tiny_config())
    assert not (tmp_path / "m").exists()


def test_two_experts_of_one_name_or_task_are_refused(tmp_path, base_dir, capsys):
    """One would stand for both. One LoRA on all tasks is of none."""
    for folder, task in (("a/safety", "safety"), ("b/safety", "safety"), ("more", "safety"), ("mix", "mix")):
        save_adapter(tmp_path / folder, base_dir, 1)
        arguments = {"task_name": task, "base_model": str(base_dir)}
        (tmp_path / folder / "run.json").write_text(
            json.dumps({"run": {"script": "align_basemodel.py", "arguments": arguments}, "train": {}, "meta": {}})
        )
    for experts, said in (
        (f"{tmp_path / 'a/safety'},{tmp_path / 'b/safety'}", "another one is called safety too"),
        (f"safety={tmp_path / 'a/safety'},{tmp_path / 'more'}", "two experts are of the task safety"),
    ):
        with pytest.raises(SystemExit):
            llama_moe.main(["--experts", experts, "--output", str(tmp_path / "m")])
        assert said in capsys.readouterr().err and not (tmp_path / "m").exists()
    assert Expert(tmp_path / "mix").task is None and Expert(tmp_path / "more").task == "safety"


def test_router_weights_are_top_k_renormalised():
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    for top_k, experts, shares in ((1, [2], [1.0]), (2, [2, 0], [0.625, 0.375]), (3, [2, 0, 1], [0.5, 0.3, 0.2])):
        top_k_index, top_k_weights = route(logits, top_k)
        assert top_k_index.tolist() == [experts]
        assert torch.allclose(top_k_weights, torch.tensor([shares]))


def test_training_keeps_router_and_experts_in_fp32_and_inference_rounds_the_experts_once(fused_dir, base_dir):
    trained = load_fused(fused_dir, str(base_dir), torch.bfloat16)
    loaded, _ = load_run(fused_dir, dtype="bfloat16")
    trained.set_attn_implementation(loaded.config._attn_implementation)
    for model, dtype in ((trained, torch.float32), (loaded, torch.bfloat16)):
        for block in model.blocks:
            assert {p.dtype for p in block.experts.parameters()} == {dtype}
            assert (block.router.weight.dtype, block.gate_proj.weight.dtype) == (torch.float32, torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, loaded(ids).logits)
    state, kept = loaded.blocks[0].experts.state_dict(), trained.blocks[0].experts.state_dict()
    assert not torch.equal(state["up_proj_A"].float(), kept["up_proj_A"]), "nothing was scaled"


def test_the_same_adapters_under_other_tasks_are_another_fusion(tmp_path, base_dir, capsys):
    """Their tensors are the same, the gating loss sends every task elsewhere."""
    for seed, name in enumerate("abc"):
        save_adapter(tmp_path / name, base_dir, seed=seed)
    for moe, tasks in (("m1", TASKS), ("m2", ("safety", "helpfulness", "truthfulness"))):
        named = ",".join(f"{task}={tmp_path / name}" for task, name in zip(tasks, "abc", strict=True))
        llama_moe.main(["--experts", named, "--output", str(tmp_path / moe)])
    assert sha256(tmp_path / "m1" / "model.safetensors") == sha256(tmp_path / "m2" / "model.safetensors")
    align = ["--moe_flag", "1", "--data_source", "sample", "--num_samples", "2", "--max_steps", "1"]
    align += ["--disable_tqdm", "1", "--results_dir", str(tmp_path / "results"), "--moe_dir"]
    align_basemodel.main([*align, str(tmp_path / "m1")])
    with pytest.raises(SystemExit):
        align_basemodel.main([*align, str(tmp_path / "m2")])
    assert "holds a run with fused_sha256=" in capsys.readouterr().err
