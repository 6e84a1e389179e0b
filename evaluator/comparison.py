"""The comparison as numbers: every run's scores, their paired differences from one run, and what each run costs.

A run `NAME_seed_7` is NAME by that seed, and one without it is of the seed that it records. Its scores are averaged
item by item with those of NAME's other seeds. Two rows are tested on the means over the seeds that both have: intervals
are of the questions, not of the seeds.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from config import BIAS, RAW, RAW_CHAT, UserError
from evaluator.metrics import MEAN_NLL, Metric, likelihood_metrics, nll_metrics, table_metrics
from evaluator.paired import holm, mean_of_differences, paired_difference
from evaluator.run_scores import Result, RunScores, scored_tasks
from evaluator.statistics import metric
from evaluator.sweeps import OF_A_MACHINE
from workspace.run_dir import DIGESTS

KINDS = ("raw", "expert", "mixed", "merge", "ensemble", "fused")


@dataclass
class Row:
    """One line of the comparison: run (without its seed), kind, and what is known of it by each seed."""

    run: str
    kind: str
    seeds: dict[int, RunScores]

    def seeds_with(self, *names: str) -> set[int]:
        """The seeds that have all of these metrics."""
        return {seed for seed, scores in self.seeds.items() if all(name in scores.metrics for name in names)}

    def result(self, name: str, seeds: set[int]) -> Result:
        """A metric's result as the mean over seeds, item by item; UserError where they were not scored alike."""
        of_seeds = [self.seeds[seed].metrics[name] for seed in sorted(seeds)]
        for other in of_seeds[1:]:
            if said := of_seeds[0].differs(other):
                raise UserError(f"{self.run}: its seeds were scored {said} ({name}); score them alike")
        values = [
            None if None in values else sum(values) / len(of_seeds)
            for values in zip(*(result.values for result in of_seeds), strict=True)
        ]
        return replace(of_seeds[0], values=values)


def split_seed(name: str) -> tuple[str, int]:
    """A run's name without its seed, and the seed (42 where the name has none); what --expert_bias put behind it
    stays."""
    match = re.fullmatch(rf"(.+?)_seed_(\d+)({BIAS}.+)?", name)
    return (match[1] + (match[3] or ""), int(match[2])) if match else (name, 42)


def seed_of(name: str, record: dict | None) -> int:
    """A run's seed: as it was trained or fused with, else that of the experts that it was made from (a merge, an
    ensemble), else as its name says. UserError where name and record contradict each other."""
    run, named = split_seed(name)
    if record is None:
        return named
    own = record["run"]["arguments"]
    if record["run"]["script"] in ("align_basemodel.py", "llama_moe.py"):
        recorded = {own.get("seed")}
    else:
        recorded = {arguments.get("seed") for arguments in record["meta"].get("experts", {}).values() if arguments}
    seed = recorded.pop() if len(recorded) == 1 else None
    if seed is None:
        return named
    if run.partition(BIAS)[0] != name.partition(BIAS)[0] and seed != named:
        raise UserError(f"{name}: was made with seed {seed}; give it a name that says so")
    return seed


def recipe(record: dict | None) -> dict:
    """What decided a run, and what it was made from, but for its seed, the rows that the seed dealt out, and what
    differs between machines; names of other runs without their seeds."""
    if record is None:
        return {}
    arguments, meta = record["run"]["arguments"], record["meta"]
    made_from = {part: meta[part] for part in ("fused", "init") if meta.get(part)}
    made_from |= {split_seed(name)[0]: of_expert for name, of_expert in (meta.get("experts") or {}).items()}
    decided = dict(arguments) | {
        f"{part}'s {key}": value for part, theirs in made_from.items() for key, value in (theirs or {}).items()
    }
    left_out = {*OF_A_MACHINE, *DIGESTS, "seed"}
    return {key: seedless(value) for key, value in decided.items() if key.split("'s ")[-1] not in left_out}


def seedless(value):
    """A recorded setting with runs' names as they are without their seeds."""
    if isinstance(value, list):
        return [seedless(one) for one in value]
    return split_seed(Path(value).name)[0] if isinstance(value, str) else value


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
    """A row for each run and its seeds, in the runs' order. UserError for likelihoods that not all seeds of a row have;
    answers may be of some seeds alone."""
    rows: dict[str, Row] = {}
    for name, scores in runs.items():
        run, seed = split_seed(name)[0], seed_of(name, scores.record)
        row = rows.setdefault(run, Row(run, kind_of(name, scores.record), {}))
        if seed in row.seeds:
            raise UserError(f"{row.seeds[seed].name} and {name}: are of one seed, {seed}; compare one of them")
        row.seeds[seed] = scores
        check_one_recipe(next(iter(row.seeds.values())), scores)
    for row in rows.values():
        for one in likelihood_metrics(scored_tasks(row.seeds.values())):
            having = row.seeds_with(one.name)
            if having and len(having) < len(row.seeds):
                missing = next(scores.name for seed, scores in row.seeds.items() if seed not in having)
                raise UserError(f"{missing}: has no {one.name}, which {row.run} has by another seed; score both alike")
    return list(rows.values())


def check_one_recipe(first: RunScores, other: RunScores) -> None:
    """UserError for runs that a name calls seeds of one another, and that differ in more."""
    ours, theirs = recipe(first.record), recipe(other.record)
    if kind_of(first.name, first.record) != kind_of(other.name, other.record):
        raise UserError(f"{first.name} and {other.name}: are called seeds of one run and are of different kinds")
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{first.name} and {other.name}: are called seeds of one run, with {key} {ours.get(key)} and "
                f"{theirs.get(key)}; name one of them otherwise"
            )


def check_one_base(runs: dict[str, RunScores]) -> None:
    """UserError for runs of different bases."""
    first: dict[str, str] = {}
    for name, scores in runs.items():
        if scores.base_sha256 is not None:
            first.setdefault(scores.base_sha256, name)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise UserError(f"{one} and {other} are of different bases; compare the runs of each with one another")


def check_scored_alike(runs: dict[str, RunScores]) -> None:
    """UserError for runs whose likelihoods do not belong into one table: of different bases, or not scored alike."""
    check_one_base(runs)
    for one in likelihood_metrics(scored_tasks(runs.values())):
        first, *others = [scores for scores in runs.values() if one.name in scores.metrics] or [None]
        for other in others:
            if said := first.metrics[one.name].differs(other.metrics[one.name]):
                raise UserError(f"{first.name} and {other.name} were scored {said} ({one.name}); score all runs alike")


def score(row: Row, one: Metric, tasks: tuple[str, ...]) -> dict | None:
    """A row's metric: value, n, interval, unit, higher_is_better, the seeds it is of, each one's value where there are
    several, and what is corrected for a judge's errors."""
    about = {"unit": one.unit, "higher_is_better": one.higher_is_better}
    parts = [part.name for part in nll_metrics(tasks)] if one is MEAN_NLL else [one.name]
    seeds = row.seeds_with(*parts)
    if not seeds:
        return None
    of_seeds = [
        sum(row.seeds[seed].metrics[name].score["value"] for name in parts) / len(parts) for seed in sorted(seeds)
    ]
    if one is MEAN_NLL:
        mean = mean_of_differences([part_of(row, None, name, seeds) for name in parts])
        result = {"value": mean["difference"], **{key: mean[key] for key in ("n", "questions", "interval")}}
    elif len(seeds) == 1:
        (seed,) = seeds
        own = row.seeds[seed].metrics[one.name].score
        result = {key: own.get(key) for key in ("value", "n", "interval")}
        result |= {key: own[key] for key in ("questions", "corrected") if own.get(key) is not None}
    else:
        part = part_of(row, None, one.name, seeds)
        result = metric(part["ours"], part["sizes"], groups=part["groups"], **about)
        corrected = [row.seeds[seed].metrics[one.name].score.get("corrected") for seed in sorted(seeds)]
        if None not in corrected:
            result["corrected_of_seeds"] = [of_seed["value"] for of_seed in corrected]
    about |= {"seeds": sorted(seeds) if row.kind != "raw" else []}
    return {**result, **about} | ({"of_seeds": of_seeds} if len(of_seeds) > 1 else {})


def part_of(row: Row, other: Row | None, name: str, seeds: set[int], others_seeds: set[int] | None = None) -> dict:
    """A metric's items of a row and of another one (None: zeros), each the mean over its seeds, as paired_difference
    takes them: those that both have a value of."""
    ours, theirs = row.result(name, seeds), None if other is None else other.result(name, others_seeds)
    if theirs is not None and (said := ours.differs(theirs)):
        raise UserError(f"{row.run} and {other.run} were scored {said} ({name}); score all runs alike")
    values = [0.0] * len(ours.ids) if theirs is None else theirs.values
    items = zip(ours.values, values, ours.sizes, ours.questions, strict=True)
    both = [item for item in items if None not in item[:2]]
    columns = zip(*both, strict=True) if both else [()] * 4
    return dict(zip(("ours", "theirs", "sizes", "groups"), columns, strict=True))


def paired(reference: Row, row: Row, one: Metric, tasks: tuple[str, ...]) -> dict | None:
    """reference - row in a metric, paired by items, over the seeds that both have (the raw base has none: over all of
    the reference's); None where there is no such seed, or no item that both have a value of."""
    parts = [part.name for part in nll_metrics(tasks)] if one is MEAN_NLL else [one.name]
    ours, theirs = reference.seeds_with(*parts), row.seeds_with(*parts)
    if "raw" not in (reference.kind, row.kind):
        ours = theirs = ours & theirs
    if not ours or not theirs:
        return None
    items = [part_of(reference, row, name, ours, theirs) for name in parts]
    if not all(part["ours"] for part in items):
        return None
    result = mean_of_differences(items) if one is MEAN_NLL else paired_difference(**items[0])
    return result | {"seeds": sorted(theirs if reference.kind == "raw" else ours)}


def cost(row: Row) -> dict:
    """What a row took, the mean of the seeds that have it recorded and were made on the first seed's device: trained
    parameters, optimiser steps (its own), seconds, bytes on disk, answered tokens per second, relative cost of a token;
    None where it is not recorded."""
    devices = [(scores.record or {"meta": {}})["meta"].get("device") for scores in row.seeds.values()]
    of_seeds = [scores.cost for scores, it in zip(row.seeds.values(), devices, strict=True) if it == devices[0]]
    known = {key: [one[key] for one in of_seeds if one[key] is not None] for key in of_seeds[0]}
    return {key: sum(values) / len(values) if values else None for key, values in known.items()}


def as_table(comparison: dict) -> dict:
    """A comparison for table.json: what selects among finished answers has no likelihood, and says null."""
    rows = [{**row, "metrics": {MEAN_NLL.name: None, **row["metrics"]}} for row in comparison["rows"]]
    return {**comparison, "rows": rows}


def compare(runs: dict[str, RunScores], reference: str) -> dict:
    """The whole comparison: {"reference", "rows": [{"run", "kind", "seeds", "metrics", "paired", "cost"}]}.

    paired: reference - row, metric by metric, with p_holm over the rows that are corrected together: the reference's
    variants (rows of its kind), and its rivals (all others). An ablation more does not weaken what is said of a rival.
    """
    check_one_base(runs)
    rows = make_rows(runs)
    by_name = {row.run: row for row in rows}
    if split_seed(reference)[0] not in by_name:
        raise UserError(f"--reference {reference}: is none of --runs")
    best = by_name[split_seed(reference)[0]]
    tasks, table = scored_tasks(runs.values()), []
    columns = table_metrics(tasks)
    for row in rows:
        metrics = {one.name: value for one in columns if (value := score(row, one, tasks)) is not None}
        differences = (
            {} if row is best else {one.name: d for one in columns if (d := paired(best, row, one, tasks)) is not None}
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
    variants = [line for line in table if line["kind"] == best.kind]
    rivals = [line for line in table if line["kind"] != best.kind]
    for family in (variants, rivals):
        for one in columns:
            tested = [line["paired"][one.name] for line in family if one.name in line["paired"]]
            for difference, p in zip(tested, holm([difference["p"] for difference in tested]), strict=True):
                difference["p_holm"] = p
    return {"reference": best.run, "rows": table}
