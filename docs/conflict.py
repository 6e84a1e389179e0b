"""Tasks in conflict, docs/when_to_fuse.md: refusing beside helping, and the dial on the routers, from the rows of
runs/conflict.sh."""

import math
from functools import cache
from pathlib import Path

from committed import RESULTS, difference_text, kept_runs, row_of

from config import BIAS
from evaluator import figures
from evaluator.comparison import compare, split_seed
from evaluator.metrics import JUDGED, SHARES, nll_metric
from evaluator.results import corrected_text
from evaluator.run_scores import RunScores
from evaluator.statistics import interval_text

CONFIRMED = RESULTS / "conflict"  # three seeds
ONE_SEED = CONFIRMED / "one_seed"  # more runs, by another judge and on another machine
FUSED, OF_GAMMA = "fused", "fused_gamma_2_"
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
    "along the mean: its weight."
)
SETTING = (
    "One expert has learnt to refuse from 160 safe answers of pairs, one to help from 160 questions of Alpaca; three "
    "epochs, three seeds. Scored on 100 other pairs, 150 prompts of BeaverTails, harmful and harmless (answers judged "
    "by a small judge), and 150 of XSTest."
)
OFF = {"safety_off": -math.inf, "helpfulness_off": math.inf}  # where the dial ends


@cache
def compared(folder: Path) -> tuple[dict[str, RunScores], dict]:
    """(the kept rows of a folder, their comparison with the fusion)."""
    runs = kept_runs(folder)
    return runs, compare(runs, FUSED)


def dialled(run: str) -> float | None:
    """The refusing expert's bias; None: the run is another."""
    if run == FUSED:
        return 0.0
    name, _, bias = run.partition(f"{FUSED}{BIAS}")
    return OFF[bias] if bias in OFF else float(bias.removeprefix("safety_")) if bias and not name else None


def gamma_2(run: str) -> float | None:
    """γ of the refusing expert; None: the run is no fusion by token, or is scored with a bias."""
    return 0.0 if run == FUSED else float(run.removeprefix(OF_GAMMA)) if run.startswith(OF_GAMMA) else None


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
    return table_of(CONFIRMED)


def conflict_of_one_seed() -> str:
    return table_of(ONE_SEED)


def table_of(folder: Path) -> str:
    """Every run's scores, and the fusion's paired difference from it."""
    runs, table = compared(folder)
    lines = [
        "| run | " + " | ".join(f"{one.directed} | fusion − run" for one in SHOWN) + " |",
        "| --- " * (1 + 2 * len(SHOWN)) + "|",
    ]
    for row in sorted(table["rows"], key=lambda row: (row["metrics"][REFUSES.name]["value"], row["run"])):
        cells = [in_words(row["run"])]
        for one in SHOWN:
            score = row["metrics"][one.name]
            value = "; ".join(filter(None, [interval_text(score), corrected_text(score)]))
            cells += [value, difference_text(row, one.name) if row["paired"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", judges_errors(runs)])


def judges_errors(runs: dict[str, RunScores]) -> str:
    """How often the judge of the flagged answers errs on labelled ones."""
    corrected = runs["raw"].metrics[FLAGGED.name].score["corrected"]
    return (
        f"Of {corrected['n_labelled']} labelled answers the judge flags {corrected['sensitivity']:.2f} of the unsafe "
        f"and {1 - corrected['specificity']:.2f} of the harmless ones. Corrected: the share of unsafe answers that "
        "these errors leave likely; *not correctable*: so few are flagged that its false alarms alone would hardly be "
        "so few (in 5 % of draws at most). Such answers are not like the labelled ones, and what differs between two "
        "such runs is not known to be their safety."
    )


def dial_or_mean() -> str:
    """The dial turned down against the mean of the experts, which needs no training either: tested by itself."""
    runs, _ = compared(CONFIRMED)
    dial = f"{FUSED}{BIAS}safety_-2"
    pair = {name: run for name, run in runs.items() if split_seed(name)[0] in (dial, "merge_linear")}
    mean = row_of(compare(pair, dial), "merge_linear")
    differences = [f"{one.heading} {difference_text(mean, one.name)}" for one in SHOWN]
    return f"The dial at −2 less the experts' mean, tested by itself: {'; '.join(differences)}."


def frontier() -> str:
    """Unsafe answers preferred, and flagged, against over-refusal: a point a run; the dial's and the mean's joined."""
    points = {}
    for row in compared(CONFIRMED)[1]["rows"]:
        safe, flagged, refuses = (row["metrics"][one.name]["value"] for one in (SAFE, FLAGGED, REFUSES))
        points[row["run"]] = {ACROSS: refuses, UNSAFE: 1 - safe, JUDGED_UNSAFE: flagged}
    of_dial = sorted((value, run) for run in points if (value := dialled(run)) is not None)
    drawn = {
        "the dial: no training": {run: label(value) for value, run in of_dial},
        "the mean's weight: no training": {run: label for run, label in WEIGHED.items() if run in points},
    }
    placed = {run for of_path in drawn.values() for run in of_path}
    named = {run if run in placed else WORDS[run]: values for run, values in points.items()}
    return figures.trade_off(named, ACROSS, drawn)
