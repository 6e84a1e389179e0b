"""Ablations, docs/comparison.md: fusions that differ in one thing from the method, on few questions, from the rows of
runs/comparison.sh --rivals 0."""

from functools import cache

from committed import NLL, REFERENCE, RESULTS, difference_text, kept_runs, minus, row_of

from evaluator.comparison import compare
from evaluator.metrics import MEAN_NLL, SHARES
from evaluator.page_figures import sweep_figures
from evaluator.page_sections import Section
from evaluator.page_words import outcomes
from evaluator.paired import CERTAIN
from evaluator.run_scores import RunScores
from evaluator.statistics import interval_text
from evaluator.sweeps import Alike

FOLDER = RESULTS / "ablations"
GAMMAS = ("0.0001", "0.001", "0.01", "0.1", "1")
ALL = (
    *("fused_prototype", "fused_fresh_experts", "fused_router_frozen", "fused_router_alone", "fused_attention"),
    *("fused_top_1", "fused_top_3", "fused_gate_0", "fused_gate_0.01", "fused_gate_0.1", "fused_gate_1"),
    *(f"fused_gamma_{which}{gamma}" for gamma in GAMMAS for which in ("1_", "2_", "3_", "")),
)
SAFE = next(one for one in SHARES if one.name == "safe_preferred")
SETTING = (
    "Forty training questions per task, one epoch, one seed, up to 60 held-out rows per score, bfloat16: a comparison "
    "of fusions with each other alone."
)


@cache
def compared() -> tuple[dict[str, RunScores], dict]:
    """(the kept rows, the comparison of the aligned fusions with the method)."""
    runs = kept_runs(FOLDER)
    return runs, compare({name: run for name, run in runs.items() if name.startswith(("fused", REFERENCE))}, REFERENCE)


def in_words() -> str:
    """Which fusions the method beats, and what γ does to the distance from the start and to safety."""
    runs, table = compared()
    others = [row for row in table["rows"] if row["run"] != REFERENCE]
    alike = Alike(runs, REFERENCE)
    drifts = [f"{x:g}: {y:.3f}" for x, y, _ in alike.points("helpfulness_weight", alike.embedding_drift)]
    safe = {x: row_of(table, name)["paired"][SAFE.name] for x, name in alike.by("safety_weight") if name != REFERENCE}
    parts = [f"By the mean likelihood the method is {outcomes(others, 'other fusions')} (paired, {CERTAIN})."]
    if len(drifts) > 1:
        parts.append(f"Distance of its embeddings from those at γ₁ = 0, by γ₁: {', '.join(drifts)}.")
    if safe and not any(paired["difference"] for paired in safe.values()):
        parts.append(f"The safe answer is preferred as often at γ₂ = {', '.join(f'{x:g}' for x in safe)} as at 0.")
    elif safe:
        shares = [f"{x:g}: {minus(-paired['difference'])} (p = {paired['p_holm']:.2g})" for x, paired in safe.items()]
        parts.append(f"Safe answer preferred at γ₂, less that at γ₂ = 0: {', '.join(shares)}.")
    if missing := [name for name in ALL if name not in runs]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    return " ".join(parts)


def document() -> str:
    """The words and the table of all ablations, the best on top."""
    _, table = compared()
    lines = [
        "| run | mean NLL/token ↓ | fused − run, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + f" | {SAFE.directed} | fused − run | trained, M |",
        "| --- " * (6 + len(NLL)) + "|",
    ]
    for row in sorted(table["rows"], key=lambda row: row["metrics"][MEAN_NLL.name]["value"]):
        own = row["run"] == REFERENCE
        cells = [
            row["run"],
            interval_text(row["metrics"][MEAN_NLL.name]),
            "" if own else difference_text(row),
            *(f"{row['metrics'][one.name]['value']:.3f}" for one in NLL),
            f"{row['metrics'][SAFE.name]['value']:.3f}",
            "" if own else difference_text(row, SAFE.name),
            f"{row['cost']['trained_parameters'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([in_words(), "", *lines])


def section() -> Section:
    """What the report's page shows of it."""
    runs, table = compared()
    drawn = tuple(
        {"heading": heading, "svg": svg, "caption": caption}
        for heading, svg, caption in sweep_figures(runs, REFERENCE)
        if svg
    )
    return Section("Ablations, on few questions", f"{SETTING} {in_words()}", table, drawn, (MEAN_NLL, *NLL, *SHARES))
