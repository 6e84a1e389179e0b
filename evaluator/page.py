"""The comparison as one self-contained page: what evaluator/comparison.py worked out, put into page.html.j2."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from config import TASKS
from evaluator import figures
from evaluator.comparison import KINDS, split_seed
from evaluator.page_figures import confusion, draw_figures, expert_names
from evaluator.results import INTERVALS
from evaluator.run_scores import JUDGED, MEAN_NLL, RunScores, nll_metrics, scored_tasks, table_metrics
from evaluator.statistics import interval_text
from workspace.files import write_text

TITLE = "H3Fusion, compared"
QUESTION = (
    "Do three aligned experts, fused and aligned together, beat each of them, their merges and ensembles, and one LoRA "
    "on the same data?"
)
COSTS = (  # key, heading, what it is, how a value is written
    ("trained_parameters", "trained parameters", "millions", lambda value: f"{value / 1e6:.2f} M"),
    ("optimiser_steps", "steps", "of the optimiser, this run's own", lambda value: f"{value:.0f}"),
    ("training_seconds", "training", "seconds", lambda value: f"{value:.0f}"),
    ("bytes_on_disk", "on disk", "beside the base", lambda value: f"{value / 1e6:.1f} MB"),
    ("new_tokens_per_second", "tokens/s", "answering", lambda value: f"{value:.1f}"),
    ("relative_cost_of_a_token", "cost of a token", "of the base's, counted", lambda value: f"{value:.3f}"),
)
SIGNIFICANT = 0.05
PAPER_GAINS = {"expert": 11.37, "ensemble": 13.77, "merge": 6.18}  # percent, by the paper's own metrics


@dataclass(frozen=True)
class Section:
    """Another comparison on the page: a table of likelihoods, the best row first, and figures of page_figures'
    form."""

    heading: str
    text: str
    comparison: dict
    figures: tuple[dict, ...] = ()


def write_page(
    path: Path,
    comparison: dict,
    runs: dict[str, RunScores],
    answers: dict | None,
    duplicates: dict[str, dict] | None,
    beside: tuple[dict, dict[str, RunScores]] | None = None,
    others: tuple[Section, ...] = (),
) -> None:
    """Write the page of a comparison (comparison.compare); answers: page_answers.shown_answers, where they may be
    shown; duplicates: data.near_duplicates.near_duplicates, where they were counted; beside: a comparison of runs of
    the same names on another base, and those runs; others: more comparisons."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, reference = comparison["rows"], comparison["reference"]
    names, records = list(runs), {name: scores.record for name, scores in runs.items()}
    columns = table_metrics(scored_tasks(runs.values()))
    shown = [one for one in columns if any(one.name in row["metrics"] for row in rows)]
    own = own_run(names, reference)
    drawn, absent = draw_figures(comparison, runs, own)
    page = environment.get_template("page.html.j2").render(
        title=TITLE,
        question=QUESTION,
        answer=verdict(comparison),
        setting=setting_text(records, alone=beside is None),
        reference=reference,
        columns=[column_of(one, rows) for one in shown]
        + [{"heading": h, "arrow": "", "about": a} for _, h, a, _ in COSTS],
        rows=[
            page_row(row, rows, shown, records, names) for row in sorted(rows, key=lambda row: KINDS.index(row["kind"]))
        ],
        statistics=statistics_text(comparison, shown),
        judges=judges_text(runs),
        figures=drawn,
        confusion=confusion(runs[own].routing, expert_names(runs[own])),
        gains=relative_gains(comparison),
        sections=[*([beside_section(comparison, records, *beside)] if beside else []), *map(section_of, others)],
        answers=answers,
        colours=figures.COLOURS,
        duplicates=duplicates,
        missing=[
            f"{heading}: no runs here to draw it from."
            for heading in absent
            if heading not in {figure["heading"] for section in others for figure in section.figures}
        ]
        + missing_text(rows, columns, shown, answers is not None, duplicates),
        made_by=made_by(records),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def own_run(names: list[str], reference: str) -> str:
    """Of the reference's runs by several seeds the first."""
    return next(name for name in names if split_seed(name)[0] == reference)


def reference_kind(comparison: dict) -> str:
    return next(row["kind"] for row in comparison["rows"] if row["run"] == comparison["reference"])


def verdict(comparison: dict) -> str:
    """The answer in a sentence or two: which rows the reference beats on the mean likelihood, and which not; its rivals
    first, then the other runs of its kind."""
    kind = reference_kind(comparison)
    compared = [row for row in comparison["rows"] if "mean_nll_per_token" in row["paired"]]
    rivals, variants = ([row for row in compared if (row["kind"] == kind) == own] for own in (False, True))
    if not compared:
        return "This page has no likelihoods of all three tasks to tell by."
    reference = f"the fused model ({comparison['reference']})" if kind == "fused" else comparison["reference"]
    families = (rivals, "rivals"), (variants, "other fusions" if kind == "fused" else f"other {kind} runs")
    parts = [outcomes(family, what) for family, what in families if family]
    return (
        f"By the likelihood of held-out answers {reference} is {'; and '.join(parts)} "
        f"(paired, p < {SIGNIFICANT} after Holm's correction)."
    )


def outcomes(rows: list[dict], what: str) -> str:
    """How many of these rows the reference beats, and by name those that it does not certainly beat."""
    better, undecided, worse = [], [], []
    for row in rows:
        difference = row["paired"]["mean_nll_per_token"]
        certain = difference["p_holm"] < SIGNIFICANT
        (undecided if not certain else better if difference["difference"] < 0 else worse).append(row["run"])
    parts = [f"better than {len(better)} of {len(rows)} {what}"] if better or not undecided + worse else []
    parts += [f"not certainly better or worse than {', '.join(undecided)}"] * bool(undecided)
    parts += [f"worse than {', '.join(worse)}"] * bool(worse)
    return ", and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


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
    rows = [row for row in comparison["rows"] if MEAN_NLL.name in row["metrics"]]
    shown = [MEAN_NLL, *(one for one in nll_metrics(TASKS) if all(one.name in row["metrics"] for row in rows))]
    return {
        "heading": section.heading,
        "text": section.text,
        "figures": section.figures,
        "reference": comparison["reference"],
        "columns": [f"{one.heading} ↓" for one in shown],
        "rows": [
            {
                "run": row["run"],
                "own": row["run"] == comparison["reference"],
                "cells": [score_cell(row, rows, one) for one in shown],
            }
            for row in sorted(rows, key=lambda row: row["metrics"][MEAN_NLL.name]["value"])
        ],
    }


def base_name(records: dict[str, dict | None]) -> str:
    """The base that the runs were made on, by its last name."""
    return next(Path(record["run"]["arguments"]["base_model"]).name for record in records.values() if record)


def setting_text(records: dict[str, dict | None], alone: bool) -> str:
    """Base, data and device in words. alone: no other base stands on the page."""
    made = [record for record in records.values() if record]
    if not made:
        return "Nothing is recorded of how the runs were made."
    arguments = made[0]["run"]["arguments"]
    base = base_name(records)
    data = Path(arguments.get("data_source") or "unrecorded").name
    data = data if data in ("hub", "sample", "unrecorded") else f"of the folder “{data}”"
    trained = [record["run"]["arguments"] for record in made if record["run"]["script"] == "align_basemodel.py"]
    samples = {arguments["num_samples"] for arguments in trained}
    questions = ", ".join("all" if n == -1 else str(n) for n in sorted(samples, key=str)) or "an unrecorded number of"
    devices = sorted({record["meta"].get("device", "an unrecorded device") for record in made})
    text = (
        f"Base model {base}; data {data}, {questions} training questions per task; made on {' and on '.join(devices)}."
    )
    if len(devices) > 1:
        text += " Seconds and tokens per second are of different devices."
    if base == "smollm2":
        text += " SmolLM2-135M-Instruct is the embedded Q4_1 file, dequantised"
        text += "; all rests on this one small model." if alone else "."
    if base == "gemma3":
        text += " Gemma 3 270M is a Q4_K_M file, dequantised."
    return text


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
        if difference["p_holm"] < SIGNIFICANT:
            tone = "good" if (difference["difference"] > 0) == one.higher_is_better else "bad"
    more = []
    if "of_seeds" in score:
        more.append(f"seeds {min(score['of_seeds']):.3f} to {max(score['of_seeds']):.3f}")
    if (corrected := score.get("corrected")) is not None:
        more.append(f"corrected {interval_text(corrected)}" if corrected["value"] is not None else "not correctable")
    return {
        "text": f"{score['value']:.3f}{interval}",
        "sort": score["value"],
        "bar": bar,
        "more": "; ".join(more),
        "paired": text,
        "tone": tone,
    }


def statistics_text(comparison: dict, columns: list) -> str:
    """How the tests are made, and what the numbers of items can show."""
    kind = reference_kind(comparison)
    text = (
        f"{INTERVALS}. Differences: bootstrap over questions; p by McNemar's exact test for yes-or-no scores of "
        "different questions, else by flipping the signs of the questions' differences; Holm's correction, column by "
        f"column, over the rows of kind “{kind}” and, apart from them, over all others. Scores of several seeds are "
        "averaged item by item first; two rows are compared over the seeds that both have. Intervals and p are of the "
        "questions: how much another seed would change stands beside the rows that have several (seeds … to …). "
        "Corrected: for the errors that a judge made on labelled answers."
    )
    if least := least_detectable_text(comparison, columns):
        text += f" True differences that would be found four times in five (at p < 0.05, uncorrected): {least}."
    return text


def least_detectable_text(comparison: dict, columns: list) -> str:
    """Of each score that was tested, the least difference that its items can show, over the rows."""
    parts = []
    for one in columns:
        tested = [row["paired"][one.name] for row in comparison["rows"] if one.name in row["paired"]]
        least = [difference["least_detectable"] for difference in tested if difference["least_detectable"]]
        if least:
            parts.append(f"{one.heading} {min(least):.3f} to {max(least):.3f} ({one.unit})")
    return ", ".join(parts)


def judges_text(runs: dict[str, RunScores]) -> str:
    """Who judged the answers, and how often those that were trained on labelled answers are right; "" without any."""
    said: dict[str, list[str]] = {}
    for one in JUDGED:
        for run in runs.values():
            if (result := run.metrics.get(one.name)) is None:
                continue
            text = result.judge[0]
            if corrected := result.score.get("corrected"):
                text += (
                    f" (right on {corrected['sensitivity']:.2f} of the labelled yes and "
                    f"{corrected['specificity']:.2f} of the labelled no, {corrected['n_labelled']} answers)"
                )
            said.setdefault(text, [])
            if one.heading not in said[text]:
                said[text].append(one.heading)
    parts = [f"{', '.join(headings)}: by {judge}" for judge, headings in said.items()]
    return f"Judges: {'; '.join(parts)}." if parts else ""


def command_of(record: dict) -> str:
    """The command that made a run; of one from before it was recorded, its settings."""
    if record["meta"].get("command"):
        return record["meta"]["command"]
    arguments = record["run"]["arguments"]
    settings = (f"{key}={value}" for key, value in arguments.items() if value is not None and "sha256" not in key)
    return f"{record['run']['script']}, its command not recorded, with {', '.join(settings)}"


def made_by(records: dict[str, dict | None]) -> str:
    """Versions, commit and checksums."""
    metas = [record["meta"] for record in records.values() if record and "packages" in record["meta"]]
    if not metas:
        return ""
    packages = " or ".join(
        sorted({", ".join(f"{name} {version}" for name, version in meta["packages"].items()) for meta in metas})
    )
    commits = sorted({str(meta.get("commit"))[:12] for meta in metas})
    sums = {}
    for record in records.values():
        sums |= (record or {"run": {"arguments": {}}})["run"]["arguments"].get("data_sha256") or {}
    data = ", ".join(f"{name} {value[:12]}" for name, value in sorted(sums.items()))
    pythons = " or ".join(sorted({meta["python"] for meta in metas}))
    versions = f"Python {pythons}, {packages}; commits {', '.join(commits)}"
    return f"{versions}. Data (sha256): {data or 'not recorded'}."


def relative_gains(comparison: dict) -> list[dict]:
    """How far the reference is below the best row of each kind that the paper compares with, in percent of that row's
    mean NLL, beside the paper's figure: {kind, run, gain, interval, paper}."""
    gains = []
    for kind, paper in PAPER_GAINS.items():
        rows = [row for row in comparison["rows"] if row["kind"] == kind and "mean_nll_per_token" in row["paired"]]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["metrics"]["mean_nll_per_token"]["value"])
        theirs, difference = best["metrics"]["mean_nll_per_token"]["value"], best["paired"]["mean_nll_per_token"]
        percent = [-100 * difference["difference"] / theirs]
        if difference["interval"]:
            percent += sorted(-100 * end / theirs for end in difference["interval"])
        gains.append({"kind": kind, "run": best["run"], "gain": percent[0], "interval": percent[1:], "paper": paper})
    return gains


def missing_text(rows: list[dict], columns: tuple, shown: list, with_texts: bool, duplicates: dict | None) -> list[str]:
    """What the page does not show, said."""
    kinds = {row["kind"] for row in rows}
    lines = [f"No row of kind {kind}." for kind in KINDS if kind not in kinds]
    scored = {one.name for one in shown}
    lines += [f"No run has {one.heading}." for one in columns if one.name not in scored]
    if not with_texts:
        lines.append("The answers themselves: their data may not be handed on, so that no text of it stands here.")
    if duplicates is None:
        lines.append("How many held-out questions the training rows nearly have: not counted.")
    single = [row["run"] for row in rows if len(row["seeds"]) == 1]
    if single:
        lines.append(f"More than one seed of {', '.join(single)}.")
    judged = {one.name for one in JUDGED}
    fewer = [row["run"] for row in rows if any(len(m["seeds"]) < len(row["seeds"]) for n, m in row["metrics"].items()
                                               if n in judged)]  # fmt: skip
    if fewer:
        lines.append(f"Answers by all seeds of {', '.join(fewer)}: their judged scores are of fewer.")
    return lines
