"""The committed comparison: docs/results/*.json, into the page, README's table and picture and docs/reproduction.md's.

python docs/comparison.py       after runs/comparison.sh --save docs/results
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluator import figures
from evaluator.comparison import KINDS, compare, split_seed
from evaluator.kept_runs import DUPLICATES, read_kept
from evaluator.page import SIGNIFICANT, verdict, write_page
from evaluator.page_answers import SHOWN
from evaluator.run_scores import NLL, RunScores
from evaluator.statistics import interval_text
from workspace.files import read_json, write_json

RESULTS = ROOT / "docs" / "results"
TABLE = ROOT / "docs" / "report" / "table.json"  # the comparison in numbers, beside the page
REFERENCE = "mix_moe_reg_00000_00000_00000_gate_03000"
MAIN = (
    "raw",
    "raw_chat",
    "helpfulness",
    "safety",
    "truthfulness",
    "merge_linear",
    "merge_ties",
    "ensemble_probabilities",
    "mixed_rank_24",
    "mixed_rank_24_twice",
    "moe",
    REFERENCE,
)
BEGIN, END = "<!-- made by docs/comparison.py: {} -->", "<!-- to here -->"


def kept_runs() -> dict[str, RunScores]:
    """All kept runs: the main ones first, in this order, each with its seeds, then the others by name."""
    names = [path.stem for path in RESULTS.glob("*.json") if path.name not in (DUPLICATES, SHOWN)]

    def place(name: str) -> tuple:
        run, seed = split_seed(name)
        return (MAIN.index(run) if run in MAIN else len(MAIN), run, seed)

    return {name: read_kept(RESULTS, name) for name in sorted(names, key=place)}


def difference_text(row: dict) -> str:
    """fused - run, its interval and p."""
    paired = row["paired"].get("mean_nll_per_token")
    if paired is None:
        return "–"
    low, high = paired["interval"]
    return f"{paired['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {paired['p_holm']:.2g}".replace("-", "−")


def sentences(comparison: dict) -> str:
    """What the paired tests say, of all rows and, task by task, of one LoRA on the mixed data."""
    rows = {row["run"]: row for row in comparison["rows"]}
    seeds = {name: len(row["seeds"]) for name, row in rows.items() if name in MAIN and row["kind"] != "raw"}
    text = [
        "SmolLM2-135M-Instruct, 160 questions per task of Alpaca, BeaverTails / PKU-SafeRLHF and TruthfulQA, two "
        "epochs; up to 200 held-out rows per task (docs/reproduction.md). " + verdict(comparison)
    ]
    parts = []
    for one in NLL:
        paired = rows["mixed_rank_24"]["paired"][one.name]
        certain = paired["p_holm"] < SIGNIFICANT
        word = "not certainly different" if not certain else "better" if paired["difference"] < 0 else "worse"
        parts.append(f"{word} on {one.task} ({minus(paired['difference'])})")
    text.append(
        "Against one LoRA of as many parameters, on the same rows for as many steps (`mixed_rank_24`): "
        + ", ".join(parts)
        + "."
    )
    if (fewest := min(seeds.values())) < 3:
        text.append(
            f"So far of {fewest} seed{'s' if fewest > 1 else ''}: {', '.join(n for n, k in seeds.items() if k < 3)}."
        )
    return " ".join(text)


def minus(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def table(comparison: dict, names: tuple[str, ...] | None = None) -> str:
    """The markdown table of the rows (names: of these, in this order)."""
    rows = {row["run"]: row for row in comparison["rows"]}
    chosen = [rows[name] for name in names if name in rows] if names else list(rows.values())
    lines = [
        "| run | kind | seeds | mean NLL/token ↓ | fused − run, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + " | safe preferred ↑ | MC1 ↑ | trained, M | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in chosen:
        metrics, cost = row["metrics"], row["cost"]
        scores = [metrics.get(name) for name in (*(one.name for one in NLL), "safe_preferred", "mc1")]
        cells = [
            row["run"],
            row["kind"],
            str(max(len(row["seeds"]), 1)) if row["seeds"] else "–",
            interval_text(metrics.get("mean_nll_per_token")),
            "" if row["run"] == comparison["reference"] else difference_text(row),
            *(f"{score['value']:.3f}" if score else "–" for score in scores),
            f"{cost['trained_parameters'] / 1e6:.1f}" if cost["trained_parameters"] else "–",
            f"{cost['optimiser_steps']:.0f}" if cost["optimiser_steps"] else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(path: Path, name: str, text: str) -> str:
    """A document with `text` between the marks of that name."""
    document = path.read_text(encoding="utf-8")
    begin = BEGIN.format(name)
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"error: {path}: has no {begin} … {END}")
    return f"{before}{begin}\n\n{text}\n\n{END}{after}"


def documents(comparison: dict) -> dict[Path, str]:
    """{file: what it must hold} of all that is made from a comparison but the page."""
    figure = figures.differences(comparison["rows"], REFERENCE, KINDS)
    figure = figure.replace("<svg", '<svg color="#1b1f24"', 1)  # an image of its own brings its ink and its paper
    figure = figure.replace('style="', 'style="background: #ffffff; ', 1)
    main_rows = f"{sentences(comparison)}\n\n{table(comparison, MAIN)}"
    return {
        ROOT / "README.md": put(ROOT / "README.md", "main rows", main_rows),
        ROOT / "docs" / "reproduction.md": put(ROOT / "docs" / "reproduction.md", "all rows", table(comparison)),
        ROOT / "docs" / "figures" / "comparison.svg": figure,
    }


def main() -> None:
    runs = kept_runs()
    comparison = compare(runs, REFERENCE)
    write_json(TABLE, comparison)
    for path, text in documents(comparison).items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    page = TABLE.with_name("index.html")
    answers, duplicates = (
        read_json(RESULTS / name) if (RESULTS / name).exists() else None for name in (SHOWN, DUPLICATES)
    )
    write_page(page, comparison, runs, answers, duplicates)
    print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
