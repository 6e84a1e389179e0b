"""Experts from elsewhere, docs/when_to_fuse.md: the methods that use few mixed questions, from the rows of
runs/elsewhere.sh."""

import re
from functools import cache
from pathlib import Path

from committed import NLL, RESULTS, by_seed, difference_text, kept_runs, mean_of, row_of, task_by_task

from config import TASKS
from evaluator import figures
from evaluator.comparison import compare, split_seed
from evaluator.run_scores import RunScores
from evaluator.sweeps import mean_nll

CONFIRMED = RESULTS / "elsewhere"  # the test half, three seeds
TRIES = CONFIRMED / "held_apart"  # one seed, every number of epochs
CAPTION = (
    "Mean NLL per token over the number of mixed questions of each task, each method with the best of its numbers of "
    "epochs. At 0: what it begins with, if that is of the experts. Dashed: what uses no mixed question."
)
METHODS = {  # prefix of the rows on some mixed questions: (words, the row that it begins with)
    "fused": ("fusion of the experts, aligned on them", "moe"),
    "merged": ("one LoRA that begins with a merge (TSV-M)", "merge_tsv_m"),
    "mixed": ("one LoRA from the base", None),  # the raw base is off the picture
    "ungated": ("fusion, aligned on them without the gating loss", "moe"),
    "initialised": ("fusion, its routers' start made from them, then aligned", None),
    "prompted": ("fusion routed by prompt, its routers' start made from them, then aligned", None),
    "slow": ("fusion routed by prompt, its routers made from them, then aligned with routers at 1e-4", None),
    "routers": ("fusion routed by prompt, its routers made from them, then trained alone at 1e-4", None),
    "frozen": (
        "fusion routed by prompt, its routers made from them and frozen, its experts aligned (no gating loss)",
        None,
    ),
    "tuned": ("task arithmetic, its coefficients tuned on them", None),
    "prototype": ("fusion, its routers' start made from them, not aligned", None),
    "by_prompt": ("fusion routed by prompt, its routers' start made from them, not aligned", None),
}
ROUTED = (  # words, the row routed by token, the row routed by prompt
    ("not aligned", "prototype_10", "by_prompt_10"),
    ("aligned, each for its chosen number of epochs", "initialised_10_epochs_4", "prompted_10_epochs_2"),
)
ROUTED_TRIES = (
    ("not aligned", "prototype_10", "by_prompt_10"),
    ("aligned for one epoch", "initialised_10_epochs_1", "prompted_10_epochs_1"),
    ("aligned for two epochs", "initialised_10_epochs_2", "prompted_10_epochs_2"),
)
FUSIONS = ("fused", "ungated", "initialised", "prompted", "slow", "routers", "frozen", "prototype", "by_prompt")
DRAWN = {  # by the curve: the words there
    "fused": "fusion routed by token, aligned",
    "prompted": "fusion routed by prompt, aligned",
    "by_prompt": "fusion routed by prompt, not aligned",
    "merged": "one LoRA that begins with a merge",
    "mixed": "one LoRA from the base",
    "tuned": "task arithmetic, tuned",
}
WITHOUT = {  # rows that need no mixed question
    "ensemble_probabilities": "ensemble of probabilities",
    "merge_ties": "TIES merge",
    "merge_linear": "uniform merge",
    "merge_tsv_m": "TSV-M merge",
    "moe": "fusion, not aligned",
}


@cache
def tries() -> dict[str, RunScores]:
    """The rows on questions held apart."""
    return kept_runs(TRIES)


def on_questions(runs: dict[str, RunScores], method: str, number: int) -> str | None:
    """The method's row on this number of mixed questions per task, without its seed: of the numbers of epochs that
    `runs` have the best on the questions held apart. None: there is none."""
    named = [name for name in runs if f"{name}_".startswith(f"{method}_{number}_") and split_seed(name)[0] == name]
    return min(named, key=lambda name: mean_nll(tries()[name], TASKS), default=None)


def best_fusion(number: int) -> str:
    """Of all fusions that use this number of mixed questions per task the one with the lowest loss on questions held
    apart."""
    named = [name for method in FUSIONS if (name := on_questions(tries(), method, number))]
    return min(named, key=lambda name: mean_nll(tries()[name], TASKS))


def numbers(runs: dict[str, RunScores]) -> list[int]:
    return sorted({int(name.split("_")[1]) for name in runs if name.split("_")[0] == "fused"})


@cache
def compared(half: Path) -> tuple[dict[str, RunScores], dict[int, dict]]:
    """(a half's kept rows, {number of mixed questions: the comparison of what uses them with the best fusion})."""
    runs = kept_runs(half)
    tables = {}
    for number in numbers(runs):
        used = {on_questions(runs, method, number) for method in METHODS} | {*WITHOUT}
        of_seeds = {name: run for name, run in runs.items() if split_seed(name)[0] in used}
        tables[number] = compare(of_seeds, best_fusion(number))
    return runs, tables


def few_rows() -> str:
    return f"{table_of(CONFIRMED)}\n\n{by_token_against()}"


def by_token_against() -> str:
    """The fusion as the paper has it (routed by token, random routers, aligned) against the best of each other kind,
    each pair tested for itself."""
    runs, tables = compared(CONFIRMED)
    sentences = []
    for number in tables:
        own, parts = on_questions(runs, "fused", number), []
        for words, other in (
            ("the LoRA that begins with a merge", on_questions(runs, "merged", number)),
            ("the LoRA from the base", on_questions(runs, "mixed", number)),
            ("the ensemble", "ensemble_probabilities"),
            ("the TIES merge", "merge_ties"),
        ):
            pair = compare({name: run for name, run in runs.items() if split_seed(name)[0] in (own, other)}, own)
            parts.append(f"{words}, {difference_text(row_of(pair, other))}{by_seed(runs, own, other)}")
        sentences.append(f"on {number} mixed questions per task: {'; '.join(parts)}")
    return f"The fusion as the paper has it, aligned, less (each tested by itself) {'. And '.join(sentences)}."


def few_rows_held_apart() -> str:
    return table_of(TRIES)


def table_of(half: Path) -> str:
    """For each number of mixed questions: every method, and what needs none, against the best fusion."""
    runs, tables = compared(half)
    lines = [
        "| mixed questions per task | method | epochs | mean NLL/token ↓ | best fusion − method, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + " |",
        "| --- " * (5 + len(NLL)) + "|",
    ]
    for number, table in tables.items():
        words = {on_questions(runs, method, number): words for method, (words, _) in METHODS.items()} | WITHOUT
        for row in sorted(table["rows"], key=mean_of):
            epochs = runs[row["run"]].record["run"]["arguments"]["num_train_epochs"] if "_epochs_" in row["run"] else ""
            cells = [
                str(number),
                words[row["run"]],
                str(epochs).removesuffix(".0"),
                f"{mean_of(row):.3f}",
                difference_text(row) if row["paired"] else "",
                *(f"{row['metrics'][one.name]['value']:.3f}" for one in NLL),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(against_the_merged(half, number) for number in tables)])


def against_the_merged(half: Path, number: int) -> str:
    """The best fusion against the LoRA that begins with a merge, task by task."""
    runs, tables = compared(half)
    row = row_of(tables[number], on_questions(runs, "merged", number))
    words = METHODS["merged"][0]
    return f"On {number} mixed questions per task the best fusion is, against {words}, {task_by_task(row)}."


def by_token_or_prompt() -> str:
    return f"{pairs_of(CONFIRMED, ROUTED)}\n\n{frozen_routers()}"


def frozen_routers() -> str:
    """The fusion routed by prompt whose routers stay as its prompts made them, against the one that trains them."""
    runs, _ = compared(CONFIRMED)
    frozen, trained = "frozen_10_epochs_2", "prompted_10_epochs_2"
    pair = compare({name: run for name, run in runs.items() if split_seed(name)[0] in (frozen, trained)}, frozen)
    other = row_of(pair, trained)
    return (
        "Routed by prompt and aligned with its routers frozen and without the gating loss: "
        f"{mean_of(row_of(pair, frozen)):.3f}; less the one whose routers are trained: {difference_text(other)}"
        f"{by_seed(runs, frozen, trained)}; it is {task_by_task(other)}."
    )


def by_token_or_prompt_held_apart() -> str:
    return pairs_of(TRIES, ROUTED_TRIES)


def pairs_of(half: Path, routed: tuple[tuple[str, str, str], ...]) -> str:
    """Fusions whose routers start from the ten questions' prompts, routed by token and by prompt: each pair tested for
    itself."""
    runs, _ = compared(half)
    lines = ["| the fusion | by token ↓ | by prompt ↓ | by prompt − by token, paired |", "| --- | --- | --- | --- |"]
    for words, token, prompt in routed:
        pair = compare({name: run for name, run in runs.items() if split_seed(name)[0] in (token, prompt)}, prompt)
        by_token, by_prompt = row_of(pair, token), row_of(pair, prompt)
        paired = f"{difference_text(by_token)}{by_seed(runs, prompt, token)}"
        lines.append(f"| {words} | {mean_of(by_token):.3f} | {mean_of(by_prompt):.3f} | {paired} |")
    return "\n".join(lines)


def epochs_tried() -> str:
    """The mean loss of every number of epochs that was tried."""
    runs, _ = compared(TRIES)
    tried: dict[tuple[str, int], dict[int, float]] = {}
    for name, run in runs.items():
        if found := re.fullmatch(r"([a-z]+)_(\d+)_epochs_(\d+)", name):
            tried.setdefault((found[1], int(found[2])), {})[int(found[3])] = mean_nll(run, TASKS)
    columns = sorted({epochs for of_method in tried.values() for epochs in of_method})
    lines = [
        "| method | mixed questions | "
        + " | ".join(f"{epochs} epoch{'s' * (epochs > 1)}" for epochs in columns)
        + " |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for (method, number), of_method in sorted(tried.items(), key=lambda item: (item[0][1], min(item[1].values()))):
        cells = [f"{of_method[epochs]:.3f}" if epochs in of_method else "–" for epochs in columns]
        lines.append(f"| {METHODS[method][0]} | {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve() -> str:
    """Nats per token against the number of mixed questions, a line a method."""
    runs, tables = compared(CONFIRMED)
    lines = {}
    for method, words in DRAWN.items():
        begin = METHODS[method][1]
        begins = [] if begin is None else [(0, mean_over_seeds(runs, begin))]
        named = {number: on_questions(runs, method, number) for number in tables}
        points = [(number, mean_of(row_of(tables[number], name))) for number, name in named.items() if name]
        if points:
            lines[words] = begins + points
    begun = {METHODS[method][1] for method in DRAWN}
    level = {words: mean_over_seeds(runs, name) for name, words in WITHOUT.items() if name not in begun}
    return figures.curves(lines, level, "mixed questions per task", "mean NLL per token, nats (lower is better)")


def mean_over_seeds(runs: dict[str, RunScores], name: str) -> float:
    values = [mean_nll(run, TASKS) for one, run in runs.items() if split_seed(one)[0] == name]
    return sum(values) / len(values)
