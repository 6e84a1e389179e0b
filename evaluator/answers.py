"""The answers that a judge reads: outputs.jsonl of one finished inference, checked before anything is asked."""

from dataclasses import dataclass
from pathlib import Path

from cli import DTYPES, check_at_least, check_not_given, check_num_samples, flag
from config import RESULTS_DIR, ROOT, UserError
from data.sources import read_jsonl, spread
from workspace.files import sha256
from workspace.run_dir import COMPLETE, read_record

CONCURRENCY = 8  # requests to a server at a time
BATCH_SIZE = 16  # texts per batch of a local judge
COLUMNS = {"instruction": str, "input": str, "output": str, "reference": str, "task": str, "generator": str}


@dataclass
class EvaluateArguments:
    """What the three judged scores share: which answers, and how they are judged."""

    task_name: str | None = flag(
        None,
        "the answers' directory under results/inference/<task>/<split>: raw, aligned or cross_<run> (default: aligned)",
    )
    aligned_flag: int | None = flag(
        None, "without --task_name: 1 the aligned expert's answers, 0 the raw base's", choices=[0, 1]
    )
    checkpoint_number: int | None = flag(None, "the answers of checkpoint-N")
    dataset_type: str = flag("test", "which half was answered", choices=["train", "test"])
    num_samples: int = flag(-1, "answers to judge, evenly spaced over the file; -1: all")
    judge: str | None = flag(None, "who judges")
    judge_url: str | None = flag(
        None, "an OpenAI-compatible server that runs the judge (default: OPENAI_BASE_URL, else OpenAI's)"
    )
    judge_model: str | None = flag(None, "the judge's model name on that server")
    concurrency: int | None = flag(None, f"requests to a server at a time (default: {CONCURRENCY})")
    dry_run: int = flag(
        0, "1: say how many requests and tokens a server would be asked, and the price; ask nothing", choices=[0, 1]
    )
    results_dir: str = flag(str(RESULTS_DIR), "where answers are read and scores written")

    def __post_init__(self):
        if self.task_name and self.aligned_flag is not None:
            raise UserError("--task_name names the answers' directory and --aligned_flag another: give one of them")
        if self.judge:  # a folder, also by its path from the repository's root
            folder = next((path for path in (Path(self.judge), ROOT / self.judge) if path.is_dir()), None)
            self.judge = str(folder.resolve()) if folder else self.judge
        if self.task_name and Path(self.task_name).name != self.task_name:
            raise UserError(
                f"--task_name {self.task_name}: must be a directory's name, such as raw, aligned, cross_<run>"
            )
        check_num_samples(num_samples=self.num_samples)
        check_at_least(1, concurrency=self.concurrency)

    @property
    def directory(self) -> str:
        """The answers' directory, as inference.py names it."""
        name = self.task_name or ("raw" if self.aligned_flag == 0 else "aligned")
        return name if self.checkpoint_number is None else f"{name}_{self.checkpoint_number}"

    def answers_folder(self, task: str) -> Path:
        """Where inference.py wrote the answers to a task's prompts."""
        return Path(self.results_dir) / "inference" / task / self.dataset_type / self.directory


@dataclass
class LocalJudgeArguments(EvaluateArguments):
    """And what a judge takes that may also run on this machine."""

    batch_size: int | None = flag(None, f"texts per batch of a judge on this machine (default: {BATCH_SIZE})")
    base_model: str | None = flag(
        None, "the base of a judge that is an adapter, if it is no longer where the judge names it"
    )
    dtype: str | None = flag(
        None,
        "of such a judge's weights: auto (the default: bfloat16 where the device is fast in it), ...",
        choices=list(DTYPES),
    )

    def resolve_judge_flags(self, on_server: bool) -> None:
        """Give the flags of a judge on a server, or of one here, their defaults; UserError for one of the other."""
        check_at_least(1, batch_size=self.batch_size)
        if on_server:
            reason = "is for a judge on this machine, and this one is asked on a server"
            check_not_given(reason, batch_size=self.batch_size, dtype=self.dtype, base_model=self.base_model)
            self.concurrency = self.concurrency or CONCURRENCY
        else:
            reason = "is for a judge on a server, and this one runs on this machine"
            check_not_given(reason, judge_model=self.judge_model, concurrency=self.concurrency)
            if not (Path(self.judge) / "adapter_config.json").exists():
                check_not_given("is for a judge that is an adapter on a base", base_model=self.base_model)
            self.batch_size, self.dtype = self.batch_size or BATCH_SIZE, self.dtype or "auto"


@dataclass(frozen=True)
class Answers:
    """Rows of outputs.jsonl in their prompts' order, the folder they come from, and the file's checksum.

    selected_by: the version of the judge that selected them (select_answers.py), which may not score them too.
    num_empty: how many answers are empty; they are judged like the others.
    """

    rows: list[dict]
    folder: Path
    checksum: str
    selected_by: str | None = None

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]

    def check_judge(self, judge: str, version: str | None) -> None:
        """UserError for the judge that selected these answers: by its own taste they are the best."""
        if version is not None and version == self.selected_by:
            raise UserError(f"--judge {judge}: selected the answers in {self.folder}; score them by another judge")

    @property
    def num_empty(self) -> int:
        return sum(not row["output"].strip() for row in self.rows)


def load_answers(folder: Path, task: str, num_samples: int = -1) -> Answers:
    """The answers of a folder of inference.py to a task's prompts, `num_samples` of them evenly spaced (-1: all).

    Raises UserError for a directory that is missing or not complete, a damaged line (with its number), an id given
    twice, and a file that does not hold as many answers as were asked for.
    """
    if not folder.is_dir():
        available = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
        raise UserError(
            f"--task_name {folder.name}: no answers under {folder.parent} (available: "
            f"{', '.join(available) or 'none'}); make them first with inference.py --task_name {task}"
        )
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder}: its inference did not finish; run inference.py again to resume it")
    path = folder / "outputs.jsonl"
    rows = read_jsonl(path, COLUMNS, may_be_empty=("input", "output", "reference"))
    record = read_record(folder / COMPLETE)
    asked = record["train"].get("answers")
    if asked is not None and len(rows) != asked:
        raise UserError(
            f"{path}: holds {len(rows)} answers, {asked} prompts were asked; move {folder} away and run "
            "inference.py again"
        )
    wrong = next((row["id"] for row in rows if row["task"] != task), None)
    if wrong is not None:
        raise UserError(f"{path}: answer {wrong!r} is not one to a {task} prompt")
    selected_by = record["run"]["arguments"].get("judge_version")
    return Answers(spread(rows, num_samples), folder, sha256(path), selected_by)
