"""One of several finished answers to each prompt, as a directory of answers like any other: ensembles that select.

python evaluator/select_answers.py --task_name safety --answers cross_helpfulness,aligned,cross_truthfulness

consensus: the answer most like the others (minimum Bayes risk by chrF); of several samples of one expert (inference.py
--seed) this is More Agents (Li et al. 2024, arXiv 2402.05120). judge: the answer that a judge of train_judge.py likes
best; an evaluator refuses to score it by the same one. classifier: the answer of the expert that a classifier of the
instruction picks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import TASKS_HELP, check_at_least, check_num_samples, flag, flag_with, read_tasks, resolve_conditional_flags
from config import RESULTS_DIR, ROOT, TASKS, UserError

BY_JUDGE, BY_CLASSIFIER = {"by": "judge"}, {"by": "classifier"}


@dataclass
class SelectArguments:
    """Flags of evaluator/select_answers.py."""

    task_name: str | None = flag(None, "the task whose prompts were answered")
    dataset_type: str = flag("test", "which half was answered", choices=["train", "test"])
    answers: str | None = flag(
        None,
        "the directories to select from, comma-separated, under results/inference/<task>/<split>; the first wins a tie",
    )
    by: str = flag("consensus", "what selects", choices=["consensus", "judge", "classifier"])
    name: str | None = flag(None, "the directory to write (default: consensus, best_by_<judge> or classifier)")
    judge: str | None = flag_with(BY_JUDGE, None, "the folder of a judge of train_judge.py")
    base_model: str | None = flag_with(BY_JUDGE, None, "the judge's base, if it is no longer where the judge names it")
    batch_size: int | None = flag_with(BY_JUDGE, 16, "texts per batch of the judge")
    data_source: str | None = flag_with(
        BY_CLASSIFIER, None, "the data that the classifier learns from: hub, sample or a folder"
    )
    tasks: str | None = flag_with(BY_CLASSIFIER, ",".join(TASKS), f"the experts' tasks: {TASKS_HELP}")
    num_samples: int | None = flag_with(BY_CLASSIFIER, -1, "training rows per task, drawn as align_basemodel.py does")
    seed: int | None = flag_with(BY_CLASSIFIER, 42, "seed of that draw")
    results_dir: str = flag(str(RESULTS_DIR), "the folder of the answers (default: results)")

    def __post_init__(self):
        resolve_conditional_flags(self)
        if self.task_name is None or len(self.directories) < 2:
            raise UserError("name the prompts with --task_name and two or more answers' directories with --answers")
        if self.by == "judge" and self.judge is None:
            raise UserError("--by judge: name a judge of train_judge.py with --judge")
        if self.by == "classifier":
            tasks = read_tasks(self.tasks)
            if self.data_source is None or len(self.directories) != len(tasks):
                said = f"takes --data_source and, as --answers, those of the experts for {', '.join(tasks)}"
                raise UserError(f"--by classifier: {said}")
        if self.name and Path(self.name).name != self.name:
            raise UserError(f"--name {self.name}: must be a plain folder name")
        check_at_least(1, batch_size=self.batch_size)
        if self.num_samples is not None:
            check_num_samples(num_samples=self.num_samples)
        if self.judge:
            folder = next((path for path in (Path(self.judge), ROOT / self.judge) if path.is_dir()), Path(self.judge))
            self.judge = str(folder.resolve())

    @property
    def directories(self) -> list[str]:
        return [part.strip() for part in (self.answers or "").split(",") if part.strip()]


if __name__ == "__main__":
    cli.check_early(cli.parse, SelectArguments)

from collections import Counter

from data.sources import absolute_source, draw, prompt_of, read_rows, source_sha256, trainable_rows
from evaluator.answers import Answers, load_answers
from evaluator.judges.protocols import JUDGE_FILE, YES_NO, clean_answer, fill
from evaluator.judges.trained import read_trained
from evaluator.results_folder import recorded
from evaluator.run_scores import ANSWERS_ALIKE
from workspace import run_dir
from workspace.files import as_written, read_json, write_lines

SCRIPT = "select_answers.py"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, SelectArguments)
    folder = Path(args.results_dir) / "inference" / args.task_name / args.dataset_type
    candidates = [load_answers(folder / name, args.task_name) for name in args.directories]
    check_same_prompts(candidates)
    arguments = {
        "task_name": args.task_name,
        "by": args.by,
        "answers": args.directories,
        "answers_sha256": [answers.checksum for answers in candidates],
        "candidates": made_alike(candidates),
        "data_source": recorded(candidates[0].folder).get("data_source"),
    }
    if args.by == "consensus":
        name, choose = "consensus", lambda: choose_by_consensus(candidates)
    elif args.by == "judge":
        from evaluator.judges.local import judge_version

        if not (Path(args.judge) / JUDGE_FILE).exists():
            raise UserError(f"--judge {args.judge}: is no folder of a judge of train_judge.py")
        arguments |= {"judge": args.judge, "judge_version": judge_version(args.judge)}
        name, choose = f"best_by_{Path(args.judge).name}", lambda: choose_by_judge(args, candidates)
    else:
        source = absolute_source(args.data_source)
        arguments |= {"data_source": source, "data_sha256": source_sha256(read_tasks(args.tasks), "train", source)}
        arguments |= {"num_samples": args.num_samples, "seed": args.seed}
        if read_tasks(args.tasks) != TASKS:
            arguments["tasks"] = args.tasks
        name, choose = "classifier", lambda: choose_by_classifier(args, source, candidates)
    output = folder / (args.name or name)
    if output.name in args.directories:
        raise UserError(f"--name {output.name}: is one of --answers")
    if run_dir.begin(output, SCRIPT, arguments, "move it away, or take another --name") == "complete":
        print(f"{output} is complete: nothing to do")
        return
    chosen = choose()
    rows = [
        {**candidates[choice].rows[i], "generator": output.name, "chosen": args.directories[choice]}
        for i, choice in enumerate(chosen)
    ]
    write_lines(output / "outputs.jsonl", rows)
    counts = Counter(row["chosen"] for row in rows)
    run_dir.finish(output, SCRIPT, arguments, {"answers": len(rows), "chosen": dict(counts)}, meta={})
    shares = ", ".join(f"{counts[name]} of {name}" for name in args.directories)
    print(f"{len(rows)} answers ({shares}): {output}")


def check_same_prompts(candidates: list[Answers]) -> None:
    """UserError where two directories do not answer the same prompts in the same order."""
    first = candidates[0]
    for other in candidates[1:]:
        if [(row["id"], row["instruction"]) for row in other.rows] != [
            (row["id"], row["instruction"]) for row in first.rows
        ]:
            raise UserError(f"{other.folder}: answers other prompts than {first.folder}; answer the same with both")


def made_alike(candidates: list[Answers]) -> dict:
    """The settings that all candidates were answered with, and their base. UserError where they differ."""
    first, *others = [recorded(answers.folder) for answers in candidates]
    settings = {key: first[key] for key in (*ANSWERS_ALIKE, "base_sha256") if key in first}
    for answers, other in zip(candidates[1:], others, strict=True):
        for key, value in settings.items():
            if key in other and other[key] != value:
                raise UserError(
                    f"{answers.folder}: was answered with {key} {other[key]}, {candidates[0].folder} with {value}; "
                    "answer with both alike"
                )
    return settings


def choose_by_consensus(candidates: list[Answers]) -> list[int]:
    """Per prompt the candidate with the largest mean chrF (Popović 2015, by sacrebleu) to the others."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    chosen = []
    for rows in zip(*(answers.rows for answers in candidates), strict=True):
        texts = [row["output"] for row in rows]
        likeness = [
            sum(chrf.sentence_score(text, [other]).score for j, other in enumerate(texts) if j != i)
            for i, text in enumerate(texts)
        ]
        chosen.append(likeness.index(max(likeness)))
    return chosen


def choose_by_judge(args: SelectArguments, candidates: list[Answers]) -> list[int]:
    """Per prompt the candidate that is likeliest true, or informative, or not harmful, to a judge trained here."""
    from evaluator.judges.local import load_causal, yes_probabilities
    from models import base

    with as_written(Path(args.judge) / JUDGE_FILE):
        kind = read_json(Path(args.judge) / JUDGE_FILE)["kind"]
    trained = read_trained(args.judge, kind)

    def text(row: dict) -> str:
        return fill(YES_NO[kind], row["instruction"], clean_answer(row["output"]))

    texts = list(dict.fromkeys(text(row) for answers in candidates for row in answers.rows))
    model, tokenizer = load_causal(args.judge, base.pick_dtype("auto"), args.base_model)
    p_yes = dict(yes_probabilities(model, tokenizer, texts, args.batch_size, trained.max_length, "judging"))
    sign = -1 if kind == "safety" else 1  # its yes is a harmful answer
    chosen = []
    for rows in zip(*(answers.rows for answers in candidates), strict=True):
        liked = [sign * p_yes[text(row)] for row in rows]
        chosen.append(liked.index(max(liked)))
    return chosen


def choose_by_classifier(args: SelectArguments, source: str, candidates: list[Answers]) -> list[int]:
    """Per prompt the expert of the task that logistic regression on TF-IDF of words takes the instruction for."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = [], []
    for label, task in enumerate(read_tasks(args.tasks)):
        rows = draw(trainable_rows(task, read_rows(task, "train", source)), args.num_samples, args.seed)
        asked = dict.fromkeys("\n".join(filter(None, prompt_of(row))) for row in rows)
        texts += asked
        labels += [label] * len(asked)
    classifier = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)),
        LogisticRegression(max_iter=1000, class_weight="balanced"),
    )
    classifier.fit(texts, labels)
    asked = ["\n".join(filter(None, (row["instruction"], row["input"]))) for row in candidates[0].rows]
    return classifier.predict(asked).tolist()


if __name__ == "__main__":
    main()
