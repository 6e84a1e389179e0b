"""What is known of a judge that train_judge.py made: its errors on held-out questions, beside every score it gives."""

from dataclasses import dataclass
from pathlib import Path

from config import UserError
from evaluator.judges.protocols import JUDGE_FILE
from evaluator.run_scores import check_score
from evaluator.statistics import corrected_share
from workspace.files import as_written, read_json, read_lines
from workspace.run_dir import COMPLETE, read_record

LEAST_LENGTH = 32  # tokens: no judge is trained on less


@dataclass(frozen=True)
class TrainedJudge:
    """judge.json of a trained judge, its held-out rows (question, answer, label, p), and the checksums of the files of
    its labelled rows."""

    settings: dict
    rows: list[dict]
    data_sha256: dict[str, str] | None

    @property
    def held_out(self) -> dict:
        """Its metrics on held-out questions."""
        return self.settings["held_out"]

    @property
    def max_length(self) -> int:
        """The tokens of a text that it was trained to read."""
        return self.settings["max_length"]

    def with_correction(self, score: dict, judged: list[bool], certain: list[bool] | None = None) -> dict:
        """A share with its estimate corrected by the judge's errors; `certain`: verdicts that are not the judge's."""
        labels, questions = ([row[name] for row in self.rows] for name in ("label", "question"))
        verdicts = [row["p"] >= self.settings["threshold"] for row in self.rows]
        return {**score, "corrected": corrected_share(judged, labels, verdicts, certain, groups=questions)}


def read_trained(judge: str, kind: str) -> TrainedJudge | None:
    """The trained judge in a folder; None for any other. UserError if it is unfinished or judges something else."""
    folder = Path(judge)
    if not (folder / JUDGE_FILE).exists():
        return None
    if not (folder / COMPLETE).exists():
        raise UserError(f"--judge {judge}: its training did not finish; run evaluator/train_judge.py again")
    with as_written(folder / JUDGE_FILE):
        settings = read_json(folder / JUDGE_FILE)
        if settings["kind"] != kind:
            raise UserError(f"--judge {judge}: is a {settings['kind']} judge; this score needs one of {kind}")
        if not (type(settings["max_length"]) is int and settings["max_length"] >= LEAST_LENGTH):
            raise ValueError("max_length is no number of tokens")
        if not (isinstance(settings["threshold"], float) and 0 < settings["threshold"] < 1):
            raise ValueError("threshold is no probability")
        for name in ("accuracy", "majority_baseline"):
            check_score(settings["held_out"][name], [])
    with as_written(folder / "held_out.jsonl"):
        rows = read_lines(folder / "held_out.jsonl")
        if not all(row["label"] in (0, 1) and 0 <= row["p"] <= 1 and isinstance(row["question"], str) for row in rows):
            raise ValueError("a row has no label of 0 or 1, no probability p, or no question")
        if {row["label"] for row in rows} != {0, 1}:
            raise ValueError("its rows have one label only")
    return TrainedJudge(settings, rows, read_record(folder / COMPLETE)["run"]["arguments"].get("data_sha256"))
