"""All that is known of one run: its record, its cost and each score's items, from a results folder or from a file.

A file, <run>.json, keeps them for others: settings, costs, each item's score by its id, and where its tokens were
routed; no text of the data, no path of a machine.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from config import GENERAL, RAW, RAW_CHAT, TASKS, UserError
from evaluator.results import judge_name
from evaluator.token_cost import relative_cost
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
GENERAL_NLL = Metric("general_nll_per_token", "general NLL/token", GENERAL, "nll_per_token", "nats per token", False)
LIKELIHOODS = (*NLL, GENERAL_NLL, *SHARES)
# the distance of a run's output embeddings from another run's; for the sweep over gamma alone, in no table
EMBEDDING_DRIFT = tuple(
    Metric(f"{task}_embedding_drift", f"{task} embedding drift", task, "embedding_drift", "of the length", False)
    for task in TASKS
)
MEAN_NLL = Metric("mean_nll_per_token", "mean NLL/token", "", "", "nats per token", False)
METRICS = (MEAN_NLL, *LIKELIHOODS, *JUDGED)
# What a score's or an answer's run.json records of the run itself, and of places
OF_THE_RUN = ("run", "base_model", "data_source", "judge", "weights_sha256", "answers_sha256", "answers")


@dataclass(frozen=True)
class Items:
    """A metric's items: ids in order, their numerators (n,; None: a guard's words that are no verdict), sizes (n,) and
    questions, and who judged them."""

    ids: list[str]
    values: list[float | None]
    sizes: list[float]
    questions: list[str]
    judge: list

    @property
    def compared_by(self) -> tuple:
        """What two runs' items must have alike to be compared."""
        return self.ids, self.sizes, self.judge


@dataclass(frozen=True)
class Result:
    """A run's score by one metric: items, the score itself, and what decided it beside the run (flags, checksums)."""

    items: Items
    score: dict
    settings: dict


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


def read_run_scores(results_dir: Path, name: str, split: str, saved: Path | None = None) -> RunScores:
    """A run of a results folder; what it lacks there from `saved`/<name>.json. UserError where it is in neither."""
    record = read_run(results_dir / "outputs" / name) or selection_record(results_dir, name, split)
    pairs = (
        (one.name, read_result(results_dir, one, name, split)) for one in (*LIKELIHOODS, *JUDGED, *EMBEDDING_DRIFT)
    )
    metrics = {name: result for name, result in pairs if result is not None}
    routing = {task: probs for task in TASKS if (probs := read_routing(results_dir, task, split, name))}
    usages = ((task, results_dir / "observation" / task / split / f"cross_{name}" / "routing.json") for task in TASKS)
    usage = {task: read_json(path) for task, path in usages if path.exists()}
    path = saved / f"{name}.json" if saved else None
    if path is None or not path.exists():
        if record or metrics:
            return RunScores(name, record, cost_of_run(results_dir, name, record, split), metrics, routing, usage)
        kept_in = f", nor kept in {saved}" if saved else ""
        raise UserError(
            f"{name}: neither made nor scored in {results_dir}{kept_in}; run evaluator/evaluate_likelihood.py --run "
            f"{name} first"
        )
    kept = read_kept(path)
    cost = {one: kept.cost[one] if value is None else value for one, value in
            cost_of_run(results_dir, name, record, split).items()}  # fmt: skip
    return RunScores(
        name, record or kept.record, cost, kept.metrics | metrics, kept.routing | routing, kept.usage | usage
    )


def read_kept(path: Path) -> RunScores:
    """What `save_run_scores` wrote; UserError for a file of something else."""
    kept = read_json(path)
    if kept.get("run") != path.stem:
        raise UserError(f"{path}: is no kept run of that name")
    metrics = {
        one: Result(Items(**result["items"]), result["score"], result["settings"])
        for one, result in kept["metrics"].items()
    }
    return RunScores(kept["run"], kept["record"], kept["cost"], metrics, kept["routing"], kept["usage"])


def save_run_scores(folder: Path, run: RunScores) -> None:
    """Write <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"run": run.name, **asdict(run), "record": without_places(run.record)}
    del kept["name"]
    write_json(folder / f"{run.name}.json", kept)


def without_places(record: dict | None) -> dict | None:
    """A run's record as others may read it: of paths the last part alone."""
    if record is None:
        return None

    def shortened(arguments: dict) -> dict:
        return {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in arguments.items()}

    record = {**record, "run": {**record["run"], "arguments": shortened(record["run"]["arguments"])}}
    if "fused" in record["meta"]:
        record["meta"] = {**record["meta"], "fused": shortened(record["meta"]["fused"])}
    return record


def selection_record(results_dir: Path, name: str, split: str) -> dict | None:
    """The record of answers that select_answers.py put together under a name, of any task."""
    for folder in sorted((results_dir / "inference").glob(f"*/{split}/{name}")):
        if record := read_run(folder):
            return record
    return None


def read_result(results_dir: Path, one: Metric, name: str, split: str) -> Result | None:
    """A metric of a run, by likelihood or by the judge of its answers; None without."""
    of_task = results_dir / "evaluation" / one.task / split
    folders = [] if one in JUDGED else [of_task / name / ("likelihood" if one in LIKELIHOODS else one.judgement)]
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
        values = [None if row["value"] is None else float(row["value"]) for row in rows]
    ids, questions = [row["id"] for row in rows], [row.get("question", row["id"]) for row in rows]
    judge = [judge_name(scores["judge"]), scores["judge"]["version"]]
    items = Items(ids, values, [float(row.get("tokens", 1)) for row in rows], questions, judge)
    settings = settings_of(folder)
    if one in JUDGED:
        settings["answers"] = settings_of(results_dir / "inference" / one.task / split / folder.parent.name)
    return Result(items, scores["metrics"][one.judgement], settings)


def settings_of(folder: Path) -> dict:
    """What run.json of a score, or of answers, records, without the places and the weights that were scored."""
    record = read_run(folder)
    return {k: v for k, v in record["run"]["arguments"].items() if k not in OF_THE_RUN} if record else {}


def read_routing(results_dir: Path, task: str, split: str, name: str) -> list[list[float]]:
    """The mean routing weights (E) of each of a run's questions of a task; empty for what has no router."""
    path = results_dir / "evaluation" / task / split / name / "likelihood" / "judgements.jsonl"
    rows = read_lines(path) if path.exists() else []
    return [row["routing_probs"] for row in rows if row["metric"] == "routing_accuracy"]


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
        "relative_cost_of_a_token": relative_cost(folder, record) if record or name in (RAW, RAW_CHAT) else None,
    }
