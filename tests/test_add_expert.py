"""llama_moe.py --add: one more expert beside an aligned fusion's, which stay as they are."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, save_adapter, write_jsonl
from safetensors.torch import load_file

import align_basemodel
from data.encoding import Encoder
from models import llama_moe
from models.expert_bias import read_bias
from models.loading import load_run
from models.mixture import read_mixture
from models.model_card import model_card
from models.prototypes import OWN_LOGIT, mean_states, task_prompts

WORDS = ("eggs", "sugar", "a ladder", "salt", "a book", "milk")


@pytest.fixture(scope="module")
def joined(tmp_path_factory, fused_dir, base_dir):
    """(data, the fused model, the expert that joins, what came out)."""
    root = tmp_path_factory.mktemp("joined")
    data = root / "data"
    shutil.copytree(ROOT / "data" / "sample", data)
    rows = [
        {
            "id": str(i),
            "instruction": f"Ask a neighbour for {WORDS[i % 6]}, {i} times.",
            "input": "",
            "output": "May I?",
        }
        for i in range(24)
    ]
    write_jsonl(data / "politeness_train.jsonl", rows)
    expert = save_adapter(root / "outputs" / "politeness", base_dir, seed=9, r=9, lora_alpha=5)  # the others: up to 8
    shutil.copytree(fused_dir, root / "outputs" / "aligned")
    llama_moe.main(["--add", "politeness", "--to", "aligned", *settings(root)])
    return data, root / "outputs" / "aligned", expert, root / "outputs" / "aligned_with_politeness"


def settings(root):
    return [
        "--data_source",
        str(root / "data"),
        "--num_prompts",
        "12",
        "--dtype",
        "float32",
        "--results_dir",
        str(root),
    ]


def test_the_others_are_untouched_and_alone_they_are_the_old_function(joined):
    _, old_dir, _, new_dir = joined
    before, after = (load_file(path / "model.safetensors") for path in (old_dir, new_dir))
    rank = before["model.layers.0.mlp.experts.gate_proj_A"].shape[1]
    for key, tensor in before.items():
        kept = after[key]
        if key.endswith("scaling"):
            kept = kept[:, :3]
        elif ".router." in key:
            kept = kept[:3]
        else:
            assert not kept[:3, rank:].any()
            kept = kept[:3, :rank]
        assert torch.equal(kept, tensor.to(kept.dtype)), key
    ids = torch.randint(2, 600, (2, 13), generator=torch.Generator().manual_seed(0))
    off = read_bias("politeness=off", new_dir)
    old, masked, free = (load_run(path, dtype="float32", bias=bias)[0].double()
                         for path, bias in ((old_dir, None), (new_dir, off), (new_dir, None)))  # fmt: skip
    with torch.no_grad():
        assert (old(ids).logits - masked(ids).logits).abs().max() < 1e-12
        assert (old(ids).logits - free(ids).logits).abs().max() > 1e-3


def test_the_new_expert_alone_is_its_dense_merge(joined):
    _, _, expert, new_dir = joined
    ids = torch.randint(2, 600, (2, 13), generator=torch.Generator().manual_seed(0))
    alone = load_run(new_dir, dtype="float32", bias=read_bias("politeness=only", new_dir))[0].double()
    dense = load_run(expert, dtype="float32")[0].double()
    with torch.no_grad():
        assert (alone(ids).logits - dense(ids).logits).abs().max() < 1e-12
    assert all(block.experts.gate_proj_A.shape[:2] == (4, 9) for block in alone.blocks)


def test_its_prompts_go_to_it_and_the_others_stay_where_they_went(joined):
    data, old_dir, _, new_dir = joined
    (old, tokenizer), (new, _) = (load_run(path, dtype="float32") for path in (old_dir, new_dir))
    encoder = Encoder(tokenizer, 300)
    mean = {task: mean_states(old, encoder, task_prompts(task, str(data), 12, 42)) for task in ("safety", "politeness")}
    polite, safe = mean["politeness"].clone(), mean["safety"].clone()
    for layer, (before, after) in enumerate(zip(old.blocks, new.blocks, strict=True)):
        logits, others = polite[layer] @ after.router.weight.T, safe[layer] @ after.router.weight.T
        assert logits[3].item() == pytest.approx(max(logits[:3].max().item(), 0) + OWN_LOGIT, rel=1e-3)
        assert torch.allclose(safe[layer] @ before.router.weight.T, others[:3], rtol=1e-6)
        assert others[3].item() < logits[3].item() / 2


def test_it_resumes_and_is_aligned_further(joined, capsys):
    data, _, _, new_dir = joined
    root = new_dir.parents[1]
    llama_moe.main(["--add", "politeness", "--to", "aligned", *settings(root)])
    assert "has this expert already" in capsys.readouterr().out
    align_basemodel.main(
        ["--moe_flag", "1", "--moe_dir", str(new_dir), "--gate_loss_weight", "0.1", "--num_samples", "2",
         "--max_steps", "1", "--batch_size", "4", "--dtype", "float32", "--run_name", "further",
         "--results_dir", str(root)]
    )  # fmt: skip
    card = model_card(read_mixture(new_dir), "Form", new_dir, "someone/base", "float32", None)
    assert "the fusion was not aligned. politeness was then added, without training." in card
    run = json.loads((root / "outputs" / "further" / "run.json").read_text())
    assert run["run"]["arguments"]["tasks"] == "helpfulness,safety,truthfulness,politeness"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--add", "politeness"], "--add and --to go together"),
        (["--add", "politeness", "--to", "politeness"], "is not a fused model"),
        (["--add", "safety=politeness", "--to", "aligned"], "has an expert of that name"),
        (["--add", "politeness", "--to", "aligned", "--expert_topk", "1"], "has no effect with --add"),
        (["--add", "politeness", "--to", "aligned", "--router_init", "arrow"], "has no effect with --add"),
        (["--add", "a=politeness,b=politeness", "--to", "aligned"], "name one expert"),
        (["--add", "", "--to", "aligned"], "name one expert"),
        (["--add", "outputs/politeness", "--to", "aligned"], "must be small letters"),
        (["--add", "politeness", "--to", "aligned", "--tasks", "a,b"], "--tasks a,b: has no effect with --add"),
        (["--add", "politeness", "--to", "aligned", "--max_rank", "4"], "--max_rank 4: has no effect with --add"),
        (["--add", "rudeness=politeness", "--to", "aligned"], "rudeness_train.jsonl"),
    ],
)
def test_what_cannot_join_is_refused(joined, arguments, said, capsys, tmp_path):
    root = joined[3].parents[1]
    with pytest.raises(SystemExit):
        llama_moe.main([*arguments, "--output", str(tmp_path / "out"), "--data_source", str(root / "data"),
                        "--results_dir", str(root)])  # fmt: skip
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out" / "model.safetensors").exists()


def test_empty_experts_are_not_the_default_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        llama_moe.main(["--experts", "", "--results_dir", str(tmp_path)])
    assert "name two or more experts" in capsys.readouterr().err
