"""The dial on the routers: what it does to the function, and what it is called."""

import json
import math
import shutil

import pytest
import torch

import inference
from config import TASKS, UserError
from evaluator import evaluate_likelihood, report, sweeps
from evaluator.results_folder import read_run_scores
from models import llama_moe
from models.expert_bias import ExpertBias, read_bias, set_expert_bias
from models.loading import load_run

torch.manual_seed(0)
IDS = torch.randint(2, 600, (2, 11))


def logits(folder, bias=None, zeros=False):
    """Logits of a fused model in float64, by --expert_bias."""
    model, _ = load_run(folder, dtype="float32", bias=read_bias(bias, folder))
    if zeros:
        set_expert_bias(model, ExpertBias(TASKS, (0.0, 0.0, 0.0), (False, False, False)))
    model.double().set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(IDS).logits


def test_zero_changes_no_bit(fused_dir):
    assert torch.equal(logits(fused_dir, zeros=True), logits(fused_dir))
    assert torch.equal(logits(fused_dir, "safety=0,truthfulness=-0"), logits(fused_dir))


@pytest.mark.parametrize("number", range(3))
def test_only_is_the_experts_dense_merge(fused_dir, base_dir, adapter_dirs, number):
    from test_llama_moe import merged_models

    dense = list(merged_models(base_dir, adapter_dirs))[number]
    with torch.no_grad():
        assert (logits(fused_dir, f"{TASKS[number]}=only") - dense(IDS).logits).abs().max() < 1e-12
    others = ",".join(f"{task}=off" for task in TASKS if task != TASKS[number])
    assert torch.equal(logits(fused_dir, others), logits(fused_dir, f"{TASKS[number]}=only"))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("number", range(3))
def test_off_is_the_fusion_of_the_others(tmp_path, fused_dir, adapter_dirs, number, top_k):
    """Made of the other two adapters and their rows of the routers."""
    kept = [i for i in range(3) if i != number]
    folder = shutil.copytree(fused_dir, tmp_path / "all")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    others = ",".join(TASKS[i] for i in kept)
    place = ["--experts_dir", str(adapter_dirs[0].parent), "--output", str(tmp_path / "others")]
    llama_moe.main([*place, "--experts", others, "--expert_topk", str(min(top_k, 2))])
    model, _ = load_run(tmp_path / "others", dtype="float32")
    whole, _ = load_run(fused_dir, dtype="float32")
    for block, of_all in zip(model.blocks, whole.blocks, strict=True):
        block.router.weight.data = of_all.router.weight.data[kept]
    model.double().set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(IDS).logits
    assert (logits(folder, f"{TASKS[number]}=off") - expected).abs().max() < 1e-12
    assert (logits(folder) - expected).abs().max() > 1e-3


def test_what_is_added_moves_the_weights_by_its_exponential(fused_dir):
    """softmax(l + b) is softmax(l) times exp(b), normalised; the logits that routing is counted by have it too."""
    recorded = []
    for bias in (None, "safety=1.5,helpfulness=-0.5"):
        model, _ = load_run(fused_dir, dtype="float32", bias=read_bias(bias, fused_dir))
        with torch.no_grad():
            x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
            recorded.append(model.blocks[0].router(x)[0].softmax(-1))
    plain, dialled = recorded
    expected = plain * torch.tensor([math.exp(-0.5), math.exp(1.5), 1.0])
    assert (dialled - expected / expected.sum(-1, keepdim=True)).abs().max() < 1e-6


def test_a_bias_is_not_saved(fused_dir, tmp_path):
    model, _ = load_run(fused_dir, dtype="float32", bias=read_bias("safety=2", fused_dir))
    assert not any("bias" in key or key.endswith(".off") for key in model.state_dict())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kindness=1", "write EXPERT=VALUE with one of helpfulness, safety, truthfulness"),
        ("safety", "write EXPERT=VALUE"),
        ("", "an empty part"),
        ("safety=1,", "an empty part"),
        ("safety=1,safety=2", "is given twice"),
        ("safety=inf", "is no number within ±10000, off or only"),
        ("safety=nan", "is no number within"),
        ("safety=1e39", "is no number within"),
        ("safety=-10001", "is no number within"),
        ("safety=", "nothing: is no number within"),
        ("safety=much", "much: is no number within"),
        ("safety=only,helpfulness=1", "name that expert alone"),
        ("safety=off,helpfulness=off,truthfulness=off", "leave one"),
    ],
)
def test_what_is_no_bias_is_refused(fused_dir, text, said):
    with pytest.raises(UserError, match=said):
        read_bias(text, fused_dir)


def test_only_a_fused_model_has_a_bias(base_dir, adapter_dirs):
    for folder in (None, base_dir, adapter_dirs[0]):
        with pytest.raises(UserError, match="only a fused model has a router"):
            read_bias("safety=1", folder)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("safety=1.0, helpfulness=-0.50", "helpfulness=-0.5,safety=1"),
        ("safety=0", ""),
        ("safety=0.1234567", "safety=0.1234567"),
        ("safety=off", "safety=off"),
        ("safety=only", "helpfulness=off,truthfulness=off"),
    ],
)
def test_one_bias_has_one_name(fused_dir, given, text):
    bias = read_bias(given, fused_dir)
    assert bias.text == text and read_bias(text or None, fused_dir) in (bias, None)
    assert bias.suffix == ("_bias_" + text.replace("=", "_").replace(",", "_") if text else "")


@pytest.mark.slow
def test_answers_and_scores_with_a_bias_are_a_row_of_their_own(fused_dir, tmp_path, capsys):
    results = tmp_path / "results"
    run = shutil.copytree(fused_dir, results / "outputs" / "mixture")
    served = ["--results_dir", str(results), "--data_source", "sample"]
    place = [*served, "--dtype", "float32"]
    few = ["--task_name", "safety", "--cross_task", "mixture", "--num_samples", "3", "--max_new_tokens", "4"]
    inference.main([*few, *place, "--expert_bias", "safety=4"])
    inference.main([*few, *place])
    answers = results / "inference" / "safety" / "test"
    assert {path.name for path in answers.iterdir() if path.is_dir()} == {
        "cross_mixture",
        "cross_mixture_bias_safety_4",
    }
    recorded = json.loads((answers / "cross_mixture_bias_safety_4" / "run.json").read_text())["run"]["arguments"]
    assert recorded["expert_bias"] == "safety=4"
    used = [
        json.loads((results / "observation" / "safety" / "test" / name / "routing.json").read_text())["weight"]
        for name in ("cross_mixture", "cross_mixture_bias_safety_4")
    ]
    assert torch.tensor(used[1]).mean(0)[1] > torch.tensor(used[0]).mean(0)[1] + 0.2
    score = ["--run", "mixture", "--num_samples", "4", *place]
    evaluate_likelihood.main(score)
    evaluate_likelihood.main([*score, "--expert_bias", "safety=only"])
    name = "mixture_bias_helpfulness_off_truthfulness_off"
    runs = ["--runs", f"mixture,{name}", "--reference", "mixture", "--results_dir", str(results)]
    report.main(runs)
    plain, alone = json.loads((results / "report" / "table.json").read_text())["rows"]
    assert (plain["run"], alone["run"], alone["kind"]) == ("mixture", name, "fused")
    assert alone["paired"]["mean_nll_per_token"]["difference"] != 0
    assert alone["metrics"]["safety_routing_accuracy"]["value"] == 1 and run.exists()
    scores = read_run_scores(results, name, "test")
    assert sweeps.settings(scores) is None  # a dial is no point of a sweep
    for refused in (
        [*place, "--cross_task", "raw_chat"],
        [*served, "--server_url", "http://localhost:1/v1", "--server_model", "m"],
    ):
        with pytest.raises(SystemExit):
            inference.main([*few, *refused, "--expert_bias", "safety=1"])
        assert "--expert_bias safety=1" in capsys.readouterr().err
