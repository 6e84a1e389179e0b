"""All that is known of one run: its record, its cost, and each score with its items."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from config import TASKS
from evaluator.metrics import NLL, NOT_TASKS, in_order

# What two scores must have alike to be compared, of their own settings and of those of the answers that were judged
ALIKE, ANSWERS_ALIKE = (
    (
        *("num_samples", "max_length", "dtype", "data_sha256", "tokenizer_sha256"),
        *("judge_protocol", "judge_version", "judge_model", "annotator_sha256", "reference_sha256"),
    ),
    ("num_samples", "max_new_tokens", "temperature", "dtype", "data_sha256", "tokenizer_sha256"),
)


@dataclass(frozen=True)
class Result:
    """A run's score by one metric: the items' ids in order, their numerators (n,; None: a guard's words that are no
    verdict), sizes (n,) and questions (the id of a question's first row); [judge's name, version]; what decided the
    score beside the run (flags, checksums; "answers": of the answers that were judged); the score itself."""

    ids: list[str]
    values: list[float | None]
    sizes: list[float]
    questions: list[str]
    judge: list
    settings: dict
    score: dict

    def differs(self, other: "Result") -> str | None:
        """In words, why this may not be compared with another run's result; None where it may."""
        if self.judge != other.judge:
            return "by different judges"
        for name, ours, theirs in (("", self.settings, other.settings), ("answers' ", *map(answers_of, (self, other)))):
            for key in ANSWERS_ALIKE if name else ALIKE:
                if key in ours and key in theirs and ours[key] != theirs[key]:
                    return f"with {name}{key} {ours[key]} and {theirs[key]}"
        if (self.ids, self.sizes) != (other.ids, other.sizes):
            return "on different items"
        return None


def answers_of(result: Result) -> dict:
    """The settings of the answers that a result judges; of selected ones they stand with their candidates."""
    answers = result.settings.get("answers", {})
    return answers.get("candidates", {}) if "by" in answers else answers


@dataclass(frozen=True)
class RunScores:
    """One run: its name, record (run.json; None for the raw base), cost, {metric: result} and, of a mixture,

    routing: {task: per question its mean routing weights (E)}; usage: {task: models.routing.routing_usage}.
    """

    name: str
    record: dict | None
    cost: dict
    metrics: dict[str, Result]
    routing: dict[str, list[list[float]]] = field(default_factory=dict)
    usage: dict[str, dict] = field(default_factory=dict)

    @property
    def base_sha256(self) -> str | None:
        """The checksum of the base that the run was made from; None where nothing says so (answers that were
        selected)."""
        if self.record:  # a merge is scored as a base of its own; what counts is what it was made from
            return self.record["run"]["arguments"].get("base_sha256")
        settings = [one.settings | answers_of(one) for one in self.metrics.values()]
        return next((one["base_sha256"] for one in settings if "base_sha256" in one), None)


def scored_tasks(runs: Iterable[RunScores]) -> tuple[str, ...]:
    """The tasks by whose likelihood these runs can be compared: those of the paper that one of them has, and of others
    those that all have which have any; the paper's where there is none."""
    having = [
        {name.removesuffix(f"_{NLL}") for name in run.metrics if name.endswith(f"_{NLL}")} - set(NOT_TASKS)
        for run in runs
    ]
    having = [tasks for tasks in having if tasks]
    if not having:
        return TASKS
    return in_order(set.union(*having) & set(TASKS) | set.intersection(*having))


def left_out_tasks(runs: Iterable[RunScores]) -> tuple[str, ...]:
    """The tasks that only some of these runs are scored on."""
    runs = list(runs)
    every = set().union(*(scored_tasks([run]) for run in runs if any(name.endswith(f"_{NLL}") for name in run.metrics)))
    return in_order(every - set(scored_tasks(runs)))


def check_score(score: dict, numbers: list[float]) -> None:
    """ValueError, or another error of values, for a metric, or its items' numbers, as no score is."""
    corrected = score.get("corrected") or {"value": None}  # None: of a judge that cannot be corrected
    numbers = [*numbers, score["value"], *([] if corrected["value"] is None else [corrected["value"]])]
    for interval in (score.get("interval"), corrected.get("interval")):
        if interval is not None:
            low, high = interval
            numbers += [low, high]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a score is no finite number")
    if not all(isinstance(score.get(name, 0), int) for name in ("n", "cut", "without_answer")):
        raise ValueError("a score's counts are no numbers")
    if not isinstance(score["unit"], str) or not isinstance(score.get("higher_is_better"), bool | None):
        raise TypeError("a score's unit is a text, and higher_is_better true, false or null")


def check_usage(usage: dict) -> None:
    """ValueError, or another error of values, for what `routing_usage` does not give."""
    if not all(isinstance(name, str) for name in usage["experts"]):
        raise TypeError("an expert's name is a text")
    for row in usage["weight"]:
        if len(row) != len(usage["experts"]) or not all(math.isfinite(float(weight)) for weight in row):
            raise ValueError("a layer's weights are one finite number for each expert")
