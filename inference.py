"""Answers of any run (raw base, aligned expert, fused mixture, any checkpoint) to any task, or to your own prompt."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cli
from cli import (
    AnsweringArguments,
    check,
    check_at_least,
    check_default,
    check_not_given,
    check_num_samples,
    check_seed,
    flag,
    read_tasks,
)
from config import RAW, RAW_CHAT, TASKS, XSTEST, UserError, answering_task
from data.text import holds_half_characters

DEFAULT_SEED = 42
NUM_TINTED = 6  # answers whose routing is kept token by token


@dataclass
class InferArguments(AnsweringArguments):
    """Flags of inference.py."""

    task_name: str | None = flag(
        None, f"the prompts to answer: {', '.join(TASKS)}, another task of the data folder, or {XSTEST}"
    )
    dataset_type: str = flag("test", "the half of the data", choices=["train", "test"])
    num_samples: int = flag(-1, "prompts to answer, evenly spaced over the half; -1 takes all")
    cross_task: str | None = flag(
        None,
        "the run that answers: a name under results/outputs, a folder, or raw_chat (the base by its chat template)",
    )
    aligned_flag: int | None = flag(
        None, "without --cross_task: 1 (default) for the task's own expert, 0 for the raw base", choices=[0, 1]
    )
    checkpoint_number: int | None = flag(None, "use checkpoint-N of the run")
    expert_bias: str | None = flag(
        None,
        "add to a fused model's router logits: EXPERT=VALUE, comma-separated; off removes an expert, only removes all "
        "others",
    )
    prompt: str | None = flag(None, "answer this instruction in the terminal")
    chat: int = flag(0, "1: hold a conversation in the terminal", choices=[0, 1])
    compare: str | None = flag(None, "with --prompt: show the answers of these runs, comma-separated")
    batch_size: int = flag(16, "prompts per batch")
    temperature: float = flag(0.6, "sampling temperature; 0: greedy")
    max_new_tokens: int = flag(512, "longest answer in tokens")
    seed: int = flag(DEFAULT_SEED, "seed of the sampling; other seeds' answers get their own directory")
    cache_implementation: str = flag(
        "dynamic", "key-value cache; on a GPU static compiles the model", choices=["dynamic", "static"]
    )
    server_url: str | None = flag(
        None, "ask OpenAI-compatible servers that run the model, comma-separated, such as http://localhost:8000/v1"
    )
    server_model: str | None = flag(None, "the model's name on that server")
    concurrency: int = flag(32, "requests to a server at a time")

    def __post_init__(self):
        if (self.server_url is None) != (self.server_model is None):
            raise UserError("--server_url and --server_model go together: the server, and the model's name on it")
        check_at_least(1, concurrency=self.concurrency)
        if self.prompt is not None and holds_half_characters(self.prompt):
            raise UserError("--prompt: is not UTF-8; set the terminal's encoding to it")
        if self.server_url:
            reason = "is of a model that runs here, not of --server_url"
            check_not_given(reason, device_map=self.device_map)
            check_default(self, reason, "dtype", "batch_size", "cache_implementation")
        else:
            check_default(self, "counts requests to --server_url, which is not given", "concurrency")
        if self.server_url and self.expert_bias:
            raise UserError(f"--expert_bias {self.expert_bias}: is not known to a server; leave --server_url out")
        if self.server_url and self.cross_task == RAW_CHAT:
            raise UserError(f"--cross_task {RAW_CHAT}: is asked on this machine; leave --server_url out")
        if self.compare is not None:
            reason = "does not go with --compare, which names the runs"
            names = ("cross_task", "aligned_flag", "expert_bias", "server_url", "task_name", "checkpoint_number")
            check_not_given(reason, **{name: getattr(self, name) for name in names})
            if self.prompt is None or not self.compared:
                raise UserError(f"--compare {self.compare}: name runs with commas, and what to answer with --prompt")
        if self.chat:
            reason = "does not go with --chat 1"
            given = {name: getattr(self, name) for name in ("prompt", "compare", "task_name", "server_url")}
            check_not_given(reason, **given)
            check_default(self, reason, "dataset_type", "num_samples", "batch_size")
        if self.prompt is not None:
            check_default(self, "has no effect with --prompt", "dataset_type", "num_samples", "batch_size")
        run_is_named = bool(self.compare or self.cross_task or self.aligned_flag == 0)
        if self.task_name is None and not (run_is_named and (self.chat or self.prompt is not None)):
            raise UserError(
                f"name the prompts to answer with --task_name {{{','.join(TASKS)}}}, or give --prompt or --chat 1 "
                "with --cross_task RUN or --aligned_flag 0"
            )
        if self.task_name not in (None, XSTEST):
            read_tasks(self.task_name, "task_name")
        if self.task_name == XSTEST and self.dataset_type != "test":
            raise UserError(f"--dataset_type {self.dataset_type}: {XSTEST} has a test half only")
        if self.cross_task and self.aligned_flag == 0:
            raise UserError("--aligned_flag 0 asks for the raw base and --cross_task for a run: give one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: give it an instruction")
        check_num_samples(num_samples=self.num_samples)
        check_at_least(1, batch_size=self.batch_size)
        check("temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more")
        check_at_least(1, max_new_tokens=self.max_new_tokens)
        check_seed(self.seed)

    @property
    def compared(self) -> list[str]:
        """The runs of --compare."""
        return [name.strip() for name in (self.compare or "").split(",") if name.strip()]

    @property
    def run(self) -> str:
        """The run that answers, as `models.loading.find_run` takes it."""
        if self.cross_task:
            return self.cross_task
        return RAW if self.aligned_flag == 0 else answering_task(self.task_name)


if __name__ == "__main__":
    cli.check_early(cli.parse, InferArguments)

from tqdm import tqdm

from data import sources
from data.batching import batches_by_length
from data.encoding import prompt_ids
from data.prompts import STOP_STRING, render_prompt
from data.sources import Record
from models import base
from models.base_identity import base_sha256, tokenizer_sha256
from models.expert_bias import ExpertBias, read_bias
from models.generation import answer_row, answered_record, generate
from models.loading import check_device_map, is_fused, load_on_device, run_sources, weights_sha256
from models.processes import answers_of_all, check_one_process, is_first, join_processes, on_first_process
from models.routing import draw_heat_map, routing_usage, token_routing, usage_line
from models.terminal import answer_prompt, compare_runs, converse, printable
from workspace import client, run_dir
from workspace.files import as_written, line_of, read_lines, write_json, write_lines

SCRIPT = "inference.py"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, InferArguments)
    join_processes()
    check_device_map(args.device_map)
    for name in ("server_url", "prompt", "chat"):
        if getattr(args, name):
            check_one_process(f"--{name} {getattr(args, name)}")
    if args.server_url:
        client.make_clients(args.server_url, args.concurrency, flag="server_url")  # its mistakes, before anything else
    if args.compare:
        compare_runs(args, [found_run(args, name) for name in args.compared])
        return
    # a server's model need not be here: its run then only gives the answers their name
    outputs = Path(args.results_dir) / "outputs"
    elsewhere = args.server_url and not (outputs / args.run).is_dir()
    path = None if elsewhere else run_dir.find_run(args.run, outputs, args.checkpoint_number)
    base_model, data_source = run_sources(path, args.base_model, args.data_source, args.results_dir)
    bias = read_bias(args.expert_bias, path)
    if args.chat:
        converse(args, path, base_model, bias)
    elif args.prompt is not None and args.server_url:
        (answer,) = answers_of_server(args, [Record("prompt", "", args.prompt)])
        print(printable(answer["output"]))
    elif args.prompt is not None:
        answer_prompt(args, path, base_model, bias)
    else:
        answer_task(args, path, base_model, data_source, bias)


def found_run(args: InferArguments, name: str) -> tuple[str, Path | None, str]:
    """(name, folder, base model) of a run of --compare."""
    path = run_dir.find_run(name, Path(args.results_dir) / "outputs")
    return name, path, run_sources(path, args.base_model, args.data_source, args.results_dir)[0]


def answer_task(
    args: InferArguments, path: Path | None, base_model: str, data_source: str, bias: ExpertBias | None
) -> None:
    """Answer a task's prompts into results/inference/<task>/<split>/<name>/outputs.jsonl, resuming what was begun."""
    name = directory_name(args, bias)
    folder = Path(args.results_dir) / "inference" / args.task_name / args.dataset_type / name
    arguments = {
        "base_model": base_model,
        "data_source": data_source,
        "data_sha256": sources.source_sha256([args.task_name], args.dataset_type, data_source),
        "run": Path(args.run).name,
        "checkpoint_number": args.checkpoint_number,
        "expert_bias": bias.text or None if bias else None,
        "num_samples": args.num_samples,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        **(server_arguments(args, path) if args.server_url else local_arguments(args, path, base_model)),
    }
    rows = sources.read_rows(args.task_name, args.dataset_type, data_source)
    records = sources.spread(sources.prompt_records(args.task_name, rows, data_source), args.num_samples)
    remedy = "move it away, or write to another --results_dir"
    state = on_first_process(lambda: run_dir.begin(folder, SCRIPT, arguments, remedy))
    outputs = folder / "outputs.jsonl"
    observation = Path(args.results_dir) / "observation" / args.task_name / args.dataset_type / name
    observe = is_fused(path) and not args.server_url
    if state == "complete":
        if not outputs.exists():
            raise UserError(f"{outputs}: is gone, and run.json says that it was complete; move the folder away")
        print(f"{folder} is complete: nothing to do")
        # stopped, or failed, after the answers
        if observe and is_first() and not (observation / "routing.json").exists():
            model, tokenizer = load_on_device(args, path, base_model, bias)
            observe_routing(model, tokenizer, read_lines(outputs), args, observation)
        return
    if args.server_url:
        batches = [[record] for record in records]
    else:
        model, tokenizer = load_on_device(args, path, base_model, bias)
        chat = args.run == RAW_CHAT
        batches = batches_by_length(records, lambda record: len(prompt_ids(tokenizer, record, chat)), args.batch_size)
    done = on_first_process(lambda: finished_batches(outputs, batches))
    num_done = sum(len(batches[i]) for i in done)
    if done:
        print(f"Going on after {num_done} of {len(records)} answers")
    todo = {number: batch for number, batch in enumerate(batches) if number not in done}
    if args.server_url:
        answers = answers_of_server(args, [record for batch in todo.values() for record in batch])
    else:
        answers = answers_of_all(
            todo, lambda number: generate(model, tokenizer, todo[number], args, args.seed + number)
        )
    if not is_first():
        for _ in answers:  # the first process has them too, and writes them
            pass
        return
    started, new_tokens = time.perf_counter(), 0
    with open(outputs, "a", encoding="utf-8") as file:
        for answer in tqdm(answers, desc=name, unit="answer", initial=num_done, total=len(records)):
            file.write(line_of({**answer, "generator": name}))
            file.flush()
            new_tokens += answer["new_tokens"] or 0
    speed = new_tokens / (time.perf_counter() - started) if new_tokens else None
    rows = put_in_order(outputs, records)
    # the speed is that of the last part of a run that was stopped
    run_dir.finish(folder, SCRIPT, arguments, {"answers": len(rows), "new_tokens_per_second": speed}, meta={})
    cut = sum(row["finish_reason"] == "length" for row in rows)
    print(
        f"{len(rows)} answers ({cut} stopped by --max_new_tokens, "
        f"{sum(not row['output'] for row in rows)} empty): {outputs}"
    )
    if observe:
        observe_routing(model, tokenizer, rows, args, observation)


def observe_routing(model, tokenizer, rows: list[dict], args: InferArguments, folder: Path) -> None:
    """Write which expert answered what: routing.json, routing.png and, of some answers, tokens.json. The answers are
    complete by now: a failure here is a warning, and the same command tries again."""
    try:
        usage = routing_usage(model, tokenizer, [answered_record(row) for row in rows], args.batch_size)
        draw_heat_map(usage, folder / "routing.png", f"{args.task_name}, {folder.name}")
        shown = [answered_record(row) for row in rows if row["output"].strip()][:NUM_TINTED]
        tokens = [
            {"question": one.instruction, "experts": usage["experts"], "tokens": token_routing(model, tokenizer, one)}
            for one in shown
        ]
        write_json(folder / "tokens.json", tokens)
        write_json(folder / "routing.json", usage)
    except Exception as error:
        print(f"warning: the answers are complete, their routing was not written: {error!r}", file=sys.stderr)
        return
    print(f"{usage_line(usage)}: {folder}")


def local_arguments(args: InferArguments, path: Path | None, base_model: str) -> dict:
    """What else decides the answers of a model that runs here."""
    return {
        "base_sha256": base_sha256(base_model),
        "tokenizer_sha256": tokenizer_sha256(base_model),
        "batch_size": args.batch_size,
        "dtype": base.dtype_name(args.dtype),
        "weights_sha256": weights_sha256(path),
        "cache_implementation": args.cache_implementation,
    }


def server_arguments(args: InferArguments, path: Path | None) -> dict:
    """What else decides the answers of a server: the model's name, and the weights of its run where that lies here. Its
    address does not: the same model may move."""
    return {"server_model": args.server_model} | ({"weights_sha256": weights_sha256(path)} if path else {})


def directory_name(args: InferArguments, bias: ExpertBias | None = None) -> str:
    """raw, aligned or cross_<run>, and checkpoint, bias and seed where they are given."""
    run = args.cross_task if args.cross_task == RAW_CHAT else f"cross_{Path(args.cross_task or '').name}"
    name = run if args.cross_task else RAW if args.aligned_flag == 0 else "aligned"
    checkpoint = "" if args.checkpoint_number is None else f"_{args.checkpoint_number}"
    dialled = bias.suffix if bias else ""
    return name + checkpoint + dialled + ("" if args.seed == DEFAULT_SEED else f"_sample_{args.seed}")


def answers_of_server(args: InferArguments, records: list[Record]) -> Iterator[dict]:
    """One answer per record from an OpenAI-compatible server's /v1/completions, as each is done, in any order.

    The prompts, the temperature and the stop string are those of `generate`. What a request cannot name in OpenAI's
    protocol (top-k, penalties) is the server's to set: it must leave out the model's own generation_config.json.
    """
    records_of = {}
    for record in records:
        records_of.setdefault(render_prompt(record.instruction, record.input), []).append(record)
    completions = client.complete_by_any(
        client.make_clients(args.server_url, args.concurrency, flag="server_url"),
        args.server_model,
        list(records_of),
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=1.0,
        seed=args.seed,
        stop=[STOP_STRING],
    )
    for prompt, completion in completions:
        choice, usage = completion.choices[0], completion.usage
        text, mark, _ = choice.text.partition(STOP_STRING)  # of a server that does not know `stop`
        for record in records_of[prompt]:
            yield answer_row(
                record,
                text,
                usage.completion_tokens if usage else None,
                stopped=bool(mark) or choice.finish_reason == "stop",
            )


def finished_batches(outputs: Path, batches: list[list[Record]]) -> set[int]:
    """Which batches have all their answers in the file; the lines of the others are taken out of it."""
    if not outputs.exists():
        return set()
    with as_written(outputs):
        answers = {row["id"]: row for row in read_lines(outputs, killed=True)}
    done = {i for i, batch in enumerate(batches) if all(record.id in answers for record in batch)}
    write_lines(outputs, [answers[record.id] for i in sorted(done) for record in batches[i]])
    return done


def put_in_order(outputs: Path, records: list[Record]) -> list[dict]:
    """Bring the answers into their prompts' order; returns them."""
    with as_written(outputs):
        answers = {row["id"]: row for row in read_lines(outputs)}
        rows = [answers[record.id] for record in records]
    write_lines(outputs, rows)
    return rows


if __name__ == "__main__":
    main()
