"""How fast a router must learn: routers alone, by the gating loss, on a fused model's frozen hidden states.

    python benchmarks/router_learning_rate.py --moe_dir models/moe --data_source sample

Two epochs, batch 8, AdamW with linear decay, as in the alignment of the fusion. Prints held-out routing accuracy per
task for each learning rate and, last, one line of JSON. This is where the default of --router_learning_rate is from.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

import config
from config import TASKS, flag
from data.encoding import Collator, Encoder, LengthGroupedSampler
from data.sources import answer_records, draw, read_rows, spread, trainable_rows
from models.loading import device, load_run
from models.losses import gate_loss, routing_hits


@dataclass
class BenchmarkArguments:
    moe_dir: str = flag(str(config.MOE_DIR), "the fused model")
    data_source: str = flag("sample", "sample, hub or a folder")
    num_samples: int = flag(160, "training samples per task (60 held-out ones are scored)")
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


def train_routers(train, held_out, rate: float, std: float, seed: int) -> dict[str, float]:
    """Held-out routing accuracy by task after two epochs."""
    layers, _, width = train[0][0].shape
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(layers, len(TASKS), width, generator=generator) * std).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    steps = 2 * -(-len(train) // 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    sampler = LengthGroupedSampler([x.shape[1] for x, _ in train], 8, seed)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), 8):
            batch = [train[i] for i in order[start : start + 8]]
            probs = torch.cat([mean_probs(weight, x) for x, _ in batch])
            optimizer.zero_grad()
            gate_loss(probs, torch.tensor([task for _, task in batch])).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        probs = torch.cat([mean_probs(weight, x) for x, _ in held_out])
    tasks = torch.tensor([task for _, task in held_out])
    hits = routing_hits(probs, tasks).float()
    return {name: hits[tasks == i].mean().item() for i, name in enumerate(TASKS)}


@config.command
def main(argv: list[str] | None = None) -> None:
    (args,) = config.parse(argv, BenchmarkArguments)
    random.seed(args.seed)
    model, tokenizer = load_run(args.moe_dir)
    model.to(device())
    encoder, inputs = Encoder(tokenizer, 300), {}
    for split in ("train", "test"):
        samples = []
        for task in TASKS:
            records = answer_records(task, trainable_rows(task, read_rows(task, split, args.data_source)))
            few = draw(records, args.num_samples, args.seed) if split == "train" else spread(records, 60)
            samples += encoder.encode_all(few)[0]
        inputs[split] = router_inputs(model, samples)
    results = {}
    for rate in map(float, args.rates.split(",")):
        found = train_routers(inputs["train"], inputs["test"], rate, model.config.initializer_range, args.seed)
        results[rate] = {**found, "mean": sum(found.values()) / len(TASKS)}
        print(f"{rate:g}: " + ", ".join(f"{name} {value:.3f}" for name, value in results[rate].items()))
    print(json.dumps({"held_out": len(inputs["test"]), "train": len(inputs["train"]), "routing_accuracy": results}))


if __name__ == "__main__":
    main()
