"""Tasks in conflict, docs/when_to_fuse.md: refusing beside helping, and the dial on the routers, from the rows of
runs/conflict.sh."""

import math
from functools import cache

from committed import RESULTS, difference_text, kept_runs, row_of

from config import BIAS
from evaluator import figures
from evaluator.comparison import compare
from evaluator.run_scores import JUDGED, SHARES, Metric, RunScores, nll_metric
from evaluator.statistics import interval_text

FOLDER = RESULTS / "conflict"
FUSED = "fused"
SAFE, FLAGGED, REFUSES, HELPS = (
    *(one for one in SHARES if one.name == "safe_preferred"),
    *(one for one in JUDGED if one.name in ("flagged", "over_refusal")),
    nll_metric("helpfulness"),
)
SHOWN = (SAFE, REFUSES, FLAGGED, HELPS)
CAPTION = (
    "Unsafe answers preferred against refusals of XSTest's safe prompts: left and down is better. Along the dial: the "
    "safety expert's bias; along γ₂: one training for each value."
)
OFF = {"safety_off": -math.inf, "helpfulness_off": math.inf}  # where the dial ends


@cache
def compared() -> tuple[dict[str, RunScores], dict]:
    """(the kept rows, their comparison with the fusion)."""
    runs = kept_runs(FOLDER)
    return runs, compare(runs, FUSED)


def dialled(run: str) -> float | None:
    """The safety expert's bias; None: the run is another."""
    if run == FUSED:
        return 0.0
    name, _, bias = run.partition(f"{FUSED}{BIAS}")
    return OFF[bias] if bias in OFF else float(bias.removeprefix("safety_")) if bias and not name else None


def gamma_2(run: str) -> float | None:
    """γ of the safety expert; None: the run is no fusion, or is scored with a bias."""
    if BIAS in run or not run.startswith(FUSED):
        return None
    of_name, _ = compared()
    return float(of_name[run].record["run"]["arguments"]["safety_weight"])


def table() -> list[dict]:
    return compared()[1]["rows"]


def value_of(row: dict, one: Metric) -> float:
    return row["metrics"][one.name]["value"]


def conflict() -> str:
    """Every run's scores, and the fusion's paired difference from it."""
    lines = [
        "| run | "
        + " | ".join(f"{one.heading} {'↑' if one.higher_is_better else '↓'} | {FUSED} − run" for one in SHOWN)
        + " |",
        "| --- " * (1 + 2 * len(SHOWN)) + "|",
    ]
    for row in sorted(table(), key=lambda row: -value_of(row, SAFE)):
        cells = [row["run"]]
        for one in SHOWN:
            cells += [interval_text(row["metrics"][one.name]), difference_text(row, one.name) if row["paired"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier() -> str:
    """Unsafe answers preferred against over-refusal, a point a run; the dial's and γ₂'s joined in their order."""
    paths = {"the dial: no training": dialled, "γ₂: one training each": gamma_2}
    placed, drawn = set(), {}
    for label, setting in paths.items():
        of_path = sorted((setting(row["run"]), *point(row)) for row in table() if setting(row["run"]) is not None)
        drawn[label] = [(x, y, name) for _, x, y, name in of_path]
        placed |= {name for *_, name in of_path}
    alone = [point(row) for row in table() if row["run"] not in placed]
    return figures.trade_off(drawn, alone, ("over-refusal on XSTest's safe prompts", "unsafe answer preferred"))


def point(row: dict) -> tuple[float, float, str]:
    return value_of(row, REFUSES), 1 - value_of(row, SAFE), row["run"]


def row(run: str) -> dict:
    return row_of(compared()[1], run)
