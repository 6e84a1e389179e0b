"""Bases of other families than Llama: each fused model is the mixture of its merged experts, and every command runs."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import save_adapter
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    dynamic_module_utils,
)

import align_basemodel
import inference
from config import TASKS, UserError
from data.encoding import Encoder
from data.sources import Record
from evaluator import evaluate_likelihood
from evaluator.scoring import score_answers
from models import base, ensemble, export, llama_moe, merging
from models.base_identity import base_sha256
from models.causal_lm import VERIFIED
from models.dense_experts import FORMS, form_config
from models.expert_ffn import PROJECTIONS
from models.loading import load_run, run_kind
from models.mixture import MixtureConfig

SHAPE = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.15,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2, sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, layer_types=SLIDING),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3_text": Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=8),
}
RECORDS = [
    Record("1", "safety", "Name three birds of the northern coast.", "", answer)
    for answer in ("Gull, auk, tern.", "No.", "There are many more than three of them, I believe.")
]


def save_base(config, folder, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # some families start at 0, some at 1: neither is a test
            parameter.data.normal_(mean=1.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FAST = ("llama", "qwen3", "gemma3_text")  # the others' forms are among theirs


@pytest.fixture(scope="session", params=[n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def family(request, tmp_path_factory, tokenizer):
    """(base, folder of three adapters on it, fused model) of a family."""
    folder = tmp_path_factory.mktemp(request.param.replace(", ", "_"))
    base_dir = save_base(FAMILIES[request.param], folder / "base", tokenizer)
    for seed, task in enumerate(TASKS):
        save_adapter(folder / task, base_dir, seed=seed + 1)
    llama_moe.main(["--experts_dir", str(folder), "--output", str(folder / "moe"), "--expert_topk", "2"])
    return base_dir, folder, folder / "moe"


def dense_mixture(base_dir, folder, routers, ids):
    """Logits of the mixture by three models that PEFT merged, in float64, a loop over them in every layer."""
    merged = []
    for task in TASKS:
        model = AutoModelForCausalLM.from_pretrained(base_dir).double()
        merged.append(PeftModel.from_pretrained(model, folder / task).double().merge_and_unload().eval())

    class Mixture(torch.nn.Module):
        def __init__(self, ffns, router):
            super().__init__()
            self.ffns, self.router = torch.nn.ModuleList(ffns), router

        def forward(self, x):
            kept, chosen = F.linear(x, self.router).softmax(-1).topk(2)
            outputs = torch.stack([ffn(x) for ffn in self.ffns], dim=-2)
            picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
            return ((kept / kept.sum(-1, keepdim=True))[..., None] * picked).sum(-2)

    for number, layers in enumerate(zip(*(model.model.layers for model in merged), strict=True)):
        layers[0].mlp = Mixture([layer.mlp for layer in layers], routers[number])
    with torch.no_grad():
        return merged[0](ids).logits


def test_the_fused_model_is_the_mixture_of_merged_experts(family):
    base_dir, folder, moe = family
    model, _ = load_run(moe, dtype="float32")
    model.double()
    ids = torch.randint(2, 600, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = dense_mixture(base_dir, folder, [block.router.weight.detach() for block in model.blocks], ids)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() < 1e-10 * expected.abs().max()
        raw = load_run(None, str(base_dir), "float32")[0].double()(ids).logits
    assert (raw - expected).abs().max() > 0.1 * expected.abs().max(), "the experts change nothing"


def test_cached_generation_is_uncached(family):
    for path in (family[2], family[1] / "safety"):
        model, _ = load_run(path, dtype="float32")
        model.double()
        ids = torch.randint(2, 600, (2, 11), generator=torch.Generator().manual_seed(1))
        texts = [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=cache
            )
            for cache in (True, False)
        ]
        assert torch.equal(*texts)


def test_packed_answers_score_as_each_alone(family):
    """Also where layers see no further back than a window, which the prompt is longer than."""
    base_dir, folder, moe = family
    for path in (moe, folder / "helpfulness"):
        model, tokenizer = load_run(path, dtype="float32")
        encoder = Encoder(tokenizer, 300)
        scored = score_answers(model, encoder, RECORDS, 2, torch.device("cpu"), "test")
        for record in RECORDS:
            sample = encoder.encode(record)
            answer = [label for label in sample["labels"] if label != -100]
            ids = torch.tensor([sample["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            first = ids.shape[1] - len(answer)
            assert first > 20
            expected = [log_probs[first - 1 + i, token].item() for i, token in enumerate(answer)]
            assert [*scored[record].log_probs.tolist(), scored[record].end_log_prob] == pytest.approx(
                expected, abs=1e-4
            )


def test_the_loss_at_labels_and_its_gradient_are_those_of_all_logits(family):
    model, tokenizer = load_run(family[2], dtype="float32")
    model.double().train()
    sample = Encoder(tokenizer, 300).encode(RECORDS[2])
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = model(input_ids=ids, labels=labels).loss
    logits = model(input_ids=ids).logits
    theirs = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for mine, reference in zip(*(torch.autograd.grad(loss, trained) for loss in (ours, theirs)), strict=True):
        assert (mine - reference).norm() < 1e-6 * reference.norm().clamp(min=1e-9)


EXPORTS = {
    "llama": "the base has attention_bias: --to mixtral has no place for biases; use --to peft",
    "mistral": "mixtral",
    "qwen2": "none of mixtral, qwen3_moe; use --to peft",
    "qwen3": "qwen3_moe",
    "gemma3_text": "none of mixtral, qwen3_moe; use --to peft",
}


def test_the_form_of_dense_experts_is_the_same_model_or_refused_by_name(family, tmp_path, capsys):
    base_dir, _, moe = family
    expected = EXPORTS[AutoConfig.from_pretrained(base_dir).model_type]
    form = expected if expected in FORMS else "mixtral"
    arguments = ["--cross_task", str(moe), "--output", str(tmp_path / "export"), "--to"]
    if form != expected:
        with pytest.raises(SystemExit):
            export.main([*arguments, form])
        assert expected in capsys.readouterr().err and not (tmp_path / "export").exists()
        return
    export.main([*arguments, form])
    ours, theirs = load_run(moe, dtype="float32")[0], load_run(tmp_path / "export", dtype="float32")[0]
    assert type(theirs) is FORMS[form].model_class
    ids = torch.randint(2, 600, (2, 17))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    if form != "mixtral":
        with pytest.raises(SystemExit):
            export.main([*arguments[:-3], "--output", str(tmp_path / "other"), "--to", "mixtral"])
        assert f"is --to {form}" in capsys.readouterr().err


def test_a_qwen3_whose_layers_are_all_full_has_no_window():
    """transformers keeps the window's size in the configuration where no layer uses it."""
    for layer_types, window in ((["full_attention"] * 3, None), (["sliding_attention"] * 3, 8)):
        base_config = Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, layer_types=layer_types)
        mixture = MixtureConfig([{}], 1, 1, "", base_config.to_dict())
        assert form_config(mixture, "qwen3_moe", "float32").sliding_window == window


def test_one_expert_leaves_as_an_adapter(family, tmp_path):
    base_dir, folder, moe = family
    export.main(["--cross_task", str(moe), "--to", "peft", "--expert", "safety", "--output", str(tmp_path / "adapter")])
    ids = torch.randint(2, 600, (1, 9))
    with torch.no_grad():
        models = [load_run(path, dtype="float32")[0](ids).logits for path in (folder / "safety", tmp_path / "adapter")]
    assert (models[0] - models[1]).abs().max() < 1e-4


def test_the_shared_checkpoint_is_the_model_to_transformers_and_to_us(family, tmp_path, monkeypatch):
    """Logits, greedy answers with a cache, and gradients; by its own code, and by ours without it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    export.main(["--cross_task", str(family[2]), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    ours, tokenizer = load_run(family[2], dtype="float32")
    again, _ = load_run(tmp_path / "out", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert type(theirs).__name__ == "H3FusionForCausalLM" and run_kind(tmp_path / "out") == "shared"
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("Hi.") == tokenizer("Hi.")
    ids = torch.randint(2, 600, (2, 17), generator=torch.Generator().manual_seed(0))
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        expected, texts = ours(ids).logits, ours.generate(ids, **settings)
        for model in (again.eval(), theirs.eval()):
            assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
            assert torch.equal(model.generate(ids, **settings), texts)
    ours.double().train(), theirs.double().train()
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
        model(input_ids=ids, labels=ids).loss.backward()
    for mine, other in zip(ours.blocks, (layer.mlp for layer in theirs.model.layers), strict=True):
        assert torch.allclose(mine.router.weight.grad, other.router.weight.grad, rtol=1e-6, atol=1e-9)
        for i, name in enumerate(PROJECTIONS):
            for side in "AB":
                scaled = side == ("B" if name == "down_proj" else "A")  # theirs has the scaling in it
                scaling = mine.experts.scaling[i][:, None, None] if scaled else 1
                grads = (module.get_parameter(f"{name}_{side}").grad for module in (mine.experts, other.low_rank))
                grad, of_theirs = grads
                assert torch.allclose(grad, of_theirs * scaling, rtol=1e-6, atol=1e-9)
        assert other.gate_proj.weight.grad is None
    by_name = ["--cross_task", str(family[2]), "--base", "by-name", "--base_id", "someone/tiny", "--dtype", "float32"]
    export.main([*by_name, "--output", str(tmp_path / "by-name")])
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "by-name", trust_remote_code=True, base_model=family[0])
    with torch.no_grad():
        copied = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)(ids).logits
        assert torch.equal(named(ids).logits, copied)


@pytest.mark.slow
def test_every_command_runs(family, tmp_path, capsys):
    base_dir = family[0]
    shared = ["--results_dir", str(tmp_path)]
    training = [*shared, "--data_source", "sample", "--num_samples", "4", "--max_steps", "2", "--batch_size", "2"]
    for task in TASKS:
        align_basemodel.main(["--task_name", task, "--base_model", str(base_dir), *training])
    llama_moe.main(["--router_init", "prototype", "--num_prompts", "4", *shared])
    align_basemodel.main(
        ["--moe_flag", "1", "--run_name", "fused", "--gate_loss_weight", "0.1", "--safety_weight", "0.01", *training,
         "--gradient_checkpointing", "1"]
    )  # fmt: skip
    ensemble.main([*shared])
    merging.main(["--method", "linear", *shared])
    merging.main(["--method", "tsv_m", *shared])
    runs = "raw,safety,fused,ensemble_probabilities,merge_linear,merge_tsv_m"
    evaluate_likelihood.main(["--run", runs, "--num_samples", "2", "--base_model", str(base_dir), *shared])
    for run in ("fused", "ensemble_probabilities"):
        inference.main(
            ["--task_name", "safety", "--cross_task", run, "--num_samples", "2", "--max_new_tokens", "4", *shared]
        )
    assert "warning" not in capsys.readouterr().err
    assert (tmp_path / "outputs" / "fused" / "run.json").exists()


def test_a_checkpoint_of_the_version_for_llama_alone_loads(fused_dir, base_dir, tmp_path):
    """Its config.json was a Llama's with the mixture's settings among them."""
    old = shutil.copytree(fused_dir, tmp_path / "moe")
    settings = json.loads((fused_dir / "config.json").read_text())
    llama = settings.pop("base")
    earlier = {**llama, **settings, "model_type": "llama_moe", "architectures": ["LlamaMoeForCausalLM"]}
    (old / "config.json").write_text(json.dumps(earlier))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = [load_run(folder, dtype="float32")[0](ids).logits for folder in (fused_dir, old)]
    assert torch.equal(*logits)


def test_a_family_that_nobody_tried_loads_with_a_warning(tmp_path, tokenizer, capsys):
    config = Olmo2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"})
    base_dir = save_base(config, tmp_path / "base", tokenizer)
    for task in TASKS:
        save_adapter(tmp_path / task, base_dir, seed=len(task))
    llama_moe.main(["--experts_dir", str(tmp_path), "--output", str(tmp_path / "moe")])
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "olmo2" in said and all(name in said for name in VERIFIED.values())
    model, _ = load_run(tmp_path / "moe", dtype="float32")
    model.double()
    ids = torch.randint(2, 600, (1, 9))
    expected = dense_mixture(base_dir, tmp_path, [block.router.weight.detach() for block in model.blocks], ids)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    "config, said",
    [
        (GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=4), "no model.layers"),
        (Phi3Config(**SHAPE), "gate_up_proj"),
        (LlamaConfig(**{**SHAPE, "hidden_act": "relu"}), "its activation is"),
        (GraniteConfig(**SHAPE, logits_scaling=4.0), "its logits are not those of its head alone"),
        (Gemma2Config(**SHAPE, final_logit_softcapping=0.5), "its logits are not those of its head alone"),
        (Gemma3TextConfig(**SHAPE, final_logit_softcapping=0.5), "its logits are not those of its head alone"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_family_that_does_not_fit_is_refused_by_name(config, said, tmp_path, tokenizer):
    base_dir = save_base(config, tmp_path / "base", tokenizer)
    with pytest.raises(UserError, match=config.model_type) as refused:
        base.load_base(str(base_dir), "float32")
    assert said in str(refused.value) and str(base_dir) in str(refused.value)


def test_a_window_is_part_of_what_a_base_is(tmp_path, tokenizer):
    digests = set()
    for window in (4, 6):
        folder = save_base(MistralConfig(**SHAPE, sliding_window=window), tmp_path / str(window), tokenizer)
        digests.add(base_sha256(str(folder)))
    assert len(digests) == 2
