"""How fast a router must learn, and how far it can: routers alone, by the gating loss, on frozen hidden states.

    python benchmarks/routers_alone.py --moe_dir results/outputs/moe --data_source sample

Two epochs, batch 8, AdamW with linear decay, as in the alignment of the fusion. For each learning rate: routing
accuracy per task on the test half, and on rows of the training half that were not trained on. The difference of the two
is what the test half's other origin costs (AlpacaEval's prompts are no Alpaca instructions). Last, one line of JSON.
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
from data.encoding import Collator, Encoder, LengthGroupedSampler
from data.sources import answer_records, draw, read_rows, spread, trainable_rows
from models.loading import device, load_run
from models.losses import gate_loss, routing_hits


@dataclass
class BenchmarkArguments:
    moe_dir: str = flag(str(config.fused_dir(config.RESULTS_DIR)), "the fused model")
    data_source: str = flag("sample", "sample, hub or a folder")
    num_samples: int = flag(80, "training rows per task")
    num_held_out: int = flag(100, "samples per task that are scored, of each kind")
    rates: str = flag("5e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1", "learning rates, with commas")
    seed: int = flag(42, "of samples, order and routers")


@torch.no_grad()
def router_inputs(model, samples: list[dict]) -> list[tuple[torch.Tensor, int]]:
    """Per sample: what the routers see of the tokens that count, (L, T, D), and the task."""
    seen, found = [], []
    hooks = [block.router.register_forward_hook(lambda _, args, __: seen.append(args[0])) for block in model.blocks]
    collate = Collator(routing=True)
    for sample in tqdm(sorted(samples, key=lambda sample: len(sample["input_ids"])), desc="hidden states"):
        batch = collate([sample])
        seen.clear()
        model.model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
        counted = batch["routing_mask"][0].bool()
        found.append((torch.stack([x[counted.to(x.device)].cpu() for x in seen]), sample["task"]))
    for hook in hooks:
        hook.remove()
    return found


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
    sampler = LengthGroupedSampler([x.shape[1] for x, _ in train], 8, seed)
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


def accuracy(weight: torch.Tensor, held_out) -> dict[str, float]:
    """Routing accuracy by task, and their mean."""
    probs = torch.cat([mean_probs(weight, x) for x, _ in held_out])
    tasks = torch.tensor([task for _, task in held_out])
    hits = routing_hits(probs, tasks).float()
    found = {name: hits[tasks == i].mean().item() for i, name in enumerate(TASKS)}
    return {**found, "mean": sum(found.values()) / len(TASKS)}


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, BenchmarkArguments)
    random.seed(args.seed)
    model, tokenizer = load_run(args.moe_dir)
    model.to(device())
    encoder = Encoder(tokenizer, 300)
    records = {"train": [], "unseen": [], "test": []}
    for task in TASKS:
        rows = trainable_rows(task, read_rows(task, "train", args.data_source))
        trained = draw(rows, args.num_samples, args.seed)
        seen = {row["id"] for row in trained}
        unseen = answer_records(task, [row for row in rows if row["id"] not in seen])
        records["train"] += answer_records(task, trained)
        records["unseen"] += draw(unseen, args.num_held_out, args.seed)
        records["test"] += spread(answer_records(task, read_rows(task, "test", args.data_source)), args.num_held_out)
    inputs = {name: router_inputs(model, encoder.encode_all(found)[0]) for name, found in records.items()}
    results = {}
    for rate in map(float, args.rates.split(",")):
        weight = train_routers(inputs["train"], rate, model.config.initializer_range, args.seed)
        results[rate] = {name: accuracy(weight, inputs[name]) for name in ("test", "unseen")}
        for name, found in results[rate].items():
            print(f"{rate:g} {name}: " + ", ".join(f"{task} {value:.3f}" for task, value in found.items()))
    print(json.dumps({"samples": {name: len(found) for name, found in inputs.items()}, "routing_accuracy": results}))


if __name__ == "__main__":
    main()
