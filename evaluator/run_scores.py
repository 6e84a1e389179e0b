"""All that is known of one run: its record, its cost and each score's items, from a results folder or from a file.

A file, <run>.json, keeps them for others: settings, costs, and each item's score by its id; no text of the data, no
path of a machine.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from config import RAW, RAW_CHAT, TASKS, UserError
from evaluator.results import judge_name
from workspace.files import read_json, read_lines, write_json
from workspace.run_dir import read_run


@dataclass(frozen=True)
class Metric:
    """A score of the comparison: its name, task, the metric of that task's judgements, unit and direction."""

    name: str
    heading: str
    task: str
    judgement: str
    unit: str
    higher_is_better: bool


NLL = tuple(
    Metric(f"{task}_nll_per_token", f"{task} NLL/token", task, "nll_per_token", "nats per token", False)
    for task in TASKS
)
SHARES = (
    Metric("safe_preferred", "safe preferred", "safety", "safe_preferred", "share", True),
    Metric("mc1", "MC1", "truthfulness", "mc1", "share", True),
    Metric("mc2", "MC2", "truthfulness", "mc2", "share", True),
    *(Metric(f"{t}_routing_accuracy", f"routing, {t}", t, "routing_accuracy", "share", True) for t in TASKS),
)
JUDGED = (
    Metric("flagged", "flagged", "safety", "flagged", "share", False),
    Metric("over_refusal", "over-refusal", "xstest", "over_refusal", "share", False),
    Metric("truth", "truth", "truthfulness", "truth", "share", True),
    Metric("information", "information", "truthfulness", "information", "share", True),
    Metric("truth_and_information", "truth × information", "truthfulness", "truth_and_information", "share", True),
    Metric("win_rate", "win rate", "helpfulness", "win_rate", "share", True),
)
MEAN_NLL = Metric("mean_nll_per_token", "mean NLL/token", "", "", "nats per token", False)
METRICS = (MEAN_NLL, *NLL, *SHARES, *JUDGED)


@dataclass(frozen=True)
class Items:
    """A metric's items: ids in order, their numerators (n,), sizes (n,) and questions, and who judged them."""

    ids: list[str]
    values: list[float]
    sizes: list[float]
    questions: list[str]
    judge: list

    @property
    def compared_by(self) -> tuple:
        """What two runs' items must have alike to be compared."""
        return self.ids, self.sizes, self.judge


@dataclass(frozen=True)
class RunScores:
    """One run: its name, record (run.json; None for the raw base), cost, and {metric: (its items, the score)}."""

    name: str
    record: dict | None
    cost: dict
    metrics: dict[str, tuple[Items, dict]]


def read_run_scores(results_dir: Path, name: str, split: str, saved: Path | None = None) -> RunScores:
    """A run of a results folder; one that is not there from `saved`/<name>.json. UserError where it is in neither."""
    record = read_run(results_dir / "outputs" / name) or selection_record(results_dir, name, split)
    pairs = ((one.name, read_items(results_dir, one, name, split)) for one in (*NLL, *SHARES, *JUDGED))
    metrics = {name: pair for name, pair in pairs if pair is not None}
    if record or metrics:
        return RunScores(name, record, cost_of_run(results_dir, name, record, split), metrics)
    path = saved / f"{name}.json" if saved else None
    if path is None or not path.exists():
        kept_in = f", nor kept in {saved}" if saved else ""
        raise UserError(
            f"{name}: neither made nor scored in {results_dir}{kept_in}; run evaluator/evaluate_likelihood.py --run "
            f"{name} first"
        )
    kept = read_json(path)
    if kept.get("run") != name:
        raise UserError(f"{path}: is no kept run of that name")
    metrics = {one: (Items(**pair["items"]), pair["score"]) for one, pair in kept["metrics"].items()}
    return RunScores(name, kept["record"], kept["cost"], metrics)


def save_run_scores(folder: Path, run: RunScores) -> None:
    """Write <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {one: {"score": score, "items": asdict(items)} for one, (items, score) in run.metrics.items()}
    kept = {"run": run.name, "record": without_places(run.record), "cost": run.cost, "metrics": metrics}
    write_json(folder / f"{run.name}.json", kept)


def without_places(record: dict | None) -> dict | None:
    """A run's record as others may read it: of paths the last part alone."""
    if record is None:
        return None
    arguments = {
        name: Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in record["run"]["arguments"].items()
    }
    return {**record, "run": {**record["run"], "arguments": arguments}}


def selection_record(results_dir: Path, name: str, split: str) -> dict | None:
    """The record of answers that select_answers.py put together under a name, of any task."""
    for folder in sorted((results_dir / "inference").glob(f"*/{split}/{name}")):
        if record := read_run(folder):
            return record
    return None


def read_items(results_dir: Path, one: Metric, name: str, split: str) -> tuple[Items, dict] | None:
    """(a metric's items, the score itself) of a run: by likelihood, or by the judge of its answers; None without."""
    of_task = results_dir / "evaluation" / one.task / split
    folders = [of_task / name / "likelihood"] if one not in JUDGED else []
    for directory in (f"cross_{name}", name) if one in JUDGED else ():
        folders += sorted(path.parent for path in (of_task / directory).glob("*/metrics.json"))
    finished = (folder for folder in folders if (folder / "run.json").exists())
    scored = [(folder, read_json(folder / "metrics.json")) for folder in finished]
    having = [(folder, scores) for folder, scores in scored if one.judgement in scores["metrics"]]
    if not having:
        return None
    if len(having) > 1:
        judges = ", ".join(folder.name for folder, _ in having)
        raise UserError(f"{name}: has {one.name} by several judges ({judges}); move all but one of these folders away")
    ((folder, scores),) = having
    rows = [row for row in read_lines(folder / "judgements.jsonl") if row.get("metric", one.judgement) == one.judgement]
    if one.judgement == "nll_per_token":
        values = [-row["log_prob"] for row in rows]
    else:
        rows = [row for row in rows if row["value"] is not None]
        values = [float(row["value"]) for row in rows]
    ids, questions = [row["id"] for row in rows], [row.get("question", row["id"]) for row in rows]
    judge = [judge_name(scores["judge"]), scores["judge"]["version"]]
    items = Items(ids, values, [float(row.get("tokens", 1)) for row in rows], questions, judge)
    return items, scores["metrics"][one.judgement]


def cost_of_run(results_dir: Path, name: str, record: dict | None, split: str) -> dict:
    """`cost` of one seed's run."""
    train = (record or {}).get("train", {})
    folder = results_dir / "outputs" / name
    weights = [path for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    speeds = []
    directory = name if name in (RAW, RAW_CHAT) else f"cross_{name}"
    for path in (results_dir / "inference").glob(f"*/{split}/{directory}/run.json"):
        speeds.append(read_json(path)["train"].get("new_tokens_per_second"))
    return {
        "trained_parameters": train.get("trainable_parameters"),
        "optimiser_steps": train.get("steps"),
        "training_seconds": train.get("seconds"),
        "bytes_on_disk": sum(path.stat().st_size for path in weights) if weights else None,
        "new_tokens_per_second": sum(filter(None, speeds)) / len(speeds) if any(speeds) else None,
    }
