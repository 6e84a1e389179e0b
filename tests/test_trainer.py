"""The alignment of the fusion: gradients, accumulation, checkpointing, logged terms, at toy size."""

import copy
import json

import pytest
import torch
from conftest import decode, needs_attention_in_bfloat16
from safetensors.torch import load_file, save_file
from torch.optim import SGD
from transformers import TrainerCallback

import align_basemodel
from align_basemodel import AlignArguments
from config import TASKS, UserError
from data.encoding import IGNORED, Collator, Encoder
from data.sampling import PADDING_SAMPLE
from data.sources import answer_records, read_rows
from models import alignment, base, training_arguments
from models.expert_ffn import PROJECTIONS
from models.loading import load_run
from models.losses import mean_routing_probs
from models.mixture import MixtureConfig, load_fused
from models.trainer import MixtureTrainer, check_deepspeed
from models.training_arguments import TrainArguments


@pytest.fixture(scope="module")
def samples(tokenizer):
    """Three samples of each task, of different lengths."""
    encoder = Encoder(tokenizer, max_length=300)
    rows = [record for task in TASKS for record in answer_records(task, read_rows(task, "train", "sample"))[:3]]
    return encoder.encode_all(rows)[0][:8]


def make_trainer(
    fused_dir,
    samples,
    tmp_path,
    gate=0.0,
    drift=0.0,
    balance="sample",
    router_lr=1e-2,
    sgd=False,
    schedule="constant",
    **more,
):
    model, _ = load_run(fused_dir, dtype="float32")
    settings = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential", **more}
    args = TrainArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        **settings,
    )
    trainer = MixtureTrainer(
        model,
        args=args,
        train_dataset=samples,
        data_collator=Collator(routing=True),
        tasks=TASKS,
        gate_loss_weight=gate,
        gate_balance=balance,
        gate_schedule=schedule,
        drift_weights=dict.fromkeys(TASKS, drift),
        router_learning_rate=router_lr,
    )
    if sgd:  # shows the gradient itself: Adam's first step is the same for any scale of it
        trained = [p for p in model.parameters() if p.requires_grad]
        trainer.optimizer = SGD(trained, lr=1e-2)
    return trainer


def trained_state(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("gate, drift, balance", [(0.0, 0.0, "sample"), (0.5, 0.1, "sample"), (0.5, 0.0, "task")])
def test_one_batch_of_eight_equals_eight_of_one(fused_dir, samples, tmp_path, gate, drift, balance):
    """The gradient of a step does not depend on how its samples are split, auxiliary losses included."""
    settings = dict(gate=gate, drift=drift, balance=balance, sgd=True, max_steps=2, max_grad_norm=0.0)
    whole = make_trainer(fused_dir, samples, tmp_path / "a", per_device_train_batch_size=8, **settings)
    split = make_trainer(
        fused_dir, samples, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings
    )
    uneven = make_trainer(
        fused_dir, samples, tmp_path / "c", per_device_train_batch_size=3, gradient_accumulation_steps=3, **settings
    )
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    expected = trained_state(whole)
    for trainer in (split, uneven):
        for name, value in trained_state(trainer).items():
            change = (expected[name] - before[name]).abs().max()
            rounding = 6e-8  # two units in the last place of a parameter of about 0.25
            assert (value - expected[name]).abs().max() <= 2e-4 * change + rounding, name
        for key in ("loss", "sft_loss", "gate_loss", "drift_safety", "routing_accuracy"):
            ours, theirs = ([log[key] for log in t.state.log_history if key in log] for t in (trainer, whole))
            assert ours == pytest.approx(theirs, rel=1e-4), key


def test_the_logged_terms_add_up_and_drift_starts_at_zero(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, gate=0.3, drift=0.2, max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sft_loss" in log]
    assert len(logs) == 3
    for log in logs:
        drift = sum(log[f"drift_{task}"] for task in TASKS)
        assert log["loss"] == pytest.approx(log["sft_loss"] + 0.3 * log["gate_loss"] + 0.2 * drift, rel=1e-4)
        assert 0 <= log["routing_accuracy"] <= 1
    assert [logs[0][f"drift_{task}"] for task in TASKS] == [0.0, 0.0, 0.0]
    assert all(logs[2][f"drift_{task}"] > 0 for task in TASKS)


def test_lambda_can_fall_to_zero_over_the_training(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, gate=0.6, schedule="linear", max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sft_loss" in log]
    for log, weight in zip(logs, (0.6, 0.4, 0.2), strict=True):
        assert log["loss"] == pytest.approx(log["sft_loss"] + weight * log["gate_loss"], rel=1e-4)


def test_the_router_trains_by_the_gating_loss_and_learns_the_tasks(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, gate=1.0, router_lr=0.1, max_steps=30, logging_steps=5)
    before = [block.router.weight.detach().clone() for block in trainer.model.blocks]
    trainer.train()
    assert all(
        (block.router.weight - old).abs().max() > 1e-3 for block, old in zip(trainer.model.blocks, before, strict=True)
    )
    logs = [log for log in trainer.state.log_history if "gate_loss" in log]
    assert logs[-1]["gate_loss"] < 0.9 * logs[0]["gate_loss"]
    assert logs[-1]["routing_accuracy"] > 0.9


def test_the_gating_loss_can_weigh_tasks_alike(fused_dir, samples, tmp_path):
    """3 samples of helpfulness, 3 of safety, 2 of truthfulness: weights 8 / (3 * 3), 8 / (3 * 3), 8 / (3 * 2)."""
    assert [TASKS.index(sample["task"]) for sample in samples] == [0, 0, 0, 1, 1, 1, 2, 2]
    trainer = make_trainer(fused_dir, samples, tmp_path, balance="task")
    assert trainer.weight_of_task_id.tolist() == pytest.approx([8 / 9, 8 / 9, 4 / 3])
    trainer.train()
    batch = Collator(routing=True)(samples)
    fresh, _ = load_run(fused_dir, dtype="float32")
    _, router_logits = decode(fresh, batch["input_ids"], batch["attention_mask"])
    own = mean_routing_probs(router_logits, batch["routing_mask"])[range(8), batch["task_ids"]]
    expected = sum(-own[batch["task_ids"] == task].log().mean() for task in range(3)) / 3
    assert trainer.state.log_history[0]["gate_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_router_has_its_own_learning_rate_and_every_parameter_one_group(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, router_lr=0.07, weight_decay=0.02)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {rates[id(p)] for name, p in trained.items() if ".router." in name} == {0.07}
    assert {rates[id(p)] for name, p in trained.items() if ".router." not in name} == {5e-4}
    assert len(rates) == len(trained) == sum(len(g["params"]) for g in trainer.optimizer.param_groups)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]} == {0.02}


@pytest.mark.parametrize("gate_gradient, reached", [("router", False), ("all", True)])
def test_the_gating_loss_trains_the_routers_and_on_request_what_is_below_them(
    fused_dir, samples, gate_gradient, reached
):
    """By the gating loss alone: every router gets a gradient; the experts below one only with "all"; the router's own
    gradient is the same for both (its weights enter the loss in one place)."""
    model, _ = load_run(fused_dir, dtype="float32")
    for block in model.blocks:
        block.router.gate_gradient = gate_gradient
    model.train()
    batch = Collator(routing=True)(samples)
    _, router_logits = decode(model, batch["input_ids"], batch["attention_mask"])
    probs = mean_routing_probs(router_logits, batch["routing_mask"])
    last = model.blocks[-1].router.weight
    inputs = [p for block in model.blocks[:-1] for p in block.experts.parameters()]
    loss = -probs[range(8), batch["task_ids"]].log().mean()
    *below, of_last = torch.autograd.grad(loss, [*inputs, last], allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 0 for grad in below) == reached
    # by hand, from the last router's logits alone
    logits = router_logits[-1].detach().requires_grad_()
    others = [x.detach() for x in router_logits[:-1]]
    probs = mean_routing_probs((*others, logits), batch["routing_mask"])
    (of_logits,) = torch.autograd.grad(-probs[range(8), batch["task_ids"]].log().mean(), logits)
    seen = []
    hook = model.blocks[-1].router.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    model.model(batch["input_ids"], batch["attention_mask"])
    hook.remove()
    expected = of_logits.T @ seen[0]
    assert torch.allclose(of_last, expected, atol=1e-6)


def test_a_frozen_router_stays_and_the_rest_trains(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, gate=1.0, max_steps=2)
    for block in trainer.model.blocks:
        block.router.weight.requires_grad_(False)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        trained = ".experts." in name and not name.endswith("scaling")
        assert torch.equal(value, before[name]) != trained, name


def test_only_router_and_experts_get_gradients_and_the_base_is_frozen(fused_dir):
    model, _ = load_run(fused_dir, dtype="float32")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".router." in name or ".experts." in name for name in trainable)
    model.add_attention_lora(rank=2, alpha=2, dropout=0.0)
    extra = {name for name, p in model.named_parameters() if p.requires_grad} - trainable
    assert extra and all(".self_attn." in name and ".lora_" in name for name in extra)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in extra} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_gradient_checkpointing_changes_no_gradient(fused_dir, samples, tmp_path):
    settings = dict(gate=0.5, drift=0.1, sgd=True, max_steps=2)
    plain = trained_state(make_trainer(fused_dir, samples, tmp_path / "a", **settings))
    trainer = make_trainer(
        fused_dir,
        samples,
        tmp_path / "b",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **settings,
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    checkpointed = trained_state(trainer)
    for name, value in plain.items():
        assert torch.allclose(checkpointed[name], value, atol=1e-6), name
    assert all((checkpointed[n] - start[n]).abs().max() > 0 for n in plain if ".router." in n)


def test_padding_changes_nothing(fused_dir, samples):
    """A sample alone and padded among longer ones: same loss, same routing, same hits."""
    model, _ = load_run(fused_dir, dtype="float32")
    model.double().set_attn_implementation("sdpa")
    collate = Collator(routing=True)
    together = collate(samples)

    def run(batch):
        with torch.no_grad():
            hidden, router_logits = decode(model, batch["input_ids"], batch["attention_mask"])
            logits = model.lm_head(hidden)[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        picked = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORED)
        return picked.sum(1), mean_routing_probs(router_logits, batch["routing_mask"])

    losses, probs = run(together)
    for i, sample in enumerate(samples):
        alone_loss, alone_probs = run(collate([sample]))
        assert abs(alone_loss[0] - losses[i]) < 1e-5 and (alone_probs[0] - probs[i]).abs().max() < 1e-7


def test_loss_at_labels_equals_the_loss_of_all_logits(fused_dir, samples):
    model, _ = load_run(fused_dir, dtype="float32")
    batch = Collator()(samples)
    ours = model(**batch).loss
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    halved = model(**batch, num_items_in_batch=2 * int((batch["labels"] != IGNORED).sum())).loss
    assert halved.item() == pytest.approx(expected.item() / 2, rel=1e-5)


def test_a_checkpoint_holds_what_was_learnt_and_loads(fused_dir, samples, tmp_path):
    trainer = make_trainer(fused_dir, samples, tmp_path, max_steps=2, gate=1.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint-2"))
    loaded, _ = load_run(tmp_path / "checkpoint-2", dtype="float32")
    for (name, ours), (_, theirs) in zip(trainer.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < 150_000


@pytest.mark.parametrize("drift, calls", [(0.0, 2), (0.1, 4)])
def test_drift_is_computed_once_a_step_and_for_the_log_alone_where_it_has_no_weight(
    fused_dir, samples, tmp_path, drift, calls
):
    """4 steps of 2 batches, 2 log lines."""
    settings = dict(max_steps=4, logging_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = make_trainer(fused_dir, samples, tmp_path, drift=drift, **settings)
    measured = []
    real = trainer.model.drift
    trainer.model.drift = lambda start: measured.append(real(start)) or measured[-1]
    trainer.train()
    assert len(measured) == calls
    expected = [x[1].item() for x in measured]
    if drift:
        expected = [(expected[0] + expected[1]) / 2, (expected[2] + expected[3]) / 2]
    logged = [log["drift_safety"] for log in trainer.state.log_history if "sft_loss" in log]
    assert logged == pytest.approx(expected) and logged[1] > 0


def test_samples_of_a_task_without_an_expert_have_no_gating_loss(fused_dir, samples, tmp_path):
    """Nor have the samples that fill up a batch: the terms are those of the others alone."""
    routed = [sample for sample in samples if sample["task"] != TASKS[2]]
    settings = dict(per_device_train_batch_size=9, gate=0.5)
    expected = make_trainer(fused_dir, routed, tmp_path / "a", **settings)
    trainer = make_trainer(fused_dir, samples, tmp_path / "b", **settings)
    trainer.train_dataset.append(PADDING_SAMPLE)
    trainer.expert_of_task_id[2] = -1
    logs = []
    for each in (expected, trainer):
        each.train()
        logs.append(each.state.log_history[0])
    for key in ("gate_loss", "routing_accuracy"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-5)


def test_tasks_weigh_alike_among_those_that_have_an_expert(fused_dir, samples, tmp_path, monkeypatch):
    """3 samples of helpfulness, 3 of safety; the 2 of truthfulness have no gating loss: weights 6 / (2 * 3)."""
    experts = MixtureConfig.expert_of_task.fget
    without = property(lambda mixture: {t: i for t, i in experts(mixture).items() if t != "truthfulness"})
    monkeypatch.setattr(MixtureConfig, "expert_of_task", without)
    trainer = make_trainer(fused_dir, samples, tmp_path, balance="task")
    assert trainer.weight_of_task_id[:2].tolist() == [1, 1]


def test_a_training_that_is_stopped_early_is_not_complete(fused_dir, samples, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(fused_dir, samples, tmp_path, max_steps=3)
    trainer.add_callback(Stop())
    with pytest.raises(UserError, match="the training stopped at step 1 of 3"):
        trainer.train_into(tmp_path / "run", False, 0.0)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_configuration_does_not_take_the_place_of_flags(section):
    check_deepspeed({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=f"has a section '{section}'; leave it out"):
        check_deepspeed({section: {}})


# ---- mixed precision -------------------------------------------------------------------------------------------------


def watch_autocast(model, seen):
    """Note the autocast dtype (None: off) inside the forward pass."""
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))

    def note(*_):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)

    layer.register_forward_pre_hook(note)


@pytest.mark.parametrize("dtype, autocast", [("bfloat16", torch.bfloat16), ("float32", None)])
def test_accelerate_runs_the_precision_that_dtype_says(fused_dir, base_dir, tmp_path, dtype, autocast):
    """Of an expert and of the fusion: Accelerate's setting, the autocast in the forward pass, what stays fp32."""
    common = ["--data_source", "sample", "--base_model", str(base_dir), "--dtype", dtype, "--num_samples", "4"]
    common += ["--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "1"]
    mixture = ["--moe_flag", "1", "--moe_dir", str(fused_dir), "--safety_weight", "0.1", "--expert_topk", "2"]
    mixture += ["--tune_attention", "1"]
    for more in (["--task_name", "safety"], mixture):
        args, training = training_arguments.parse([*common, *more, "--logging_steps", "1"], AlignArguments)
        training.output_dir = str(tmp_path)
        samples = alignment.training_samples(args, 42, base.load_tokenizer(args.base_model))
        make = alignment.mixture_trainer if args.moe_flag else alignment.expert_trainer
        trainer = make(args, training, samples)
        seen = []
        watch_autocast(trainer.model, seen)
        trainer.train()
        assert trainer.accelerator.mixed_precision == {"bfloat16": "bf16", "float32": "no"}[dtype]
        assert seen == [autocast] * 2
        dtypes = {p.requires_grad: set() for p in trainer.model.parameters()}
        for p in trainer.model.parameters():
            dtypes[p.requires_grad].add(p.dtype)
        assert dtypes == {True: {torch.float32}, False: {getattr(torch, dtype)}}


@needs_attention_in_bfloat16
def test_the_fusions_losses_and_drift_are_fp32_under_mixed_precision(fused_dir, base_dir, samples, tmp_path):
    """With bf16 products: the drift is that of the fp32 matrices, the gating loss that of fp32 router logits."""
    trainer = make_trainer(fused_dir, samples, tmp_path, gate=0.5, drift=0.1, bf16=True, max_steps=2)
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    start = trainer.model.start_of_fusion()
    drifts, logits = [], []
    real = trainer.model.drift
    trainer.model.drift = lambda *args: drifts.append(real(*args)) or drifts[-1]
    hook = trainer.model.blocks[0].router.register_forward_hook(lambda _, __, out: logits.append(out[0]))
    trainer.train()
    hook.remove()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert {x.dtype for x in (*drifts, *logits)} == {torch.float32}
    changes = []
    for block, then in zip(trainer.model.blocks, start, strict=True):
        for i, p in enumerate(PROJECTIONS):
            a, b, a_then, b_then = (x[0].double() for x in (*block.experts.matrices(p), then[f"{p}_A"], then[f"{p}_B"]))
            changes.append(torch.linalg.matrix_norm(b @ a - b_then.T @ a_then) * block.experts.scaling[i, 0])
    assert real(start)[0].item() == pytest.approx(torch.stack(changes).mean().item(), rel=1e-5)


def test_attention_is_tuned_in_fp32_and_what_was_saved_in_less_still_loads(fused_dir, base_dir, tmp_path):
    """On a bf16 base. Runs made before kept the attention's LoRA in the base's dtype."""
    model = load_fused(fused_dir, str(base_dir), "bfloat16")
    model.add_attention_lora(rank=2, alpha=2, dropout=0.0)
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {p.dtype for p in lora.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    before = {key: value.bfloat16() if ".lora_" in key else value for key, value in saved.items()}
    save_file(before, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_fused(tmp_path, str(base_dir), "bfloat16")
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, lora[name].bfloat16().float())


def test_bf16_and_dtype_bfloat16_give_the_same_bits(base_dir, tiny_source, tmp_path):
    common = ["--task_name", "safety", "--base_model", str(base_dir), "--data_source", str(tiny_source)]
    common += ["--results_dir", str(tmp_path), "--max_steps", "2", "--batch_size", "2", "--disable_tqdm", "1"]
    spellings = {"a": ["--bf16", "1"], "b": ["--dtype", "bfloat16"], "c": ["--dtype", "float32"]}
    for name, spelling in spellings.items():
        align_basemodel.main([*common, *spelling, "--run_name", name])
    folders = [tmp_path / "outputs" / name for name in spellings]
    a, b, c = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(a[key], b[key]) for key in a) and not all(torch.equal(a[key], c[key]) for key in a)
    a, b, c = [json.loads((folder / "run.json").read_text())["run"]["arguments"] for folder in folders]
    assert a == b and a["dtype"] == "bfloat16" and c["dtype"] == "float32"
