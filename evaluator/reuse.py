"""Whether runs kept by evaluator/report.py --save were made and scored as they would be now: exit code 0 if all were.

python evaluator/reuse.py --run NAME --saved DIR --base_model BASE --data_source DATA --num_samples 200 \
    --made_by "align_basemodel.py --task_name safety ..."        the command that would make the run

What the flags of both commands decide, the base and the data must be alike; of a run that was made from experts also
how these were made (--experts: as kept under these names), of one that begins with a fusion or a merge what flags made
that (--begun_by), and of answers that a judge of train_judge.py scored what it was trained on. The weights themselves
are not compared: two processors train them differently in the last digits. Says on one line what differs, and exits
with 3.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import (
    DTYPES,
    TASKS_HELP,
    check_at_least,
    check_not_given,
    check_num_samples,
    effective_flags,
    flag,
    flag_with,
    read_tasks,
    resolve_conditional_flags,
)
from config import GENERAL, HELD_APART, TASKS, UserError

OF_HELD_APART = {"dataset_type": HELD_APART}
NOT_ALIKE = 3  # the exit code: of Python's own none


@dataclass
class ReuseArguments:
    """Flags of evaluator/reuse.py."""

    run: str = flag("raw", "the kept runs, comma-separated")
    saved: str | None = flag(None, "the folder where they are kept")
    made_by: str | None = flag(None, "the command that would make the run (none for raw)")
    begun_by: str | None = flag(None, "the command that would make the fusion or the merge that it begins with")
    experts: str | None = flag(None, "the kept experts that it would be made from, comma-separated")
    drift: int = flag(0, "1: it must have an embedding drift", choices=[0, 1])
    base_model: str | None = flag(None, "the base that it would be made from")
    data_source: str | None = flag(None, "the data that it would be scored on: hub, sample or a folder")
    dataset_type: str = flag("test", "which half", choices=["train", "test", HELD_APART])
    num_samples: int = flag(-1, "rows per score, as evaluate_likelihood.py takes them")
    num_trained: int | None = flag_with(OF_HELD_APART, None, "as evaluate_likelihood.py takes it")
    seed: int | None = flag_with(OF_HELD_APART, 42, "as evaluate_likelihood.py takes it")
    comparisons: int = flag(1, "as evaluate_likelihood.py takes it", choices=[0, 1])
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    dtype: str = flag("auto", "precision of the base in scoring and answering", choices=list(DTYPES))
    num_answered: int | None = flag(None, "also ask for judged answers to that many prompts per task")
    max_new_tokens: int | None = flag(None, "of those answers")
    temperature: float = flag(0.6, "of those answers")
    judged: str = flag("flagged,truth,information", "the judged scores to ask for, comma-separated")
    judge_data_source: str | None = flag(None, "the data that their judge would be trained on (default: --data_source)")

    def __post_init__(self):
        if None in (self.saved, self.base_model, self.data_source):
            raise UserError("name the folder of the kept runs with --saved, and --base_model and --data_source")
        resolve_conditional_flags(self)
        if (self.num_answered is None) != (self.max_new_tokens is None):
            raise UserError("--num_answered and --max_new_tokens: give both, or neither")
        if self.num_answered is None:
            check_not_given("has an effect with --num_answered only", judge_data_source=self.judge_data_source)
        check_num_samples(num_samples=self.num_samples)
        check_at_least(1, num_answered=self.num_answered, max_new_tokens=self.max_new_tokens)


if __name__ == "__main__":
    cli.check_early(cli.parse, ReuseArguments)

import importlib
import shlex

from data.sources import absolute_source, source_sha256
from evaluator.evaluate_likelihood import LikelihoodArguments, settings_of
from evaluator.judges.labelled import judge_sha256
from evaluator.kept_runs import kept_folder, read_kept
from evaluator.metrics import JUDGED, drift_metrics, likelihood_metrics, nll_metric, nll_metrics
from evaluator.run_scores import Result, RunScores, answers_of
from evaluator.sweeps import OF_A_MACHINE
from models import base


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ReuseArguments)
    args.data_source, args.judge_data_source = map(absolute_source, (args.data_source, args.judge_data_source))
    for name in (name.strip() for name in args.run.split(",") if name.strip()):
        if reason := what_differs(args, name):
            print(f"{name}: not taken over from {args.saved}: {reason}")
            sys.exit(NOT_ALIKE)
        print(f"{name}: taken over from {args.saved}")


def what_differs(args: ReuseArguments, name: str) -> str | None:
    """In words, in what a kept run is not the one that would be made and scored now; None in nothing."""
    run = read_kept(kept_folder(Path(args.saved), args.dataset_type), name)
    if run is None:
        return "it is not there"
    if args.made_by:
        script = shlex.split(args.made_by)[0]
        if run.record is None or run.record["run"]["script"] != Path(script).name:
            return f"it was not made by {script}"
        if differing := flags_differ(args.made_by, run.record["run"]["arguments"]):
            return f"it was made with {differing}"
    if args.begun_by:
        meta = run.record["meta"] if run.record else {}
        beginning = meta.get("fused", meta.get("init"))
        if beginning is None:
            return "it does not say how what it begins with was made"
        if differing := flags_differ(args.begun_by, beginning):
            return f"it begins with what was made with {differing}"
    if args.experts and (said := experts_differ(args, run)):
        return said
    if args.drift and any(one.name not in run.metrics for one in drift_metrics(read_tasks(args.tasks))):
        return "it has no embedding drift"
    return likelihood_differs(args, run) or (answers_differ(args, run) if args.num_answered else None)


def flags_differ(command: str, recorded: dict) -> str | None:
    """In what a command's flags are not the recorded ones; None in nothing."""
    script, *flags = shlex.split(command)
    maker = importlib.import_module(".".join(Path(script).with_suffix("").parts))
    asked = maker.asked(flags)
    for flag_name, default in getattr(maker, "LEFT_OUT_AT", {}).items():  # neither has one that is at its default
        if flag_name in recorded and flag_name not in asked:
            return f"{flag_name}={recorded[flag_name]}, asked for is {default}"
    return first_difference(recorded, asked)


def experts_differ(args: ReuseArguments, run: RunScores) -> str | None:
    """In what the experts that a run was made from are not the kept ones of these names; None in nothing."""
    recorded = run.record["meta"].get("experts")
    if recorded is None:
        return "it does not say how its experts were made"
    names = [name.strip() for name in args.experts.split(",")]
    if len(recorded) != len(names):
        return f"it was made from {len(recorded)} experts"
    for (expert, arguments), name in zip(recorded.items(), names, strict=True):
        kept = read_kept(kept_folder(Path(args.saved), args.dataset_type), name)
        if kept is None or kept.record is None:
            return f"its expert {name} is not there"
        asked = {key: value for key, value in kept.record["run"]["arguments"].items() if key not in OF_A_MACHINE}
        if arguments is None or (differing := first_difference(arguments, asked)):
            return f"its expert {expert} was made with {differing if arguments else 'nothing recorded'}"
    return None


def likelihood_differs(args: ReuseArguments, run: RunScores) -> str | None:
    """In what a run's likelihoods are not those that would be made; None in nothing. Selected answers have none."""
    if run.record and run.record["run"]["script"] == "select_answers.py":
        return None
    tasks = read_tasks(args.tasks)
    for one in (*nll_metrics(tasks), *(() if args.dataset_type == HELD_APART else (nll_metric(GENERAL),))):
        if one.name not in run.metrics:
            return f"it has no {one.name}"
    names = ("num_samples", "dataset_type", "dtype", "comparisons")
    scored_by = {name: getattr(args, name) for name in names} | effective_flags(args)
    scoring = LikelihoodArguments(**scored_by)
    base_sha256 = None if run.record is None else run.record["run"]["arguments"].get("base_sha256")
    for one in likelihood_metrics(tasks):
        if one.name in run.metrics:
            asked = {"comparisons": 1, **settings_of(scoring, one.task, args.base_model, args.data_source)}
            scored = {"comparisons": 1, **run.metrics[one.name].settings}
            if "tokenizer_sha256" not in scored:  # of an earlier version
                del asked["tokenizer_sha256"]
            if base_sha256:  # a merge is scored as a base of its own; what counts is what it was made from
                scored = scored | {"base_sha256": base_sha256}
            if scored.get("max_length") != asked["max_length"]:  # none asked for: the model's window
                return f"its {one.name} was scored with max_length={scored.get('max_length')}"
            if differing := first_difference(scored, asked):
                return f"its {one.name} was scored with {differing}"
    return None


def answers_differ(args: ReuseArguments, run: RunScores) -> str | None:
    """In what a run's judged answers are not those that would be made and judged; None in nothing. Of selected ones it
    is asked alone how they were judged: the answers that they were selected from are runs of their own."""
    for one in JUDGED:
        if one.name not in run.metrics:
            if one.name in args.judged.split(","):
                return f"it has no {one.name}"
            continue
        if differing := judge_differs(args, one.name, run.metrics[one.name]):
            return f"its {one.name} was judged with {differing}"
        if not (answers := answers_of(run.metrics[one.name])):
            continue
        asked = {
            "num_samples": args.num_answered,
            "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens,
            "dtype": base.dtype_name(args.dtype),
            "data_sha256": source_sha256([one.task], args.dataset_type, args.data_source),
        }
        if differing := first_difference(answers, asked):
            return f"its answers for {one.name} were made with {differing}"
    return None


def judge_differs(args: ReuseArguments, name: str, result: Result) -> str | None:
    """In what the rows that a trained judge learnt from are not those that it would learn from; None in nothing, for a
    judge that was not trained here, and where nothing is recorded, as by earlier versions."""
    if result.settings.get("judge_data_sha256") is None:
        return None
    read = judge_sha256("safety" if name == "flagged" else name, args.judge_data_source or args.data_source)
    return first_difference(result.settings, {"judge_data_sha256": read})


def first_difference(recorded: dict, asked: dict) -> str | None:
    """The first setting that was recorded otherwise than it is asked for now (None: as an earlier stage says)."""
    for name, value in asked.items():
        if value is not None and recorded.get(name) != value:
            return f"{name}={recorded.get(name)}, asked for is {value}"
    return None


if __name__ == "__main__":
    main()
