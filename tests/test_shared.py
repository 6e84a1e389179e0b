"""export.py --to shared: what is written, and that it is a run like any other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_export import with_attention
from transformers import AutoModelForCausalLM, LlamaConfig

import align_basemodel
import inference
from config import UserError
from evaluator import evaluate_likelihood
from models import export, shared
from models.base_identity import base_sha256
from models.expert_bias import read_bias
from models.loading import load_run, weights_sha256
from models.shared import kernel_source, modeling_source

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def exported(fused_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "out"
    export.main(["--cross_task", str(fused_dir), "--output", str(folder), "--dtype", "float32"])
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_modeling_file_has_the_projects_own_lines_and_nothing_else_of_it(exported):
    text = (exported / "modeling_h3fusion.py").read_text()
    assert kernel_source() in text and len(kernel_source().splitlines()) > 200
    assert "import models" not in text and "from models" not in text and "four_bit." not in text
    compile(text, "modeling", "exec")
    assert "LlamaForCausalLM" in modeling_source(LlamaConfig())


def test_the_base_is_there_once(exported, fused_dir, base_dir):
    settings = json.loads((exported / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"] == "modeling_h3fusion.H3FusionModel"
    assert not [key for key in settings if "num_experts" in key or "num_local_experts" in key]
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    tensors = {key: value for path in exported.glob("*.safetensors") for key, value in load_file(path).items()}
    assert set(index["weight_map"]) == set(tensors)
    base = load_file(base_dir / "model.safetensors")
    assert all(torch.equal(tensors[key], base[key]) for key in base)
    own = load_file(fused_dir / "model.safetensors")
    assert len(tensors) == len(base) + len([key for key in own if not key.endswith("scaling")])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_it_is_a_run_like_any_other_without_its_code(exported, fused_dir, tmp_path, capsys):
    loaded = load_run(exported, dtype="float32")[0]
    assert torch.equal(logits(loaded), logits(load_run(fused_dir, dtype="float32")[0]))
    assert weights_sha256(exported) == base_sha256(str(exported))
    bias = read_bias("safety=only", exported)
    alone = [logits(load_run(path, dtype="float32", bias=bias)[0]) for path in (exported, fused_dir)]
    assert torch.equal(*alone) and not torch.equal(alone[0], logits(loaded))
    inference.main(["--prompt", "Hello", "--cross_task", str(exported), "--max_new_tokens", "4"])
    assert "experts used: helpfulness" in capsys.readouterr().out
    evaluate_likelihood.main(
        ["--run", str(exported), "--data_source", "sample", "--num_samples", "2", "--results_dir", str(tmp_path)]
    )
    scores = json.loads((tmp_path / "evaluation/safety/test/out/likelihood/metrics.json").read_text())
    assert "routing_accuracy" in scores["metrics"]


def test_it_is_no_base_of_others_and_names_no_place(exported, tmp_path, capsys):
    with pytest.raises(UserError, match="is a fused model that holds its base; name it as a run"):
        load_run(None, str(exported), "float32")
    with pytest.raises(SystemExit):
        align_basemodel.main(["--task_name", "safety", "--base_model", str(exported), "--data_source", "sample",
                              "--results_dir", str(tmp_path)])  # fmt: skip
    assert "holds its base" in capsys.readouterr().err and not list(tmp_path.glob("outputs/*/*.safetensors"))
    settings = (exported / "config.json").read_text()
    assert '_name_or_path": "/' not in settings and json.loads(settings)["mixture"]["base_model_name_or_path"] is None


def test_tuned_attention_is_merged(fused_dir, tmp_path):
    tuned = with_attention(fused_dir, tmp_path / "tuned")
    export.main(["--cross_task", str(tuned), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    ours, theirs = (logits(load_run(path, dtype="float32")[0]) for path in (tuned, tmp_path / "out"))
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert (ours - logits(load_run(fused_dir, dtype="float32")[0])).abs().max() > 1e-2


def test_half_precision_has_half_precision_experts(fused_dir, tmp_path):
    export.main(["--cross_task", str(fused_dir), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    tensors = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    ours, theirs = (logits(model) for model in (load_run(fused_dir, dtype="float32")[0],
                                                shared.read_back(tmp_path / "out", "sdpa")))  # fmt: skip
    assert (ours - theirs).norm() < 0.05 * ours.norm() and not torch.equal(ours, theirs)


def test_a_base_of_several_files_keeps_them_apart(fused_dir, base_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(base_dir).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_dir / name, tmp_path / "base" / name)
    files = len(list((tmp_path / "base").glob("*.safetensors")))
    assert files > 1
    export.main(["--cross_task", str(fused_dir), "--base_model", str(tmp_path / "base"), "--output",
                 str(tmp_path / "out"), "--dtype", "float32"])  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files + 1


def test_another_kernel_is_not_kept(fused_dir, tmp_path, monkeypatch, capsys):
    whole = shared.kernel_source()
    spoilt = whole.replace("top_k_weights / top_k_weights.sum(-1, keepdim=True)", "top_k_weights")
    assert spoilt != whole
    monkeypatch.setattr(shared, "kernel_source", lambda: spoilt)
    with pytest.raises(SystemExit):
        export.main(["--cross_task", str(fused_dir), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    assert "is not the model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_torn_export_is_refused(exported, tmp_path):
    torn = shutil.copytree(exported, tmp_path / "out")
    index = json.loads((torn / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.router.weight"]
    (torn / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not fit its config.json .tensor model.layers.1.mlp.router.weight"):
        load_run(torn, dtype="float32")
    max(torn.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="is missing"):
        load_run(torn)
