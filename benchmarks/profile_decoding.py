"""Where the time of a decoded token goes: the dense base and ours, by kind of operation.

    python benchmarks/profile_decoding.py --base_model smollm2 --batches 1,8,64

Each form runs in a process of its own. A step's milliseconds are measured without the profiler; the operations of some
more steps are then counted and timed by torch.profiler, which slows each of them a little. The figures go to
benchmarks/results/decoding_profile.json.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.profiler import ProfilerActivity, profile, schedule

import cli
from benchmarks.whole_model import in_own_process, make_fusion, random_ids
from cli import flag
from config import ROOT, TASKS
from models import base
from models.loading import device, load_run
from workspace.files import read_json, write_json
from workspace.run_dir import environment

FORMS = ("dense base", "ours")
KEPT = ROOT / "benchmarks" / "results" / "decoding_profile.json"
RANK, PROMPT_TOKENS, WARMUP_STEPS, PROFILED_STEPS = 8, 64, 4, 16
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear")
KINDS = ("products with the base's weights", "low-rank products and the router's", "attention", "joining", "all else")


@dataclass
class ProfileArguments:
    base_model: str = flag("smollm2", "hub id, folder, or the name of an embedded model")
    dtype: str = flag("auto", "auto, float32, bfloat16 or float16")
    batches: str = flag("1,8,64", "tokens decoded at a time, with commas")
    steps: int = flag(48, "steps of which the median is taken")


def kind(name: str, shapes: list, narrow: set[int]) -> str:
    """What an operation does. narrow: the sizes that only the mixture's own products have."""
    if name in PRODUCTS or "gemm" in name:
        sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
        return KINDS[1] if sizes & narrow else KINDS[0]
    if name == "aten::cat":  # the cache's growth, which takes longer under the profiler
        return KINDS[3]
    return KINDS[2] if "attention" in name else KINDS[4]


def measure(form: str, folder: Path, base_model: str, dtype: str, batches: list[int], steps: int) -> dict:
    """Of each batch: ms of a step, operations in it, and profiled ms of each kind."""
    torch.manual_seed(0)
    model, _ = load_run(folder / "moe" if form == "ours" else None, base_model, dtype)
    model.to(device()).eval()
    columns = len(TASKS) * RANK
    figures = {}
    for batch in batches:
        prompt = random_ids(model, batch, PROMPT_TOKENS)
        with torch.inference_mode():
            cache = model(input_ids=prompt, use_cache=True).past_key_values
            token = prompt[:, -1:]
            taken = []
            for _ in range(steps + 4):
                started = time.perf_counter()
                model(input_ids=token, past_key_values=cache, use_cache=True)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
            counted = schedule(wait=0, warmup=WARMUP_STEPS, active=PROFILED_STEPS, repeat=1)
            with profile(activities=[ProfilerActivity.CPU], schedule=counted, record_shapes=True) as profiled:
                for _ in range(WARMUP_STEPS + PROFILED_STEPS):
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                    profiled.step()
        milliseconds, count = dict.fromkeys(KINDS, 0.0), 0
        of_operation: dict[str, float] = {}
        for event in profiled.key_averages(group_by_input_shape=True):
            if event.key.startswith("ProfilerStep"):
                continue
            took = event.self_cpu_time_total / 1000 / PROFILED_STEPS
            milliseconds[kind(event.key, event.input_shapes, {columns, 2 * columns, len(TASKS)})] += took
            of_operation[event.key] = of_operation.get(event.key, 0.0) + took
            count += event.count
        figures[str(batch)] = {
            "step_ms": 1000 * statistics.median(taken[4:]),
            "operations": round(count / PROFILED_STEPS),
            "profiled_ms": milliseconds,
            "longest_ms": dict(sorted(of_operation.items(), key=lambda pair: -pair[1])[:12]),
        }
    return figures


def table(figures: dict) -> str:
    """The figures of one dtype, as docs/performance.md has them."""
    heads = ["tokens at a time", "form", "ms a step", "operations", *KINDS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for batch in figures[FORMS[0]]:
        for form in FORMS:
            one = figures[form][batch]
            cells = [batch, form, f"{one['step_ms']:.1f}", str(one["operations"])]
            cells += [f"{one['profiled_ms'][name]:.1f}" for name in KINDS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ProfileArguments)
    batches = [int(batch) for batch in args.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        make_fusion(Path(folder), args.base_model)
        given = Path(folder), args.base_model, args.dtype, batches, args.steps
        figures = {form: in_own_process(measure, form, *given) for form in FORMS}
    print(table(figures))
    kept = read_json(KEPT) if KEPT.exists() else {}
    made = {"made_by": environment(), "threads": torch.get_num_threads(), "results": figures}
    write_json(KEPT, {**kept, base.dtype_name(args.dtype): made})


if __name__ == "__main__":
    main()
