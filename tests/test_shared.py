"""export.py --to shared: what is written, and that it is a run like any other; with the base copied or named."""

import json
import shutil

import pytest
import torch
from conftest import other_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import failed, with_attention
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

import align_basemodel
import inference
from config import UserError
from evaluator import evaluate_likelihood
from models import export, shared
from models.base_identity import base_sha256
from models.expert_bias import read_bias
from models.loading import is_fused, load_run, run_kind, weights_sha256
from models.shared import kernel_source, modeling_source
from workspace.files import sha256

BASE_ID = "someone/tiny-llama"
COMMIT = "0" * 40
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


def test_peft_trains_lora_on_its_attention_and_is_refused_on_its_ffn(exported):
    def trained(modules):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    gradients = trained(["q_proj", "v_proj"])
    assert len(gradients) == 2 * 2 * 3 and all(grad.abs().max() > 0 for grad in gradients.values())
    with pytest.raises(ValueError, match="leave gate_proj, up_proj and down_proj out"):
        trained(["gate_proj", "up_proj", "down_proj"])


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


# ---- the base by name


@pytest.fixture(scope="module")
def named(fused_dir, tmp_path_factory):
    """The export without its base's weights."""
    folder = tmp_path_factory.mktemp("named") / "out"
    export.main(["--cross_task", str(fused_dir), "--base", "by-name", "--base_id", BASE_ID, "--output", str(folder),
                 "--dtype", "float32"])  # fmt: skip
    return folder


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """transformers copies modeling files to a place of this test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def hub_cache(tmp_path, base_dir, monkeypatch):
    """The hub's cache, offline, with the base under its name; the folder of that name in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / f"models--{BASE_ID.replace('/', '--')}"
    shutil.copytree(base_dir, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def from_pretrained(folder, auto=AutoModelForCausalLM, **more):
    return auto.from_pretrained(folder, trust_remote_code=True, **more)


def test_by_name_only_ours_is_written(named, fused_dir, base_dir):
    assert sorted(path.name for path in named.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_h3fusion.py", "run.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    own = load_file(fused_dir / "model.safetensors")
    assert len(load_file(named / "model.safetensors")) == len([key for key in own if not key.endswith("scaling")])
    assert (named / "model.safetensors").stat().st_size <= (fused_dir / "model.safetensors").stat().st_size
    written = json.loads((named / "config.json").read_text())["mixture"]["base"]
    assert written["id"] == BASE_ID and list(written["files"]) == ["model.safetensors"]
    assert written["files"]["model.safetensors"] == sha256(base_dir / "model.safetensors")
    assert f"base_model: {BASE_ID}\n" in (named / "README.md").read_text()
    for path in named.iterdir():
        assert str(base_dir.parents[1]).encode() not in path.read_bytes(), f"{path.name} names a place"


def test_by_name_it_is_the_copied_form(named, exported, base_dir, own_modules, hub_cache):
    copied, offline = from_pretrained(exported), from_pretrained(named)
    assert torch.equal(logits(offline), logits(copied))
    assert torch.equal(logits(from_pretrained(named, base_model=base_dir)), logits(copied))
    again = type(offline).from_pretrained(pretrained_model_name_or_path=named, base_model=base_dir)
    assert torch.equal(logits(again), logits(copied))
    assert offline.generation_config.to_dict() == copied.generation_config.to_dict()
    assert offline.config.name_or_path == str(named)
    assert not any(layer.mlp.up_proj.weight.requires_grad for layer in offline.model.layers)
    with torch.no_grad():
        hidden, expected = (from_pretrained(folder, AutoModel)(IDS).last_hidden_state for folder in (named, exported))
    assert torch.equal(hidden, expected)


def test_by_name_in_half_precision_it_is_the_copied_form(fused_dir, base_dir, tmp_path, own_modules):
    for form, more in (("copied", []), ("by-name", ["--base_id", BASE_ID])):
        export.main(["--cross_task", str(fused_dir), "--base", form, *more, "--output", str(tmp_path / form),
                     "--dtype", "bfloat16"])  # fmt: skip
    copied, named = from_pretrained(tmp_path / "copied"), from_pretrained(tmp_path / "by-name", base_model=base_dir)
    assert named.dtype == torch.bfloat16 and torch.equal(logits(named), logits(copied))


def test_a_loaded_one_is_saved_with_its_base(named, exported, base_dir, tmp_path, own_modules):
    from_pretrained(named, base_model=base_dir).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(from_pretrained(exported)))


def test_another_base_is_refused_by_the_name_of_its_file(named, exported, base_dir, tmp_path, own_modules, hub_cache):
    other = other_base(base_dir, tmp_path / "other")
    with pytest.raises(ValueError, match="other.model.safetensors: is not the file of someone/tiny-llama"):
        from_pretrained(named, base_model=other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="other: holds no model.safetensors of the base someone/tiny-llama"):
        from_pretrained(named, base_model=other)
    with pytest.raises(ValueError, match="base_model=.*holds its base"):
        from_pretrained(exported, base_model=base_dir)
    newer = "1" * 40
    other_base(base_dir, hub_cache / "snapshots" / newer)
    (hub_cache / "refs" / "main").write_text(newer)
    with pytest.raises(ValueError, match="model.safetensors: is not the file of"):
        from_pretrained(named)
    assert torch.equal(logits(from_pretrained(named, revision=COMMIT)), logits(from_pretrained(exported)))


def test_a_base_of_several_files_is_named_by_all(fused_dir, base_dir, exported, tmp_path, own_modules):
    LlamaForCausalLM.from_pretrained(base_dir).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_dir / name, tmp_path / "base" / name)
    export.main(["--cross_task", str(fused_dir), "--base", "by-name", "--base_id", BASE_ID, "--base_model",
                 str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--dtype", "float32"])  # fmt: skip
    files = json.loads((tmp_path / "out" / "config.json").read_text())["mixture"]["base"]["files"]
    assert set(files) == {path.name for path in (tmp_path / "base").glob("*.safetensors")} and len(files) > 1
    loaded = from_pretrained(tmp_path / "out", base_model=tmp_path / "base")
    assert torch.equal(logits(loaded), logits(from_pretrained(exported)))


def test_a_base_without_a_name_is_refused(fused_dir, base_dir, tmp_path, capsys, monkeypatch):
    by_name = ["--cross_task", fused_dir, "--base", "by-name", "--output", tmp_path / "out", "--verify", "0"]
    assert "name it on the hub with --base_id" in failed(by_name, capsys)
    assert "is no name on the hub" in failed([*by_name, "--base_id", base_dir], capsys)
    assert "--to mixtral" in failed([*by_name, "--to", "mixtral"], capsys)
    copied = ["--cross_task", fused_dir, "--output", tmp_path / "out", "--base_id", BASE_ID]
    assert "goes with --base by-name" in failed(copied, capsys)
    tuned = with_attention(fused_dir, tmp_path / "tuned")
    assert "tuned attention" in failed(["--cross_task", tuned, *by_name[2:], "--base_id", BASE_ID], capsys)
    on_embedded = shutil.copytree(fused_dir, tmp_path / "on_embedded")
    run = json.loads((on_embedded / "run.json").read_text())
    run["run"]["arguments"] |= {"base_model": "smollm2", "tokenizer_sha256": None}
    (on_embedded / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(shared, "BASE_MODELS_DIR", base_dir.parent)
    assert "tiny-llama is converted from a GGUF file" in failed([*by_name, "--base_id", BASE_ID], capsys)
    monkeypatch.undo()
    for more in ([], ["--base_id", BASE_ID]):
        assert "smollm2 is converted from a GGUF file" in failed(
            ["--cross_task", on_embedded, *by_name[2:], *more], capsys
        )
    assert not (tmp_path / "out").exists()


def test_a_base_from_the_hub_has_its_name(fused_dir, tmp_path, hub_cache):
    export.main(["--cross_task", str(fused_dir), "--base", "by-name", "--output", str(tmp_path / "out"),
                 "--base_model", BASE_ID])  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mixture"]["base"]["id"] == BASE_ID


def test_the_same_export_again_is_told_from_one_with_another_name(named, fused_dir, exported, capsys):
    again = ["--cross_task", str(fused_dir), "--base", "by-name", "--dtype", "float32", "--base_id"]
    export.main([*again, BASE_ID, "--output", str(named)])
    assert "is this export already (verified" in capsys.readouterr().out
    assert "base_id=someone/tiny-llama, this one" in failed([*again, "someone/other", "--output", named], capsys)
    assert "base=None, this one has base=by-name" in failed([*again, BASE_ID, "--output", exported], capsys)


def test_by_name_it_is_a_run_like_any_other_without_its_code(named, fused_dir, base_dir, tmp_path, capsys):
    assert run_kind(named) == "shared_by_name" and is_fused(named)
    loaded, tokenizer = load_run(named, str(base_dir), "float32")
    assert torch.equal(logits(loaded), logits(load_run(fused_dir, dtype="float32")[0])) and tokenizer("Hi.").input_ids
    assert weights_sha256(named) == sha256(named / "model.safetensors")
    bias = read_bias("safety=only", named)
    alone = [logits(load_run(path, str(base_dir), "float32", bias)[0]) for path in (named, fused_dir)]
    assert torch.equal(*alone) and not torch.equal(alone[0], logits(loaded))
    inference.main(["--prompt", "Hello", "--cross_task", str(named), "--max_new_tokens", "4", "--base_model",
                    str(base_dir)])  # fmt: skip
    assert "experts used: helpfulness" in capsys.readouterr().out
    evaluate_likelihood.main(["--run", str(named), "--data_source", "sample", "--num_samples", "2", "--results_dir",
                              str(tmp_path), "--base_model", str(base_dir)])  # fmt: skip
    scores = json.loads((tmp_path / "evaluation/safety/test/out/likelihood/metrics.json").read_text())
    assert "routing_accuracy" in scores["metrics"]


def test_by_name_our_own_commands_take_its_base_from_the_hub(named, fused_dir, base_dir, tmp_path, hub_cache):
    """Whether or not its run.json came along."""
    alone = shutil.copytree(named, tmp_path / "alone")
    (alone / "run.json").unlink()
    for folder in (named, alone):
        assert torch.equal(
            logits(load_run(folder, dtype="float32")[0]), logits(load_run(fused_dir, dtype="float32")[0])
        )
    other = other_base(base_dir, tmp_path / "other")
    for folder in (named, alone):
        with pytest.raises(UserError, match="other: is not the base of .*, someone/tiny-llama as it was"):
            load_run(folder, str(other))
    shutil.copyfile(other / "model.safetensors", hub_cache / "snapshots" / COMMIT / "model.safetensors")
    with pytest.raises(UserError, match="someone/tiny-llama: is not the base of .*give that one's folder"):
        load_run(named)
    shutil.rmtree(hub_cache)
    with pytest.raises(UserError, match="someone/tiny-llama is not cached"):
        load_run(named)


def test_by_name_it_is_no_base_of_others_and_no_start_of_a_fusion(named, tmp_path, capsys):
    with pytest.raises(UserError, match="is a fused model that names its base; name it as a run"):
        load_run(None, str(named), "float32")
    assert "is not a fused model" in failed(["--cross_task", named, "--output", tmp_path / "out"], capsys)


def test_by_name_a_torn_one_is_refused(named, base_dir, tmp_path):
    torn = shutil.copytree(named, tmp_path / "out")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.mlp.router.weight"]
    save_file(tensors, torn / "model.safetensors")
    with pytest.raises(UserError, match="does not fit its config.json .tensor model.layers.1.mlp.router.weight"):
        load_run(torn, str(base_dir))
    (torn / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model.safetensors"):
        load_run(torn, str(base_dir))


def test_a_base_in_pickles_is_refused(fused_dir, base_dir, tmp_path, capsys):
    pickled = shutil.copytree(base_dir, tmp_path / "base")
    torch.save(load_file(base_dir / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    run = json.loads((fused_dir / "run.json").read_text())
    del run["run"]["arguments"]["base_sha256"]  # a pickle's digest is another
    fused = shutil.copytree(fused_dir, tmp_path / "moe")
    run["run"]["arguments"]["base_model"] = str(pickled)
    (fused / "run.json").write_text(json.dumps(run))
    assert "pytorch_model.bin: by name only safetensors" in failed(
        ["--cross_task", fused, "--base", "by-name", "--base_id", BASE_ID, "--output", tmp_path / "out"], capsys
    )
