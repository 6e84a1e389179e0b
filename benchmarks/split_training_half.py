"""A data folder whose test rows are unseen rows of the training half: scores without a shift between the halves.

    python benchmarks/split_training_half.py --data_source DIR --output DIR2 --num_samples 160

DIR2 holds the rows that `align_basemodel.py --data_source DIR --num_samples 160` trains on and, as its test rows, rows
with other prompts of the same files. AlpacaEval's prompts are no Alpaca instructions, and TruthfulQA's halves differ in
kind: what a score on DIR loses against one on DIR2 is that shift.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import flag
from config import TASKS, UserError
from data.sources import draw, prompt_of, read_rows, source_dir, trainable_rows
from workspace.files import write_lines


@dataclass
class SplitArguments:
    data_source: str = flag("sample", "sample, hub or a folder")
    output: str = flag("", "the folder to write; must not exist")
    num_samples: int = flag(160, "training rows per task, as aligned on")
    num_held_out: int = flag(100, "test rows per task, at most")
    seed: int = flag(42, "as aligned with")


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, SplitArguments)
    output = Path(args.output)
    if not args.output or output.exists():
        raise UserError(f"--output {args.output}: name a folder that does not exist")
    halves = {}
    for task in TASKS:
        rows = trainable_rows(task, read_rows(task, "train", args.data_source))
        train = draw(rows, args.num_samples, args.seed)
        seen = {prompt_of(row) for row in train}
        test = draw([row for row in rows if prompt_of(row) not in seen], args.num_held_out, args.seed)
        if not test:
            raise UserError(f"--num_samples {args.num_samples}: leaves no row of {task} to hold out")
        halves |= {f"{task}_train": train, f"{task}_test": test}
    output.mkdir(parents=True)
    for name, rows in halves.items():
        write_lines(output / f"{name}.jsonl", rows)
        print(f"{output / name}.jsonl: {len(rows)} rows")
    if args.data_source != "hub" and (pairs := source_dir(args.data_source) / "safety_pairs.jsonl").exists():
        shutil.copy(pairs, output)


if __name__ == "__main__":
    main()
