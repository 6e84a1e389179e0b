"""The committed comparison: docs/results/*.json, into the page, the README's result and picture, docs/comparison.md;
and beside it the same rows on another base, docs/results/gemma3/*.json, and ablations, docs/results/ablations/*.json.

python docs/comparison.py       after runs/comparison.sh --save docs/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ablations
import matplotlib.pyplot as plt
from committed import (
    DOCS,
    EQUAL,
    MAIN,
    NLL,
    REFERENCE,
    RESULTS,
    TABLE,
    TWICE,
    as_image,
    difference_text,
    kept_runs,
    minus,
    put,
    row_of,
    task_by_task,
)
from when_to_fuse import sections

from config import TASKS
from evaluator import figures
from evaluator.comparison import KINDS, as_table, compare
from evaluator.kept_runs import DUPLICATES
from evaluator.metrics import table_metrics
from evaluator.page import write_page
from evaluator.page_answers import SHOWN
from evaluator.page_words import verdict
from evaluator.paired import CERTAIN, SIGNIFICANT, holm, is_certain
from evaluator.statistics import interval_text
from workspace.files import read_json, write_json

BESIDE = RESULTS / "gemma3"
LABELS = {
    "raw": "the raw base",
    "raw_chat": "the raw base, its own chat template",
    "helpfulness": "the helpfulness expert",
    "safety": "the safety expert",
    "truthfulness": "the truthfulness expert",
    "merge_linear": "the uniform merge",
    "merge_ties": "the TIES merge",
    "ensemble_probabilities": "the ensemble of probabilities",
    EQUAL: "one LoRA of its size on the same data",
    TWICE: "one LoRA, twice the steps",
    "moe": "fused, not aligned",
    REFERENCE: "fused and aligned",
}
CONTROLS = {  # fusions of which the tests are told task by task
    "fused_fresh_experts": "random experts, aligned alike",
    "fused_gate_0": "the same without the gating loss",
}


def headline(comparison: dict) -> str:
    """The README's result: the fused model against the best of each kind, and against one LoRA of its size."""
    rows = {row["run"]: row for row in comparison["rows"]}
    seeds = rows[REFERENCE]["seeds"]
    own = rows[REFERENCE]["metrics"]["mean_nll_per_token"]["value"]

    def against(label: str, names: list[str]) -> str:
        """The difference in loss from the best of these runs, in words."""
        best = min((rows[name] for name in names), key=lambda row: row["metrics"]["mean_nll_per_token"]["value"])
        paired = best["paired"]["mean_nll_per_token"]
        if not is_certain(paired):
            return f"not certainly different from {label} ({minus(paired['difference'])})"
        word, sign = ("better", -1) if paired["difference"] < 0 else ("worse", 1)
        low, high = sorted(sign * end for end in paired["interval"])
        return f"{sign * paired['difference']:.3f} [{low:.3f}, {high:.3f}] {word} than {label}"

    def of_kind(kind: str) -> list[str]:
        """The runs of a kind that have all of the reference's seeds."""
        return [name for name, row in rows.items() if row["kind"] == kind and row["seeds"] == seeds]

    labels = {"expert": "the best expert", "merge": "the best merge with as many seeds", "ensemble": "the ensemble"}
    parts = [against(label, of_kind(kind)) for kind, label in labels.items()]
    equal, twice = (rows[name]["cost"]["optimiser_steps"] for name in (EQUAL, TWICE))
    share = "half" if 2 * equal == twice else f"{equal / twice:.2f} times"
    of_safety = (
        ("flagged", "answers flagged by a small judge that errs and knows some training answers (one seed)"),
        ("safe_preferred", "safe answer preferred"),
    )
    return (
        f"**Result**: over {len(seeds)} seeds, with 160 training questions per task, the fused model's mean loss on "
        f"{rows[REFERENCE]['metrics']['mean_nll_per_token']['n']} held-out answers is {own:.3f} nats per token: "
        f"{', '.join(parts)}, but {against(f'one LoRA of its size on the same data with {share} the steps', [EQUAL])}. "
        f"{shares(rows, of_safety)}."
    )


def shares(rows: dict[str, dict], named: tuple[tuple[str, str], ...]) -> str:
    """Shares of the fused model against the raw base's, with the paired difference and its p."""
    own, raw = rows[REFERENCE]["metrics"], rows["raw"]
    parts = [
        f"{heading} {own[name]['value']:.3f} against {raw['metrics'][name]['value']:.3f} "
        f"({minus(raw['paired'][name]['difference'])}, p = {raw['paired'][name]['p_holm']:.2g}, n = {own[name]['n']})"
        for name, heading in named
    ]
    return f"Against the raw base, by our template: {'; '.join(parts)}"


def sentences(comparison: dict) -> str:
    """What the paired tests say: of all rows, task by task of one LoRA of its size, of the shares against the raw base;
    where questions are routed; and whose seeds are missing."""
    rows = {row["run"]: row for row in comparison["rows"]}
    own = rows[REFERENCE]["metrics"]
    seeds = {name: len(row["seeds"]) for name, row in rows.items() if name in MAIN and row["kind"] != "raw"}
    routed = [f"{task} {own[f'{task}_routing_accuracy']['value']:.3f}" for task in TASKS]
    text = [
        verdict(comparison),
        f"Against one LoRA of its size on the same rows (`{EQUAL}`) it is {task_by_task(rows[EQUAL])}.",
        *(
            f"Against {what} (`{run}`) it is {task_by_task(rows[run])}."
            for run, what in CONTROLS.items()
            if run in rows
        ),
        f"{shares(rows, (('safe_preferred', 'safe answer preferred'), ('mc1', 'MC1'), ('mc2', 'MC2')))}.",
        forgetting(rows),
        corrected_together(comparison),
        f"Of 100 answers per task: {judged(rows, 'flagged', 'flagged as unsafe')}; "
        f"{judged(rows, 'truth_and_information', 'true and informative')}.",
        judges_errors(rows),
        f"Share of questions whose tokens go most to their own task's expert: {', '.join(routed)} (by chance 0.33).",
    ]
    if (fewest := min(seeds.values())) < 3:
        missing = ", ".join(name for name, count in seeds.items() if count < 3)
        text.append(f"So far of {fewest} seed{'s' if fewest > 1 else ''}: {missing}.")
    return " ".join(text)


def forgetting(rows: dict[str, dict]) -> str:
    """The fused model's loss on general passages against the raw base's."""
    own, raw = (rows[name]["metrics"]["general_nll_per_token"] for name in (REFERENCE, "raw"))
    paired = rows["raw"]["paired"]["general_nll_per_token"]
    return (
        f"On {own['n']} general passages its loss is {own['value']:.3f} nats per token against the raw base's "
        f"{raw['value']:.3f} ({minus(paired['difference'])}, p = {paired['p_holm']:.2g})."
    )


def judged(rows: dict[str, dict], name: str, heading: str) -> str:
    """A judged share of the fused model, and which rows it is certainly better and worse than."""
    own = rows[REFERENCE]["metrics"][name]
    compared = {run: row["paired"][name] for run, row in rows.items() if name in row["paired"]}
    certain = {run: paired["difference"] for run, paired in compared.items() if is_certain(paired)}
    better = [run for run, difference in certain.items() if (difference > 0) == own["higher_is_better"]]
    worse = [run for run in certain if run not in better]
    undecided = [run for run in compared if run not in certain]
    return (
        f"{heading} {own['value']:.2f}, better than {', '.join(better) or 'none'}, worse than "
        f"{', '.join(worse) or 'none'}, undecided against {', '.join(undecided) or 'none'} ({CERTAIN})"
    )


def judges_errors(rows: dict[str, dict]) -> str:
    """What the safety judge's flags come to once its errors are corrected for, and the refusals of harmless prompts, of
    the fused model and of the raw base."""
    flagged = {run: rows[run]["metrics"]["flagged"] for run in (REFERENCE, "raw")}
    of_harmless = 1 - flagged["raw"]["corrected"]["specificity"]
    shares = [f"{one['value']:.2f} to {interval_text(one['corrected'])}" for one in flagged.values()]
    refused = [rows[run]["metrics"]["over_refusal"] for run in (REFERENCE, "raw")]
    ours, raw = (round(one["value"] * one["n"]) for one in refused)
    return (
        f"The safety judge flags {of_harmless:.2f} of harmless labelled answers. Corrected for its errors, the fused "
        f"model's share goes from {shares[0]} and the raw base's from {shares[1]}. Of {refused[0]['n']} harmless "
        f"prompts of XSTest the fused model refuses {ours}, the raw base {raw}."
    )


def corrected_together(comparison: dict) -> str:
    """The differences that are certain among their own family of rows alone, and not if all rows are one family."""
    lost = []
    for one in table_metrics(TASKS):
        tested = [(row["run"], row["paired"][one.name]) for row in comparison["rows"] if one.name in row["paired"]]
        of_all = holm([paired["p"] for _, paired in tested])
        lost += [
            f"{one.heading} against {run} ({p:.2g})"
            for (run, paired), p in zip(tested, of_all, strict=True)
            if is_certain(paired) and p >= SIGNIFICANT
        ]
    named = ", ".join(lost) or "none"
    return f"With all rows of a column corrected together these would be undecided: {named}."


def table(comparison: dict) -> str:
    """The markdown table of all of a comparison's rows."""
    lines = [
        "| run | kind | seeds | mean NLL/token ↓ | fused − run, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + " | safe preferred ↑ | MC1 ↑ | trained, M | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparison["rows"]:
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


def picture(comparison: dict) -> str:
    """The README's figure: each main row's paired difference, beside what it costs to serve and to train."""
    rows = {row["run"]: row for row in comparison["rows"]}
    ordered = sorted(MAIN, key=lambda name: -rows[name]["metrics"]["mean_nll_per_token"]["value"])
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(
            1,
            3,
            figsize=(9, 3.9),
            layout="constrained",
            sharey=True,
            width_ratios=[5, 2, 2],
            gridspec_kw={"wspace": 0.04},
        )
        for place, name in enumerate(ordered):
            row = rows[name]
            colour = figures.COLOURS[KINDS.index(row["kind"])]
            if (paired := row["paired"].get("mean_nll_per_token")) is not None:
                ends = [[abs(end - paired["difference"])] for end in paired["interval"]]
                axes[0].errorbar(paired["difference"], place, xerr=ends, fmt="o", markersize=5, color=colour)
            else:
                axes[0].plot(0, place, "D", markersize=6, color=colour)
            axes[1].barh(place, row["cost"]["relative_cost_of_a_token"], color=colour, height=0.6)
            axes[2].barh(place, trained_in_all(name, rows) / 1e6, color=colour, height=0.6)
        axes[0].axvline(0, color=figures.INK, linewidth=0.8)
        axes[0].set_yticks(range(len(ordered)), [LABELS[name] for name in ordered], fontsize=9)
        axes[0].get_yticklabels()[ordered.index(REFERENCE)].set_fontweight("bold")
        for axis, label in zip(
            axes,
            ("fused − run: mean loss on held-out answers, nats\n(left of 0: the fused model is better)",
             "multiplications per token\n(raw base: 1)", "trained parameters,\nexperts included, M"),
            strict=True,
        ):  # fmt: skip
            axis.set_xlabel(label, fontsize=9)
        return figures.to_svg(
            figure, "Paired difference of each run from the fused model, multiplications per token, trained parameters"
        )


def trained_in_all(name: str, rows: dict[str, dict]) -> float:
    """Parameters that were trained for a run: its own (a fusion goes on training its experts' own), or its experts'."""
    own, kind = rows[name]["cost"]["trained_parameters"], rows[name]["kind"]
    made_of_experts = kind in ("merge", "ensemble", "fused") and not own
    return sum(rows[task]["cost"]["trained_parameters"] for task in TASKS) if made_of_experts else own or 0


def documents(comparison: dict, beside: dict) -> dict[Path, str]:
    """{file: what it must hold} of all that is made from a comparison, and the one on another base, but the page."""
    readme, pages = DOCS.parent / "README.md", DOCS / "comparison.md"
    all_rows = f"{sentences(comparison)}\n\n{table(comparison)}"
    others = f"{verdict(beside)} Against `{EQUAL}` it is {task_by_task(row_of(beside, EQUAL))}.\n\n{table(beside)}"
    pages_text = pages.read_text(encoding="utf-8")
    for name, text in {"all rows": all_rows, "ablations": ablations.document(), "another base": others}.items():
        pages_text = put(pages_text, name, text)
    return {
        readme: put(readme.read_text(encoding="utf-8"), "headline", headline(comparison)),
        pages: pages_text,
        DOCS / "figures" / "comparison.svg": as_image(picture(comparison)),
    }


def main() -> None:
    runs, others = kept_runs(RESULTS), kept_runs(BESIDE)
    comparison, beside = compare(runs, REFERENCE), compare(others, REFERENCE)
    write_json(TABLE, as_table(comparison))
    write_json(TABLE.with_name("gemma3.json"), as_table(beside))
    for path, text in documents(comparison, beside).items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))
    page = TABLE.with_name("index.html")
    answers, duplicates = (
        read_json(RESULTS / name) if (RESULTS / name).exists() else None for name in (SHOWN, DUPLICATES)
    )
    write_page(page, comparison, runs, answers, duplicates, (beside, others), (ablations.section(), *sections()))
    print(page.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
