"""Which figures the comparison's page shows, and from which runs; figures.py draws them."""

from config import TASKS
from evaluator import figures
from evaluator.comparison import KINDS
from evaluator.run_scores import RunScores
from evaluator.sweeps import Alike, safe_preferred


def draw_figures(comparison: dict, runs: dict[str, RunScores], own: str) -> tuple[list[dict], list[str]]:
    """(figures for the page, the headings of those that could not be drawn); own: the reference with its seed."""
    reference, rows = comparison["reference"], comparison["rows"]
    log = ((runs[own].record or {}).get("train") or {}).get("log", [])
    usage = runs[own].usage
    candidates = [
        (
            "What the fused model is better than",
            figures.differences(rows, reference, KINDS),
            f"The mean NLL per token of {reference} less each row's, paired by question, with 95 % intervals.",
        ),
        (
            "Quality against cost",
            figures.quality_against_cost(rows, reference, KINDS),
            "Each row's mean NLL per token over the parameters trained for it. Names without room are left out.",
        ),
        ("The fusion's training", figures.training_curves(log), f"The alignment of {reference}, as logged."),
        *sweep_figures(runs, own),
        (
            "Where tokens go",
            figures.routing_heat(usage),
            f"Mean routing weight of each expert of {reference} over the tokens of prompts and answers.",
        ),
    ]
    drawn = [{"heading": h, "svg": svg, "caption": caption} for h, svg, caption in candidates if svg]
    return drawn, [heading for heading, svg, _ in candidates if not svg]


def sweep_figures(runs: dict[str, RunScores], own: str) -> list[tuple[str, str | None, str]]:
    """(heading, figure, caption) of the fusions that differ from `own` in one setting; None for a figure of none."""
    alike = Alike(runs, own)
    helpfulness, safety, _ = (f"{task}_weight" for task in TASKS)
    of_gamma_1 = alike.by(helpfulness)
    histograms = {
        f"γ₁ = {gamma:g}": [probs for of_task in runs[name].routing.values() for probs in of_task]
        for gamma, name in (of_gamma_1 if len(of_gamma_1) > 1 else [])
    }
    return [
        (
            "Sweep over λ",
            figures.sweep(
                alike.points("gate_loss_weight", alike.mean_nll), "λ of the gating loss", "mean NLL per token"
            ),
            "Fusions that differ in λ alone.",
        ),
        (
            "Sweep over γ",
            figures.sweep(alike.gammas(), "γ of all experts", "mean NLL per token"),
            "Fusions that differ in γ alone, alike for all experts.",
        ),
        (
            "Sweep over k",
            figures.sweep(alike.points("expert_topk", alike.mean_nll), "experts per token", "mean NLL per token"),
            "Fusions that differ in the experts per token alone.",
        ),
        (
            "The paper's figure: routing weights for each γ₁",
            figures.weight_histograms(
                {name: probs for name, probs in histograms.items() if probs}, expert_names(runs[own])
            ),
            "Each expert's mean routing weight on a prompt, over the prompts of all tasks.",
        ),
        (
            "The paper's figure: embedding drift over γ₁",
            figures.sweep(alike.points(helpfulness, alike.embedding_drift), "γ₁", "distance"),
            "Distance of the mean final hidden state of a prompt from that of the reference, over that one's length; "
            "mean over the prompts of all tasks.",
        ),
        (
            "Safety against γ₂",
            figures.sweep(alike.points(safety, safe_preferred), "γ₂ of the safety expert", "safe preferred"),
            "The share of prompts whose safe answer is likelier than the unsafe one. A reader reports of the paper's "
            "section 5.1 that more regularisation of the safety expert makes the model less safe.",
        ),
    ]


def expert_names(run: RunScores) -> list[str]:
    """The experts of an aligned fusion, in order; the paper's where nothing is recorded."""
    fused = ((run.record or {}).get("meta") or {}).get("fused") or {}
    return fused.get("experts") or next((u["experts"] for u in run.usage.values()), list(TASKS))


def confusion(routing: dict[str, list[list[float]]], experts: list[str]) -> dict | None:
    """Of each task's questions, how many go most to each expert."""
    rows = []
    for task, probs in routing.items():
        counts = [0] * len(probs[0])
        for of_question in probs:
            counts[of_question.index(max(of_question))] += 1
        rows.append((task, counts))
    return {"experts": experts[: len(rows[0][1])], "rows": rows} if rows else None
