"""Reads a run's scores, routing and cost from the folders that the scripts wrote of it."""

import math
import statistics
from pathlib import Path

from config import BIAS, GENERAL, RAW, RAW_CHAT, TASKS, XSTEST, UserError, answering_task
from evaluator.metrics import (
    DRIFT,
    JUDGED,
    NLL,
    ROUTING,
    Metric,
    drift_metrics,
    in_order,
    likelihood_metrics,
    nll_metrics,
)
from evaluator.results import judge_name
from evaluator.run_scores import Result, RunScores, check_score, check_usage
from evaluator.token_cost import relative_cost
from models.loading import weights_sha256
from workspace.files import as_written, read_json, read_lines, sha256
from workspace.run_dir import read_record, read_run

# What a score's or an answer's run.json records of the run itself, and of places
OF_THE_RUN = (
    *("run", "base_model", "data_source", "judge", "answers"),
    *("weights_sha256", "answers_sha256", "judgements_sha256", "pairs_sha256"),
)


def read_run_scores(results_dir: Path, name: str, split: str, kept: RunScores | None = None) -> RunScores:
    """A run of a results folder. kept: the run as it was kept elsewhere, for what the folder has not; not for a run
    that was scored here. UserError where it is neither here nor kept."""
    record = read_run(made_in(results_dir, name)) or selection_record(results_dir, name, split)
    tasks = tasks_of_folder(results_dir)
    wanted = (*likelihood_metrics(tasks), *JUDGED, *drift_metrics(tasks))
    pairs = ((one.name, read_result(results_dir, one, name, split)) for one in wanted)
    metrics = {name: result for name, result in pairs if result is not None}
    routing = {task: probs for task in tasks if (probs := read_routing(results_dir, task, split, name))}
    usages = ((task, results_dir / "observation" / task / split / f"cross_{name}" / "routing.json") for task in tasks)
    usage = {task: read_usage(path) for task, path in usages if path.exists()}
    check_weights(results_dir, name, split)
    if kept is not None and not any(one.name in metrics for one in nll_metrics(tasks)):
        speed = cost_of_run(results_dir, name, record, split)["new_tokens_per_second"]
        cost = kept.cost if speed is None else kept.cost | {"new_tokens_per_second": speed}
        return RunScores(name, kept.record, cost, kept.metrics | metrics, kept.routing | routing, kept.usage | usage)
    if record or metrics:
        return RunScores(name, record, cost_of_run(results_dir, name, record, split), metrics, routing, usage)
    raise UserError(
        f"{name}: neither made nor scored in {results_dir}, nor kept; run evaluator/evaluate_likelihood.py --run "
        f"{name} first"
    )


def tasks_of_folder(results_dir: Path) -> tuple[str, ...]:
    """The paper's tasks, and others that something in a results folder was scored on."""
    folders = (path.name for path in (results_dir / "evaluation").glob("*") if path.is_dir())
    return in_order({*TASKS, *folders} - {GENERAL, XSTEST})


def made_in(results_dir: Path, name: str) -> Path:
    """The folder of a run; of one that is scored with an expert bias, the folder of the run without it."""
    outputs = results_dir / "outputs"
    return outputs / name if (outputs / name).exists() else outputs / name.partition(BIAS)[0]


def selection_record(results_dir: Path, name: str, split: str) -> dict | None:
    """The record of answers that select_answers.py put together under a name, of any task."""
    for folder in sorted((results_dir / "inference").glob(f"*/{split}/{name}")):
        record = read_run(folder)
        if record and record["run"]["script"] == "select_answers.py":  # the raw base answers under its name too
            return record
    return None


def read_result(results_dir: Path, one: Metric, name: str, split: str) -> Result | None:
    """A metric of a run, by likelihood or by the judge of its answers; None without."""
    with as_written(results_dir / "evaluation" / one.task / split):
        return read_result_as_written(results_dir, one, name, split)


def read_result_as_written(results_dir: Path, one: Metric, name: str, split: str) -> Result | None:
    """`read_result`, but for errors of values where a file was changed."""
    of_task = results_dir / "evaluation" / one.task / split
    folders = [] if one in JUDGED else [of_task / name / (one.judgement if one.judgement == DRIFT else "likelihood")]
    for directory in answers_directories(name, one.task) if one in JUDGED else ():
        folders += sorted(path.parent for path in (of_task / directory).glob("*/metrics.json"))
    finished = (folder for folder in folders if (folder / "run.json").exists())
    scored = [(folder, read_json(folder / "metrics.json")) for folder in finished]
    having = [(folder, scores) for folder, scores in scored if one.judgement in scores["metrics"]]
    if not having:
        return None
    if len(having) > 1:
        judges = ", ".join(f"{folder.parent.name}/{folder.name}" for folder, _ in having)
        raise UserError(
            f"{name}: has {one.name} of several answers or by several judges ({judges}); move all but one of these "
            "folders away"
        )
    ((folder, scores),) = having
    rows = [row for row in read_lines(folder / "judgements.jsonl") if row.get("metric", one.judgement) == one.judgement]
    if one.judgement == NLL:
        values = [-row["log_prob"] for row in rows]
    else:
        values = [None if row["value"] is None else float(row["value"]) for row in rows]
    first: dict[str, str] = {}  # the id of a question's first row: a question may be given by its text
    questions = [first.setdefault(row.get("question", row["id"]), row["id"]) for row in rows]
    judge = [judge_name(scores["judge"]), scores["judge"]["version"]]
    settings = settings_of(folder)
    if one in JUDGED:
        answers = results_dir / "inference" / one.task / split / folder.parent.name
        check_answers(folder, answers / "outputs.jsonl")
        settings["answers"] = settings_of(answers)
    ids, sizes = [row["id"] for row in rows], [float(row.get("tokens", 1)) for row in rows]
    score = scores["metrics"][one.judgement]
    check_score(score, [*(value for value in values if value is not None), *sizes])
    if sum(value is not None for value in values) != score["n"]:
        raise ValueError(f"judgements.jsonl of {folder.name} has not the {score['n']} items of its score")
    if len(ids) != len(set(ids)) or not all(isinstance(id, str) for id in [*ids, *questions]):
        raise ValueError("judgements.jsonl has an id twice, or one that is no text")
    return Result(ids, values, sizes, questions, judge, settings, score)


def check_answers(folder: Path, outputs: Path) -> None:
    """UserError for a score of other answers than those that lie here now."""
    judged = recorded(folder).get("answers_sha256")
    if judged and outputs.exists() and sha256(outputs) != judged:
        raise UserError(f"{folder}: is a score of other answers than {outputs} holds; move it away and judge these")


def check_weights(results_dir: Path, name: str, split: str) -> None:
    """UserError for scores and answers of a run that were not made by the same weights, those that it has now."""
    made = made_in(results_dir, name)
    first: dict[str, Path] = {weights_sha256(made): made} if holds_weights(made) else {}
    folders = [
        *(results_dir / "evaluation").glob(f"*/{split}/{name}/likelihood"),
        *(results_dir / "evaluation").glob(f"*/{split}/{name}/{DRIFT}"),
        *(path for path in (results_dir / "inference").glob(f"*/{split}/*")
          if path.name in answers_directories(name, path.parents[1].name)),
    ]  # fmt: skip
    for folder in sorted(folders):
        if weights := recorded(folder).get("weights_sha256"):
            first.setdefault(weights, folder)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise UserError(f"{name}: {one} and {other} are of different weights; move what is older away and make it anew")


def holds_weights(folder: Path) -> bool:
    """Whether a run's weights lie here, and not its record alone."""
    return any(folder.glob("*.safetensors"))


def answers_directories(name: str, task: str) -> tuple[str, ...]:
    """The names under which inference.py keeps a run's answers to a task (or to XSTest's prompts)."""
    return (f"cross_{name}", name, *(["aligned"] if name == answering_task(task) else []))


def recorded(folder: Path) -> dict:
    """The arguments in run.json of a score, or of answers; empty where there is none."""
    record = read_run(folder)
    return record["run"]["arguments"] if record else {}


def settings_of(folder: Path) -> dict:
    """What run.json of a score, or of answers, records, without the places and the weights that were scored."""
    return {key: value for key, value in recorded(folder).items() if key not in OF_THE_RUN}


def read_routing(results_dir: Path, task: str, split: str, name: str) -> list[list[float]]:
    """The mean routing weights (E) of each of a run's questions of a task; empty for what has no router."""
    path = results_dir / "evaluation" / task / split / name / "likelihood" / "judgements.jsonl"
    rows = read_lines(path) if path.exists() else []
    with as_written(path):
        probs = [[float(p) for p in row["routing_probs"]] for row in rows if row["metric"] == ROUTING]
        if len({len(row) for row in probs}) > 1:
            raise ValueError("routing_probs of different numbers of experts")
        return probs


def read_usage(path: Path) -> dict:
    """What inference.py wrote of the routing of its answers."""
    usage = read_json(path)
    with as_written(path):
        check_usage(usage)
    return usage


def cost_of_run(results_dir: Path, name: str, record: dict | None, split: str) -> dict:
    """`cost` of one seed's run."""
    with as_written(made_in(results_dir, name)):
        return cost_as_written(results_dir, name, record, split)


def cost_as_written(results_dir: Path, name: str, record: dict | None, split: str) -> dict:
    """`cost_of_run`, but for errors of values where a file was changed."""
    train = (record or {}).get("train", {})
    numbers = [train.get(one) for one in ("trainable_parameters", "steps", "seconds")]
    if not all(one is None or isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        raise ValueError("a cost is no finite number")
    folder = made_in(results_dir, name)
    weights = [path for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    speeds = []
    for path in (results_dir / "inference").glob(f"*/{split}/*/run.json"):
        if path.parent.name not in answers_directories(name, path.parents[2].name):
            continue
        if (speed := read_record(path)["train"].get("new_tokens_per_second")) is not None:
            speeds.append(speed)
    return {
        "trained_parameters": train.get("trainable_parameters"),
        "optimiser_steps": train.get("steps"),
        "training_seconds": train.get("seconds"),
        "bytes_on_disk": sum(path.stat().st_size for path in weights) if weights else None,
        "new_tokens_per_second": statistics.fmean(speeds) if speeds else None,
        "relative_cost_of_a_token": relative_cost(folder, record) if record or name in (RAW, RAW_CHAT) else None,
    }
