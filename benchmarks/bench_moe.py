"""What the mixture costs beside its limit, one dense FFN, and beside other ways to compute it.

    python benchmarks/bench_moe.py              one FFN layer: forward, and forward + backward
    python benchmarks/bench_moe.py --model 1    the whole model: training, prefill, decoding, answers per minute
    python benchmarks/bench_moe.py --model 1 --random_init Llama-2-7B    the same of random weights, for a GPU
    python benchmarks/bench_moe.py --quick 1    seconds instead of minutes: does it run at all

Same weights and inputs for all forms, in one process, in turn; fresh inputs in every repeat; first all outputs are
compared. The base is frozen; gradients reach the input and the routing weights, and in the low-rank forms the experts.
A forward alone has the low-rank experts in the base's dtype, as load_run brings them; with a backward they are fp32.
Prints a table, keeps benchmarks/results/<device>.json, and prints that as one line of JSON last.
"""

import copy
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import cli
import config
from benchmarks import whole_model
from cli import flag
from config import ROOT, UserError
from models.expert_ffn import ACTIVATIONS, PROJECTIONS, LowRankExperts
from models.loading import device
from models.router import route
from workspace.files import read_json, write_json
from workspace.run_dir import environment

SHAPES = {"SmolLM2-135M": (576, 1536), "Llama-2-7B": (4096, 11008), "tiny": (64, 160)}  # D, F
NUM_EXPERTS, RANK = 3, 8
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # relative error of an output against fp32
BARS = {  # shape, tokens, pass: the largest ratio to the dense FFN we accept, at top-2 in bfloat16
    "cpu": {
        ("Llama-2-7B", 512, "forward"): 1.15,
        ("Llama-2-7B", 512, "forward + backward"): 1.30,
        ("Llama-2-7B", 1, "forward"): 1.15,
        ("Llama-2-7B", 8, "forward"): 1.15,
        ("SmolLM2-135M", 512, "forward"): 1.6,
    },
    "cuda": {("Llama-2-7B", 4096, "forward"): 1.10, ("Llama-2-7B", 4096, "forward + backward"): 1.20},
}
BATCHED_MM_LIMIT_BYTES = 4e9  # batched_mm copies every chosen expert's weights once per token


@dataclass
class BenchmarkArguments:
    model: int = flag(0, "1: the whole model instead of one FFN", choices=[0, 1])
    quick: int = flag(0, "1: tiny sizes, no figures to quote", choices=[0, 1])
    shapes: str = flag("SmolLM2-135M,Llama-2-7B", f"of one FFN, with commas: {', '.join(SHAPES)}")
    top_k: str = flag("1,2,3", "experts per token, with commas")
    tokens: str | None = flag(None, "with commas (default: 1,8,512; on a GPU also 4096,16384)")
    repeats: int = flag(15, "timed repeats, after two that are not")
    dtype: str = flag("bfloat16", "of base and inputs", choices=["bfloat16", "float32"])
    activation: str = flag("silu", "of the FFN's gate", choices=list(ACTIVATIONS))
    base_model: str = flag(config.EMBEDDED_MODEL, "with --model 1: the base")
    random_init: str | None = flag(
        None,
        "with --model 1: a randomly initialised model of this shape instead",
        choices=list(whole_model.RANDOM_SHAPES),
    )


class Layer(nn.Module):
    """One FFN in every form: base + low-rank experts, and the same experts merged into dense copies."""

    def __init__(self, hidden_size: int, width: int, dtype: torch.dtype, activation: str = "silu"):
        super().__init__()
        sizes = {"gate_proj": (hidden_size, width), "up_proj": (hidden_size, width), "down_proj": (width, hidden_size)}
        self.base = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.experts = LowRankExperts(hidden_size, width, NUM_EXPERTS, RANK, activation)
        for matrix in self.experts.parameters():
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5 * 0.3)
        self.experts.scaling.fill_(0.5)
        self.trained = self.experts  # fp32, cast in every forward; and as load_run brings them for inference:
        self.loaded = copy.deepcopy(self.experts)
        self.loaded.fold_scaling(dtype)
        self.base.to(dtype).requires_grad_(False)
        self.activated = ACTIVATIONS[activation].value
        sizes = dict(hidden_size=hidden_size, intermediate_size=width, num_local_experts=NUM_EXPERTS)
        settings = MixtralConfig(**sizes, hidden_act=activation)
        self.mixtral = MixtralExperts(settings).to(dtype).requires_grad_(False)
        self.use(self.trained)
        with torch.no_grad():
            for i in range(NUM_EXPERTS):
                gate, up, down = (self.experts.merged(i, name, self.base[name].weight) for name in PROJECTIONS)
                self.mixtral.gate_up_proj[i] = torch.cat((gate, up))
                self.mixtral.down_proj[i] = down

    def use(self, experts: LowRankExperts) -> None:
        """Compute with these low-rank experts from now on."""
        self.experts, self.scaling = experts, experts.scaling.max().item()


def dense(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The limit: the base FFN alone, without experts."""
    return layer.base["down_proj"](layer.activated(layer.base["gate_proj"](x)) * layer.base["up_proj"](x))


def ours(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return layer.experts(x, index, weights, *(layer.base[name] for name in PROJECTIONS))


def expert_loop(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As the released code has it: dense experts one by one, each on the tokens that chose it."""
    y = torch.zeros_like(x)
    for i in range(NUM_EXPERTS):
        token, slot = (index == i).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], layer.mixtral.gate_up_proj[i]).chunk(2, dim=-1)
        part = F.linear(layer.activated(gate) * up, layer.mixtral.down_proj[i]) * weights[token, slot, None]
        y.index_add_(0, token, part.to(y.dtype))
    return y


def mixlora_sharing(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As MixLoRA shares (https://arxiv.org/abs/2404.15159): W_g x and W_u x once, W_d for every chosen expert."""
    gate, up, y = layer.base["gate_proj"](x), layer.base["up_proj"](x), torch.zeros_like(x)

    def low_rank(name: str, i: int, z: Tensor) -> Tensor:
        a, b = (matrix[i].to(z.dtype) for matrix in layer.experts.matrices(name))
        return z @ a.T @ b.T * layer.scaling

    for i in range(NUM_EXPERTS):
        token, slot = (index == i).nonzero(as_tuple=True)
        hidden = layer.activated(gate[token] + low_rank("gate_proj", i, x[token]))
        hidden = hidden * (up[token] + low_rank("up_proj", i, x[token]))
        part = (layer.base["down_proj"](hidden) + low_rank("down_proj", i, hidden)) * weights[token, slot, None]
        y = y.index_add(0, token, part.to(y.dtype))
    return y


def mixtral_experts(backend: str) -> Callable:
    """transformers' own form with one of its backends."""

    def forward(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layer.mixtral.config._experts_implementation = backend
        return layer.mixtral(x, index, weights.to(x.dtype))

    return forward


def forms(compiled: bool) -> dict[str, Callable]:
    """Every form by name; the limit and ours by torch.compile as well."""
    by_name = {"dense": dense, "ours": ours}
    if compiled:
        torch.compiler.reset()
        by_name |= {f"{name}, compiled": torch.compile(form, dynamic=False) for name, form in by_name.items()}
    backends = {f"Mixtral {name}": mixtral_experts(name) for name in ("eager", "batched_mm", "grouped_mm")}
    return by_name | {"expert loop": expert_loop, "MixLoRA": mixlora_sharing, **backends}


def inputs(tokens: int, hidden_size: int, top_k: int, dtype: torch.dtype, target) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh x (N, D), top_k_index and top_k_weights (N, K) of random logits."""
    choice = route(torch.randn(tokens, NUM_EXPERTS, device=target), top_k)
    return torch.randn(tokens, hidden_size, device=target, dtype=dtype), *choice


def left_out(usable: dict[str, Callable], layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, str]:
    """Those of the forms that cannot be timed and why; UserError if one computes something else."""
    dtype = str(x.dtype).removeprefix("torch.")
    routing_weights = torch.zeros(len(x), NUM_EXPERTS, device=x.device).scatter(1, index, weights)
    merged = [layer.mixtral.gate_up_proj.float(), layer.mixtral.down_proj.float()]
    exact = 0
    for i in range(NUM_EXPERTS):
        gate, up = F.linear(x.float(), merged[0][i]).chunk(2, dim=-1)
        exact = exact + routing_weights[:, i, None] * F.linear(layer.activated(gate) * up, merged[1][i])
    out = {}
    for name, form in usable.items():
        copies = index.numel() * sum(w[0].numel() for w in layer.mixtral.parameters()) * x.element_size()
        if "batched_mm" in name and copies > BATCHED_MM_LIMIT_BYTES:
            out[name] = f"would copy {copies / 1e9:.0f} GB of weights"
            continue
        try:
            y = form(layer, x.clone().requires_grad_(), index, weights.clone().requires_grad_())
            y.sum().backward()
        except (RuntimeError, NotImplementedError, ImportError) as error:
            out[name] = " ".join(str(error).split())[:80]
            continue
        error = float((y.detach().float() - exact).norm() / exact.norm())
        if not name.startswith("dense") and not error < TOLERANCES[dtype]:
            raise UserError(f"{name} is not the mixture: relative error {error:.1e}; nothing was timed")
    return out


def timed(form: Callable, layer: Layer, x: Tensor, index: Tensor, weights: Tensor, grad_y: Tensor | None) -> float:
    """Milliseconds of one forward, or with grad_y of forward + backward."""
    x, weights = (tensor.clone().requires_grad_(grad_y is not None) for tensor in (x, weights))
    synchronise = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    synchronise()
    start = time.perf_counter()
    with torch.set_grad_enabled(grad_y is not None):
        y = form(layer, x, index, weights)
        if grad_y is not None:
            y.backward(grad_y)
    synchronise()
    return (time.perf_counter() - start) * 1e3


def compare(layer: Layer, tokens: int, top_k: int, args: BenchmarkArguments, target) -> list[dict]:
    """Time every form in turn; one row per form and pass: median and quartiles in ms, and ratio to the dense FFN."""
    dtype, hidden_size = getattr(torch, args.dtype), layer.base["gate_proj"].in_features
    usable = forms(compiled=not args.quick)
    absent = left_out(usable, layer, *inputs(tokens, hidden_size, top_k, dtype, target))
    rows = [{"form": name, "not_timed": reason} for name, reason in absent.items()]
    usable = {name: form for name, form in usable.items() if name not in absent}
    for backward in (False, True):
        layer.use(layer.trained if backward else layer.loaded)
        seconds = {name: [] for name in usable}
        for repeat in range(args.repeats + 2):
            x, *choice = inputs(tokens, hidden_size, top_k, dtype, target)
            grad_y = torch.randn_like(x) if backward else None
            for name, form in usable.items():
                layer.zero_grad(set_to_none=True)
                took = timed(form, layer, x, *choice, grad_y)
                if repeat >= 2:
                    seconds[name].append(took)
        middle = {
            name: torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])) for name, values in seconds.items()
        }
        for name, (low, median, high) in middle.items():
            rows.append(
                {
                    "form": name,
                    "pass": "forward + backward" if backward else "forward",
                    "ms": round(float(median), 4),
                    "ms_quartiles": [round(float(low), 4), round(float(high), 4)],
                    "ratio": round(float(median / middle["dense"][1]), 3),
                }
            )
    return rows


def bench_ffn(args: BenchmarkArguments) -> list[dict]:
    target = device()
    tokens = args.tokens or ("1,8,512,4096,16384" if target.type == "cuda" else "1,8,512")
    rows = []
    for shape in args.shapes.split(","):
        if shape not in SHAPES:
            raise UserError(f"--shapes {shape}: must be of {', '.join(SHAPES)}")
        torch.manual_seed(0)
        layer = Layer(*SHAPES[shape], getattr(torch, args.dtype), args.activation).to(target)
        for top_k in map(int, args.top_k.split(",")):
            for count in map(int, tokens.split(",")):
                timed = [
                    {"shape": shape, "top_k": top_k, "tokens": count, **row}
                    for row in compare(layer, count, top_k, args, target)
                ]
                print_rows(timed)
                rows += timed
    for top_k in map(int, args.top_k.split(",")):
        print("", *markdown(rows, top_k), sep="\n")
    print()
    print_bars(rows)
    return rows


def print_rows(rows: list[dict]) -> None:
    """One line per form: median and quartiles in ms, ratio to the dense FFN, of both passes."""
    print(f"\n{rows[0]['shape']}, top-{rows[0]['top_k']} of {NUM_EXPERTS}, {rows[0]['tokens']} tokens")
    for row in rows:
        if "not_timed" in row:
            print(f"  {row['form']:<20} {'':<20} not timed: {row['not_timed']}")
        else:
            low, high = row["ms_quartiles"]
            print(
                f"  {row['form']:<20} {row['pass']:<20} {row['ms']:>10.2f} ms [{low:.2f}, {high:.2f}] "
                f"{row['ratio']:>7.2f} x dense"
            )


def print_bars(rows: list[dict]) -> None:
    """Our ratios against each bar, and how much faster than the best backend of MixtralExperts."""
    timed_rows = [row for row in rows if row["top_k"] == 2 and "ms" in row]
    for (shape, tokens, kind), limit in BARS[device().type].items():
        row_of_form = {
            row["form"]: row
            for row in timed_rows
            if (row["shape"], row["tokens"], row["pass"]) == (shape, tokens, kind)
        }
        for form in ("ours", "ours, compiled"):
            if form in row_of_form:
                ratio = row_of_form[form]["ratio"]
                best = (
                    min(row["ms"] for name, row in row_of_form.items() if name.startswith("Mixtral"))
                    / row_of_form[form]["ms"]
                )
                print(
                    f"{shape}, {tokens} tokens, {kind}, {form}: {ratio:.2f} x dense (bar {limit:.2f}: "
                    f"{'met' if ratio <= limit else 'missed'}), {best:.2f} x faster than MixtralExperts"
                )


def markdown(rows: list[dict], top_k: int) -> list[str]:
    """The lines of a table of one top-k: milliseconds of the dense FFN, and every other form as a multiple of them."""
    columns = ("ours", "ours, compiled", "expert loop", "MixLoRA")
    lines = [
        f"| one FFN, top-{top_k} of {NUM_EXPERTS} | pass | dense, ms | {' | '.join(columns)} | best of Mixtral |",
        "| --- | --- |" + " --- |" * (len(columns) + 2),
    ]
    groups = {}
    for row in rows:
        if row["top_k"] == top_k and "ms" in row:
            groups.setdefault((row["shape"], row["tokens"], row["pass"]), {})[row["form"]] = row
    for (shape, tokens, kind), row_of_form in groups.items():
        best = min(row["ratio"] for form, row in row_of_form.items() if form.startswith("Mixtral"))
        cells = [f"{row_of_form[form]['ratio']:.2f}" if form in row_of_form else "–" for form in columns]
        lines.append(
            f"| {shape}, {tokens} token{'s' * (tokens > 1)} | {kind} | {row_of_form['dense']['ms']:.1f} | "
            f"{' | '.join(cells)} | {best:.2f} |"
        )
    return lines


def keep(part: str, figures: dict | list, args: BenchmarkArguments) -> dict:
    """Write one part into benchmarks/results/<device>.json beside the other."""
    made_by = environment()
    name = re.sub(r"[^a-z0-9]+", "-", made_by["device"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = {"arguments": vars(args), "threads": torch.get_num_threads(), "made_by": made_by, "results": figures}
    if not args.quick:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**(read_json(path) if path.exists() else {}), part: result})
        print(f"\n{path}")
    return {part: result}


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, BenchmarkArguments)
    if args.quick:
        args.shapes, args.top_k, args.tokens, args.repeats = "tiny", "2", "1,8", 2
    if args.model and args.random_init:
        figures = whole_model.bench_random(args.random_init, bool(args.quick))
        result = keep(f"random {args.random_init}", figures, args)
    elif args.model:
        result = keep("model", whole_model.bench_model(args.base_model, bool(args.quick)), args)
    else:
        part = "ffn" if args.activation == "silu" else f"ffn, {args.activation}"
        result = keep(part, bench_ffn(args), args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
