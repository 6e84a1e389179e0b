"""The training questions of a data folder, dealt out once: most to the experts, a few to whoever fuses, a few to none.

python data/split.py --data_source DIR --output DIR2 --mixed 10,40,160 --num_held_apart 60

Writes DIR2/experts and DIR2/mixed_10, mixed_40, mixed_160: each a data folder with its part of the training half (a
smaller mixed one is part of the larger), the whole test half, and the questions held apart, by which settings are
chosen (evaluate_likelihood.py --dataset_type held_apart). DIR2/split.json says which id went where.
"""

import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import TASKS_HELP, check_at_least, flag, read_tasks
from config import HELD_APART, TASKS, UserError


@dataclass
class SplitArguments:
    """Flags of data/split.py."""

    data_source: str | None = flag(None, "the data to split: sample, or a folder")
    output: str | None = flag(None, "where to write")
    mixed: str = flag("10,40,160", "sizes of the mixed sets, in questions per task, comma-separated")
    num_held_apart: int = flag(60, "questions per task that nothing is trained on")
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    seed: int = flag(42, "seed of the draw")

    def __post_init__(self):
        if self.data_source in (None, "hub") or self.output is None:
            raise UserError("name the data with --data_source (sample, or a folder) and where to write with --output")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in self.mixed.split(",")):
            raise UserError(f"--mixed {self.mixed}: must be whole numbers above 0, with commas")
        check_at_least(1, num_held_apart=self.num_held_apart)
        read_tasks(self.tasks)

    @property
    def numbers(self) -> list[int]:
        return sorted({int(part) for part in self.mixed.split(",")})


if __name__ == "__main__":
    cli.check_early(cli.parse, SplitArguments)

from data.held_apart import SPLIT_FILE
from data.sources import (
    COLUMNS,
    MULTIPLE_CHOICE,
    data_sha256,
    prompt_of,
    read_jsonl,
    read_rows,
    source_dir,
    trainable_rows,
)
from workspace.files import read_json, write_json, write_lines
from workspace.run_dir import open_partial

PAIRS = "safety_pairs.jsonl"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, SplitArguments)
    source, output = source_dir(args.data_source), Path(args.output)
    files = sorted(source.glob("*.jsonl"))
    made_by = {"mixed": args.numbers, "num_held_apart": args.num_held_apart, "seed": args.seed}
    made_by["data_sha256"] = data_sha256(files)
    tasks = read_tasks(args.tasks)
    if tasks != TASKS:
        made_by["tasks"] = list(tasks)
    if already_dealt(output, made_by):
        return
    rows = {task: read_rows(task, "train", args.data_source) for task in tasks}
    parts = {task: deal_out(args, task, rows[task]) for task in tasks}
    with open_partial(output) as partial:
        for name in next(iter(parts.values())):
            if name == HELD_APART:
                continue
            (partial / name).mkdir(parents=True)
            for path in files:
                if path.name == PAIRS:  # as without the split: none of a training prompt is compared, in any part
                    trained = {row["prompt"] for row in rows.get("safety", ())}
                    pairs = [row for row in read_jsonl(path, COLUMNS["safety_pairs"]) if row["prompt"] not in trained]
                    write_lines(partial / name / PAIRS, pairs)
                elif (
                    path.name == MULTIPLE_CHOICE
                    and (untrained := untrained_questions(path, args.data_source)) is not None
                ):
                    write_lines(partial / name / MULTIPLE_CHOICE, untrained)
                elif not path.name.endswith("_train.jsonl"):
                    shutil.copyfile(path, partial / name / path.name)
            for task in tasks:
                for half, part in (("train", name), (HELD_APART, HELD_APART)):
                    chosen = [row for row in rows[task] if prompt_of(row) in parts[task][part]]
                    write_lines(partial / name / f"{task}_{half}.jsonl", chosen)
        ids = {
            name: {task: [row["id"] for row in rows[task] if prompt_of(row) in parts[task][name]] for task in tasks}
            for name in next(iter(parts.values()))
        }
        write_json(partial / SPLIT_FILE, {"made_by": made_by, "ids": ids})
        partial.rename(output)
    for name in ids:
        counts = ", ".join(f"{task} {len(parts[task][name])}" for task in tasks)
        print(f"{output / name if name != HELD_APART else name}: questions of {counts}")


def already_dealt(output: Path, made_by: dict) -> bool:
    """Whether a folder holds what would be written now. UserError for one that holds anything else."""
    if not output.exists():
        return False
    if not (output / SPLIT_FILE).exists() or read_json(output / SPLIT_FILE).get("made_by") != made_by:
        raise UserError(f"--output {output}: holds something else than this would write; name another folder")
    print(f"{output}: made already from these files: nothing to do")
    return True


def untrained_questions(path: Path, source: str) -> list[dict] | None:
    """The multiple-choice rows whose questions are no training questions of the undivided data, of which each part
    has only some; None where no row is of one (the file is copied as it is)."""
    if not (path.parent / "truthfulness_train.jsonl").exists():
        return None
    trained = {row["question"] for row in read_rows("truthfulness", "train", source)}
    rows = read_jsonl(path, {"idx": int, **COLUMNS["truthfulness_mc"]}, id_column="idx")
    untrained = [row for row in rows if row["question"] not in trained]
    return untrained if len(untrained) < len(rows) else None


def deal_out(args: SplitArguments, task: str, rows: list[dict]) -> dict[str, set]:
    """{part: its questions}; UserError where a task has too few. Questions without an answer to train on go to the
    experts, who leave them out as every alignment does."""
    questions = list({prompt_of(row): None for row in trainable_rows(task, rows)})
    random.Random(f"{args.seed} {task}").shuffle(questions)
    largest = args.numbers[-1]
    if len(questions) <= args.num_held_apart + largest:
        raise UserError(
            f"--data_source {args.data_source}: {task} has {len(questions)} training questions, {args.num_held_apart} "
            f"held apart and {largest} mixed ones leave the expert none; take fewer"
        )
    held_apart, mixed = questions[: args.num_held_apart], questions[args.num_held_apart :][:largest]
    taken = {*held_apart, *mixed}
    return {
        "experts": {prompt_of(row) for row in rows} - taken,
        **{f"mixed_{number}": set(mixed[:number]) for number in args.numbers},
        HELD_APART: set(held_apart),
    }


if __name__ == "__main__":
    main()
