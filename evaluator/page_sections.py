"""Other comparisons on the comparison's page, each a section: a small table and its figures."""

from dataclasses import dataclass

from config import TASKS
from evaluator.metrics import MEAN_NLL, Metric, nll_metrics
from evaluator.page_table import score_cell
from evaluator.page_words import base_name, setting_text, verdict
from evaluator.run_scores import RunScores


@dataclass(frozen=True)
class Section:
    """Another comparison on the page: a table of these scores (none given: of likelihoods), the best row by the first
    of them on top, and figures of page_figures' form."""

    heading: str
    text: str
    comparison: dict
    figures: tuple[dict, ...] = ()
    scores: tuple[Metric, ...] = ()


def beside_section(comparison: dict, records: dict, other: dict, others_runs: dict[str, RunScores]) -> dict:
    """The mean NLL of the rows that both comparisons have, as the template shows a section: heading, text, columns and
    rows of `score_cell`; the text says what the second comparison says."""
    others_records = {name: scores.record for name, scores in others_runs.items()}
    by_run = {row["run"]: row for row in other["rows"]}
    rows = [
        {
            "run": row["run"],
            "own": row["run"] == comparison["reference"],
            "cells": [
                score_cell(row, comparison["rows"], MEAN_NLL),
                score_cell(by_run[row["run"]], other["rows"], MEAN_NLL),
            ],
        }
        for row in comparison["rows"]
        if row["run"] in by_run
    ]
    return {
        "heading": "The same rows on another base",
        "figures": (),
        "text": f"{setting_text(others_records, alone=False)} {verdict(other)}",
        "reference": comparison["reference"],
        "columns": [f"mean NLL/token ↓, {base_name(some)}" for some in (records, others_records)],
        "rows": rows,
    }


def section_of(section: Section) -> dict:
    """A section in the form of `beside_section`."""
    comparison = section.comparison
    first, *others = section.scores or (MEAN_NLL, *nll_metrics(TASKS))
    rows = [row for row in comparison["rows"] if first.name in row["metrics"]]
    shown = [first, *(one for one in others if all(one.name in row["metrics"] for row in rows))]
    return {
        "heading": section.heading,
        "text": section.text,
        "figures": section.figures,
        "reference": comparison["reference"],
        "columns": [one.directed for one in shown],
        "rows": [
            {
                "run": row["run"],
                "own": row["run"] == comparison["reference"],
                "cells": [score_cell(row, rows, one) for one in shown],
            }
            for row in sorted(rows, key=lambda row: row["metrics"][first.name]["value"], reverse=first.higher_is_better)
        ],
    }
