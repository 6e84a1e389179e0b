"""The fusion's controls: routers by prototypes of the tasks' prompts, and fresh experts."""

import json

import pytest
import torch
from conftest import decode
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from config import TASKS, UserError
from data.encoding import Encoder
from data.held_apart import held_apart_records
from data.sources import Record, draw, read_rows, trainable_rows
from models import llama_moe, prototypes
from models.loading import load_run

TEXTS = ["Bake bread", "Can a fox be tamed, and who would want to?", "Name three birds of the north"]


def test_the_mean_state_is_that_of_each_prompt_alone(base_dir, tokenizer):
    model = LlamaForCausalLM.from_pretrained(base_dir).eval()
    encoder = Encoder(tokenizer, 512)
    records = [Record(str(i), "safety", text) for i, text in enumerate(TEXTS)]
    states = []
    for record in records:
        sample, seen = encoder.encode(record), []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([sample["input_ids"]]))
        for hook in hooks:
            hook.remove()
        states.append(torch.stack(seen)[:, sample["opening"] :])
    expected = torch.cat(states, dim=1).mean(1)
    for batch_size in (1, 3):
        assert torch.allclose(prototypes.mean_states(model, encoder, records, batch_size), expected, atol=1e-5)


def test_a_prototype_router_knows_its_own_tasks_mean_state():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 2, 16, generator=generator) * 5  # what all tasks share is large
    states = common + torch.randn(3, 2, 16, generator=generator)
    routers = prototypes.prototype_routers(states)
    for layer, router in enumerate(routers):
        logits = states[:, layer] @ router.T  # (task, expert)
        assert logits.diagonal().mean() == pytest.approx(prototypes.OWN_LOGIT, rel=1e-4)
        assert (logits.argmax(1) == torch.arange(3)).all()
        assert torch.allclose(router @ states.mean(0)[layer], torch.zeros(3), atol=1e-3)


def test_an_arrow_points_where_the_expert_changes_most():
    generator = torch.Generator().manual_seed(0)
    deltas = [(torch.randn(2, 16, generator=generator), torch.randn(24, 2, generator=generator), 0.5) for _ in "gu"]
    direction = prototypes.most_changed_input(deltas)
    dense = torch.cat([s * b @ a for a, b, s in deltas]).double()
    assert abs(abs(direction.double() @ torch.linalg.svd(dense).Vh[0]) - 1) < 1e-6
    states = torch.randn(1, 2, 16, generator=generator) * 5 + torch.randn(3, 2, 16, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(3, 2, 16, generator=generator), dim=-1)
    for layer, router in enumerate(prototypes.arrow_routers(states, directions)):
        logits = states[:, layer] @ router.T
        assert logits.diagonal().min() > 0 and logits.diagonal().mean() == pytest.approx(2.0, rel=1e-4)
        within = torch.stack([directions[:, layer], states.mean(0)[layer].expand(3, -1)], dim=1)  # (3, 2, D)
        for row, plane in zip(router, within, strict=True):  # a direction, less what is common
            rest = row - torch.linalg.lstsq(plane.T, row[:, None]).solution[:, 0] @ plane
            assert rest.norm() < 1e-4 * row.norm()


def fuse(output, *more):
    llama_moe.main(["--output", str(output), *map(str, more)])


def test_routers_start_by_prototypes(tmp_path, adapter_dirs, tiny_source, capsys):
    experts = ["--experts_dir", adapter_dirs[0].parent, "--router_init", "prototype", "--data_source", tiny_source]
    fuse(tmp_path / "moe", *experts, "--num_prompts", 6, "--dtype", "float32")
    fuse(tmp_path / "arrow", *experts[:3], "arrow", *experts[4:], "--num_prompts", 6, "--dtype", "float32")
    by_arrow = load_file(tmp_path / "arrow" / "model.safetensors")
    assert json.loads((tmp_path / "arrow" / "run.json").read_text())["run"]["arguments"]["router_init"] == "arrow"
    by_prompts = load_file(tmp_path / "moe" / "model.safetensors")
    differing = [key for key in by_prompts if not torch.equal(by_prompts[key], by_arrow[key])]
    assert differing == [key for key in by_prompts if ".router." in key]
    fuse(tmp_path / "random", *experts[:2])
    run = json.loads((tmp_path / "moe" / "run.json").read_text())["run"]["arguments"]
    assert run["router_init"] == "prototype" and run["num_prompts"] == 6 and run["dtype"] == "float32"
    assert set(run["data_sha256"]) == {f"{task}_train.jsonl" for task in TASKS}
    assert "router_init" not in json.loads((tmp_path / "random" / "run.json").read_text())["run"]["arguments"]
    model, tokenizer = load_run(tmp_path / "moe", dtype="float32")
    prompts = [prototypes.task_prompts(task, str(tiny_source), 6, 42) for task in TASKS]
    encoder = Encoder(tokenizer, 512)
    hits = 0
    for task, records in enumerate(prompts):
        for record in records:
            sample = encoder.encode(record)
            ids = torch.tensor([sample["input_ids"]])
            with torch.no_grad():
                _, router_logits = decode(model, input_ids=ids)
            first_layer = router_logits[0][sample["opening"] :]  # which no expert has changed yet
            hits += int(first_layer.mean(0).argmax() == task)
    assert hits >= 12  # of 18; 6 by chance
    capsys.readouterr()
    with pytest.raises(SystemExit):
        fuse(tmp_path / "moe", *experts, "--num_prompts", 5, "--dtype", "float32")
    assert "num_prompts=6" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fuse(tmp_path / "moe", *experts, "--num_prompts", 6, "--dtype", "float32", "--num_trained", 8)
    assert "num_trained" in capsys.readouterr().err


def test_prompts_may_be_of_the_rows_alone_that_an_alignment_draws():
    held_apart = held_apart_records(TASKS, "sample", 16, 4, 42)
    for task in TASKS:
        drawn = draw(trainable_rows(task, read_rows(task, "train", "sample")), 16, 42)
        prompts = prototypes.task_prompts(task, "sample", 100, 42, num_trained=16)
        assert {prompt.id for prompt in prompts} <= {row["id"] for row in drawn} and len(prompts) >= 8
        assert not {p.instruction for p in prompts} & {record.instruction for record in held_apart[task]}
        assert len(prototypes.task_prompts(task, "sample", 100, 42)) > len(prompts)


def test_fresh_experts_change_nothing_until_they_are_aligned(tmp_path, base_dir):
    fuse(tmp_path / "fresh", "--fresh_rank", 4, "--base_model", base_dir)
    model, _ = load_run(tmp_path / "fresh", dtype="float32")
    base, _ = load_run(None, str(base_dir), "float32")
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-5)
    saved = load_file(tmp_path / "fresh" / "model.safetensors")
    a, b = (saved[f"model.layers.0.mlp.experts.up_proj_{letter}"] for letter in "AB")
    assert not b.any() and a.abs().max() <= 32**-0.5 and not torch.equal(a[0], a[1])
    assert model.mixture.expert_of_task == {task: i for i, task in enumerate(TASKS)}
    fuse(tmp_path / "of_43", "--fresh_rank", 4, "--base_model", base_dir, "--seed", 43)
    other = load_file(tmp_path / "of_43" / "model.safetensors")["model.layers.0.mlp.experts.up_proj_A"]
    assert not any(torch.equal(one, another) for one in a for another in other)  # seeds share no expert


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--num_prompts", 4), "--num_prompts 4: has an effect with --router_init prototype or arrow only"),
        (("--fresh_rank", 4, "--base_model", "X", "--router_init", "arrow"), "fresh experts change nothing yet"),
        (("--fresh_rank", 4), "--fresh_rank takes --base_model"),
        (("--router_init", "prototype"), "name it with --data_source"),
        (("--router_init", "prototype", "--experts", "a=X,b=Y,c=Z"), "has no task whose prompts to take"),
    ],
)
def test_mistakes_are_one_line(flags, said, adapter_dirs, tmp_path, capsys):
    folder_of = dict(zip("XYZ", map(str, adapter_dirs), strict=True))
    flags = ["".join(folder_of.get(c, c) for c in str(flag)) if "=" in str(flag) else flag for flag in flags]
    experts = [] if "--fresh_rank" in flags else ["--experts_dir", adapter_dirs[0].parent]
    with pytest.raises(SystemExit) as exit_:
        fuse(tmp_path / "moe", *flags, *experts)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_prompts_that_are_alike_give_no_router():
    for scale in (1e-3, 1, 1e3):
        states = scale * torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1)).repeat(3, 1, 1)
        with pytest.raises(UserError, match="the same mean states"):
            prototypes.prototype_routers(states)
