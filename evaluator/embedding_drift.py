"""How far a run's output embeddings lie from those of another run: the paper's embedding drift.

Of each held-out prompt the final hidden states (after the last norm) of both runs, averaged over the instruction's
tokens; their Euclidean distance over the length of the reference's. 0: the same function of the prompt.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import DTYPES, NF4, TASKS_HELP, SourceArguments, check_at_least, check_num_samples, flag, read_tasks
from config import TASKS, UserError


@dataclass
class DriftArguments(SourceArguments):
    """Flags of evaluator/embedding_drift.py."""

    run: str | None = flag(None, "the runs to measure, comma-separated: names under results/outputs, or folders")
    reference: str | None = flag(None, "the run to measure from")
    dataset_type: str = flag("test", "which half", choices=["train", "test"])
    num_samples: int = flag(-1, "prompts per task, evenly spaced over the half; -1 takes all")
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    dtype: str = flag(
        "float32",
        "precision of the base's weights: bfloat16's rounding is larger than the distance of two like runs",
        choices=[*DTYPES, NF4],
    )
    batch_size: int = flag(16, "prompts per batch")

    def __post_init__(self):
        if self.run is None or self.reference is None:
            raise UserError("name the runs with --run, and the one that they are measured from with --reference")
        check_num_samples(num_samples=self.num_samples)
        check_at_least(1, batch_size=self.batch_size)
        read_tasks(self.tasks)


if __name__ == "__main__":
    cli.check_early(cli.parse, DriftArguments)

import torch
from torch import Tensor
from tqdm import tqdm

from data import sources
from data.batching import batches_by_length, pad
from data.encoding import Encoder
from data.sources import Record
from evaluator.results import REMEDY, evaluation_folder, print_scores, write_scores
from evaluator.statistics import metric
from models import base
from models.base_identity import base_sha256
from models.loading import device, load_run, run_sources, weights_sha256
from models.prompt_routing import prompt_mask, routed_by_prompt
from workspace import run_dir
from workspace.run_dir import find_run

SCRIPT = "embedding_drift.py"
METRIC = "embedding_drift"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, DriftArguments)
    outputs = Path(args.results_dir) / "outputs"
    names = [name.strip() for name in args.run.split(",") if name.strip()]
    reference = find_run(args.reference, outputs)
    paths = {name: find_run(name, outputs) for name in names}
    of_reference, embedded = {}, None  # the reference's embeddings, and of which prompts on which base
    for name, path in paths.items():
        base_model, data_source = run_sources(path, args.base_model, args.data_source, args.results_dir)
        arguments, todo = {}, []
        for task in read_tasks(args.tasks):
            arguments[task] = {
                "base_model": base_model,
                "base_sha256": base_sha256(base_model),
                "data_source": data_source,
                "data_sha256": sources.source_sha256([task], args.dataset_type, data_source),
                "num_samples": args.num_samples,
                "dtype": base.dtype_name(args.dtype),
                "weights_sha256": weights_sha256(path),
                "reference": Path(args.reference).name,
                "reference_sha256": weights_sha256(reference),
            }
            folder = evaluation_folder(args.results_dir, task, args.dataset_type, Path(name).name, METRIC)
            if run_dir.begin(folder, SCRIPT, arguments[task], REMEDY) != "complete":
                todo.append((task, folder))
        if not todo:
            print(f"{name}: measured already")
            continue
        prompts = {task: prompts_of(task, args, data_source) for task in read_tasks(args.tasks)}
        if embedded != (base_model, prompts):  # another run's data may have other prompts
            of_reference = embeddings(reference, base_model, args, prompts, args.reference)
            embedded = base_model, prompts
        ours = embeddings(path, base_model, args, prompts, name)
        for task, folder in todo:
            distance = ((ours[task] - of_reference[task]).norm(dim=-1) / of_reference[task].norm(dim=-1)).tolist()
            groups = [(record.instruction, record.input) for record in prompts[task]]
            unit = "of the reference's length"
            score = {METRIC: metric(distance, groups=groups, unit=unit, higher_is_better=False)}
            judgements = [
                {"metric": METRIC, "id": record.id, "value": value}
                for record, value in zip(prompts[task], distance, strict=True)
            ]
            write_scores(folder, SCRIPT, arguments[task], {"name": METRIC, "version": None}, score, judgements)
            print_scores(folder)


def prompts_of(task: str, args: DriftArguments, source: str) -> list[Record]:
    """A task's held-out prompts, without an answer."""
    rows = sources.read_rows(task, args.dataset_type, source)
    records = sources.spread(sources.prompt_records(task, rows, source), args.num_samples)
    return [replace(record, output="") for record in records]


@torch.inference_mode()
def embeddings(
    path: Path | None, base_model: str, args: DriftArguments, prompts: dict[str, list[Record]], name: str
) -> dict[str, Tensor]:
    """{task: (P, D) mean final hidden state of each prompt's instruction} of a run."""
    model, tokenizer = load_run(path, base_model, args.dtype)
    model = getattr(model, "get_base_model", lambda: model)().to(device())
    encoder = Encoder(tokenizer, model.config.max_position_embeddings)
    result = {}
    for task, records in prompts.items():
        samples = [(number, encoder.encode(record)) for number, record in enumerate(records)]
        means = torch.empty(len(records), model.config.hidden_size)
        batches = batches_by_length(samples, lambda sample: len(sample[1]["input_ids"]), args.batch_size)
        for batch in tqdm(batches, desc=f"{name} on {task}", unit="batch"):
            ids, mask = (tensor.to(device()) for tensor in pad([s["input_ids"] for _, s in batch], left=False))
            prompts_at = [range(sample["opening"], len(sample["input_ids"])) for _, sample in batch]
            with routed_by_prompt(model, prompt_mask(prompts_at, ids.shape[1])):
                states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
            for (number, sample), row in zip(batch, states, strict=True):
                means[number] = row[sample["opening"] : len(sample["input_ids"])].mean(0)
        result[task] = means
    return result


if __name__ == "__main__":
    main()
