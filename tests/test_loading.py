"""What is loaded under a run's name, and which base it stands on, wherever that lies."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, other_base, save_adapter, tiny_config
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import align_basemodel
import config
import inference
from config import UserError
from evaluator.scoring import check_scored
from models import base_identity, export, llama_moe, loading
from models.adapters import Expert
from models.base_identity import base_sha256, tokenizer_sha256
from models.loading import load_run, run_kind, weights_sha256
from models.mixture import MixtureForCausalLM

IDS = torch.tensor([[5, 17, 300, 42]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_each_kind_of_run_is_loaded_as_itself(base_dir, adapter_dirs, fused_dir, tmp_path):
    assert [run_kind(folder) for folder in (None, adapter_dirs[1], fused_dir)] == ["raw", "adapter", "fused"]
    raw, _ = load_run(None, str(base_dir), "float32")
    expert, _ = load_run(adapter_dirs[1], dtype="float32")
    fused, _ = load_run(fused_dir, dtype="float32")
    assert isinstance(fused, MixtureForCausalLM)
    merged = expert.merge_and_unload()  # a causal LM's own folder
    merged.save_pretrained(tmp_path / "merged")
    load_run(None, str(base_dir), "float32")[1].save_pretrained(tmp_path / "merged")
    whole, _ = load_run(tmp_path / "merged", dtype="float32")
    assert torch.allclose(logits(whole), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(whole), logits(raw), atol=1e-2)


def test_an_export_answers_and_scores_as_itself(fused_dir, tmp_path):
    """A Mixtral folder is not its base: the base used to be loaded under its name."""
    export.main(["--cross_task", str(fused_dir), "--to", "mixtral", "--output", str(tmp_path / "mixtral")])
    mixtral, _ = load_run(tmp_path / "mixtral", dtype="float32")
    fused, _ = load_run(fused_dir, dtype="float32")
    assert mixtral.config.model_type == "mixtral"
    assert torch.allclose(logits(mixtral), logits(fused), atol=1e-4)


def damaged(folder: Path, source: Path, how: str) -> Path:
    shutil.copytree(source, folder)
    weights = next(folder.glob("*model.safetensors"))
    if how == "no weights":
        weights.unlink()
    elif how == "torn":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "no config":
        next(folder.glob("*config.json")).unlink()
    return folder


@pytest.mark.parametrize("how", ["no weights", "torn", "no config"])
@pytest.mark.parametrize("kind", ["adapter", "fused", "causal_lm"])
def test_what_holds_no_whole_model_is_refused(kind, how, base_dir, adapter_dirs, fused_dir, tmp_path):
    """Each of these was scored as the raw base under the run's name."""
    source = {"adapter": adapter_dirs[1], "fused": fused_dir, "causal_lm": tmp_path / "whole"}[kind]
    LlamaForCausalLM.from_pretrained(base_dir).save_pretrained(tmp_path / "whole")
    for name in ("generation_config.json", "README.md", "run.json"):
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    folder = damaged(tmp_path / "checkpoint-8", source, how)
    for name in ("generation_config.json", "run.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="checkpoint-8") as refused:
        load_run(folder, str(base_dir))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("files", [{}, {"run.json": "{}"}, {"config.json": '{"model_type": "bert"}'}])
def test_a_folder_of_something_else_is_refused(files, base_dir, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="neither an adapter nor a model|a causal language model is needed"):
        load_run(tmp_path, str(base_dir))


def test_a_base_is_known_by_its_tensors_and_shape(base_dir, tmp_path):
    digest = base_sha256(str(base_dir))
    copy = Path(shutil.copytree(base_dir, tmp_path / "elsewhere"))
    assert base_sha256(str(copy)) == digest
    model = LlamaForCausalLM.from_pretrained(base_dir)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert base_sha256(str(tmp_path / "sharded")) == digest
    assert base_sha256(str(other_base(base_dir, tmp_path / "chat"))) != digest
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    assert base_sha256(str(copy)) != digest


def test_a_base_is_read_once_and_again_when_its_file_changes(base_dir, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(base_dir, tmp_path / "base"))
    read = []
    whole = base_identity.tensors_sha256
    monkeypatch.setattr(base_identity, "tensors_sha256", lambda *args: read.append(1) or whole(*args))
    first = base_sha256(str(folder))
    assert base_sha256(str(folder)) == first and len(read) == 1
    other_base(base_dir, folder)
    assert base_sha256(str(folder)) != first and len(read) == 2


def test_another_tokenizer_makes_another_run(base_dir, adapter_dirs, tmp_path, capsys):
    """Of the same weights: other tokens, or another chat template."""
    other, chatty = (Path(shutil.copytree(base_dir, tmp_path / name)) for name in ("other", "chatty"))
    make_tokenizer("Other words are tokens here. " * 40).save_pretrained(other)
    templated = make_tokenizer()
    templated.chat_template = "{{ messages[0]['content'] }}"
    templated.save_pretrained(chatty)
    digests = {tokenizer_sha256(str(folder)) for folder in (base_dir, other, chatty)}
    assert len(digests) == 3 and len({base_sha256(str(folder)) for folder in (base_dir, other, chatty)}) == 1
    moved = shutil.copytree(base_dir, tmp_path / "moved")
    assert tokenizer_sha256(str(moved)) == tokenizer_sha256(str(base_dir))
    align = ["--task_name", "safety", "--data_source", "sample", "--num_samples", "2", "--max_steps", "1",
             "--batch_size", "2", "--dtype", "float32", "--results_dir", str(tmp_path)]  # fmt: skip
    align_basemodel.main([*align, "--base_model", str(base_dir)])
    align_basemodel.main([*align, "--base_model", str(moved)])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        align_basemodel.main([*align, "--base_model", str(other)])
    assert "tokenizer_sha256" in capsys.readouterr().err
    experts = f"helpfulness={adapter_dirs[0]},safety={tmp_path}/outputs/safety"
    with pytest.raises(SystemExit):
        llama_moe.main(["--experts", experts, "--base_model", str(other), "--output", str(tmp_path / "moe")])
    assert "outputs/safety: was made with another tokenizer" in capsys.readouterr().err
    experts = f"helpfulness={adapter_dirs[0]},truthfulness={adapter_dirs[2]}"
    moe = str(tmp_path / "moe")
    llama_moe.main(["--experts", experts, "--base_model", str(base_dir), "--output", moe])
    here = ["--results_dir", str(tmp_path), "--base_model", str(other)]
    for script, flags in (
        (inference, ["--task_name", "safety", "--cross_task", "safety", "--num_samples", "1", *here]),
        (align_basemodel, [*align, "--init_adapter", "safety", "--run_name", "on", *here]),
        (align_basemodel, [*align[2:], "--moe_flag", "1", "--moe_dir", moe, *here]),
        (llama_moe, ["--add", "safety", "--to", moe, "--data_source", "sample", *here]),
        (export, ["--cross_task", moe, "--output", str(tmp_path / "out"), *here]),
    ):
        with pytest.raises(SystemExit):
            script.main(flags)
        assert "was made with another tokenizer" in capsys.readouterr().err, script.__name__


def test_the_digest_of_a_mixtral_is_what_it_was(tmp_path):
    """Answers and scores of earlier exports record it."""
    settings = dict(vocab_size=60, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    MixtralForCausalLM(MixtralConfig(**settings, num_key_value_heads=1, num_local_experts=2)).save_pretrained(tmp_path)
    shape = {name: getattr(AutoConfig.from_pretrained(tmp_path), name, None) for name in base_identity.SHAPE}
    digest = base_identity.tensors_sha256([tmp_path / "model.safetensors"], False)
    expected = hashlib.sha256(json.dumps([shape, digest], sort_keys=True).encode()).hexdigest()
    assert base_sha256(str(tmp_path)) == expected


@pytest.mark.slow
def test_smollm2_and_its_folder_are_one_base():
    folder = config.BASE_MODELS_DIR / config.EMBEDDED_MODEL
    assert base_sha256("smollm2") == base_sha256(str(folder))


def test_a_base_that_moved_is_given_by_its_new_place(base_dir, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(base_dir, old)
    adapter = save_adapter(tmp_path / "expert", old, 1)
    recorded = {"base_model": str(old), "base_sha256": base_sha256(str(old))}
    (adapter / "run.json").write_text(json.dumps({"run": {"script": "align_basemodel.py", "arguments": recorded}}))
    before = logits(load_run(adapter, dtype="float32")[0])
    old.rename(new)
    with pytest.raises(UserError, match="no longer at .*old; give its new place with --base_model"):
        load_run(adapter)
    model, _ = load_run(adapter, str(new), "float32")
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="chat: is not the base of"):
        load_run(adapter, str(other_base(new, tmp_path / "chat")))
    assert loading.run_sources(adapter, str(new), None, str(tmp_path))[0] == str(new)


def test_weights_that_a_run_learnt_have_a_digest(base_dir, adapter_dirs, fused_dir):
    digests = [weights_sha256(folder) for folder in (*adapter_dirs, fused_dir, base_dir)]
    assert weights_sha256(None) is None and len(set(digests)) == 5


def changed(folder: Path, to: Path, name: str, **settings) -> Path:
    """A copy of a folder with other settings in a file of it."""
    shutil.copytree(folder, to)
    path = to / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return to


def test_the_digest_is_also_of_the_settings_that_answers_depend_on(adapter_dirs, fused_dir, tmp_path):
    """The same tensors with another top-k, or of an adapter that nothing else describes with another alpha, are another
    model."""
    for to in ("mixtral", "shared"):
        export.main(["--cross_task", str(fused_dir), "--to", to, "--output", str(tmp_path / to)])
    others = changed(tmp_path / "mixtral", tmp_path / "mixtral_1", "config.json", num_experts_per_tok=1)
    assert weights_sha256(others) == f"{weights_sha256(tmp_path / 'mixtral')}, top-1"
    mixture = json.loads((tmp_path / "shared" / "config.json").read_text())["mixture"]
    others = changed(tmp_path / "shared", tmp_path / "shared_1", "config.json", mixture=mixture | {"top_k": 1})
    assert weights_sha256(others) == f"{weights_sha256(tmp_path / 'shared')}, top-1"
    single = changed(fused_dir, tmp_path / "single", "config.json", num_experts_per_tok=1)
    assert weights_sha256(single) == f"{weights_sha256(fused_dir)}, top-1"
    adapter = shutil.copytree(adapter_dirs[0], tmp_path / "adapter")
    louder = changed(adapter, tmp_path / "louder", "adapter_config.json", lora_alpha=64)
    moved = changed(adapter, tmp_path / "moved", "adapter_config.json", base_model_name_or_path="elsewhere")
    assert weights_sha256(adapter) == weights_sha256(moved) != weights_sha256(louder)
    assert Expert(adapter).checksum == weights_sha256(adapter)


def test_adapters_that_would_not_be_run_as_they_are_are_refused(base_dir, adapter_dirs, tmp_path, tokenizer):
    """Virtual tokens, which scoring would leave out; tensors of other names, for which PEFT takes random ones; and of
    another shape."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base_dir), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    model.save_pretrained(tmp_path / "prompt")
    renamed = shutil.copytree(adapter_dirs[1], tmp_path / "renamed")
    tensors = load_file(renamed / "adapter_model.safetensors")
    odd = {name.replace("model.layers", "language_model.layers"): value for name, value in tensors.items()}
    save_file(odd, renamed / "adapter_model.safetensors")
    wider = tmp_path / "wider"
    LlamaForCausalLM(tiny_config(intermediate_size=64)).save_pretrained(wider)
    tokenizer.save_pretrained(wider)
    of_wider = save_adapter(tmp_path / "of_wider", wider, 1)
    changed(of_wider, tmp_path / "misfit", "adapter_config.json", base_model_name_or_path=str(base_dir))
    changed(adapter_dirs[1], tmp_path / "elsewhere", "adapter_config.json", target_modules=["c_attn"])
    head = shutil.copytree(adapter_dirs[1], tmp_path / "head")
    more = {f"base_model.model.lm_head.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
    save_file(tensors | more, head / "adapter_model.safetensors")
    for name, said in (
        ("prompt", "virtual tokens cannot be run here"),
        ("renamed", "has no tensor base_model.model.model.layers.0"),
        ("misfit", "does not fit its base"),
        ("elsewhere", "does not fit its base"),
        ("head", "its tensor base_model.model.lm_head.lora_A.weight has no place"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            load_run(tmp_path / name, dtype="float32")
        assert "\n" not in str(refused.value)


def test_a_model_whose_head_is_not_all_of_its_logits_is_run_but_not_scored(tmp_path, tokenizer):
    """Granite divides its logits, Gemma 2 bends them and has no attention but eager's."""
    shape = dict(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    for name, settings in (
        ("granite", GraniteConfig(**shape, logits_scaling=8.0)),
        ("gemma2", Gemma2Config(**shape, head_dim=8, final_logit_softcapping=0.01)),
    ):
        AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model, _ = load_run(tmp_path / name, dtype="float32")
        with pytest.raises(UserError, match=f"a {name} model cannot be scored by likelihood here"):
            check_scored(model)
