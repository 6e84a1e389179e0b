"""Serving, side by side: the dense base, the export that holds it once, Mixtral's form; by vLLM and by this project.

    python benchmarks/bench_serving.py --cross_task RUN --vllm PATH      into benchmarks/results/serving.json
    python benchmarks/bench_serving.py --cross_task RUN --vllm "" --quick 1   seconds: does it run at all

PATH: the vllm command, in an environment of its own. Everything is bfloat16. Each form is served in turn, --rounds
times; a figure is the median of the rounds. Greedy, 64 new tokens a request. Memory: that of the engine's processes
(what they share counted once), key-value cache included. The last line is the figures as JSON.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import openai
import torch

import cli
from benchmarks import whole_model
from cli import flag
from config import RESULTS_DIR, ROOT, UserError
from models import base, export
from models.cost import peak_memory_bytes
from models.loading import device, load_run, resolve_base
from workspace.files import write_json
from workspace.run_dir import environment, find_run

KEPT = ROOT / "benchmarks" / "results" / "serving.json"
FORMS = ("dense base", "shared", "mixtral")
AT_ONCE = {1: 4, 8: 24, 64: 128}  # requests at a time: how many in all
PROMPT_TOKENS, NEW_TOKENS = 64, 64
START_S = 900  # within which a server must answer


@dataclass
class ServingArguments:
    cross_task: str | None = flag(None, "the fused run: a name under results/outputs, or its folder")
    vllm: str = flag("vllm", 'the vllm command; "" leaves vLLM out')
    forms: str = flag(",".join(FORMS), "which forms, comma-separated")
    rounds: int = flag(3, "how often each form is served")
    quick: int = flag(0, "1: few tokens and requests, no figures to quote, nothing is kept", choices=[0, 1])
    results_dir: str = flag(str(RESULTS_DIR), "the folder that the run is read from (default: results)")

    def __post_init__(self):
        if not self.cross_task:
            raise UserError("--cross_task: name the fused run to serve")
        cli.check_at_least(1, rounds=self.rounds)
        for form in self.forms.split(","):
            cli.check("forms", form, form in FORMS, f"one of {', '.join(FORMS)}")
        if self.vllm:
            check_vllm(self.vllm)


def check_vllm(command: str) -> None:
    cli.check("vllm", command, shutil.which(command) is not None, "a command: give its path")


def export_forms(run: Path, folder: Path, forms: list[str], dtype: str = "bfloat16") -> dict[str, Path]:
    """The forms as checkpoints."""
    folders = {form: folder / form.replace(" ", "_") for form in forms}
    for form, path in folders.items():
        if form == "dense base":
            base_model = resolve_base(run, None)
            base.load_base(base_model, dtype, lambda of_family: of_family).save_pretrained(path)
            base.load_tokenizer(base_model).save_pretrained(path)
        else:
            arguments = ["--cross_task", str(run), "--to", form, "--output", str(path), "--dtype", dtype]
            export.main([*arguments, "--verify", "0"])
    return folders


def bytes_of_weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def serve_by_vllm(command: str, folder: Path, shared: bool, *more: str) -> tuple[subprocess.Popen, str]:
    """(the server's process, its address) once it answers. more: flags of vLLM's."""
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), *more]
    flags += ["--max-model-len", str(2 * (PROMPT_TOKENS + NEW_TOKENS))]
    flags += ["--trust-remote-code", "--model-impl", "transformers"] if shared else []
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        settings["VLLM_CPU_KVCACHE_SPACE"] = "2"
    path = f"{Path(command).resolve().parent}:{os.environ['PATH']}" if "/" in command else os.environ["PATH"]
    log = open(folder.with_suffix(".log"), "w")  # noqa: SIM115
    server = subprocess.Popen(
        [command, "serve", str(folder), *flags],
        env={**os.environ, "PATH": path, **settings},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address, begun = f"http://127.0.0.1:{port}/v1", time.monotonic()
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    while time.monotonic() < begun + START_S and server.poll() is None:
        try:
            client.models.list()
            return server, address
        except openai.OpenAIError:
            time.sleep(1)
    stop(server)
    raise UserError(f"vLLM did not answer; the end of its log: {Path(log.name).read_text()[-1500:]}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def stop(server: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, sign)
            server.wait(30)


def memory_bytes(session: int) -> int:
    """The memory of a session's processes, what they share counted once (Linux's proportional set size)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            continue  # it has ended
    return total


async def ask(client: openai.AsyncOpenAI, model: str, prompts: list[list[int]], at_once: int) -> dict[str, float]:
    """Tokens per second over all requests, and the median seconds to a request's first token."""
    gate, first, counts = asyncio.Semaphore(at_once), [], []

    async def one(prompt: list[int]) -> None:
        async with gate:
            begun = time.perf_counter()
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            started = None
            async for part in stream:
                started = started or time.perf_counter()
                if part.usage:
                    counts.append(part.usage.completion_tokens)
            first.append(started - begun)

    begun = time.perf_counter()
    await asyncio.gather(*map(one, prompts))
    return {"tokens_per_s": sum(counts) / (time.perf_counter() - begun), "first_token_s": statistics.median(first)}


def measure_server(address: str, model: str, session: int, vocabulary: int, at_once: dict[int, int]) -> dict:
    """The figures of a running server, by name."""
    figures = {}

    async def all_of_it() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
            for number, requests in at_once.items():
                await ask(client, model, random_prompts(number, vocabulary, 2 * number), number)  # not counted
                measured = await ask(client, model, random_prompts(requests, vocabulary, 2 * number + 1), number)
                figures.update({f"{name}_at_{number}": value for name, value in measured.items()})

    asyncio.run(all_of_it())
    figures["memory_bytes"] = memory_bytes(session)
    return figures


def random_prompts(number: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Of another seed other prompts, none a beginning of another: an engine keeps what it has read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (number, PROMPT_TOKENS), generator=generator).tolist()


def measure_own(form: str, run: Path, folder: Path, at_once: tuple[int, ...], new_tokens: int) -> dict[str, float]:
    """The figures of this project's own inference; it holds a fused run as aligned, not as exported."""
    whole_model.quiet()
    model, _ = load_run(run if form == "shared" else folder, None, "bfloat16")
    model.to(device())
    figures = {}
    for number in at_once:
        ids = torch.tensor(random_prompts(number, model.config.vocab_size, 2 * number + 1), device=model.device)
        with torch.inference_mode():
            first = whole_model.seconds(lambda ids=ids: whole_model.generate(model, ids, 1), 3)
            took = whole_model.seconds(lambda ids=ids: whole_model.generate(model, ids, new_tokens), 1)
        figures |= {f"tokens_per_s_at_{number}": number * new_tokens / took, f"first_token_s_at_{number}": first}
    figures["memory_bytes"] = peak_memory_bytes()
    return figures


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def markdown(kept: dict) -> str:
    """The figures as a table, as docs/serving.md has it."""
    headings = [f"tokens/s at {n}" for n in AT_ONCE] + [f"first token, s, at {n}" for n in AT_ONCE]
    lines = [f"| engine | form | weights, MB | {' | '.join(headings)} | memory, GB |"]
    lines.append("| --- | --- |" + " --- |" * (len(headings) + 2))
    for one in kept["results"]:
        speeds = [f"{one[f'tokens_per_s_at_{n}']:.0f}" for n in AT_ONCE]
        waits = [f"{one[f'first_token_s_at_{n}']:.2f}" for n in AT_ONCE]
        cells = [f"{one['weights_bytes'] / 1e6:.0f}", *speeds, *waits, f"{one['memory_bytes'] / 1e9:.1f}"]
        lines.append(f"| {one['engine']} | {one['form']} | {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ServingArguments)
    run = find_run(args.cross_task, Path(args.results_dir) / "outputs")
    forms = args.forms.split(",")
    at_once, new_tokens = ({1: 2, 2: 4}, 4) if args.quick else (AT_ONCE, NEW_TOKENS)
    rounds: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = export_forms(run, Path(temporary), forms)
        vocabulary = base.load_config(str(folders[forms[0]])).vocab_size
        for number in range(args.rounds):
            for form, folder in folders.items():
                if args.vllm:
                    server, address = serve_by_vllm(args.vllm, folder, form == "shared", "--dtype", "bfloat16")
                    try:
                        figures = measure_server(address, str(folder), server.pid, vocabulary, at_once)
                    finally:
                        stop(server)
                    rounds.setdefault(("vLLM", form), []).append(figures)
                figures = whole_model.in_own_process(measure_own, form, run, folder, tuple(at_once), new_tokens)
                rounds.setdefault(("this project", form), []).append(figures)
                print(f"round {number + 1}, {form}: {[(k[0], v[-1]) for k, v in rounds.items() if k[1] == form]}")
        results = [
            {
                "engine": engine,
                "form": form,
                "weights_bytes": bytes_of_weights(folders[form]),
                **medians(figures),
                "rounds": figures,
            }
            for (engine, form), figures in rounds.items()
        ]
    asked = {name: getattr(args, name) for name in ("forms", "rounds", "quick")}  # and no place of this machine
    kept = {"arguments": asked, "made_by": environment(), "results": results}
    kept["vllm"] = vllm_versions(args.vllm) if args.vllm else None
    if not args.quick:
        write_json(KEPT, kept)
        print(markdown(kept))
    print(json.dumps(kept))


def vllm_versions(command: str) -> dict[str, str]:
    """The versions in vLLM's own environment."""
    names = "vllm", "torch", "transformers"
    code = f"import json, importlib.metadata as m; print(json.dumps({{name: m.version(name) for name in {names}}}))"
    python = Path(shutil.which(command)).with_name("python")
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
