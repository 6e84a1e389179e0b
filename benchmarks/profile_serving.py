"""Where vLLM's time goes with 64 requests at a time: the dense base, the export that holds it once, Mixtral's form.

    python benchmarks/profile_serving.py --cross_task RUN --vllm PATH     into benchmarks/results/profile_serving.json

PATH: the vllm command, in an environment of its own. Each form is served in turn. 64 requests of 64 prompt and 64 new
tokens are answered three times: not counted, timed, and under vLLM's torch profiler. A kind's seconds are what its
operations took themselves in the third, in the process that runs the model.
"""

import asyncio
import gzip
import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import openai

import cli
from benchmarks.bench_serving import (
    FORMS,
    ask,
    check_vllm,
    export_forms,
    random_prompts,
    serve_by_vllm,
    stop,
    vllm_versions,
)
from cli import flag
from config import RESULTS_DIR, ROOT, UserError
from models import base
from workspace.files import write_json
from workspace.run_dir import environment, find_run

KEPT = ROOT / "benchmarks" / "results" / "profile_serving.json"
REQUESTS = 64
FFN, LOW_RANK, OTHER, ATTENTION, ELSE = (
    "products with FFN weights",
    "low-rank products",  # the router's among them
    "other products",
    "attention",
    "all else",
)
KINDS = (FFN, LOW_RANK, OTHER, ATTENTION, ELSE)


@dataclass
class ProfileArguments:
    cross_task: str | None = flag(None, "the fused run: a name under results/outputs, or its folder")
    vllm: str = flag("vllm", "the vllm command")
    dtype: str = flag("float32", "of the checkpoints", choices=["float32", "bfloat16"])
    results_dir: str = flag(str(RESULTS_DIR), "the folder that the run is read from (default: results)")

    def __post_init__(self):
        if not self.cross_task:
            raise UserError("--cross_task: name the fused run to serve")
        check_vllm(self.vllm)


def kind(name: str, shapes: list, intermediate: int, hidden: int) -> str:
    """What an operation of vLLM's CPU build does. In the FFN of the shared form only low-rank products are PyTorch's;
    the base's layers and Mixtral's experts are vLLM's own operations."""
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    if "fused_moe" in name:
        return FFN
    if "onednn_mm" in name:
        return FFN if sizes & {intermediate, 2 * intermediate} else OTHER
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return LOW_RANK if sizes & {intermediate, 2 * intermediate, hidden} else OTHER
    return ATTENTION if "attention_with_kv_cache" in name else ELSE


def seconds_by_kind(events: Iterable[dict], intermediate: int, hidden: int) -> tuple[dict[str, float], int]:
    """(seconds of each kind, operations) of a trace, less what operations within an operation took."""
    operations = [event for event in events if event.get("ph") == "X" and event.get("cat") == "cpu_op"]
    operations.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    seconds, around = dict.fromkeys(KINDS, 0.0), []
    for event in operations:
        while around and (around[-1][0] != event["tid"] or around[-1][1] <= event["ts"]):
            around.pop()
        if around:
            seconds[around[-1][2]] -= event["dur"] / 1e6
        what = kind(event["name"], event.get("args", {}).get("Input Dims", []), intermediate, hidden)
        seconds[what] += event["dur"] / 1e6
        around.append((event["tid"], event["ts"] + event["dur"], what))
    return seconds, len(operations)


def profiled(command: str, folder: Path, form: str, dtype: str) -> dict:
    """A form's tokens per second, and its seconds by kind."""
    traces = folder.with_suffix(".traces")
    settings = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_record_shapes": True}
    settings |= {"torch_profiler_with_stack": False, "ignore_frontend": True}
    more = "--dtype", dtype, "--profiler-config", json.dumps(settings)
    server, address = serve_by_vllm(command, folder, form == "shared", *more)
    config = base.load_config(str(folder))

    def post(what: str) -> None:
        urllib.request.urlopen(f"{address.removesuffix('/v1')}/{what}", data=b"").close()

    async def answer(seed: int) -> float:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=None) as client:
            prompts = random_prompts(REQUESTS, config.vocab_size, seed)
            return (await ask(client, str(folder), prompts, REQUESTS))["tokens_per_s"]

    try:
        asyncio.run(answer(0))
        speed = asyncio.run(answer(1))
        post("start_profile")
        asyncio.run(answer(2))
        post("stop_profile")
    finally:
        stop(server)
    (trace,) = traces.glob("*rank0*.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    seconds, count = seconds_by_kind(events, config.intermediate_size, config.hidden_size)
    return {"tokens_per_s": speed, "profiled_s": seconds, "operations": count}


def table(figures: dict[str, dict]) -> str:
    """The figures as docs/serving.md has them."""
    heads = ["form", "tokens/s", *(f"{name}, s" for name in KINDS), "together, s"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for form, one in figures.items():
        seconds = [one["profiled_s"][name] for name in KINDS]
        cells = [form, f"{one['tokens_per_s']:.0f}", *(f"{value:.1f}" for value in (*seconds, sum(seconds)))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ProfileArguments)
    run = find_run(args.cross_task, Path(args.results_dir) / "outputs")
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for form, folder in export_forms(run, Path(temporary), list(FORMS), args.dtype).items():
            figures[form] = profiled(args.vllm, folder, form, args.dtype)
            print(table(figures), flush=True)
    made = {"dtype": args.dtype, "made_by": environment(), "vllm": vllm_versions(args.vllm)}
    write_json(KEPT, {**made, "requests": REQUESTS, "results": figures})


if __name__ == "__main__":
    main()
