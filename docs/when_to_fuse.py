"""docs/when_to_fuse.md and docs/tries.md: their sentences, tables and pictures, from the rows kept in docs/results.

python docs/when_to_fuse.py       after new rows: runs/recipes.sh --save docs/results/recipes
"""

import sys
from dataclasses import replace
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import conflict
import elsewhere
import recipes
from committed import (
    EQUAL,
    NLL,
    REFERENCE,
    RESULTS,
    TABLE,
    TWICE,
    as_image,
    by_seed,
    difference_text,
    kept_runs,
    mean_of,
    put,
    row_of,
    task_by_task,
)

from config import TASKS
from evaluator.comparison import compare, split_seed
from evaluator.metrics import MEAN_NLL
from evaluator.page_sections import Section
from evaluator.run_scores import RunScores
from workspace.files import read_json

PAGE = DOCS / "when_to_fuse.md"
ALL_TRIES = DOCS / "tries.md"
ENSEMBLE = "ensemble_probabilities"
WITHOUT_ROWS = (*TASKS, "merge_linear", "merge_ties", ENSEMBLE, "moe")  # of three seeds each


def equal_steps() -> str:
    """The fused model against one LoRA of its size: with the steps of experts and fusion together, and with half."""
    table = read_json(TABLE)
    fused, equal, twice = (row_of(table, name) for name in (REFERENCE, EQUAL, TWICE))
    percent = -100 * twice["paired"][MEAN_NLL.name]["difference"] / mean_of(twice)
    all_steps, half = (f"{row['cost']['optimiser_steps']:.0f}" for row in (twice, equal))
    return (
        f"With the steps of experts and fusion together ({all_steps}), one LoRA of the fused model's size comes to "
        f"{mean_of(twice):.3f} nats per token and the fused model to {mean_of(fused):.3f}: {difference_text(twice)}, "
        f"{percent:.1f} % below it; it is {task_by_task(twice)}. But the same LoRA with half of these steps ({half}) "
        f"comes to {mean_of(equal):.3f}: there the difference is {difference_text(equal)}; the fused model is "
        f"{task_by_task(equal)}."
    )


def without_rows() -> str:
    """What three experts give without any training row of whoever joins them, against the ensemble."""
    runs = {name: run for name, run in kept_runs(RESULTS).items() if split_seed(name)[0] in WITHOUT_ROWS}
    lines = [f"| run | mean NLL/token ↓ | `{ENSEMBLE}` − run, paired | cost of a token |", "| --- | --- | --- | --- |"]
    for row in sorted(compare(runs, ENSEMBLE)["rows"], key=mean_of):
        paired = difference_text(row) if row["paired"] else ""
        lines.append(
            f"| {row['run']} | {mean_of(row):.3f} | {paired} | {row['cost']['relative_cost_of_a_token']:.2f} |"
        )
    return "\n".join([*lines, "", against_the_uniform_merge(runs)])


def against_the_uniform_merge(runs: dict[str, RunScores]) -> str:
    """What else has the cost of one model against the uniform merge, each by itself."""
    uniform, parts = "merge_linear", []
    for name, words in {"merge_ties": "TIES", "moe": "the fusion that is not aligned"}.items():
        pair = compare({run: scores for run, scores in runs.items() if split_seed(run)[0] in (name, uniform)}, name)
        parts.append(f"{words}: {difference_text(row_of(pair, uniform))}{by_seed(runs, name, uniform)}")
    return f"Less the uniform merge's loss, each tested by itself: {'; '.join(parts)}."


def own_tasks() -> str:
    """One LoRA on all tasks' rows against each expert, on the expert's own task."""
    runs = {name: run for name, run in kept_runs(RESULTS).items() if split_seed(name)[0] in (*TASKS, EQUAL)}
    table = compare(runs, EQUAL)
    lines = [
        f"| task | its own expert ↓ | one LoRA on all three (`{EQUAL}`) ↓ | LoRA − expert, paired |",
        "| --- | --- | --- | --- |",
    ]
    for one in NLL:
        expert, mixed = (row_of(table, name)["metrics"][one.name]["value"] for name in (one.task, EQUAL))
        paired = difference_text(row_of(table, one.task), one.name)
        lines.append(f"| {one.task} | {expert:.3f} | {mixed:.3f} | {paired} |")
    return "\n".join(lines)


def sections() -> tuple[Section, ...]:
    """What the report's page shows of it."""
    text = f"Forty training questions per task, one seed, training questions held apart. {recipes.best_tries()}"
    few = [
        Section(
            f"Experts from elsewhere, {number} mixed questions per task",
            "Experts of 160 questions of their own task; few questions of all tasks that no expert saw. Three "
            "seeds, the test half.",
            table,
        )
        for number, table in elsewhere.compared(elsewhere.CONFIRMED)[1].items()
    ]
    curve = {"heading": "Likelihood over mixed questions", "svg": elsewhere.curve(), "caption": elsewhere.CAPTION}
    few[-1] = replace(few[-1], figures=(curve,))
    drawn = {"heading": "Refusals and unsafe answers", "svg": conflict.frontier(), "caption": conflict.CAPTION}
    chosen = (
        f"Forty training questions per task, three seeds, the test half. {recipes.in_words(*recipes.compared_chosen())}"
    )
    return (
        Section("Recipes, to choose by", text.replace("`", ""), recipes.compared_tries()[2]),
        Section("The chosen recipes", chosen.replace("`", ""), recipes.compared_chosen()[2]),
        *few,
        Section(
            "Tasks in conflict", conflict.SETTING, conflict.compared(conflict.CONFIRMED)[1], (drawn,), conflict.SHOWN
        ),
    )


def documents() -> dict[Path, str]:
    """{file: what it must hold}."""
    made_of = {
        PAGE: (
            without_rows,
            equal_steps,
            own_tasks,
            recipes.confirmed,
            elsewhere.few_rows,
            elsewhere.by_token_or_prompt,
            conflict.conflict,
            conflict.dial_or_mean,
        ),
        ALL_TRIES: (
            recipes.best_tries,
            recipes.tries,
            recipes.single_changes,
            elsewhere.epochs_tried,
            elsewhere.few_rows_held_apart,
            elsewhere.by_token_or_prompt_held_apart,
            conflict.conflict_of_one_seed,
        ),
    }
    figures_of = {
        "tries.svg": recipes.picture(),
        "elsewhere.svg": as_image(elsewhere.curve()),
        "conflict.svg": as_image(conflict.frontier()),
    }
    return {path: written(path, parts) for path, parts in made_of.items()} | {
        DOCS / "figures" / name: svg for name, svg in figures_of.items()
    }


def written(path: Path, parts: tuple) -> str:
    """A document with what each of these makes between the marks of its name."""
    text = path.read_text(encoding="utf-8")
    for make in parts:
        text = put(text, make.__name__.replace("_", " "), make(), script="when_to_fuse.py")
    return text


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
        print(path.name)
