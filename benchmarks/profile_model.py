"""Where the time of a decoded token and of a training step goes: the dense base and ours, by kind of operation.

    python benchmarks/profile_model.py --part decoding
    python benchmarks/profile_model.py --part training

Each form runs in a process of its own. A step's milliseconds are measured without the profiler; the operations of some
more steps are then counted and timed by torch.profiler, which slows each of them a little. In training both forms have
LoRA of rank 8 on the FFN, ours with three experts. The figures go to benchmarks/results/profile.json.
"""

import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.profiler import ProfilerActivity, profile, schedule

import cli
from benchmarks.whole_model import in_own_process, make_fusion, random_ids, training_step
from cli import check, check_at_least, flag
from config import ROOT, TASKS
from models import base
from models.loading import device, load_run
from workspace.files import read_json, write_json
from workspace.run_dir import environment

FORMS = ("dense base", "ours")
KEPT = ROOT / "benchmarks" / "results" / "profile.json"
RANK, PROMPT_TOKENS = 8, 64
LOW_RANKS = {len(TASKS) * RANK, 2 * len(TASKS) * RANK, len(TASKS)}  # the sizes that only products of ours have
SIZES = {"decoding": "1,8,64", "training": "4x128,8x256"}
STEPS = {"decoding": (4, 48, 16), "training": (1, 5, 2)}  # not counted, timed, profiled
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mkldnn_linear")
ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data")
BASE, LOW_RANK, HEAD, OF_ATTENTION, JOINING, ELSE = (
    "products with the base's weights",
    "low-rank products and the router's",
    "the head and its loss",
    "attention",
    "joining",
    "all else",
)
KINDS = {
    "decoding": (BASE, LOW_RANK, OF_ATTENTION, JOINING, ELSE),
    "training": (BASE, LOW_RANK, HEAD, OF_ATTENTION, ELSE),
}


@dataclass
class ProfileArguments:
    base_model: str = flag("smollm2", "hub id, folder, or the name of an embedded model")
    dtype: str = flag("auto", "auto, float32, bfloat16 or float16")
    part: str = flag("decoding", "decoding or training")
    sizes: str | None = flag(None, "decoding: tokens at a time (1,8,64); training: samples x tokens (4x128,8x256)")
    steps: int | None = flag(None, "steps of which the median is taken (decoding 48, training 5)")


def kind(part: str, name: str, shapes: list, narrow: set[int], vocabulary: int) -> str:
    """What an operation does. narrow: the sizes that only low-rank products and the router's have."""
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    if part == "training" and vocabulary in sizes:
        return HEAD
    if name in PRODUCTS or "gemm" in name:
        return LOW_RANK if sizes & narrow else BASE
    if part == "decoding" and name == "aten::cat":  # the cache's growth, which takes longer under the profiler
        return JOINING
    return OF_ATTENTION if "attention" in name or name in ATTENTION else ELSE


def steps_of(part: str, form: str, model, size: str) -> tuple[Callable[[], None], set[int]]:
    """(one step of a part at a size, the sizes that only its low-rank products have)."""
    if part == "training":
        rows, tokens = map(int, size.split("x"))
        return training_step(form, model, (rows, tokens)), LOW_RANKS if form == "ours" else {RANK}
    prompt = random_ids(model, int(size), PROMPT_TOKENS)
    cache = model(input_ids=prompt, use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)

    return step, LOW_RANKS


def measure(part: str, form: str, folder: Path, base_model: str, dtype: str, size: str, steps: int | None) -> dict:
    """Of one form and size: ms of a step, operations in it, and profiled ms of each kind."""
    torch.manual_seed(0)
    model, _ = load_run(folder / "moe" if form == "ours" else None, base_model, dtype)
    model.to(device()).eval()
    vocabulary, (warmup_steps, timed_steps, profiled_steps) = model.config.vocab_size, STEPS[part]
    with torch.inference_mode(part == "decoding"):
        step, narrow = steps_of(part, form, model, size)
        taken = []
        for _ in range(warmup_steps + (steps or timed_steps)):
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        counted = schedule(wait=0, warmup=1, active=profiled_steps, repeat=1)
        with profile(activities=[ProfilerActivity.CPU], schedule=counted, record_shapes=True) as profiled:
            for _ in range(1 + profiled_steps):
                step()
                profiled.step()
    milliseconds, count = dict.fromkeys(KINDS[part], 0.0), 0
    of_operation: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        if event.key.startswith("ProfilerStep"):
            continue
        took = event.self_cpu_time_total / 1000 / profiled_steps
        milliseconds[kind(part, event.key, event.input_shapes, narrow, vocabulary)] += took
        of_operation[event.key] = of_operation.get(event.key, 0.0) + took
        count += event.count
    return {
        "step_ms": 1000 * statistics.median(taken[warmup_steps:]),
        "operations": round(count / profiled_steps),
        "profiled_ms": milliseconds,
        "longest_ms": dict(sorted(of_operation.items(), key=lambda pair: -pair[1])[:12]),
    }


def table(part: str, figures: dict) -> str:
    """The figures of one part and dtype, as docs/performance.md has them."""
    about = "tokens at a time" if part == "decoding" else "samples x tokens"
    heads = [about, "form", "ms a step", "operations", *KINDS[part]]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for size in figures[FORMS[0]]:
        for form in FORMS:
            one = figures[form][size]
            cells = [size, form, f"{one['step_ms']:.1f}", str(one["operations"])]
            cells += [f"{one['profiled_ms'][name]:.1f}" for name in KINDS[part]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ProfileArguments)
    check("part", args.part, args.part in KINDS, " or ".join(KINDS))
    check_at_least(1, steps=args.steps)
    sizes, one = args.sizes or SIZES[args.part], r"\d+" if args.part == "decoding" else r"\d+x\d+"
    check("sizes", sizes, re.fullmatch(f"{one}(,{one})*", sizes) is not None, f"like {SIZES[args.part]}")
    narrow = LOW_RANKS if args.part == "decoding" else LOW_RANKS | {RANK}
    for size in sizes.split(","):
        tokens = math.prod(map(int, size.split("x")))
        check("sizes", sizes, tokens not in narrow, f"of other tokens than {tokens}, a low-rank size")
    with tempfile.TemporaryDirectory() as folder:
        make_fusion(Path(folder), args.base_model)
        given = Path(folder), args.base_model, args.dtype
        figures = {
            form: {
                size: in_own_process(measure, args.part, form, *given, size, args.steps) for size in sizes.split(",")
            }
            for form in FORMS
        }
    print(table(args.part, figures))
    kept = read_json(KEPT) if KEPT.exists() else {}
    made = {"made_by": environment(), "threads": torch.get_num_threads(), "results": figures}
    kept[args.part] = {**kept.get(args.part, {}), base.dtype_name(args.dtype): made}
    write_json(KEPT, kept)


if __name__ == "__main__":
    main()
