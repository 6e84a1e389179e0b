"""How the cost of a mixture grows with its experts and their rank: one FFN, and a training step of a whole model.

    python benchmarks/growth.py               into benchmarks/results/growth.json and docs/figures/growth.svg
    python benchmarks/growth.py --quick 1     seconds instead of minutes: does it run at all
    python benchmarks/growth.py --draw 1      the picture again, from the kept figures

Every ratio is to the same dense FFN, or to LoRA of that rank on the same base, timed in turn with it. Top-2; random
weights. The last line is the figures as JSON.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import cli
from benchmarks import whole_model
from cli import flag
from config import ROOT
from models import base
from models.expert_ffn import PROJECTIONS, LowRankExperts
from models.loading import device
from models.mixture import MixtureConfig, mixture_class
from models.router import route
from workspace.files import read_json, write_json
from workspace.run_dir import environment

KEPT, PICTURE = ROOT / "benchmarks" / "results" / "growth.json", ROOT / "docs" / "figures" / "growth.svg"
NUMBERS, RANKS = (2, 3, 4, 8, 16), (4, 8, 16, 32, 64)  # of experts, at rank 8; ranks, of three experts
RANK, NUM_EXPERTS, TOP_K = 8, 3, 2
FFN = (4096, 11008)  # D, F: Llama-2-7B's
MODEL = dict(  # SmolLM2-135M's shape
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
QUICK_MODEL = MODEL | dict(hidden_size=36, intermediate_size=48, num_hidden_layers=2, vocab_size=64)


@dataclass
class GrowthArguments:
    quick: int = flag(0, "1: tiny sizes, no figures to quote", choices=[0, 1])
    draw: int = flag(0, "1: only draw what was kept", choices=[0, 1])
    tokens: int = flag(512, "of the FFN")
    batch: str = flag("4x128", "samples x tokens of a training step")
    repeats: int = flag(5, "timed repeats, after one that is not")


def points() -> list[tuple[int, int]]:
    """(experts, rank) of every measurement."""
    return list(dict.fromkeys([*((n, RANK) for n in NUMBERS), *((NUM_EXPERTS, r) for r in RANKS)]))


def measure_ffn(number: int, rank: int, sizes: tuple[int, int], args: GrowthArguments) -> dict:
    """Ratios of a mixture's FFN to the dense one, forward and forward + backward."""
    dtype, (hidden, width) = base.pick_dtype("auto"), sizes
    dense = nn.ModuleDict(
        {name: nn.Linear(*(sizes if name != "down_proj" else sizes[::-1]), bias=False) for name in PROJECTIONS}
    )
    dense.to(device(), dtype).requires_grad_(False)
    experts = LowRankExperts(hidden, width, number, rank).to(device())
    for matrix in experts.parameters():
        nn.init.normal_(matrix, std=0.3 * matrix.shape[-1] ** -0.5)
    x = torch.randn(args.tokens, hidden, device=device(), dtype=dtype, requires_grad=True)
    choice = route(torch.randn(args.tokens, number, device=device()), TOP_K)
    grad = torch.randn_like(x)

    def of_base():
        return dense["down_proj"](nn.functional.silu(dense["gate_proj"](x)) * dense["up_proj"](x))

    def of_mixture():
        return experts(x, *choice, *(dense[name] for name in PROJECTIONS))

    def backward(form: Callable) -> Callable:
        return lambda: form().backward(grad)

    with torch.no_grad():
        base_forward, forward = whole_model.seconds_in_turn([of_base, of_mixture], args.repeats)
    base_both, both = whole_model.seconds_in_turn([backward(of_base), backward(of_mixture)], args.repeats)
    return {"ffn_forward": forward / base_forward, "ffn_forward_backward": both / base_both}


def measure_step(number: int, rank: int, shape: dict, args: GrowthArguments) -> dict:
    """Ratio of a fusion's training step to that of LoRA of its rank on the same base, and the seconds of both."""
    torch.manual_seed(0)
    mixture = MixtureConfig([{"name": str(i), "task": None} for i in range(number)], rank, TOP_K, "", {})
    fused = mixture_class(LlamaForCausalLM)(LlamaConfig(**shape))
    fused.become(mixture)
    fused.seal_base()
    lora = LoraConfig(r=rank, target_modules=list(PROJECTIONS))
    models = [get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), lora), fused]
    samples, tokens = map(int, args.batch.split("x"))
    ids = torch.randint(shape["vocab_size"], (samples, tokens), device=device())

    def step(model: nn.Module) -> Callable:
        model.to(device()).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run():
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    of_lora, of_fusion = whole_model.seconds_in_turn([step(model) for model in models], args.repeats)
    return {"step": of_fusion / of_lora, "step_s": of_fusion, "lora_step_s": of_lora}


def draw(kept: dict) -> None:
    """The ratios over the number of experts and over their rank."""
    plt.rcParams["svg.hashsalt"] = "h3fusion"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    lines = {
        "ffn_forward": "FFN, forward / dense FFN",
        "ffn_forward_backward": "FFN, forward + backward / dense FFN",
        "step": "training step / LoRA of that rank",
    }
    panels = (
        ("experts", f"experts of rank {RANK}", [row for row in kept["results"] if row["rank"] == RANK]),
        ("rank", f"rank of {NUM_EXPERTS} experts", [row for row in kept["results"] if row["experts"] == NUM_EXPERTS]),
    )
    for axis, (key, label, rows) in zip(axes, panels, strict=True):
        rows = sorted(rows, key=lambda row: row[key])
        for name, text in lines.items():
            axis.plot([row[key] for row in rows], [row[name] for row in rows], "o-", label=text)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row[key] for row in rows], [str(row[key]) for row in rows])
        axis.set_xlabel(label)
        axis.axhline(1, color="#888888", linewidth=0.8)
    axes[0].set_ylim(bottom=0)  # of both, once both have their lines
    axes[0].set_ylabel("times as long")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(PICTURE, metadata={"Date": None})


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, GrowthArguments)
    if args.draw:
        draw(read_json(KEPT))
        print(PICTURE)
        return
    sizes, shape = (FFN, MODEL) if not args.quick else ((36, 48), QUICK_MODEL)
    if args.quick:
        args.tokens, args.batch, args.repeats = 8, "2x16", 1
    rows = []
    for number, rank in points():
        row = {"experts": number, "rank": rank}
        row |= measure_ffn(number, rank, sizes, args) | measure_step(number, rank, shape, args)
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()))
        rows.append(row)
    kept = {"arguments": vars(args), "made_by": environment(), "results": rows}
    if not args.quick:
        write_json(KEPT, kept)
        draw(kept)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
