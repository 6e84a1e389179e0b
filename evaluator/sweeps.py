"""Fusions that differ in one setting: what the comparison's sweeps are drawn from."""

from dataclasses import dataclass

from config import BIAS, TASKS
from evaluator.metrics import SHARES, drift_metrics, nll_metrics
from evaluator.run_scores import RunScores, scored_tasks

# What a fusion's record says of the place and the weights that it was made from, not of how
OF_A_MACHINE = (
    *("base_model", "data_source", "run_name"),
    *("fused_sha256", "init_sha256", "adapters_sha256", "tokenizer_sha256"),
)


@dataclass
class Alike:
    """Aligned fusions, by what they differ in from the reference (own: it, with its seed)."""

    runs: dict[str, RunScores]
    own: str

    def by(self, *free: str) -> list[tuple[float, str]]:
        """(value of the first setting in `free`, run's name), in its order, of fusions that differ in `free` alone."""
        ours = settings(self.runs[self.own])
        if ours is None:
            return []
        found = []
        for name, run in self.runs.items():
            theirs = settings(run)
            fixed = {*ours, *(theirs or {})} - {*free}
            if theirs is not None and all(theirs.get(key) == ours.get(key) for key in fixed):
                found.append((theirs[free[0]], name))
        return sorted(found)

    def points(self, setting: str, measure) -> list[tuple[float, float, str]]:
        """(setting, measure, run) of fusions that differ in it alone; measure: of a run's scores."""
        found = [(value, measure(self.runs[name]), name) for value, name in self.by(setting)]
        return [point for point in found if point[1] is not None]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those of the comparison's table, whatever else one of the runs is scored on."""
        return scored_tasks(self.runs.values())

    def mean_nll(self, run: RunScores) -> float | None:
        return mean_nll(run, self.tasks)

    def embedding_drift(self, run: RunScores) -> float | None:
        """The mean over tasks of evaluator/embedding_drift.py's distance from `own`; None where it was not measured."""
        if run.name == self.own:
            return 0.0
        metrics = drift_metrics(self.tasks)
        measured_from = {run.metrics[one.name].settings.get("reference") for one in metrics if one.name in run.metrics}
        return mean_of(run, metrics) if measured_from == {self.own} else None

    def gammas(self) -> list[tuple[float, float, str]]:
        """(γ, mean NLL, run) of fusions that differ in γ alone, alike for all experts."""
        weights = [f"{task}_weight" for task in TASKS]
        return [
            (gamma, mean, name)
            for gamma, name in self.by(*weights)
            if len({settings(self.runs[name])[weight] for weight in weights}) == 1
            and (mean := self.mean_nll(self.runs[name])) is not None
        ]


def settings(run: RunScores) -> dict | None:
    """What decided an aligned fusion, and the fusion it began with, without checksums of what differs between two
    machines; None for any other run, and for one that is scored with an expert bias."""
    if BIAS in run.name or run.record is None or run.record["run"]["arguments"].get("moe_flag") != 1:
        return None
    own = {key: value for key, value in run.record["run"]["arguments"].items() if key not in OF_A_MACHINE}
    began = {
        f"fused {key}": value for key, value in run.record["meta"].get("fused", {}).items() if key not in OF_A_MACHINE
    }
    return own | began


def mean_of(run: RunScores, metrics: tuple) -> float | None:
    """The mean of several scores; None where the run lacks one."""
    values = [run.metrics[one.name].score["value"] for one in metrics if one.name in run.metrics]
    return sum(values) / len(values) if len(values) == len(metrics) else None


def mean_nll(run: RunScores, tasks: tuple[str, ...]) -> float | None:
    return mean_of(run, nll_metrics(tasks))


def safe_preferred(run: RunScores) -> float | None:
    return mean_of(run, tuple(one for one in SHARES if one.name == "safe_preferred"))
