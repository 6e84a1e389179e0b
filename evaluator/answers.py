"""The answers that a judge reads: outputs.jsonl of one finished inference, checked before anything is asked."""

from dataclasses import dataclass
from pathlib import Path

from config import EvaluateArguments, UserError
from data.sources import read_jsonl, spread
from workspace.run_dir import COMPLETE, read_json, sha256

COLUMNS = {"instruction": str, "input": str, "output": str, "reference": str, "task": str, "generator": str}


@dataclass(frozen=True)
class Answers:
    """Rows of outputs.jsonl in their prompts' order, the folder they come from, and the file's checksum.

    num_empty: how many answers are empty; they are judged like the others.
    """

    rows: list[dict]
    folder: Path
    checksum: str

    @property
    def num_empty(self) -> int:
        return sum(not row["output"].strip() for row in self.rows)


def load_answers(args: EvaluateArguments, task: str) -> Answers:
    """The answers of `args.directory` to a task's prompts, `--num_samples` of them evenly spaced.

    Raises UserError for a directory that is not there or not complete, a damaged line (with its number), an id given
    twice, and a file that does not hold as many answers as were asked for.
    """
    split_dir = Path(args.results_dir) / "inference" / task / args.dataset_type
    folder = split_dir / args.directory
    if not folder.is_dir():
        there = sorted(path.name for path in split_dir.iterdir()) if split_dir.is_dir() else []
        raise UserError(
            f"--task_name {args.directory}: no answers under {split_dir} (there: {', '.join(there) or 'none'}); "
            f"make them first with inference.py --task_name {task}"
        )
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder}: its inference did not finish; run inference.py again, it goes on where it was")
    path = folder / "outputs.jsonl"
    rows = read_jsonl(path, COLUMNS, may_be_empty=("input", "output", "reference"))
    asked = read_json(folder / COMPLETE)["train"].get("answers")
    if asked is not None and len(rows) != asked:
        raise UserError(
            f"{path}: holds {len(rows)} answers, {asked} prompts were asked; move {folder} away and run "
            "inference.py again"
        )
    wrong = next((row["id"] for row in rows if row["task"] != task), None)
    if wrong is not None:
        raise UserError(f"{path}: answer {wrong!r} is not one to a {task} prompt")
    return Answers(spread(rows, args.num_samples), folder, sha256(path))
