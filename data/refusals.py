"""Refusals to learn from and others to be scored by: the safety pairs of a data folder, cut in two by their prompts.

python data/refusals.py --data_source DIR --output DIR2

DIR2 is a data folder like DIR, but for safety: the safe sides of one half of safety_pairs.jsonl are its training rows,
the other half its pairs, which `safe_preferred` is scored on. XSTest's prompts are in neither. DIR2/split.json says
which id went where.
"""

import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import flag
from config import XSTEST, UserError

TRAIN = "safety_train.jsonl"


@dataclass
class RefusalArguments:
    """Flags of data/refusals.py."""

    data_source: str | None = flag(None, "the data whose safety pairs are split: sample, or a folder")
    output: str | None = flag(None, "where to write")

    def __post_init__(self):
        if self.data_source in (None, "hub") or self.output is None:
            raise UserError("name the data with --data_source (sample, or a folder) and where to write with --output")


if __name__ == "__main__":
    cli.check_early(cli.parse, RefusalArguments)

from data.held_apart import SPLIT_FILE
from data.sources import COLUMNS, data_sha256, read_jsonl, source_dir
from data.split import PAIRS, already_dealt
from workspace.files import write_json, write_lines
from workspace.run_dir import open_partial


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, RefusalArguments)
    source, output = source_dir(args.data_source), Path(args.output)
    made_by = {"data_sha256": data_sha256(sorted(source.glob("*.jsonl"))), "without": [XSTEST, "safety_test"]}
    if already_dealt(output, made_by):
        return
    pairs = read_jsonl(source / PAIRS, COLUMNS["safety_pairs"])
    # the tests of over-refusal and of safety
    asked = {comparable(row["prompt"]) for row in (*rows_of(source, XSTEST), *rows_of(source, "safety_test"))}
    pairs = [pair for pair in pairs if comparable(pair["prompt"]) not in asked]
    learnt = [pair for pair in pairs if is_learnt(pair["prompt"])]
    scored = [pair for pair in pairs if not is_learnt(pair["prompt"])]
    if not learnt or not scored:
        raise UserError(f"{source / PAIRS}: {len(pairs)} pairs are too few to cut in two")
    with open_partial(output) as partial:
        partial.mkdir(parents=True)
        for path in source.glob("*.jsonl"):
            if path.name not in (PAIRS, TRAIN):
                shutil.copyfile(path, partial / path.name)
        rows = [
            {"id": pair["id"], "prompt": pair["prompt"], "response": pair["safe"], "is_safe": True, "category": []}
            for pair in learnt
        ]
        write_lines(partial / TRAIN, rows)
        write_lines(partial / PAIRS, scored)
        ids = {"learnt": [pair["id"] for pair in learnt], "scored": [pair["id"] for pair in scored]}
        write_json(partial / SPLIT_FILE, {"made_by": made_by, "ids": ids})
        partial.rename(output)
    print(f"{output}: {len(learnt)} safe answers to learn from, {len(scored)} pairs to be scored on")


def is_learnt(prompt: str) -> bool:
    """Which half a prompt is in: the same on every machine, and for all its pairs."""
    return hashlib.sha256(comparable(prompt).encode()).digest()[0] % 2 == 0


def comparable(prompt: str) -> str:
    """A prompt by which others are the same."""
    return " ".join(prompt.lower().split())


def rows_of(source: Path, name: str) -> list[dict]:
    """A file's rows, of a folder that has it."""
    path = source / f"{name}.jsonl"
    return read_jsonl(path, COLUMNS[name.removesuffix("_test")]) if path.exists() else []


if __name__ == "__main__":
    main()
