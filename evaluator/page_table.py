"""The main table of the comparison's page: its columns, its rows with their costs and commands, its cells."""

from statistics import fmean

from evaluator.comparison import split_seed
from evaluator.paired import is_certain
from evaluator.results import corrected_text

COSTS = (  # key, heading, what it is, how a value is written
    ("trained_parameters", "trained parameters", "millions", lambda value: f"{value / 1e6:.2f} M"),
    ("optimiser_steps", "steps", "of the optimiser, this run's own", lambda value: f"{value:.0f}"),
    ("training_seconds", "training", "seconds", lambda value: f"{value:.0f}"),
    ("bytes_on_disk", "on disk", "beside the base", lambda value: f"{value / 1e6:.1f} MB"),
    ("new_tokens_per_second", "tokens/s", "answering", lambda value: f"{value:.1f}"),
    ("relative_cost_of_a_token", "cost of a token", "of the base's, counted", lambda value: f"{value:.3f}"),
)
PAPER_GAINS = {"expert": 11.37, "ensemble": 13.77, "merge": 6.18}  # percent, by the paper's own metrics


def column_of(one, rows: list[dict]) -> dict:
    counts = {row["metrics"][one.name]["n"] for row in rows if one.name in row["metrics"]}
    n = "/".join(map(str, sorted(counts)))
    return {"heading": one.heading, "arrow": "↑" if one.higher_is_better else "↓", "about": f"{one.unit}, n = {n}"}


def page_row(row: dict, rows: list[dict], shown: list, records: dict, names: list[str]) -> dict:
    """A row as the template shows it: cells of scores, then of costs, and the command that made it."""
    cells = [score_cell(row, rows, one) for one in shown]
    for key, _, _, write in COSTS:
        value = row["cost"][key]
        text = None if value is None else write(value)
        sort = "" if value is None else value
        cells.append({"text": text, "sort": sort, "bar": None, "more": "", "paired": None, "tone": ""})
    own = [name for name in names if split_seed(name)[0] == row["run"] and records.get(name)]
    command = "\n".join(command_of(records[name]) for name in own)
    return {"run": row["run"], "kind": row["kind"], "seeds": row["seeds"], "cells": cells, "command": command}


def score_cell(row: dict, rows: list[dict], one) -> dict:
    """One score: its text, a bar of its interval on the column's scale, and the paired difference."""
    score = row["metrics"].get(one.name)
    if score is None:
        return {"text": None, "sort": "", "bar": None, "more": "", "paired": None, "tone": ""}
    of_column = [r["metrics"][one.name] for r in rows if one.name in r["metrics"]]
    ends = [end for s in of_column for end in (s["interval"] or [s["value"]])] + [s["value"] for s in of_column]
    low, span = min(ends), (max(ends) - min(ends)) or 1

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    start, end = score["interval"] or (score["value"], score["value"])
    bar = {"low": place(start), "width": round(place(end) - place(start), 2), "value": place(score["value"])}
    interval = f" [{start:.3f}, {end:.3f}]" if score["interval"] else ""
    text, tone = None, ""
    if (difference := row["paired"].get(one.name)) is not None:
        around = difference["interval"]
        text = f"{difference['difference']:+.3f}" + (f" [{around[0]:+.3f}, {around[1]:+.3f}]" if around else "")
        text += f", p = {difference['p_holm']:.3g}"
        if is_certain(difference):
            tone = "good" if (difference["difference"] > 0) == one.higher_is_better else "bad"
    more = []
    if "of_seeds" in score:
        more.append(f"seeds {min(score['of_seeds']):.3f} to {max(score['of_seeds']):.3f}")
    if corrected := corrected_text(score):
        more.append(corrected)
    return {
        "text": f"{score['value']:.3f}{interval}",
        "sort": score["value"],
        "bar": bar,
        "more": "; ".join(more),
        "paired": text,
        "tone": tone,
    }


def command_of(record: dict) -> str:
    """The command that made a run; of one from before it was recorded, its settings."""
    if record["meta"].get("command"):
        return record["meta"]["command"]
    arguments = record["run"]["arguments"]
    settings = (f"{key}={value}" for key, value in arguments.items() if value is not None and "sha256" not in key)
    return f"{record['run']['script']}, its command not recorded, with {', '.join(settings)}"


def relative_gains(comparison: dict) -> list[dict]:
    """How far the reference is below the best row of each kind that the paper compares with, in percent of that row's
    mean NLL over the seeds that both have, beside the paper's figure: {kind, run, gain, interval, paper}."""
    gains = []
    for kind, paper in PAPER_GAINS.items():
        rows = [row for row in comparison["rows"] if row["kind"] == kind and "mean_nll_per_token" in row["paired"]]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["metrics"]["mean_nll_per_token"]["value"])
        score, difference = best["metrics"]["mean_nll_per_token"], best["paired"]["mean_nll_per_token"]
        of_seeds = dict(zip(score["seeds"], score.get("of_seeds", [score["value"]]), strict=True))
        theirs = fmean(of_seeds[seed] for seed in difference["seeds"])
        percent = [-100 * difference["difference"] / theirs]
        if difference["interval"]:
            percent += sorted(-100 * end / theirs for end in difference["interval"])
        gains.append({"kind": kind, "run": best["run"], "gain": percent[0], "interval": percent[1:], "paper": paper})
    return gains
