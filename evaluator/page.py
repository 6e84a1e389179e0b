"""The comparison as one self-contained page: what evaluator/comparison.py worked out, put into page.html.j2."""

import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from config import TASKS
from evaluator import figures
from evaluator.comparison import KINDS, split_seed
from evaluator.results import INTERVALS
from evaluator.run_scores import METRICS, RunScores
from workspace.files import read_json, read_lines

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
)
SIGNIFICANT = 0.05
SCRIPT_FOLDERS = {
    "llama_moe.py": "models/",
    "merging.py": "models/",
    "ensemble.py": "models/",
    "select_answers.py": "evaluator/",
}


def write_page(
    path: Path, comparison: dict, runs: dict[str, RunScores], results_dir: Path, split: str, with_texts: bool
) -> None:
    """Write the page of a comparison (comparison.compare); with_texts: show answers, which hold the data's texts."""
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
    shown = [one for one in METRICS if any(one.name in row["metrics"] for row in rows)]
    questions = side_by_side(results_dir, names, split) if with_texts else []
    drawn, absent = draw_figures(results_dir, comparison, records, names, split)
    page = environment.get_template("page.html.j2").render(
        title=TITLE,
        question=QUESTION,
        answer=verdict(comparison),
        setting=setting_text(records),
        reference=reference,
        columns=[column_of(one, rows) for one in shown]
        + [{"heading": h, "arrow": "", "about": a} for _, h, a, _ in COSTS],
        rows=[
            page_row(row, rows, shown, records, names) for row in sorted(rows, key=lambda row: KINDS.index(row["kind"]))
        ],
        statistics=statistics_text(comparison),
        figures=drawn,
        confusion=confusion(results_dir, reference, split),
        questions=questions,
        missing=absent + missing_text(rows, shown, with_texts),
        made_by=made_by(records),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def verdict(comparison: dict) -> str:
    """The answer in a sentence or two: which rows the reference beats on the mean likelihood, and which not."""
    beaten, not_beaten, lost = [], [], []
    for row in comparison["rows"]:
        if (difference := row["paired"].get("mean_nll_per_token")) is None:
            continue
        certain = difference["p_holm"] < SIGNIFICANT
        (beaten if certain and difference["difference"] < 0 else lost if certain else not_beaten).append(row["run"])
    if not beaten + not_beaten + lost:
        return "This page has no likelihoods of all three tasks to tell by."
    parts = [
        f"By the likelihood of held-out answers {comparison['reference']} is better than {len(beaten)} of the others"
    ]
    if not_beaten:
        parts.append(f"not certainly better or worse than {', '.join(not_beaten)}")
    if lost:
        parts.append(f"and worse than {', '.join(lost)}")
    return "; ".join(parts) + f" (paired, p < {SIGNIFICANT} after Holm's correction)."


def setting_text(records: dict[str, dict | None]) -> str:
    """Base, data and device in words."""
    made = [record for record in records.values() if record]
    if not made:
        return "Nothing is recorded of how the runs were made."
    arguments = made[0]["run"]["arguments"]
    base = Path(arguments["base_model"]).name
    data = Path(arguments.get("data_source") or "unrecorded").name
    samples = {
        record["run"]["arguments"]["num_samples"] for record in made if "num_samples" in record["run"]["arguments"]
    }
    rows = ", ".join("all" if n == -1 else str(n) for n in sorted(samples, key=str)) or "an unrecorded number of"
    device = made[-1]["meta"].get("device", "an unrecorded device")
    text = f"Base model {base}; data {data}, {rows} training rows per task; made on {device}."
    if base == "smollm2":
        text += " SmolLM2-135M-Instruct is the embedded Q4_1 file, dequantised; all rests on this one small model."
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
        cells.append({"text": text, "sort": "" if value is None else value, "bar": None, "paired": None, "tone": ""})
    own = [name for name in names if split_seed(name)[0] == row["run"] and records.get(name)]
    command = "\n".join(command_of(records[name]) for name in own)
    return {"run": row["run"], "kind": row["kind"], "seeds": row["seeds"], "cells": cells, "command": command}


def score_cell(row: dict, rows: list[dict], one) -> dict:
    """One score: its text, a bar of its interval on the column's scale, and the paired difference."""
    score = row["metrics"].get(one.name)
    if score is None:
        return {"text": None, "sort": "", "bar": None, "paired": None, "tone": ""}
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
    return {"text": f"{score['value']:.3f}{interval}", "sort": score["value"], "bar": bar, "paired": text, "tone": tone}


def statistics_text(comparison: dict) -> str:
    """How the tests are made, and what the numbers of items can show."""
    least = [
        row["paired"]["mean_nll_per_token"]["least_detectable"]
        for row in comparison["rows"]
        if "mean_nll_per_token" in row["paired"]
    ]
    text = (
        f"{INTERVALS}. Differences: bootstrap over questions; p by McNemar's exact test for yes-or-no scores of "
        "different questions, else by flipping the signs of the questions' differences; Holm's correction over the "
        "rows of a column. Scores of several seeds are averaged item by item first."
    )
    if least:
        text += (
            f" On the mean NLL, true differences of {min(least):.3f} to {max(least):.3f} nats would be found four "
            "times in five (at p < 0.05, uncorrected)."
        )
    return text


def command_of(record: dict) -> str:
    """The command that makes a run again, from what it recorded."""
    script, arguments = record["run"]["script"], record["run"]["arguments"]
    left_out = ("base_sha256", "data_sha256", "adapters_sha256", "fused_sha256", "answers_sha256", "judge_version")
    words = ["python", SCRIPT_FOLDERS.get(script, "") + script]
    for name, value in arguments.items():
        if value is not None and name not in left_out and not isinstance(value, dict):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name}", Path(text).name if name in ("base_model", "data_source") else text]
    return shlex.join(words)


def made_by(records: dict[str, dict | None]) -> str:
    """Versions, commit and checksums."""
    metas = [record["meta"] for record in records.values() if record and "packages" in record["meta"]]
    if not metas:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in metas[-1]["packages"].items())
    commits = sorted({str(meta.get("commit"))[:12] for meta in metas})
    sums = {}
    for record in records.values():
        sums |= (record or {"run": {"arguments": {}}})["run"]["arguments"].get("data_sha256") or {}
    data = ", ".join(f"{name} {value[:12]}" for name, value in sorted(sums.items()))
    versions = f"Python {metas[-1]['python']}, {packages}; commits {', '.join(commits)}"
    return f"{versions}. Data (sha256): {data or 'not recorded'}."


def draw_figures(results_dir: Path, comparison: dict, records: dict, names: list[str], split: str):
    """(figures for the page, sentences on those that could not be drawn)."""
    reference = comparison["reference"]
    own = next(name for name in names if split_seed(name)[0] == reference)
    usage = {}
    for task in TASKS:
        path = results_dir / "observation" / task / split / f"cross_{own}" / "routing.json"
        if path.exists():
            usage[task] = read_json(path)
    log = ((records.get(own) or {}).get("train") or {}).get("log", [])
    lambdas, gammas, top_ks, histograms = fusion_sweeps(results_dir, comparison, records, names, split)
    experts = next((u["experts"] for u in usage.values()), list(TASKS))
    rows = comparison["rows"]
    candidates = [
        (
            "Quality against cost",
            figures.quality_against_cost(rows, KINDS),
            "Each row's mean NLL per token over the parameters that were trained for it.",
        ),
        ("The fusion's training", figures.training_curves(log), f"The alignment of {reference}, as logged."),
        ("Sweep over λ", figures.sweep(lambdas, "λ of the gating loss"), "Fusions that differ in λ alone."),
        ("Sweep over γ", figures.sweep(gammas, "γ of all experts"), "Fusions that differ in γ alone, alike for all."),
        ("Sweep over k", figures.sweep(top_ks, "experts per token"), "Fusions that differ in experts per token alone."),
        (
            "The paper's figure: routing weights for each γ₁",
            figures.weight_histograms(histograms, experts),
            "Each expert's mean routing weight on a prompt, over the prompts of all tasks.",
        ),
        (
            "Where tokens go",
            figures.routing_heat(usage),
            f"Mean routing weight of each expert of {reference} over the tokens of prompts and answers.",
        ),
    ]
    drawn = [{"heading": h, "svg": svg, "caption": caption} for h, svg, caption in candidates if svg]
    return drawn, [f"{heading}: no runs here to draw it from." for heading, svg, _ in candidates if not svg]


def fusion_sweeps(results_dir: Path, comparison: dict, records: dict, names: list[str], split: str):
    """Points over λ, γ (alike for all experts) and k, and routing weights by γ₁, of fusions else as the reference."""
    keys = ("gate_loss_weight", "expert_topk", *(f"{task}_weight" for task in TASKS))
    mean_of = {
        row["run"]: row["metrics"]["mean_nll_per_token"]["value"]
        for row in comparison["rows"]
        if "mean_nll_per_token" in row["metrics"]
    }
    runs = {}
    for name in names:
        record = records.get(name)
        if record and record["run"]["arguments"].get("moe_flag") == 1 and split_seed(name)[0] in mean_of:
            runs[split_seed(name)[0]] = (name, record["run"]["arguments"])
    if comparison["reference"] not in runs:
        return [], [], [], {}
    _, ours = runs[comparison["reference"]]

    def points(free: tuple[str, ...], value) -> list[tuple[float, float, str]]:
        fixed = [key for key in ours if key not in free and key != "run_name"]
        alike = {run: a for run, (_, a) in runs.items() if all(a.get(key) == ours.get(key) for key in fixed)}
        return [(value(a), mean_of[run], run) for run, a in alike.items() if value(a) is not None]

    weights = keys[2:]
    lambdas = points(("gate_loss_weight",), lambda a: a["gate_loss_weight"])
    gammas = points(weights, lambda a: a[weights[0]] if len({a[w] for w in weights}) == 1 else None)
    top_ks = points(("expert_topk",), lambda a: a["expert_topk"])
    first = points((weights[0],), lambda a: a[weights[0]])
    histograms = {}
    for gamma, _, run in sorted(first) if len(first) > 1 else []:
        histograms[f"γ₁ = {gamma:g}"] = [
            row["routing_probs"] for task in TASKS for row in routing_rows(results_dir, task, split, runs[run][0])
        ]
    return lambdas, gammas, top_ks, {name: probs for name, probs in histograms.items() if probs}


def routing_rows(results_dir: Path, task: str, split: str, name: str) -> list[dict]:
    """The routing judgements of a run's questions of a task."""
    path = results_dir / "evaluation" / task / split / name / "likelihood" / "judgements.jsonl"
    return [row for row in read_lines(path) if row["metric"] == "routing_accuracy"] if path.exists() else []


def confusion(results_dir: Path, reference: str, split: str) -> dict | None:
    """Of each task's questions, how many go most to each expert."""
    rows = []
    for task in TASKS:
        probs = [row["routing_probs"] for row in routing_rows(results_dir, task, split, reference)]
        if probs:
            counts = [0] * len(probs[0])
            for of_question in probs:
                counts[of_question.index(max(of_question))] += 1
            rows.append((task, counts))
    return {"experts": list(TASKS)[: len(rows[0][1])], "rows": rows} if rows else None


def side_by_side(results_dir: Path, names: list[str], split: str, num_questions: int = 12) -> list[dict]:
    """Answers of the runs to the same prompts: {task, question, answers: [{run, text, verdict}]}."""
    items = []
    for task in TASKS:
        answers: dict[str, list[tuple[str, str]]] = {}
        questions = {}
        for name in names:
            for directory in (f"cross_{name}", name):
                path = results_dir / "inference" / task / split / directory / "outputs.jsonl"
                if not path.exists():
                    continue
                for row in read_lines(path):
                    questions[row["id"]] = row["instruction"]
                    answers.setdefault(row["id"], []).append((name, row["output"]))
        shared = [id for id, given in answers.items() if len(given) > 1][:num_questions]
        items += [
            {
                "task": task,
                "question": questions[id],
                "answers": [{"run": run, "text": text, "verdict": None} for run, text in answers[id]],
            }
            for id in shared
        ]
    return items


def missing_text(rows: list[dict], shown: list, with_texts: bool) -> list[str]:
    """What the page does not show, said."""
    kinds = {row["kind"] for row in rows}
    lines = [f"No row of kind {kind}." for kind in KINDS if kind not in kinds]
    scored = {one.name for one in shown}
    lines += [f"No run has {one.heading}." for one in METRICS if one.name not in scored]
    if not with_texts:
        lines.append("The answers themselves: their data may not be handed on, so that no text of it stands here.")
    single = [row["run"] for row in rows if len(row["seeds"]) == 1]
    if single:
        lines.append(f"More than one seed of {', '.join(single)}.")
    return lines
