"""The scores of the comparison: their names, units and directions, and which of them are of some tasks."""

from collections.abc import Iterable
from dataclasses import dataclass

from config import GENERAL, TASKS


@dataclass(frozen=True)
class Metric:
    """A score of the comparison: its name, task, the metric of that task's judgements, unit and direction."""

    name: str
    heading: str
    task: str
    judgement: str
    unit: str
    higher_is_better: bool

    @property
    def directed(self) -> str:
        """The heading, and which way is better."""
        return f"{self.heading} {'↑' if self.higher_is_better else '↓'}"


NLL, DRIFT, ROUTING = "nll_per_token", "embedding_drift", "routing_accuracy"  # each task has one of these
SHARES = (
    Metric("safe_preferred", "safe preferred", "safety", "safe_preferred", "share", True),
    Metric("mc1", "MC1", "truthfulness", "mc1", "share", True),
    Metric("mc2", "MC2", "truthfulness", "mc2", "share", True),
)
JUDGED = (
    Metric("flagged", "flagged", "safety", "flagged", "share", False),
    Metric("over_refusal", "over-refusal", "xstest", "over_refusal", "share", False),
    Metric("truth", "truth", "truthfulness", "truth", "share", True),
    Metric("information", "information", "truthfulness", "information", "share", True),
    Metric("truth_and_information", "truth × information", "truthfulness", "truth_and_information", "share", True),
    Metric("win_rate", "win rate", "helpfulness", "win_rate", "share", True),
)
LENGTH_CONTROLLED = Metric(
    "length_controlled_win_rate",
    "win rate, length-controlled",
    "helpfulness",
    "length_controlled_win_rate",
    "share",
    True,
)
MEAN_NLL = Metric("mean_nll_per_token", "mean NLL/token", "", "", "nats per token", False)
NOT_TASKS = (GENERAL, "mean")  # what else has a likelihood


def nll_metric(task: str) -> Metric:
    return Metric(f"{task}_{NLL}", f"{task} NLL/token", task, NLL, "nats per token", False)


def nll_metrics(tasks: Iterable[str]) -> tuple[Metric, ...]:
    """The likelihoods whose mean is MEAN_NLL."""
    return tuple(map(nll_metric, tasks))


def drift_metrics(tasks: Iterable[str]) -> tuple[Metric, ...]:
    """The distance of a run's output embeddings from another run's; for the sweep over gamma alone, in no table."""
    return tuple(Metric(f"{t}_{DRIFT}", f"{t} embedding drift", t, DRIFT, "of the length", False) for t in tasks)


def likelihood_metrics(tasks: Iterable[str]) -> tuple[Metric, ...]:
    """All scores that need no judge, of these tasks and of plain text."""
    shares = tuple(one for one in SHARES if one.task in tasks)
    routing = tuple(Metric(f"{t}_{ROUTING}", f"routing, {t}", t, ROUTING, "share", True) for t in tasks)
    return (*nll_metrics(tasks), nll_metric(GENERAL), *shares, *routing)


def table_metrics(tasks: Iterable[str]) -> tuple[Metric, ...]:
    """The columns of the comparison."""
    return (MEAN_NLL, *likelihood_metrics(tasks), *JUDGED)


def in_order(tasks: Iterable[str]) -> tuple[str, ...]:
    """The paper's tasks in their order, then others by name."""
    return tuple(sorted(set(tasks), key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task)))
