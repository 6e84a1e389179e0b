"""Tasks in conflict, docs/when_to_fuse.md: refusing beside helping, and the dial on the routers, from the rows of
runs/conflict.sh."""

import math
from functools import cache

from committed import RESULTS, difference_text, kept_runs, row_of

from config import BIAS
from evaluator import figures
from evaluator.comparison import compare
from evaluator.run_scores import JUDGED, SHARES, RunScores, nll_metric
from evaluator.statistics import interval_text

FOLDER = RESULTS / "conflict"
FUSED = "fused"
SAFE, FLAGGED, REFUSES, HELPS = (
    *(one for one in SHARES if one.name == "safe_preferred"),
    *(one for one in JUDGED if one.name in ("flagged", "over_refusal")),
    nll_metric("helpfulness"),
)
SHOWN = (SAFE, FLAGGED, REFUSES, HELPS)
WORDS = {
    "raw": "the base",
    "helpfulness": "the helping expert",
    "safety": "the refusing expert",
    "mixed": "one LoRA on both tasks' rows",
    "merge_linear": "their mean",
    "merge_linear_safety_2": "their mean, the refusing one counted twice",
    "ensemble_probabilities": "the ensemble of their probabilities",
    "by_prompt": "fusion routed by prompt, not aligned",
    "prompted": "fusion routed by prompt, aligned",
    FUSED: "fusion routed by token, aligned",
}
WEIGHED = {"helpfulness": "0", "merge_linear": "1", "merge_linear_safety_2": "2", "safety": "only"}  # in the mean
ACROSS, UNSAFE, JUDGED_UNSAFE = "harmless prompts refused", "unsafe answer preferred", "answers flagged as unsafe"
CAPTION = (
    "Share of pairs whose unsafe answer is preferred, and of answers that a small judge flags, over the share of "
    "XSTest's harmless prompts that are refused: left and down is better. Along the dial: the refusing expert's bias; "
    "along the mean: its weight; along γ₂: its drift's weight, one training for each value."
)
SETTING = (
    "One expert has learnt to refuse from 160 safe answers of pairs, one to help from 160 questions of Alpaca; three "
    "epochs, one seed. Scored on 60 other pairs, 100 unsafe prompts (answers judged by a small judge) and XSTest."
)
OFF = {"safety_off": -math.inf, "helpfulness_off": math.inf}  # where the dial ends


@cache
def compared() -> tuple[dict[str, RunScores], dict]:
    """(the kept rows, their comparison with the fusion)."""
    runs = kept_runs(FOLDER)
    return runs, compare(runs, FUSED)


def dialled(run: str) -> float | None:
    """The refusing expert's bias; None: the run is another."""
    if run == FUSED:
        return 0.0
    name, _, bias = run.partition(f"{FUSED}{BIAS}")
    return OFF[bias] if bias in OFF else float(bias.removeprefix("safety_")) if bias and not name else None


def gamma_2(run: str) -> float | None:
    """γ of the refusing expert; None: the run is no fusion by token, or is scored with a bias."""
    if BIAS in run or not run.startswith(FUSED):
        return None
    of_name, _ = compared()
    return float(of_name[run].record["run"]["arguments"]["safety_weight"])


def in_words(run: str) -> str:
    if run in WORDS:
        return WORDS[run]
    bias = dialled(run)
    return (
        f"that fusion, {said_of_dial(bias)}" if bias is not None else f"that fusion, aligned with γ₂ = {gamma_2(run):g}"
    )


def said_of_dial(bias: float) -> str:
    return "--expert_bias safety=" + {-math.inf: "off", math.inf: "only"}.get(bias, f"{bias:g}")


def label(value: float) -> str:
    """Of a point on a path."""
    return {0: "fusion", -math.inf: "off", math.inf: "only"}.get(value, f"{value:+g}")


def conflict() -> str:
    """Every run's scores, and the fusion's paired difference from it."""
    lines = [
        "| run | " + " | ".join(f"{one.directed} | fusion − run" for one in SHOWN) + " |",
        "| --- " * (1 + 2 * len(SHOWN)) + "|",
    ]
    for row in sorted(compared()[1]["rows"], key=lambda row: (row["metrics"][REFUSES.name]["value"], row["run"])):
        cells = [in_words(row["run"])]
        for one in SHOWN:
            cells += [interval_text(row["metrics"][one.name]), difference_text(row, one.name) if row["paired"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dial_or_mean() -> str:
    """The dial turned down against the mean of the experts, which needs no training either: tested by itself."""
    runs, _ = compared()
    table = compare(
        {name: runs[name] for name in ("merge_linear", f"{FUSED}{BIAS}safety_-2")}, f"{FUSED}{BIAS}safety_-2"
    )
    mean = row_of(table, "merge_linear")
    differences = [f"{one.heading} {difference_text(mean, one.name)}" for one in SHOWN]
    return f"The dial at −2 less the experts' mean, tested by itself: {'; '.join(differences)}."


def frontier() -> str:
    """Unsafe answers preferred, and flagged, against over-refusal: a point a run; the dial's, the mean's and γ₂'s
    joined."""
    points, paths = {}, {"the dial: no training": dialled, "γ₂: one training each": gamma_2}
    for row in compared()[1]["rows"]:
        safe, flagged, refuses = (row["metrics"][one.name]["value"] for one in (SAFE, FLAGGED, REFUSES))
        points[row["run"]] = {ACROSS: refuses, UNSAFE: 1 - safe, JUDGED_UNSAFE: flagged}
    drawn = {}
    for line, setting in paths.items():
        of_path = sorted((value, run) for run in points if (value := setting(run)) is not None)
        drawn[line] = {run: label(value) for value, run in of_path}
    drawn["the mean's weight: no training"] = WEIGHED
    placed = {run for of_path in drawn.values() for run in of_path}
    named = {run if run in placed else WORDS[run]: values for run, values in points.items()}
    return figures.trade_off(named, ACROSS, drawn)
