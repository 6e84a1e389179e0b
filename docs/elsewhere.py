"""Experts from elsewhere, docs/when_to_fuse.md: the methods that use few mixed questions, from the rows of
runs/elsewhere.sh."""

from functools import cache

from committed import NLL, RESULTS, difference_text, kept_runs, mean_of, row_of

from evaluator import figures
from evaluator.comparison import compare, split_seed
from evaluator.run_scores import RunScores
from evaluator.sweeps import mean_nll

FOLDER = RESULTS / "elsewhere"
CHOSEN_ON = FOLDER / "held_apart"  # one seed, every number of epochs; FOLDER itself: the test half, three seeds
METHODS = {  # prefix of the rows on some mixed questions: (words, the row that it begins with)
    "fused": ("fusion of the experts, aligned on them", "moe"),
    "merged": ("one LoRA that begins with a merge (TSV-M)", "merge_tsv_m"),
    "mixed": ("one LoRA from the base", "raw"),
    "tuned": ("task arithmetic, its coefficients tuned on them", None),
    "prototype": ("fusion, its routers' start made from them, not aligned", "moe"),
}
REST = {  # what no mixed question can change, and is not begun from either
    "ensemble_probabilities": "ensemble of probabilities, not trained",
    "merge_ties": "TIES, not tuned",
    "merge_linear": "uniform merge",
}


def on_questions(runs: dict[str, RunScores], method: str, number: int) -> str | None:
    """The method's row on this number of mixed questions per task, without its seed: of the numbers of epochs that
    were tried the best. 0: what it begins with. None: there is none."""
    if number == 0:
        return METHODS[method][1]
    named = [name for name in runs if f"{name}_".startswith(f"{method}_{number}_") and split_seed(name)[0] == name]
    return min(named, key=lambda name: mean_nll(runs[name]), default=None)


def numbers(runs: dict[str, RunScores]) -> list[int]:
    return sorted({int(name.split("_")[1]) for name in runs if name.split("_")[0] == "fused"})


@cache
def compared(folder) -> tuple[dict[str, RunScores], dict[int, dict]]:
    """(a half's kept rows, {number of mixed questions: the comparison of what uses them with the fusion})."""
    runs = kept_runs(folder)
    tables = {}
    for number in numbers(runs):
        used = {on_questions(runs, method, number) for method in METHODS} | {*REST}
        of_seeds = {name: run for name, run in runs.items() if split_seed(name)[0] in used}
        tables[number] = compare(of_seeds, on_questions(runs, "fused", number))
    return runs, tables


def few_rows(folder=FOLDER) -> str:
    """A table for each number of mixed questions: every method, and what is not trained, against the fusion."""
    runs, tables = compared(folder)
    lines = [
        "| mixed questions per task | method | epochs | mean NLL/token ↓ | fusion − method, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + " |",
        "| --- " * (5 + len(NLL)) + "|",
    ]
    for number, table in tables.items():
        words = {on_questions(runs, method, number): words for method, (words, _) in METHODS.items()} | REST
        for row in sorted(table["rows"], key=mean_of):
            epochs = runs[row["run"]].record["run"]["arguments"]["num_train_epochs"] if "_epochs_" in row["run"] else ""
            cells = [
                str(number),
                words[row["run"]],
                str(epochs),
                f"{mean_of(row):.3f}",
                difference_text(row) if row["paired"] else "",
                *(f"{row['metrics'][one.name]['value']:.3f}" for one in NLL),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(folder=FOLDER) -> str:
    """Nats per token against the number of mixed questions, a line a method."""
    runs, tables = compared(folder)
    lines = {}
    for method, (words, begin) in METHODS.items():
        begins = [] if begin is None else [(0, mean_over_seeds(runs, begin))]
        lines[words] = begins + [
            (number, mean_of(row_of(table, on_questions(runs, method, number)))) for number, table in tables.items()
        ]
    level = {words: mean_over_seeds(runs, name) for name, words in REST.items()}
    return figures.curves(lines, level, "mixed questions per task", "mean NLL per token, nats (lower is better)")


def mean_over_seeds(runs: dict[str, RunScores], name: str) -> float:
    values = [mean_nll(run) for one, run in runs.items() if split_seed(one)[0] == name]
    return sum(values) / len(values)
