"""The comparison as numbers: every run's scores, their paired differences from one run, and what each run costs.

A run `NAME_seed_7` is NAME by another seed: its scores are averaged item by item with those of NAME's other seeds, and
tests are on these means.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from config import RAW, RAW_CHAT, TASKS, UserError
from evaluator.paired import holm, mean_of_differences, paired_difference
from evaluator.statistics import metric
from workspace.files import read_json, read_lines
from workspace.run_dir import read_run

KINDS = ("raw", "expert", "mixed", "merge", "ensemble", "fused")


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
    """A metric's items: ids in order, their numerators (n,), sizes (n,) and questions."""

    ids: list[str]
    values: list[float]
    sizes: list[float]
    questions: list[str]


@dataclass
class Row:
    """One line of the comparison: run (without its seed), kind, and per seed the run's own name and record."""

    run: str
    kind: str
    names: dict[int, str]
    records: dict[int, dict | None]
    items: dict[str, Items] = field(default_factory=dict)
    scores: dict[str, list[dict]] = field(default_factory=dict)  # per metric, each seed's own


def split_seed(name: str) -> tuple[str, int]:
    """A run's name without its seed, and the seed (42 where the name has none)."""
    match = re.fullmatch(r"(.+)_seed_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 42)


def kind_of(name: str, record: dict | None) -> str:
    """What kind of run a record is of; UserError for one that is none of the comparison's."""
    if name in (RAW, RAW_CHAT):
        return "raw"
    script, arguments = (record["run"]["script"], record["run"]["arguments"]) if record else ("", {})
    if script == "align_basemodel.py":
        return "fused" if arguments["moe_flag"] else "mixed" if arguments["task_name"] == "mix" else "expert"
    kinds = {"llama_moe.py": "fused", "merging.py": "merge", "ensemble.py": "ensemble", "select_answers.py": "ensemble"}
    if script not in kinds:
        raise UserError(f"{name}: is no run that this comparison knows (it was made by {script or 'nothing recorded'})")
    return kinds[script]


def read_rows(results_dir: Path, names: list[str], split: str) -> list[Row]:
    """A row for each run and its seeds, with all its scores, in the names' order."""
    rows: dict[str, Row] = {}
    for name in names:
        run, seed = split_seed(name)
        folder = results_dir / "outputs" / name
        record = read_run(folder) or selection_record(results_dir, name, split)
        row = rows.setdefault(run, Row(run, kind_of(name, record), {}, {}))
        row.names[seed], row.records[seed] = name, record
    for row in rows.values():
        for one in (*NLL, *SHARES, *JUDGED):
            of_seeds = [read_items(results_dir, one, name, split) for name in row.names.values()]
            if not any(of_seeds):
                continue
            if not all(of_seeds):
                missing = list(row.names.values())[of_seeds.index(None)]
                raise UserError(f"{missing}: has no {one.name}, which {row.run} has by another seed; score both alike")
            items, scores = zip(*of_seeds, strict=True)
            row.items[one.name], row.scores[one.name] = average(row.run, one.name, items), list(scores)
    return list(rows.values())


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
    for folder in folders:
        if not (folder / "run.json").exists():
            continue
        scores = read_json(folder / "metrics.json")["metrics"]
        if one.judgement not in scores:
            continue
        rows = [
            row for row in read_lines(folder / "judgements.jsonl") if row.get("metric", one.judgement) == one.judgement
        ]
        if one.judgement == "nll_per_token":
            values = [-row["log_prob"] for row in rows]
        else:
            rows = [row for row in rows if row["value"] is not None]
            values = [float(row["value"]) for row in rows]
        ids = [row["id"] for row in rows]
        sizes = [float(row.get("tokens", 1)) for row in rows]
        return Items(ids, values, sizes, [row.get("question", row["id"]) for row in rows]), scores[one.judgement]
    return None


def average(run: str, name: str, of_seeds: tuple[Items, ...]) -> Items:
    """The items of several seeds as one, value by value; UserError where they are not the same items."""
    first = of_seeds[0]
    if any((items.ids, items.sizes) != (first.ids, first.sizes) for items in of_seeds[1:]):
        raise UserError(f"{run}: its seeds were scored on different items of {name}; score them alike")
    values = [sum(values) / len(of_seeds) for values in zip(*(items.values for items in of_seeds), strict=True)]
    return Items(first.ids, values, first.sizes, first.questions)


def score(row: Row, one: Metric) -> dict | None:
    """A row's metric: value, n, interval, unit, higher_is_better, and each seed's value where there are several."""
    about = {"unit": one.unit, "higher_is_better": one.higher_is_better}
    if one is MEAN_NLL:
        if not all(part.name in row.items for part in NLL):
            return None
        parts = [part_of(row, None, part.name) for part in NLL]
        mean = mean_of_differences(parts)
        result = {
            "value": mean["difference"],
            "n": mean["n"],
            "questions": mean["questions"],
            "interval": mean["interval"],
        }
        seeds = [sum(row.scores[part.name][i]["value"] for part in NLL) / len(NLL) for i in range(len(row.names))]
    elif one.name not in row.items:
        return None
    else:
        seeds = [score["value"] for score in row.scores[one.name]]
        items = row.items[one.name]
        if len(seeds) == 1:
            result = {k: row.scores[one.name][0].get(k) for k in ("value", "n", "questions", "interval")}
        else:
            result = metric(items.values, items.sizes, groups=items.questions, **about)
        if result.get("questions") is None:
            result.pop("questions", None)
    return {**result, **about} | ({"of_seeds": seeds} if len(seeds) > 1 else {})


def part_of(row: Row, other: Row | None, name: str) -> dict:
    """A metric's items of a row and of another one (None: zeros) as paired_difference takes them."""
    items = row.items[name]
    if other is not None and (other.items[name].ids, other.items[name].sizes) != (items.ids, items.sizes):
        raise UserError(f"{row.run} and {other.run} were scored on different items of {name}; score all runs alike")
    theirs = other.items[name].values if other is not None else [0.0] * len(items.ids)
    return {"ours": items.values, "theirs": theirs, "sizes": items.sizes, "groups": items.questions}


def paired(reference: Row, row: Row, one: Metric) -> dict | None:
    """reference - row in a metric, paired by items; None where one of them lacks it."""
    if one is MEAN_NLL:
        if not all(part.name in x.items for part in NLL for x in (reference, row)):
            return None
        return mean_of_differences([part_of(reference, row, part.name) for part in NLL])
    if one.name not in reference.items or one.name not in row.items:
        return None
    return paired_difference(**part_of(reference, row, one.name))


def cost(results_dir: Path, row: Row, split: str) -> dict:
    """What a row took, the mean of its seeds: trained parameters, optimiser steps (in all, its experts' included),
    seconds, bytes on disk, answered tokens per second; None where it is not recorded."""
    of_seeds = [
        cost_of_run(results_dir, name, record, split)
        for name, record in zip(row.names.values(), row.records.values(), strict=True)
    ]
    return {
        key: sum(values) / len(values) if None not in (values := [one[key] for one in of_seeds]) else None
        for key in of_seeds[0]
    }


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


def compare(results_dir: Path, names: list[str], reference: str, split: str) -> dict:
    """The whole comparison: {"reference", "rows": [{"run", "kind", "seeds", "metrics", "paired", "cost"}]}.

    paired: reference - row, with p_holm over the table's rows, metric by metric.
    """
    rows = read_rows(results_dir, names, split)
    by_name = {row.run: row for row in rows}
    if split_seed(reference)[0] not in by_name:
        raise UserError(f"--reference {reference}: is none of --runs")
    best = by_name[split_seed(reference)[0]]
    table = []
    for row in rows:
        metrics = {one.name: value for one in METRICS if (value := score(row, one)) is not None}
        differences = (
            {} if row is best else {one.name: d for one in METRICS if (d := paired(best, row, one)) is not None}
        )
        seeds = sorted(row.names) if row.kind != "raw" else []
        table.append(
            {
                "run": row.run,
                "kind": row.kind,
                "seeds": seeds,
                "metrics": metrics,
                "paired": differences,
                "cost": cost(results_dir, row, split),
            }
        )
    for one in METRICS:
        tested = [line["paired"][one.name] for line in table if one.name in line["paired"]]
        for difference, p in zip(tested, holm([difference["p"] for difference in tested]), strict=True):
            difference["p_holm"] = p
    return {"reference": best.run, "rows": table}
