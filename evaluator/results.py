"""The one format of every score: results/evaluation/<task>/<split>/<run>/<judge>/ {metrics.json, judgements.jsonl}."""

import re
from collections.abc import Callable
from pathlib import Path

from evaluator.statistics import interval_text
from workspace import run_dir
from workspace.files import as_written, read_json, read_lines, write_json, write_lines

REMEDY = "move it away, or write to another --results_dir"
INTERVALS = "95 % intervals (Wilson for shares, bootstrap over questions otherwise)"
MAIN_FIELDS = {"value", "n", "questions", "interval", "unit", "higher_is_better", "corrected"}  # of a metric


def evaluation_folder(results_dir: str | Path, task: str, split: str, run: str, judge: str) -> Path:
    """Where the scores of a run by a judge lie; a judge named by a path or a hub id gives its last part."""
    name = re.sub(r"[^\w.-]+", "_", Path(judge).name)
    return Path(results_dir) / "evaluation" / task / split / run / name


def score_once(
    folder: Path, script: str, arguments: dict, score: Callable[[], tuple[dict, dict, list[dict]]]
) -> dict[str, dict]:
    """Score unless that is done, write and print the scores, and return {name: metric}.

    folder: `evaluation_folder`. arguments: all that decides the scores; UserError if the folder holds those of others.
    score: returns (judge, metrics, judgements). judge: {"name", "version", ...} and what is known of its accuracy, see
    `judge_text`; metrics: {name: statistics.metric(...)}; judgements: one per item.
    """
    if run_dir.begin(folder, script, arguments, REMEDY) == "complete":
        print(f"{folder}: scored already")
    else:
        write_scores(folder, script, arguments, *score())
    print_scores(folder)
    with as_written(folder / "metrics.json"):
        return read_json(folder / "metrics.json")["metrics"]


def write_scores(
    folder: Path, script: str, arguments: dict, judge: dict, metrics: dict, judgements: list[dict]
) -> None:
    """Write judgements.jsonl, metrics.json and, last, run.json of a folder opened by run_dir.begin."""
    task, split, run = folder.parts[-4:-1]
    write_lines(folder / "judgements.jsonl", judgements)
    scores = {"judge": judge, "run": run, "task": task, "split": split, "metrics": metrics}
    write_json(folder / "metrics.json", scores)
    run_dir.finish(folder, script, arguments, train={}, meta={})


def print_scores(folder: Path) -> None:
    """The scores in a folder for a person: the judge and its accuracy, then each metric with all that it counts."""
    with as_written(folder / "metrics.json"):
        scores = read_json(folder / "metrics.json")
        print(f"{scores['run']} on {scores['task']} ({scores['split']}), {judge_text(scores['judge'])}: {folder}")
        for name, value in scores["metrics"].items():
            if ": " in name and not value["value"]:  # a part of another metric, such as one category of harm
                continue
            counts = "".join(
                f", {field.replace('_', ' ')} {count:.4g}"
                for field, count in value.items()
                if field not in MAIN_FIELDS and count is not None
            )
            print(f"  {name} {show(value)}{counts}")
            if "corrected" in value:
                print(f"    {show_corrected(value['corrected'])}")


def show(value: dict) -> str:
    """A metric for a person: value, 95 % interval, unit, n and, where rows repeat a question, how many there are."""
    questions = f", {value['questions']} questions" if "questions" in value else ""
    return f"{interval_text(value)} {value['unit']} (n = {value['n']}{questions})"


def show_corrected(corrected: dict) -> str:
    """The estimate of a share that a judge's errors leave likely, for a person."""
    if corrected["value"] is None:
        return f"not corrected, {corrected['reason']}"
    return f"corrected for the judge's errors {show(corrected)}"


def corrected_text(score: dict) -> str:
    """The same for a table's cell; of several seeds each one's. "" for a score that is not corrected."""
    if (of_seeds := score.get("corrected_of_seeds")) is not None:
        if set(of_seeds) == {None}:
            return "not correctable, any seed"
        return "corrected, each seed: " + ", ".join(
            "not correctable" if value is None else f"{value:.3f}" for value in of_seeds
        )
    if (corrected := score.get("corrected")) is None:
        return ""
    return "not correctable" if corrected["value"] is None else f"corrected {interval_text(corrected)}"


def judge_name(judge: dict) -> str:
    """The short name of a judge, or of the two of a joint score: the last part of a folder or hub id."""
    return ", ".join(Path(one["name"]).name for one in judge.get("judges", [judge]))


def judge_text(judge: dict) -> str:
    """A judge for a person: its name and what is known of its accuracy.

    judge: {"name"} and, as far as known, "held_out" (the metrics of a judge of train_judge.py), "human_agreement"
    (the published share), "agreement" (a metric: with labels).
    """
    name = judge_name(judge)
    if (held_out := judge.get("held_out")) is not None:
        return (
            f"small judge {name} trained here: accuracy {show(held_out['accuracy'])} on held-out questions, where "
            f"always answering alike gets {held_out['majority_baseline']['value']:.3f}"
        )
    if (agreement := judge.get("agreement")) is not None:
        return f"judge {name} (agrees with the labels at {show(agreement)})"
    if judge.get("human_agreement") is not None:
        return f"judge {name} (its agreement with people, as published: {judge['human_agreement']})"
    return f"judge {name}"


def read_judgements(folder: Path) -> dict[str, dict]:
    """{id: line} of a finished folder's judgements.jsonl."""
    with as_written(folder / "judgements.jsonl"):
        return {row["id"]: row for row in read_lines(folder / "judgements.jsonl")}
