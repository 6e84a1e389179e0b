"""Routing by prompt against routing by token: is a fusion better if a question chooses its experts once?

    python benchmarks/prompt_routing.py --run RUN --num_held_apart 100

RUN is an aligned fusion, as align_basemodel.py makes it: routed by token. Its alignment is repeated from the same fused
model with one choice of experts per sample and layer, by the mean of the router's logits over the prompt's tokens after
the template's opening. Both are scored on training questions that neither has seen (of a folder of data/split.py: those
that it held apart). Last, one line of JSON: nats per token of both, and the paired difference. Re-run it to resume it.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from tqdm import tqdm

import align_basemodel
import cli
from align_basemodel import AlignArguments
from cli import check_at_least, flag
from config import HELD_APART, RESULTS_DIR, TASKS, UserError, outputs_dir
from data.batching import batches_by_length
from data.encoding import IGNORED, Collator, Encoder
from data.held_apart import held_apart_records
from data.sources import Record, answer_records, read_rows, source_files
from evaluator.paired import mean_of_differences, paired_difference
from models import base, training_arguments
from models.alignment import mixture_trainer, training_samples
from models.causal_lm import answer_log_probs
from models.loading import device, load_run
from models.router import Router, route
from workspace import run_dir


@dataclass
class PromptRoutingArguments:
    """Flags of benchmarks/prompt_routing.py."""

    run: str | None = flag(None, "the fusion, aligned with routing by token: a run's name or a folder")
    data_source: str | None = flag(None, "its data, if they moved")
    moe_dir: str | None = flag(None, "what it was aligned from, if that moved")
    num_held_apart: int | None = flag(
        None,
        "training questions per task that it has not seen, which are scored (default: 100; all that data/split.py held "
        "apart)",
    )
    batch_size: int = flag(16, "samples per batch in scoring")
    results_dir: str = flag(str(RESULTS_DIR), "the folder of its results (default: results)")

    def __post_init__(self):
        if self.run is None:
            raise UserError("name an aligned fusion with --run")
        check_at_least(1, num_held_apart=self.num_held_apart, batch_size=self.batch_size)


def scored_records(source: str, num_trained: int, num_held_apart: int | None, seed: int) -> dict[str, list[Record]]:
    """{task: good answers to training questions that the fusion has not seen}."""
    if not source_files(TASKS[0], HELD_APART, source):
        return held_apart_records(TASKS, source, num_trained, 100 if num_held_apart is None else num_held_apart, seed)
    if num_held_apart is not None:
        raise UserError(
            f"--num_held_apart {num_held_apart}: data/split.py held apart what {source} is scored on, all of it"
        )
    return {task: answer_records(task, read_rows(task, HELD_APART, source)) for task in TASKS}


@contextmanager
def routed_by_prompt(model: nn.Module, of_prompt: list[Tensor]) -> Iterator[None]:
    """Within it every router chooses once per sample: by the mean of its logits over the positions in of_prompt[0]
    (B, T), which the caller sets before each pass."""

    def once(router: Router, _, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        counted = of_prompt[0].to(output[0].device, output[0].dtype)[..., None]  # (B, T, 1)
        logits = output[0].view(*counted.shape[:2], -1)  # (B, T, E)
        means = (logits * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)
        logits = means.expand_as(logits).flatten(0, 1)  # (N, E)
        return logits, *route(logits, router.top_k)

    hooks = [module.register_forward_hook(once) for module in model.modules() if isinstance(module, Router)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prompt_positions(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: the tokens between the template's opening and the answer. batch: of Collator with routing."""
    return batch["routing_mask"].bool() & (batch["labels"] == IGNORED)


def align_by_prompt(args: AlignArguments, training, folder: Path) -> None:
    """Align the fused model of `args` as they say, but routed by prompt, into `folder`; resume what was begun there."""
    name, arguments = "prompt_routing.py", align_basemodel.result_arguments(args, training)
    state = run_dir.begin(folder, name, arguments, "move it away")
    if state == "complete":
        return
    training.output_dir, started = str(folder), time.perf_counter()
    samples = training_samples(args, training.seed, base.load_tokenizer(args.base_model))
    trainer = mixture_trainer(args, training, samples)
    of_prompt, loss_of = [torch.empty(0)], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        of_prompt[0] = prompt_positions(inputs)
        return loss_of(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    with routed_by_prompt(trainer.model, of_prompt):
        trained = trainer.train_into(folder, state == "resume", started)
    run_dir.finish(folder, name, arguments, trained, meta={})


@torch.inference_mode()
def losses(model, tokenizer, records: list[Record], of_prompt: list[Tensor], batch_size: int) -> dict[str, Tensor]:
    """{id: (loss in nats, tokens)} of each record's answer; sets of_prompt[0] before each pass."""
    samples, _ = Encoder(tokenizer, model.config.max_position_embeddings).encode_all(records)
    collate, result = Collator(routing=True), {}
    for batch in tqdm(batches_by_length(samples, lambda one: len(one["input_ids"]), batch_size), unit="batch"):
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
        of_prompt[0] = prompt_positions(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        log_probs, rows = answer_log_probs(hidden, model.lm_head, inputs["labels"])
        sums = torch.zeros(len(batch), device=log_probs.device).index_add_(0, rows, -log_probs)
        counts = rows.bincount(minlength=len(batch))
        result |= {one["id"]: pair for one, pair in zip(batch, torch.stack((sums, counts), 1).cpu(), strict=True)}
    return result


def compare(of_token: dict[str, Tensor], of_prompt: dict[str, Tensor], records: dict[str, list[Record]]) -> dict:
    """By task and over their mean: nats per token of both, and by prompt - by token, paired by question."""
    parts, rows = [], {}
    for task, of_task in records.items():
        scored = [record for record in of_task if record.id in of_token]
        (ours, sizes), (theirs, _) = (
            torch.stack([of_run[record.id] for record in scored]).double().T.tolist()
            for of_run in (of_prompt, of_token)
        )
        part = {"ours": ours, "theirs": theirs, "sizes": sizes, "groups": [record.instruction for record in scored]}
        parts.append(part)
        rows[task] = {
            "by_prompt": sum(ours) / sum(sizes),
            "by_token": sum(theirs) / sum(sizes),
            **paired_difference(**part),
        }
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in ("by_prompt", "by_token")}
    return {**rows, "mean": {**mean, **mean_of_differences(parts)}}


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, PromptRoutingArguments)
    path = run_dir.find_run(args.run, outputs_dir(args.results_dir))
    align, training = alignment_of(path, args)
    if align.gate_gradient != "all":
        raise UserError(f"--run {args.run}: was aligned with --gate_gradient {align.gate_gradient}; all is needed here")
    records = scored_records(align.data_source, align.num_samples, args.num_held_apart, training.seed)
    every = [record for of_task in records.values() for record in of_task]
    folder, positions = Path(args.results_dir) / "prompt_routing" / path.name, [torch.empty(0)]
    align_by_prompt(align, training, folder)
    by_token, tokenizer = load_run(path, align.base_model, align.dtype)
    of_token = losses(by_token.to(device()), tokenizer, every, positions, args.batch_size)
    del by_token
    by_prompt, _ = load_run(folder, align.base_model, align.dtype)
    with routed_by_prompt(by_prompt.to(device()), positions):
        of_prompt = losses(by_prompt, tokenizer, every, positions, args.batch_size)
    result = compare(of_token, of_prompt, records)
    about = {"run": path.name, "samples": {task: len(of_task) for task, of_task in records.items()}}
    about |= run_dir.environment()
    print(json.dumps({**about, "results": result}))


def alignment_of(path: Path, args: PromptRoutingArguments) -> tuple:
    """The flags with which a fusion was aligned, from its own command. UserError for another run, and for one whose
    fused model, base or data are not those of then."""
    run = run_dir.read_run(path)
    if run is None or run["run"]["script"] != align_basemodel.SCRIPT or not run["run"]["arguments"]["moe_flag"]:
        raise UserError(f"--run {args.run}: is no aligned fusion of this project")
    if run["meta"].get("command") is None:
        raise UserError(f"--run {args.run}: does not record the command that made it; align it by align_basemodel.py")
    flags = shlex.split(run["meta"]["command"])[2:]
    moved = {"moe_dir": args.moe_dir, "data_source": args.data_source}
    for name, place in moved.items():
        flags += [f"--{name}", place] if place else []
    align, training = training_arguments.parse(flags, AlignArguments)
    align_basemodel.resolve_sources(align)
    now = align_basemodel.result_arguments(align, training)
    run_dir.compare_arguments(path, run["run"]["arguments"], now, "name with --moe_dir what it was aligned from")
    return align, training


if __name__ == "__main__":
    main()
