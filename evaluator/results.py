"""The one format of every score: results/evaluation/<task>/<split>/<run>/<judge>/ {metrics.json, judgements.jsonl}."""

import json
import re
from pathlib import Path

from workspace import run_dir


def evaluation_folder(results_dir: str | Path, task: str, split: str, run: str, judge: str) -> Path:
    """Where the scores of a run by a judge lie; a judge named by a path or a hub id gives its last part."""
    name = re.sub(r"[^\w.-]+", "_", Path(judge).name)
    return Path(results_dir) / "evaluation" / task / split / run / name


def judge_name(judge: str) -> str:
    """A judge for a person: a hub id or an engine as it is, a folder by its last part."""
    return Path(judge).name if Path(judge).is_dir() else judge


def write_scores(
    folder: Path, script: str, arguments: dict, judge: dict, metrics: dict, judgements: list[dict]
) -> None:
    """Write judgements.jsonl (one line per item), metrics.json and, last, run.json of a folder opened by run_dir.begin.

    judge: {"name", "version", ...} and what is known of its accuracy. metrics: {name: statistics.metric(...)}.
    """
    task, split, run = folder.parts[-4:-1]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judgements)
    (folder / "judgements.jsonl").write_text(lines, encoding="utf-8")
    scores = {"judge": judge, "run": run, "task": task, "split": split, "metrics": metrics}
    run_dir.write_json(folder / "metrics.json", scores)
    run_dir.finish(folder, script, arguments, train={}, meta={})


def show(value: dict) -> str:
    """A metric for a person: value, 95 % interval, unit, n."""
    interval = "" if value["interval"] is None else f" [{value['interval'][0]:.3f}, {value['interval'][1]:.3f}]"
    return f"{value['value']:.3f}{interval} {value['unit']} (n = {value['n']})"


def read_judgements(folder: Path) -> dict[str, dict]:
    """{id: line} of a finished folder's judgements.jsonl."""
    return {row["id"]: row for row in run_dir.read_lines(folder / "judgements.jsonl")}
