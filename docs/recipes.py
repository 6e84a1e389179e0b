"""Equal terms, docs/when_to_fuse.md and docs/tries.md: the fusion against one LoRA, both tuned, from the rows of
runs/recipes.sh."""

from functools import cache

from committed import NLL, RESULTS, as_image, by_seed, difference_text, kept_runs, mean_of, row_of, task_by_task

from evaluator import figures
from evaluator.comparison import KINDS, compare
from evaluator.metrics import MEAN_NLL
from evaluator.run_scores import RunScores
from evaluator.statistics import interval_text
from evaluator.sweeps import OF_A_MACHINE

CONFIRMED = RESULTS / "recipes"  # the test half, three seeds
TRIES = CONFIRMED / "held_apart"
TRIED = ("fused", "mixed")  # how their names begin; the others are their experts
SINGLE_CHANGES = (  # words, the try without the change, the try with it
    ("fusion: a third epoch of alignment, experts of one epoch", "fused_1_then_2", "fused_1_then_3"),
    ("LoRA: a third epoch", "mixed", "mixed_3_epochs"),
    ("LoRA: a fourth epoch", "mixed_3_epochs", "mixed_twice"),
    ("LoRA: twice the rate", "mixed", "mixed_rate_1e-3"),
    ("LoRA: twice that rate", "mixed_rate_1e-3", "mixed_rate_2e-3"),
    ("LoRA: twice that again", "mixed_rate_2e-3", "mixed_rate_4e-3"),
    ("LoRA: a third epoch at twice the rate", "mixed_rate_1e-3", "mixed_3_epochs_rate_1e-3"),
    ("fusion: twice the rate", "fused", "fused_rate_1e-3"),
    ("fusion: twice that rate", "fused_rate_1e-3", "fused_rate_2e-3"),
    ("fusion: twice that again", "fused_rate_2e-3", "fused_rate_4e-3"),
    ("LoRA at 2e-3: dropout of 0.3", "mixed_rate_2e-3", "mixed_rate_2e-3_dropout_0.3"),
    ("LoRA at 2e-3: twice the rank", "mixed_rate_2e-3", "mixed_rate_2e-3_rank_48"),
    ("fusion at 2e-3: its experts at 2e-3 too", "fused_rate_2e-3", "fused_all_at_2e-3"),
    ("fusion at 2e-3: its routers made from the prompts", "fused_rate_2e-3", "fused_rate_2e-3_prototype"),
    ("fusion: the demo's earlier λ, γ and router rate (all at once)", "fused", "fused_gate_1_gamma_0.001"),
    ("fusion: from the demo's earlier settings to the best ones", "fused_gate_1_gamma_0.001", "fused_rate_2e-3"),
    ("fusion: twice the rate, three epochs, dropout of 0.1", "fused_2_then_3", "fused_2_then_3_rate_1e-3"),
    ("fusion: a third epoch at twice the rate, dropout of 0.1", "fused_rate_1e-3", "fused_2_then_3_rate_1e-3"),
    ("fusion: dropout of 0.3", "fused", "fused_dropout_0.3"),
    ("fusion: less than half the rate", "fused", "fused_rate_2e-4"),
    ("fusion: three experts per token in training, two after", "fused", "fused_top_3_then_2"),
    (
        "fusion: routed by prompt, its routers made from the prompts (both at once)",
        "fused_rate_1e-3",
        "fused_prototype_by_prompt_rate_1e-3",
    ),
)


@cache
def compared_tries() -> tuple[dict[str, RunScores], str, dict]:
    """(the kept tries and their experts, the best one LoRA, the comparison of the tries with it)."""
    runs = kept_runs(TRIES)
    best = best_of(runs, "mixed")
    return runs, best, compare({name: run for name, run in runs.items() if name.startswith(TRIED)}, best)


@cache
def compared_chosen() -> tuple[dict[str, RunScores], str, dict]:
    """The same of the recipes that were scored on the test half; the best LoRA there too is the tries'."""
    runs = kept_runs(CONFIRMED)
    _, best, _ = compared_tries()
    return runs, best, compare({name: runs[name] for name in runs if name.startswith(TRIED)}, best)


def best_tries() -> str:
    """The best one LoRA of the tries against the best fusion of them, in words."""
    runs, mixed, table = compared_tries()
    return f"{in_words(runs, mixed, table)} Both were chosen on these questions, which flatters both."


def confirmed() -> str:
    names = [name for name in kept_runs(TRIES) if name.startswith(TRIED)]
    of_lora = sum(name.startswith("mixed") for name in names)
    tried = f"Tried on the questions held apart: {of_lora} recipes of the LoRA, {len(names) - of_lora} of the fusion."
    return f"{tried} {in_words(*compared_chosen())}\n\n{table_of_tries(*compared_chosen())}"


def in_words(runs: dict[str, RunScores], mixed: str, table: dict) -> str:
    """The best one LoRA of the tries against their best fusion, in a comparison of both."""
    fused = best_of(kept_runs(TRIES), "fused")
    of_mixed, of_fused = row_of(table, mixed), row_of(table, fused)
    percent = 100 * of_fused["paired"][MEAN_NLL.name]["difference"] / mean_of(of_mixed)
    return (
        f"The best LoRA (`{mixed}`, {steps_in_all(runs, mixed):.0f} steps) comes to {mean_of(of_mixed):.3f}, the best "
        f"fusion (`{fused}`, {steps_in_all(runs, fused):.0f} steps in all) to {mean_of(of_fused):.3f}. LoRA − fusion: "
        f"{difference_text(of_fused)}{by_seed(runs, mixed, fused)}, {percent:.1f} % of the LoRA's loss; "
        f"the LoRA is {task_by_task(of_fused)}."
    )


def tries() -> str:
    """Every recipe that was tried, on questions held apart, against the best one LoRA."""
    return table_of_tries(*compared_tries())


def table_of_tries(runs: dict[str, RunScores], reference: str, table: dict) -> str:
    lines = [
        f"| run | what is changed | steps in all | mean NLL/token ↓ | {reference} − run, paired | "
        + " | ".join(f"{one.task} ↓" for one in NLL)
        + " |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(table["rows"], key=mean_of):
        scores = [row["metrics"][one.name]["value"] for one in NLL]
        cells = [
            row["run"],
            changes(row["run"]),
            f"{steps_in_all(runs, row['run']):.0f}",
            interval_text(row["metrics"][MEAN_NLL.name]),
            difference_text(row) if row["paired"] else "",
            *(f"{score:.3f}" for score in scores),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def single_changes() -> str:
    """Tries that differ in one thing, each pair tested for itself."""
    runs, _, _ = compared_tries()
    lines = ["| what is changed | before | after | after − before, paired |", "| --- | --- | --- | --- |"]
    for words, before, after in SINGLE_CHANGES:
        row = row_of(compare({name: runs[name] for name in (before, after)}, after), before)
        lines.append(f"| {words} | {before} | {after} | {difference_text(row)} |")
    return "\n".join(lines)


def best_of(runs: dict[str, RunScores], prefix: str) -> str:
    """The run of the least mean loss among those whose names begin so."""
    named = [name for name in runs if name.startswith(prefix)]
    return min(named, key=lambda name: sum(runs[name].metrics[one.name].score["value"] for one in NLL))


def steps_in_all(runs: dict[str, RunScores], name: str) -> float:
    """A run's own optimiser steps and those of the experts that it was fused from."""
    experts = runs[name].record["meta"].get("experts", {})
    made_so = {task: expert_of(runs, arguments) for task, arguments in experts.items()}
    return sum(runs[one].cost["optimiser_steps"] for one in (name, *made_so.values()))


def expert_of(runs: dict[str, RunScores], arguments: dict) -> str:
    """The kept expert that was aligned with these arguments."""

    def recipe(made: dict) -> dict:
        return {key: value for key, value in made.items() if key not in OF_A_MACHINE}

    named = {name: run.record["run"]["arguments"] for name, run in runs.items() if run.record}
    return next(name for name, made in named.items() if recipe(made) == recipe(arguments))


def changes(name: str) -> str:
    """The settings of a try, its experts and its start that differ from those of `mixed` or `fused`."""
    runs, _, _ = compared_tries()
    ours, theirs = (settings_of(runs[one]) for one in (name, name.split("_")[0]))
    return ", ".join(f"{key} {ours[key]}" for key in ours if ours[key] != theirs.get(key))


def settings_of(run: RunScores) -> dict[str, str]:
    """What decided a run, as a user would say it: its flags, those of its experts, and how its routers began."""
    record = run.record
    settings = {k: v for k, v in record["run"]["arguments"].items() if k not in OF_A_MACHINE and "sha256" not in k}
    experts = record["meta"].get("experts", {})
    for key in ("num_train_epochs", "learning_rate", "rank"):
        of_tasks = {task: arguments[key] for task, arguments in experts.items()}
        if len(set(of_tasks.values())) == 1:
            settings[f"experts' {key}"] = of_tasks.popitem()[1]
        else:
            settings |= {f"{task} expert's {key}": value for task, value in of_tasks.items()}
    settings |= {k: v for k, v in record["meta"].get("fused", {}).items() if k == "router_init"}
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in settings.items()}


def picture() -> str:
    """Every try's paired difference from the best one LoRA."""
    _, best, table = compared_tries()
    return as_image(figures.differences(table["rows"], best, KINDS))
