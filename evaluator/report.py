"""The report: results/report/table.md, table.json and index.html, the page.

table.md: the scores that need no judge (--runs raw,helpfulness,...,moe,mix_moe_...; "" for none), the judged ones of
every answers' directory that has any, and what aligning the runs took. table.json and the page: all of it by run, with
the paired differences from one of them (--reference).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import flag
from config import BIAS, HELD_APART, RESULTS_DIR, TASKS, UserError


@dataclass
class ReportArguments:
    """Flags of evaluator/report.py."""

    runs: str = flag(f"raw,{','.join(TASKS)}", "the runs, comma-separated, in the table's order")
    reference: str | None = flag(
        None, "the run to compare the others with (default: the last aligned fusion of --runs)"
    )
    show_answers: str | None = flag(
        None,
        "show the answers of this results folder on the page, and keep them with --save; their texts are its data's",
    )
    save: str | None = flag(None, "keep each run's scores by item in this folder, as <run>.json without texts")
    only_save: int = flag(0, "1: keep the scores and write no report", choices=[0, 1])
    saved: str | None = flag(None, "read runs that are not in --results_dir from such a folder")
    beside: str | None = flag(
        None, "kept runs of the same names on another base, by --save: their mean likelihoods stand beside these"
    )
    data_source: str | None = flag(None, "count held-out questions that nearly stand in the training rows of this data")
    dataset_type: str = flag("test", "which half", choices=["train", "test", HELD_APART])
    results_dir: str = flag(str(RESULTS_DIR), "the folder of the scores (default: results)")

    def __post_init__(self):
        if self.data_source and self.dataset_type != "test":
            raise UserError("--data_source: near-duplicates are counted between training rows and the test half alone")
        if self.only_save and not self.save:
            raise UserError("--only_save 1: say where, with --save")
        for name in ("show_answers", "beside"):
            if self.only_save and getattr(self, name):
                raise UserError(f"--only_save 1 writes no page: leave --{name} out")


if __name__ == "__main__":
    cli.check_early(cli.parse, ReportArguments)

from evaluator.comparison import as_table, check_scored_alike, compare
from evaluator.kept_runs import DUPLICATES, check_made_alike, kept_folder, read_kept, save_run
from evaluator.metrics import JUDGED, LENGTH_CONTROLLED, likelihood_metrics, nll_metrics
from evaluator.page import own_run, write_page
from evaluator.page_answers import SHOWN, shown_answers
from evaluator.results import INTERVALS, corrected_text, judge_name, judge_text
from evaluator.results_folder import check_answers, made_in, read_run_scores
from evaluator.run_scores import RunScores, left_out_tasks, scored_tasks
from evaluator.statistics import interval_text
from workspace.files import as_written, read_json, write_json, write_text
from workspace.run_dir import COMPLETE, read_run


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ReportArguments)
    runs = [Path(name.strip()).name for name in args.runs.split(",") if name.strip()]
    results_dir = Path(args.results_dir)
    saved, save = (folder and kept_folder(Path(folder), args.dataset_type) for folder in (args.saved, args.save))
    kept = {run: read_kept(saved, run) if saved else None for run in runs}
    known = {run: read_run_scores(results_dir, run, args.dataset_type, kept[run]) for run in runs}
    for run, scores in known.items():
        if kept[run] is not None and scores.record is kept[run].record:
            check_made_alike(read_run(made_in(results_dir, run)), kept[run])
    for scores in known.values() if save else ():
        save_run(save, scores)
    if left_out := left_out_tasks(known.values()):
        print(f"Not all runs are scored on {', '.join(left_out)}: left out of the comparison")
    duplicates = count_duplicates(args, scored_tasks(known.values()))
    if args.only_save:
        return
    check_scored_alike(known)
    reference = args.reference or last_fusion(known)
    comparison = compare(known, reference) if reference else None
    parts = [judged_table(results_dir, args.dataset_type)]
    if runs:
        parts = [likelihood_table(known, results_dir, args.dataset_type), *parts, cost_table(known)]
    table = "\n".join(part for part in parts if part)
    if not table:
        raise UserError(
            f"--results_dir {results_dir}: holds no judged scores of the {args.dataset_type} half, and "
            "--runs names no run"
        )
    path = kept_folder(results_dir / "report", args.dataset_type) / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, table)
    print(table)
    print(f"written to {path}")
    if comparison:
        write_json(path.with_name("table.json"), as_table(comparison))
        page = path.with_name("index.html")
        answers = answers_to_show(args, list(known), own_run(list(known), comparison["reference"]))
        beside = args.beside and beside_runs(kept_folder(Path(args.beside), args.dataset_type), list(known), reference)
        write_page(page, comparison, known, answers, duplicates, beside)
        print(f"the page: {page}")


def beside_runs(folder: Path, names: list[str], reference: str) -> tuple[dict, dict[str, RunScores]]:
    """The kept runs of a folder that have these names, compared: comparison, runs. UserError without the reference."""
    runs = {name: kept for name in names if (kept := read_kept(folder, name)) is not None}
    if reference not in runs:
        raise UserError(f"--beside {folder}: has no {reference}.json; keep that run there with --save")
    return compare(runs, reference), runs


def count_duplicates(args: ReportArguments, tasks: tuple[str, ...]) -> dict[str, dict] | None:
    """The near-duplicates of --data_source, kept in --save; without it those kept in --saved, if there are any."""
    if args.data_source:
        from data.near_duplicates import near_duplicates  # scikit-learn, for this alone

        counts = near_duplicates(tasks, args.data_source)
        if args.save:
            write_json(Path(args.save) / DUPLICATES, counts)
        return counts
    path = kept_folder(Path(args.saved), args.dataset_type) / DUPLICATES if args.saved else None
    return read_json(path) if path and path.exists() else None


def answers_to_show(args: ReportArguments, runs: list[str], own: str) -> dict | None:
    """The answers of --show_answers, kept in --save; without it those kept in --saved, if there are any."""
    if args.show_answers:
        answers = shown_answers(Path(args.show_answers), runs, own, args.dataset_type)
        if args.save:
            write_json(kept_folder(Path(args.save), args.dataset_type) / SHOWN, answers)
        return answers
    path = kept_folder(Path(args.saved), args.dataset_type) / SHOWN if args.saved else None
    return read_json(path) if path and path.exists() else None


def last_fusion(runs: dict[str, RunScores]) -> str | None:
    """The last of the runs that is an aligned fusion, by its record, and is scored as it is."""
    of_record = {run: one.record["run"]["arguments"] for run, one in runs.items() if one.record and BIAS not in run}
    fusions = [run for run, arguments in of_record.items() if arguments.get("moe_flag") == 1]
    return fusions[-1] if fusions else None


def likelihood_table(runs: dict[str, RunScores], results_dir: Path, split: str) -> str:
    """The markdown table of the runs' likelihood scores: value and 95 % interval, n in the heading. Answers that were
    selected have none."""
    tasks = scored_tasks(runs.values())
    scores = {}
    for run, known in runs.items():
        if known.record and known.record["run"]["script"] == "select_answers.py":
            continue
        having = (one for one in likelihood_metrics(tasks) if one.name in known.metrics)
        scores[run] = {(one.task, one.judgement): known.metrics[one.name].score for one in having}
        for one in nll_metrics(tasks):
            if one.name not in known.metrics:
                path = results_dir / "evaluation" / one.task / split / run / "likelihood" / "metrics.json"
                raise UserError(f"{path}: does not exist; run evaluator/evaluate_likelihood.py --run {run} first")
    named = (
        (f"{one.heading} {'↑' if one.higher_is_better else '↓'}", one.task, one.judgement)
        for one in likelihood_metrics(tasks)
    )
    columns = [column for column in named if any(column[1:] in metrics for metrics in scores.values())]
    counts = []
    for _, task, name in columns:
        n = {metrics[task, name]["n"] for metrics in scores.values() if (task, name) in metrics}
        if len(n) > 1:
            raise UserError(
                f"{name} of {task} was scored on different numbers of items ({sorted(n)}): score all runs alike"
            )
        counts.append(n.pop())
    lines = [
        "| run | "
        + " | ".join(f"{heading} (n = {n})" for (heading, *_), n in zip(columns, counts, strict=True))
        + " |",
        "| --- |" + " --- |" * len(columns),
        *(
            f"| {run} | " + " | ".join(interval_text(metrics.get(key[1:])) for key in columns) + " |"
            for run, metrics in scores.items()
        ),
        "",
        f"Held-out rows; {INTERVALS}. Likelihoods of given answers, no judge: not the paper's metrics. Routing: the "
        "share of questions whose own tokens go most to their task's expert. A run named moe is the fused model before "
        "its alignment." + cut_text(scores, columns),
        "",
    ]
    return "\n".join(lines)


def cut_text(scores: dict[str, dict], columns: list[tuple]) -> str:
    """A sentence of how many items of each column lost tokens to the model's window (or --max_length); "" if none."""
    most = {
        heading: max(of_run.get((task, name), {}).get("cut", 0) for of_run in scores.values())
        for heading, task, name in columns
    }
    cut = [f"{count} of {heading.rstrip(' ↓↑')}" for heading, count in most.items() if count]
    return f" Longer than the model's window, and cut to it: {', '.join(cut)}." if cut else ""


def judged_table(results_dir: Path, split: str) -> str:
    """The markdown table of every finished judged score: a row per answers' directory, a column per score and judge; ""
    without any. Value, 95 % interval, n, and the estimate corrected for a trained judge's errors. UserError for a score
    of other answers than the directory holds now."""
    cells: dict[str, dict[tuple, dict]] = {}  # answers' directory -> (heading, (judge's name, version)) -> metric
    judges: dict[str, list[tuple]] = {}  # heading -> judges, in order of appearance
    accuracies: dict[str, None] = {}  # what is known of the judges, each once, in order
    for one in (*JUDGED, LENGTH_CONTROLLED):
        heading, task, name = one.directed, one.task, one.judgement
        for finished in sorted((results_dir / "evaluation" / task / split).glob(f"*/*/{COMPLETE}")):
            folder, path = finished.parent, finished.with_name("metrics.json")
            scores = read_json(path)
            with as_written(path):
                if name not in scores["metrics"]:
                    continue
                check_answers(folder, results_dir / "inference" / task / split / folder.parent.name / "outputs.jsonl")
                judge = (judge_name(scores["judge"]), scores["judge"]["version"])
                judged_cell(scores["metrics"][name])  # or an error of values
                cells.setdefault(str(scores["run"]), {})[heading, judge] = scores["metrics"][name]
                if judge not in judges.setdefault(heading, []):
                    judges[heading].append(judge)
                if judge_text(scores["judge"]) != f"judge {judge[0]}":
                    accuracies[judge_text(scores["judge"])] = None
    if not cells:
        return ""
    columns = [(heading, judge) for heading, names in judges.items() for judge in names]
    lines = [
        "| answers | " + " | ".join(f"{heading} ({said(judge, judges[heading])})" for heading, judge in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for run in sorted(cells):
        lines.append(f"| {run} | " + " | ".join(judged_cell(cells[run].get(column)) for column in columns) + " |")
    lines += ["", f"Judged answers; {INTERVALS}."]
    lines += [f"{text[0].upper()}{text[1:]}." for text in accuracies]
    return "\n".join([*lines, ""])


def said(judge: tuple, judges: list[tuple]) -> str:
    """A judge's name, and its version where another judge of that name stands beside it."""
    name, version = judge
    return f"{name}, {version}" if [one for one, _ in judges].count(name) > 1 else name


def judged_cell(score: dict | None) -> str:
    """One judged score: value, interval, n, and beside it the corrected estimate where there is one."""
    if score is None:
        return interval_text(None)
    return "; ".join(filter(None, [f"{interval_text(score)} (n = {score['n']})", corrected_text(score)]))


def cost_table(runs: dict[str, RunScores]) -> str:
    """The markdown table of what aligning the runs took, from their run.json; "" if none of them was aligned here."""
    records = {run: one.record for run, one in runs.items() if one.record and "samples" in one.record.get("train", {})}
    if not records:
        return ""
    lines = [
        "| run | samples x epochs | seconds | peak memory (GB) | trained parameters (M) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run, record in records.items():
        train, arguments = record["train"], record["run"]["arguments"]
        with as_written(Path(run) / "run.json"):
            lines.append(
                f"| {run} | {train['samples']} x {arguments['num_train_epochs']:g} | {train['seconds']:.0f} | "
                f"{train['peak_memory_bytes'] / 1e9:.1f} | {train['trainable_parameters'] / 1e6:.1f} |"
            )
    with as_written(Path(next(iter(records))) / "run.json"):
        made = {}  # (device, packages): the runs
        for run, record in records.items():
            packages = ", ".join(f"{name} {version}" for name, version in record["meta"]["packages"].items())
            made.setdefault((record["meta"]["device"], packages), []).append(run)
    on = [
        f"{device}; {packages}" + (f" ({', '.join(of_these)})" if len(made) > 1 else "")
        for (device, packages), of_these in made.items()
    ]
    lines += ["", f"Alignment, start-up included, on {'. On '.join(on)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
