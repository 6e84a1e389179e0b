"""What is known of a judge that train_judge.py made: its errors on held-out questions, beside every score it gives."""

from dataclasses import dataclass
from pathlib import Path

from config import UserError
from evaluator.results import show
from evaluator.statistics import corrected_share
from workspace.run_dir import COMPLETE, read_json, read_lines

JUDGE_FILE = "judge.json"


@dataclass(frozen=True)
class TrainedJudge:
    """judge.json of a trained judge, and the labels and verdicts of its held-out rows."""

    settings: dict
    labels: list[int]
    verdicts: list[int]

    @property
    def known(self) -> dict:
        """Its figures on held-out questions, for metrics.json."""
        return self.settings["held_out"]

    def beside(self, value: dict, judged: list[bool], known: list[bool] | None = None) -> dict:
        """A share with its estimate corrected by the judge's errors; `known` are verdicts that are not the judge's."""
        return {**value, "corrected": corrected_share(judged, self.labels, self.verdicts, known)}

    def warning(self) -> str:
        """One line on how far to trust it, for a person."""
        known = self.known
        return (
            f"small judge trained here: accuracy {show(known['accuracy'])} on held-out questions, where always "
            f"answering alike gets {known['majority_baseline']['value']:.3f}"
        )


def read_trained(judge: str, kind: str) -> TrainedJudge | None:
    """The trained judge in a folder; None for any other. UserError if it is unfinished or tells something else."""
    folder = Path(judge)
    if not (folder / JUDGE_FILE).exists():
        return None
    if not (folder / COMPLETE).exists():
        raise UserError(f"--judge {judge}: its training did not finish; run evaluator/train_judge.py again")
    settings = read_json(folder / JUDGE_FILE)
    if settings["kind"] != kind:
        raise UserError(f"--judge {judge}: is a {settings['kind']} judge; this score needs one of {kind}")
    rows = read_lines(folder / "held_out.jsonl")
    verdicts = [int(row["p"] >= settings["threshold"]) for row in rows]
    return TrainedJudge(settings, [row["label"] for row in rows], verdicts)


def show_corrected(value: dict) -> str:
    """The corrected estimate of a share for a person."""
    found = value["corrected"]
    return f"not corrected, {found['reason']}" if found["value"] is None else f"corrected for its errors {show(found)}"
