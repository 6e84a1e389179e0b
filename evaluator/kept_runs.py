"""Runs as files for others, <run>.json: settings, costs, each item's score by its id, and where its tokens were routed.

No text of the data stands in them, and no path of a machine.
"""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

from config import UserError
from evaluator.run_scores import Result, RunScores, check_score, check_usage
from evaluator.sweeps import OF_A_MACHINE
from workspace.files import as_written, read_json, write_text

DUPLICATES = "near_duplicates.json"  # beside the runs: of the data that they are scored on


def kept_folder(folder: Path, split: str) -> Path:
    """Where in a folder what is of a half lies: the test half's in itself, another's in a folder of that name."""
    return folder if split == "test" else folder / split


def read_kept(folder: Path, name: str) -> RunScores | None:
    """A kept run; None where the folder has none of that name. UserError for a file of something else."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    kept = read_json(path)
    if kept.get("run") != name:
        raise UserError(f"{path}: is no kept run of that name")
    metrics = {}
    with as_written(path):
        for one, result in kept["metrics"].items():
            size = result["sizes"] or [1.0] * len(result["ids"])
            metrics[one] = Result(**{**result, "sizes": size, "questions": result["questions"] or result["ids"]})
            check_score(result["score"], [*(value for value in result["values"] if value is not None), *size])
        for usage in kept["usage"].values():
            check_usage(usage)
        return RunScores(kept["run"], kept["record"], kept["cost"], metrics, kept["routing"], kept["usage"])


def save_run(folder: Path, run: RunScores) -> None:
    """Write <name>.json, one line per score. UserError where the folder has a run of that name that would be lost."""
    folder.mkdir(parents=True, exist_ok=True)
    before, record = read_kept(folder, run.name), without_places(run.record)
    if before is not None and (lost := what_is_lost(before, replace(run, record=record))):
        raise UserError(
            f"{folder / run.name}.json: holds another run of that name ({lost}); name another folder, or move that "
            "file away"
        )
    fields = asdict(run)
    kept = {"run": fields.pop("name"), **fields, "record": record}
    for result in kept["metrics"].values():
        if set(result["sizes"]) == {1.0}:
            result["sizes"] = None
        if result["questions"] == result["ids"]:
            result["questions"] = None
    parts = [f"{json.dumps(key)}: {lines_of(value)}" for key, value in kept.items()]
    write_text(folder / f"{run.name}.json", "{\n" + ",\n".join(parts) + "\n}\n")


def check_made_alike(here: dict | None, kept: RunScores) -> None:
    """UserError for a run's record that is not the one of the kept run in its place; None: it was not made here."""
    if here is None or kept.record is None:
        return
    ours, theirs = (record["run"]["arguments"] for record in (without_places(here), kept.record))
    for key in sorted({*ours, *theirs} - {*OF_A_MACHINE}):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{kept.name}: made here with {key}={ours.get(key)}, kept with {key}={theirs.get(key)}; score the one "
                "made here with evaluator/evaluate_likelihood.py, or leave --saved out"
            )


def what_is_lost(kept: RunScores, run: RunScores) -> str | None:
    """In words, what of a kept run would be lost if this one were written over it; None: nothing."""
    recorded, ours = (one.record["run"]["arguments"] if one.record else {} for one in (kept, run))
    for key in sorted({*recorded, *ours} - {*OF_A_MACHINE}):
        if recorded.get(key) != ours.get(key):
            return f"made with {key}={recorded.get(key)}, not {ours.get(key)}"
    if None not in (kept.base_sha256, run.base_sha256) and kept.base_sha256 != run.base_sha256:
        return "of another base"
    if lost := [task for task in (*kept.routing, *kept.usage) if task not in {**run.routing, **run.usage}]:
        return f"with the routing of {lost[0]}, which this one has not"
    for name, result in kept.metrics.items():
        if name not in run.metrics:
            return f"with {name}, which this one has not"
        if said := result.differs(run.metrics[name]):
            return f"{name} scored {said}"
    return None


def lines_of(value) -> str:
    """JSON with a line for each entry of an object, and none within."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    lines = [f" {json.dumps(key)}: {json.dumps(one, ensure_ascii=False)}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}" if lines else "{}"


def without_places(record: dict | None) -> dict | None:
    """A run's record as others may read it: of paths the last part alone."""
    if record is None:
        return None
    meta = dict(record["meta"])
    for part in ("fused", "experts", "init", "drawn"):
        if meta.get(part):
            meta[part] = shortened(meta[part])
    if meta.get("command"):
        meta["command"] = shlex.join(last_part(word) for word in shlex.split(meta["command"]))
    run = {**record["run"], "arguments": shortened(record["run"]["arguments"])}
    return {**record, "run": run, "meta": meta}


def shortened(value):
    """Recorded arguments with the last part of what is a path."""
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shortened(one) for one in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def last_part(word: str) -> str:
    """A word of a command line; of absolute paths in it (also NAME=PATH, with commas) the last part."""
    parts = []
    for part in word.split(","):
        name, equals, path = part.rpartition("=")
        parts.append(name + equals + (Path(path).name if Path(path).is_absolute() else path))
    return ",".join(parts)
