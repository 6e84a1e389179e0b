"""How fast a router must learn, and how far it can: routers alone, by the gating loss, on frozen hidden states.

    python benchmarks/routers_alone.py --moe_dir results/demo/outputs/moe --data_source sample

Two epochs, batch 8, AdamW with linear decay, as in the alignment of the fusion. For each learning rate: routing
accuracy per task, by the prompts' tokens, on rows of the training half held apart from the training. A setting is
chosen by these; the test half is never read here. Last, one line of JSON.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

import cli
import config
from cli import flag
from config import TASKS
from data.encoding import IGNORED, Collator, Encoder
from data.held_apart import held_apart_records
from data.sampling import StepSampler
from data.sources import answer_records, draw, read_rows, trainable_rows
from models.loading import device, load_run
from models.losses import gate_loss, routing_hits


@dataclass
class BenchmarkArguments:
    moe_dir: str = flag(str(config.fused_dir(config.RESULTS_DIR)), "the fused model")
    data_source: str = flag("sample", "sample, hub or a folder")
    num_samples: int = flag(80, "training rows per task")
    num_held_apart: int = flag(100, "other training prompts per task, which are scored")
    rates: str = flag("5e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1", "learning rates, with commas")
    seed: int = flag(42, "of samples, order and routers")


@torch.no_grad()
def router_inputs(model, samples: list[dict], prompts_only: bool) -> list[tuple[torch.Tensor, int]]:
    """Per sample: what the routers see of the tokens that count, (L, T, D), and the task."""
    states, inputs = [], []
    hooks = [block.router.register_forward_hook(lambda _, args, __: states.append(args[0])) for block in model.blocks]
    collate = Collator(routing=True)
    for sample in tqdm(sorted(samples, key=lambda sample: len(sample["input_ids"])), desc="hidden states"):
        batch = collate([sample])
        states.clear()
        model.model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
        counted = batch["routing_mask"][0].bool()
        if prompts_only:
            counted &= batch["labels"][0] == IGNORED
        inputs.append((torch.stack([x[counted.to(x.device)].cpu() for x in states]), TASKS.index(sample["task"])))
    for hook in hooks:
        hook.remove()
    return inputs


def mean_probs(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (L, E, D), x (L, T, D) -> mean routing probabilities (1, E)."""
    return torch.einsum("ltd,led->lte", x.float(), weight).softmax(-1).mean((0, 1))[None]


def train_routers(train, rate: float, std: float, seed: int) -> torch.Tensor:
    """The routers (L, E, D) after two epochs; tasks weigh alike, as in the alignment."""
    layers, _, width = train[0][0].shape
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(layers, len(TASKS), width, generator=generator) * std).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    steps = 2 * -(-len(train) // 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    sampler = StepSampler([x.shape[1] for x, _ in train], 8, seed)
    counts = torch.bincount(torch.tensor([task for _, task in train]), minlength=len(TASKS))
    task_weights = counts.sum() / (len(TASKS) * counts)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), 8):
            batch = [train[i] for i in order[start : start + 8]]
            probs = torch.cat([mean_probs(weight, x) for x, _ in batch])
            optimizer.zero_grad()
            tasks = torch.tensor([task for _, task in batch])
            gate_loss(probs, tasks, task_weights[tasks]).backward()
            optimizer.step()
            schedule.step()
    return weight.detach()


def accuracy(weight: torch.Tensor, inputs) -> dict[str, float]:
    """Routing accuracy by task, and their mean."""
    probs = torch.cat([mean_probs(weight, x) for x, _ in inputs])
    tasks = torch.tensor([task for _, task in inputs])
    hits = routing_hits(probs, tasks).float()
    of_task = {name: hits[tasks == i].mean().item() for i, name in enumerate(TASKS)}
    return {**of_task, "mean": sum(of_task.values()) / len(TASKS)}


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, BenchmarkArguments)
    random.seed(args.seed)
    model, tokenizer = load_run(args.moe_dir)
    model.to(device())
    encoder = Encoder(tokenizer, 300)
    trained, held_apart = [], []
    records = held_apart_records(TASKS, args.data_source, args.num_samples, args.num_held_apart, args.seed)
    for task in TASKS:
        rows = trainable_rows(task, read_rows(task, "train", args.data_source))
        trained += answer_records(task, draw(rows, args.num_samples, args.seed))
        held_apart += list({record.instruction: record for record in records[task]}.values())
    train_inputs = router_inputs(model, encoder.encode_all(trained)[0], prompts_only=False)
    held_apart_inputs = router_inputs(model, encoder.encode_all(held_apart)[0], prompts_only=True)
    results = {}
    for rate in map(float, args.rates.split(",")):
        weight = train_routers(train_inputs, rate, model.config.initializer_range, args.seed)
        results[rate] = accuracy(weight, held_apart_inputs)
        print(f"{rate:g}: " + ", ".join(f"{task} {value:.3f}" for task, value in results[rate].items()))
    counts = {"train": len(train_inputs), "held_apart": len(held_apart_inputs)}
    print(json.dumps({"samples": counts, "routing_accuracy": results}))


if __name__ == "__main__":
    main()
