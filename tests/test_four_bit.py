"""--dtype nf4: the base in 4 bits. bitsandbytes is optional and every import of PEFT would load it, so it lies beside
the environment (see the Makefile) and only these tests' processes see it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script, save_adapter, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import inference
from evaluator import train_judge
from models import four_bit

GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA_TOO = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
BESIDE = Path(sys.prefix) / "four_bit"

EXACTNESS = """
import gc, sys, weakref
from pathlib import Path
import torch
from models import four_bit
from models.loading import load_run
from models.mixture import load_fused

folder, base_model = Path(sys.argv[1]), sys.argv[2]
ids = torch.randint(3, 600, (2, 24), generator=torch.Generator().manual_seed(0))
made, dense_weight = [], four_bit.dense_weight
def watched(linear):
    weight = dense_weight(linear)
    made.append(weakref.ref(weight))
    return weight
four_bit.dense_weight = watched

def gradients(model):
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

small = load_fused(folder, base_model, "nf4")
with torch.no_grad():
    small.eval()(input_ids=ids)  # where bitsandbytes would pack the weights for this CPU
made.clear()
loss = small.train()(input_ids=ids, labels=ids).loss
gc.collect()
assert len(made) == 9 and not any(weight() is not None for weight in made), "dense weights outlive the forward"
loss.backward()
assert len(made) == 18
actual = {name: p.grad for name, p in small.named_parameters() if p.requires_grad}

same = load_fused(folder, base_model, "auto")  # computes in what the 4-bit one computes in
for (_, small_module), (_, dense_module) in zip(small.named_modules(), same.named_modules(), strict=True):
    if isinstance(small_module, torch.nn.Linear) and four_bit.is_quantized(small_module):
        dense_module.weight.data = dense_weight(small_module)
expected = gradients(same)
assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)
assert all(actual[f"model.layers.{i}.mlp.router.weight"].any() for i in range(3))

full = load_fused(folder, base_model, "auto")
assert not torch.equal(full.blocks[0].gate_proj.weight, dense_weight(small.blocks[0].gate_proj)), "nothing was rounded"
for block, dense_block in zip(small.blocks, full.blocks):
    assert block.gate_proj.weight.nbytes * 2 == dense_block.gate_proj.weight.numel()
loaded, _ = load_run(folder, base_model, "nf4")
assert torch.isfinite(loaded(ids).logits).all()
print("exact")
"""


SHARED = """
import sys, torch
from transformers import AutoModelForCausalLM, dynamic_module_utils
from models import four_bit
from models.loading import load_run

folder, out, cache, *base_model = sys.argv[1:]
dynamic_module_utils.HF_MODULES_CACHE = cache
torch.cpu.get_capabilities = dict  # in float32, whatever this CPU is fast in
small = AutoModelForCausalLM.from_pretrained(
    out, trust_remote_code=True, quantization_config=four_bit.quantization(torch.float32), dtype=torch.float32,
    **({"base_model": base_model[0]} if base_model else {}),
)
assert four_bit.is_quantized(small.model.layers[0].mlp.gate_proj)
four_bit.keep_order(small)
ids = torch.randint(3, 600, (2, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    ours, theirs = load_run(folder, dtype="nf4")[0](ids).logits, small.eval()(ids).logits
assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max(), (ours - theirs).abs().max()
small.train()(input_ids=ids, labels=ids).loss.backward()
assert all(layer.mlp.router.weight.grad.any() for layer in small.model.layers)
print("shared")
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_without_bitsandbytes_one_line_says_how_to_get_it(fused_dir, capsys):
    with pytest.raises(SystemExit) as exit_:
        inference.main(["--prompt", "Hello", "--cross_task", str(fused_dir), "--dtype", "nf4"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: --dtype nf4: get 4-bit weights with: pip install {four_bit.PACKAGE}\n"


def test_a_judge_is_not_trained_in_four_bits(capsys):
    with pytest.raises(SystemExit) as exit_:
        train_judge.main(["--kind", "truth", "--dtype", "nf4"])
    assert exit_.value.code == 2 and "invalid choice: 'nf4'" in capsys.readouterr().err


def test_the_same_version_is_named_everywhere():
    for name in ("Makefile", "docs/usage.md"):
        versions = re.findall(r"bitsandbytes==[\d.]+\d", (ROOT / name).read_text())
        assert versions and set(versions) == {four_bit.PACKAGE}, name


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def base_of_64(request, tmp_path_factory, tokenizer):
    """4-bit blocks are 64 weights long."""
    folder = tmp_path_factory.mktemp("base") / "tiny-64"
    config = tiny_config(hidden_size=64, intermediate_size=128)
    if request.param == "gemma3_text":
        kept = {name: getattr(config, name) for name in GEMMA_TOO}
        config = Gemma3TextConfig(**kept, head_dim=16, sliding_window=8, layer_types=GEMMA_LAYERS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


IN_TURN = """
import json, runpy, sys
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
"""


def run(*command):
    """Python with bitsandbytes in sight; its output."""
    assert (BESIDE / "bitsandbytes").is_dir(), f"pip install --no-deps --target {BESIDE} {four_bit.PACKAGE}"
    result = run_script("-c", *command, PYTHONPATH=f"{BESIDE}:{ROOT}")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_whole_method_in_four_bits(tmp_path, base_of_64):
    for seed, task in enumerate(("helpfulness", "truthfulness")):
        save_adapter(tmp_path / "outputs" / task, base_of_64, seed)
    moe, name = tmp_path / "moe", "mix_moe_reg_00000_00000_00000_gate_01000"
    data = ["--data_source", "sample", "--num_samples", 8, "--num_train_epochs", 1, "--batch_size", 4]
    common = ["--results_dir", tmp_path, "--dtype", "nf4"]
    by_name = ["--base", "by-name", "--base_id", "someone/tiny", "--output", tmp_path / "named", "--dtype", "float32"]
    fusion = ["--moe_flag", 1, "--moe_dir", moe, "--gate_loss_weight", 0.1, "--gradient_checkpointing", 1]
    asked = ["--task_name", "safety", "--cross_task", name, "--num_samples", 2, "--max_new_tokens", 4]
    commands = [
        ["align_basemodel.py", "--task_name", "safety", "--base_model", base_of_64, *data, *common],
        ["models/llama_moe.py", "--results_dir", tmp_path, "--output", moe],
        ["models/export.py", "--cross_task", moe, "--output", tmp_path / "out", "--dtype", "float32"],
        ["models/export.py", "--cross_task", moe, *by_name],
        ["align_basemodel.py", *fusion, "--save_steps", 2, "--max_steps", 4, *data, *common],
        ["inference.py", *asked, *common],
        ["evaluator/evaluate_likelihood.py", "--run", f"safety,{name}", "--num_samples", 2, *common],
    ]
    run(IN_TURN, json.dumps([[str(word) for word in command] for command in commands]))
    assert run(EXACTNESS, moe, base_of_64).endswith("exact\n")
    assert run(SHARED, moe, tmp_path / "out", tmp_path / "modules").endswith("shared\n")
    assert run(SHARED, moe, tmp_path / "named", tmp_path / "modules", base_of_64).endswith("shared\n")
    folder = tmp_path / "outputs" / name
    before, after = (load_file(path / "model.safetensors") for path in (moe, folder))
    assert before.keys() == after.keys() and all(".router." in key or ".experts." in key for key in after)
    assert all(not before[key].equal(after[key]) for key in after if "router" in key or key.endswith("_A"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "run.json").read_text())["run"]["arguments"]["dtype"] == "nf4"
    scores = tmp_path / "evaluation" / "safety" / "test" / name / "likelihood" / "metrics.json"
    assert json.loads(scores.read_text())["metrics"]["nll_per_token"]["n"] == 2
