"""The card of an exported checkpoint says what it was made from, and how."""

import json

import torch
import yaml
from safetensors.torch import save_file

from models.mixture import MixtureConfig
from models.model_card import model_card
from workspace.files import sha256

EXPERTS = [{"name": task, "task": task, "rank": 8} for task in ("helpfulness", "safety", "truthfulness")]
MIXTURE = MixtureConfig(EXPERTS, 8, 2, "someone/base", {})
ALIGNED = {
    "run": {
        "script": "align_basemodel.py",
        "arguments": {
            "moe_flag": 1, "data_source": "hub", "num_train_epochs": 2.0, "learning_rate": 5e-4, "seed": 42,
            "effective_batch_size": 4, "router_learning_rate": 0.1, "gate_loss_weight": 0.01, "helpfulness_weight": 0.1,
            "safety_weight": 0.0, "truthfulness_weight": 0.0, "drift_weights": "politeness=0.2",
        },
    },
    "train": {"samples": 925, "steps": 464},
}  # fmt: skip


def card(tmp_path, record=None, base="someone/base", results=None):
    run = tmp_path / "mix_moe"
    run.mkdir(exist_ok=True)
    if record is not None:
        (run / "run.json").write_text(json.dumps(record))
    text = model_card(MIXTURE, "MixtralForCausalLM", run, base, "bfloat16", results)
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_an_aligned_run_tells_its_data_settings_and_scores(tmp_path):
    folder = tmp_path / "results" / "evaluation" / "safety" / "test" / "mix_moe" / "likelihood"
    folder.mkdir(parents=True)
    score = {"value": 2.3174, "n": 169, "interval": [2.25, 2.381]}
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"nll_per_token": score}}))
    (tmp_path / "mix_moe").mkdir()
    weights = tmp_path / "mix_moe" / "model.safetensors"
    save_file({"a": torch.zeros(2)}, weights)
    MIXTURE.save(tmp_path / "mix_moe")
    of_score = {"run": {"script": "evaluate_likelihood.py", "arguments": {"weights_sha256": sha256(weights)}}}
    (folder / "run.json").write_text(json.dumps(of_score))
    head, body = card(tmp_path, ALIGNED, results=tmp_path / "results")
    assert head["base_model"] == "someone/base" and head["library_name"] == "transformers"
    assert head["datasets"] == ["tatsu-lab/alpaca", "PKU-Alignment/BeaverTails", "truthfulqa/truthful_qa"]
    assert "top-2 of 3 experts" in body and "- expert 1: safety (rank 8)" in body
    assert (
        "aligned on tatsu-lab/alpaca, PKU-Alignment/BeaverTails, truthfulqa/truthful_qa: samples 925; epochs 2.0; "
        "optimiser steps 464; samples per step 4; learning rate 0.0005; the routers' 0.1; weight of the gating loss "
        "0.01; weights of the drift helpfulness 0.1, safety 0.0, truthfulness 0.0, politeness 0.2; seed 42."
    ) in body
    assert "## Scores\n- safety: 2.317 [2.250, 2.381] nats per token of held-out answers (n = 169)" in body
    assert "- helpfulness:" not in body
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"nll_per_token": score | {"n": 1, "interval": None}}}))
    of_one = card(tmp_path, ALIGNED, results=tmp_path / "results")[1]
    assert "- safety: 2.317 nats per token of held-out answers (n = 1)" in of_one
    save_file({"a": torch.ones(2)}, weights)  # another run of this name
    assert "## Scores" not in card(tmp_path, ALIGNED, results=tmp_path / "results")[1]


def test_one_more_expert_beside_an_aligned_fusion_hides_nothing_of_its_alignment(tmp_path):
    added = {"to": "mix", "experts": ["helpfulness", "safety", "truthfulness", "politeness"], "data_source": "hub"}
    meta = {"fused": ALIGNED["run"]["arguments"]}
    _, body = card(tmp_path, {"run": {"script": "llama_moe.py", "arguments": added}, "train": {}, "meta": meta})
    assert "and the fusion was aligned on tatsu-lab/alpaca" in body and "learning rate 0.0005" in body
    assert body.count("politeness was then added, without training.") == 1 and "not aligned" not in body


def test_what_is_not_known_is_not_told(tmp_path):
    head, body = card(tmp_path, base="smollm2")
    assert "base_model" not in head and "datasets" not in head and "## Scores" not in body
    assert "It is not recorded." in body
    fused = {"run": {"script": "llama_moe.py", "arguments": {"data_source": "hub"}}}
    assert "the fusion was not aligned" in card(tmp_path, fused)[1]
    exported = {"run": {"script": "export.py", "arguments": {"data_source": "hub"}}}
    assert "It is not recorded." in card(tmp_path, exported)[1]


def test_no_place_of_this_machine_is_named(tmp_path):
    record = {**ALIGNED, "run": {**ALIGNED["run"], "arguments": {**ALIGNED["run"]["arguments"],
                                                                 "data_source": str(tmp_path)}}}  # fmt: skip
    head, body = card(tmp_path, record, base=str(tmp_path))
    assert "base_model" not in head and str(tmp_path) not in body and "aligned on a folder of its own: " in body
