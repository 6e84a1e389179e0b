"""The comparison as numbers: every run's scores, their paired differences from one run, and what each run costs.

A run `NAME_seed_7` is NAME by another seed: its scores are averaged item by item with those of NAME's other seeds, and
tests are on these means.
"""

import re
from dataclasses import dataclass, field, replace

from config import RAW, RAW_CHAT, UserError
from evaluator.paired import holm, mean_of_differences, paired_difference
from evaluator.run_scores import JUDGED, LIKELIHOODS, MEAN_NLL, METRICS, NLL, Items, Metric, RunScores
from evaluator.statistics import metric

KINDS = ("raw", "expert", "mixed", "merge", "ensemble", "fused")


@dataclass
class Row:
    """One line of the comparison: run (without its seed), kind, what is known of it by each seed, and the items of all
    seeds as one."""

    run: str
    kind: str
    seeds: dict[int, RunScores]
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


def make_rows(runs: dict[str, RunScores]) -> list[Row]:
    """A row for each run and its seeds, with all its scores, in the runs' order."""
    rows: dict[str, Row] = {}
    for name, scores in runs.items():
        run, seed = split_seed(name)
        row = rows.setdefault(run, Row(run, kind_of(name, scores.record), {}))
        row.seeds[seed] = scores
    for row in rows.values():
        for one in (*LIKELIHOODS, *JUDGED):
            having = [scores for scores in row.seeds.values() if one.name in scores.metrics]
            if one in LIKELIHOODS and having and len(having) < len(row.seeds):
                missing = next(scores.name for scores in row.seeds.values() if one.name not in scores.metrics)
                raise UserError(f"{missing}: has no {one.name}, which {row.run} has by another seed; score both alike")
            if having:
                items = tuple(scores.metrics[one.name].items for scores in having)
                row.items[one.name] = average(row.run, one.name, items)
                row.scores[one.name] = [scores.metrics[one.name].score for scores in having]
    return list(rows.values())


def average(run: str, name: str, of_seeds: tuple[Items, ...]) -> Items:
    """The items of several seeds as one, value by value; UserError where they are not the same items."""
    first = of_seeds[0]
    if any(items.compared_by != first.compared_by for items in of_seeds[1:]):
        raise UserError(
            f"{run}: its seeds were scored on different items of {name}, or by different judges; score them alike"
        )
    values = [
        None if None in values else sum(values) / len(of_seeds)
        for values in zip(*(items.values for items in of_seeds), strict=True)
    ]
    return replace(first, values=values)


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
        seeds = [sum(row.scores[part.name][i]["value"] for part in NLL) / len(NLL) for i in range(len(row.seeds))]
    elif one.name not in row.items:
        return None
    else:
        seeds = [score["value"] for score in row.scores[one.name]]
        if len(seeds) == 1:
            result = {k: row.scores[one.name][0].get(k) for k in ("value", "n", "questions", "interval")}
        else:
            part = part_of(row, None, one.name)
            result = metric(part["ours"], part["sizes"], groups=part["groups"], **about)
        if result.get("questions") is None:
            result.pop("questions", None)
    return {**result, **about} | ({"of_seeds": seeds} if len(seeds) > 1 else {})


def part_of(row: Row, other: Row | None, name: str) -> dict:
    """A metric's items of a row and of another one (None: zeros) as paired_difference takes them: those that both have
    a value of."""
    items = row.items[name]
    if other is not None and other.items[name].compared_by != items.compared_by:
        raise UserError(
            f"{row.run} and {other.run} were scored on different items of {name}, or by different judges; score all "
            "runs alike"
        )
    theirs = other.items[name].values if other is not None else [0.0] * len(items.ids)
    both = [
        item for item in zip(items.values, theirs, items.sizes, items.questions, strict=True) if None not in item[:2]
    ]
    return dict(zip(("ours", "theirs", "sizes", "groups"), zip(*both, strict=True), strict=True))


def paired(reference: Row, row: Row, one: Metric) -> dict | None:
    """reference - row in a metric, paired by items; None where one of them lacks it."""
    if one is MEAN_NLL:
        if not all(part.name in x.items for part in NLL for x in (reference, row)):
            return None
        return mean_of_differences([part_of(reference, row, part.name) for part in NLL])
    if one.name not in reference.items or one.name not in row.items:
        return None
    return paired_difference(**part_of(reference, row, one.name))


def cost(row: Row) -> dict:
    """What a row took, the mean of its seeds: trained parameters, optimiser steps (its own), seconds, bytes on disk,
    answered tokens per second; None where it is not recorded."""
    of_seeds = [scores.cost for scores in row.seeds.values()]
    return {
        key: sum(values) / len(values) if None not in (values := [one[key] for one in of_seeds]) else None
        for key in of_seeds[0]
    }


def compare(runs: dict[str, RunScores], reference: str) -> dict:
    """The whole comparison: {"reference", "rows": [{"run", "kind", "seeds", "metrics", "paired", "cost"}]}.

    paired: reference - row, with p_holm over the table's rows, metric by metric.
    """
    rows = make_rows(runs)
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
        seeds = sorted(row.seeds) if row.kind != "raw" else []
        table.append(
            {
                "run": row.run,
                "kind": row.kind,
                "seeds": seeds,
                "metrics": metrics,
                "paired": differences,
                "cost": cost(row),
            }
        )
    for one in METRICS:
        tested = [line["paired"][one.name] for line in table if one.name in line["paired"]]
        for difference, p in zip(tested, holm([difference["p"] for difference in tested]), strict=True):
            difference["p_holm"] = p
    return {"reference": best.run, "rows": table}
