"""Train a small truth, information or safety judge on labelled answers, and measure it on questions it never saw.

The judge is a LoRA adapter that says " yes" or " no" after the protocol's text (evaluator/judges/protocols.py), so that
evaluate_truth_and_info.py and evaluate_safety.py take it by its folder: --judge results/judges/<kind>.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import DTYPES, SourceArguments, check, check_at_least, check_num_samples, flag, is_positive
from config import UserError


@dataclass
class JudgeArguments(SourceArguments):
    """What evaluator/train_judge.py adds to JudgeTrainArguments."""

    kind: str | None = flag(None, "what the judge decides", choices=["truth", "information", "safety"])
    output: str | None = flag(None, "where the judge is written (default: judges/<kind> in --results_dir)")
    half: str | None = flag(
        None,
        "which half of the training questions (default: both): of two judges one may select what the other scores",
        choices=["first", "second"],
    )
    num_samples: int = flag(-1, "training rows, drawn with --seed; -1: all")
    num_held_out: int = flag(1000, "held-out rows the judge is measured on, evenly spaced; -1: all")
    max_length: int = flag(192, "tokens; of a longer text the middle of the answer is cut")
    batch_size: int | None = flag(None, "short for --per_device_train_batch_size")
    dtype: str = flag(
        "auto",
        "of the base weights; auto: bfloat16 where the device is fast in it, else float16 on a GPU, float32 on a CPU",
        choices=list(DTYPES),
    )
    rank: int = flag(16, "LoRA rank r")
    alpha: float = flag(32, "LoRA alpha")
    lora_dropout: float = flag(0.0, "LoRA dropout; drawing it is slow on a CPU")

    def __post_init__(self):
        if self.kind is None:
            raise UserError("say what the judge decides: --kind {truth,information,safety}")
        check_num_samples(num_samples=self.num_samples, num_held_out=self.num_held_out)
        check_at_least(32, max_length=self.max_length)
        check_at_least(1, batch_size=self.batch_size, rank=self.rank)
        check("alpha", self.alpha, is_positive(self.alpha), "a finite number above 0")
        check("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")


if __name__ == "__main__":
    cli.check_early(cli.parse_known, JudgeArguments, cli.TRAINING_EPILOG)


from data.encoding import IGNORED, Collator
from data.sources import absolute_source, draw, spread
from evaluator.judges.labelled import Labelled, judge_rows, judge_sha256
from evaluator.judges.local import token_ids, yes_no_ids, yes_probabilities
from evaluator.judges.protocols import JUDGE_FILE, YES_NO
from evaluator.results import show
from evaluator.statistics import area_under_curve, calibration_error, metric, share, statistic_metric
from models import base, training_arguments
from models.adapters import add_lora
from models.base_identity import base_sha256
from models.loading import device
from models.processes import on_first_process
from models.trainer import AlignmentTrainer
from models.training_arguments import TrainArguments
from workspace import run_dir
from workspace.files import write_json, write_lines

SCRIPT = "train_judge.py"
THRESHOLD = 0.5  # of p(" yes")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Arguments that change the result: a judge with others never takes a finished or begun judge's folder.
OURS = (
    "kind",
    "base_model",
    "data_source",
    "dtype",
    "half",
    "num_samples",
    "num_held_out",
    "max_length",
    "rank",
    "alpha",
    "lora_dropout",
)


@dataclass
class JudgeTrainArguments(TrainArguments):
    """TrainArguments with what trains a judge best in a few minutes."""

    learning_rate: float = flag(4e-4, "of the LoRA matrices")
    num_train_epochs: float = flag(1.0, "epochs")
    per_device_train_batch_size: int = flag(8, "samples per device and batch")
    gradient_accumulation_steps: int = flag(2, "batches per step")
    save_strategy: str = flag("steps", "when to write a checkpoint to resume from")
    save_steps: float = flag(0.25, "every that many steps, or that share of them all")
    save_total_limit: int | None = flag(1, "checkpoints kept")


@cli.command
def main(argv: list[str] | None = None) -> None:
    args, training = training_arguments.parse(argv, JudgeArguments, JudgeTrainArguments)
    args.base_model = base.default_base_model(args.base_model)
    args.data_source = absolute_source(args.data_source) or "hub"
    folder = Path(args.output or Path(args.results_dir) / "judges" / args.kind)
    training.output_dir = str(folder)
    arguments = {name: getattr(args, name) for name in OURS} | training.compared()
    arguments["base_sha256"] = base_sha256(args.base_model)
    arguments["data_sha256"] = judge_sha256(args.kind, args.data_source)
    remedy = "give this judge a folder of its own with --output, or move that one"
    state = on_first_process(lambda: run_dir.begin(folder, SCRIPT, arguments, remedy))
    if state == "complete":
        print(f"{folder} is complete: nothing to do")
        return
    print(training.describe_batch())
    started = time.perf_counter()
    rows, held_out, origin = judge_rows(args.kind, args.data_source)
    if args.half:
        rows = half_of(rows, args.half)
    rows, held_out = draw(rows, args.num_samples, training.seed), spread(held_out, args.num_held_out)
    for name, chosen in (("num_samples", rows), ("num_held_out", held_out)):
        if {row.label for row in chosen} != {0, 1}:
            raise UserError(f"--{name} {getattr(args, name)}: the rows drawn have one label only; take more")
    print(f"{args.kind}: {len(rows)} training and {len(held_out)} held-out rows, no question in both, from {origin}")
    tokenizer = base.load_tokenizer(args.base_model)
    trainer = judge_trainer(args, training, samples(args, rows, tokenizer))
    trained = trainer.train_into(folder, state == "resume", started)
    if trained is None:
        return
    trained_at = time.perf_counter()
    # without the Trainer's autocast: measured as an evaluator will load it
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).to(device()).eval()
    metrics, p = measure(args, model, tokenizer, rows, held_out, training.per_device_train_batch_size)
    write_judge(folder, args, held_out, metrics, p)
    train = {
        "samples": len(rows),
        "held_out": len(held_out),
        **metrics,
        **trained,
        "train_seconds": trained["seconds"],
        "seconds": round(trained["seconds"] + time.perf_counter() - trained_at, 1),
    }
    run_dir.finish(folder, SCRIPT, arguments, train, {"training": training.recorded()})
    for name, value in metrics.items():
        print(f"  {name} {show(value)}")
    print(f"Trained the {args.kind} judge in {train['seconds']:.0f} s: {folder}")


def half_of(rows: list[Labelled], half: str) -> list[Labelled]:
    """The rows of every other question, in the order in which the questions first come: the first of each two, or the
    second."""
    questions = {question: number for number, question in enumerate(dict.fromkeys(row.question for row in rows))}
    return [row for row in rows if questions[row.question] % 2 == ("first", "second").index(half)]


def samples(args: JudgeArguments, rows: list[Labelled], tokenizer) -> list[dict]:
    """The rows encoded: the protocol's text, then " yes" or " no", the one labelled token."""
    no_yes = yes_no_ids(tokenizer, rows[0].text(args.kind))[::-1]
    encoded = []
    for row in rows:
        ids = token_ids(tokenizer, row.text(args.kind), args.max_length)
        answer = no_yes[row.label]
        encoded.append({"input_ids": [*ids, answer], "labels": [IGNORED] * len(ids) + [answer]})
    return encoded


def judge_trainer(args: JudgeArguments, training: JudgeTrainArguments, encoded: list[dict]) -> AlignmentTrainer:
    """A Trainer of LoRA on attention and FFN; logits are made for the answer's position only."""
    model = add_lora(args, TARGETS, training.seed)
    return AlignmentTrainer(model, training, train_dataset=encoded, data_collator=Collator())


def measure(args: JudgeArguments, model, tokenizer, rows: list[Labelled], held_out: list[Labelled], batch_size: int):
    """({metric: ...} on the held-out rows, p(" yes") per held-out row)."""
    texts = [row.text(args.kind) for row in held_out]
    p_of_text = dict(yes_probabilities(model, tokenizer, texts, batch_size, args.max_length, "held-out rows"))
    p = [p_of_text[text] for text in texts]
    majority = int(sum(row.label for row in rows) * 2 > len(rows))
    return held_out_metrics(held_out, p, majority), p


def held_out_metrics(held_out: list[Labelled], p: list[float], majority: int) -> dict[str, dict]:
    """How well p(" yes") (N,) tells the N rows' labels, with intervals over their questions.

    majority: the label of most training rows.
    """
    labels = [row.label for row in held_out]
    questions = [row.question for row in held_out]
    hits = [int(value >= THRESHOLD) == label for value, label in zip(p, labels, strict=True)]

    def hits_among(wanted: int) -> dict:
        rows = [
            (hit, question) for hit, label, question in zip(hits, labels, questions, strict=True) if label == wanted
        ]
        values, groups = zip(*rows, strict=True)
        return share(values, groups=groups, higher_is_better=True)

    def statistic(function, unit: str, higher_is_better: bool) -> dict:
        return statistic_metric(function, (labels, p), groups=questions, unit=unit, higher_is_better=higher_is_better)

    squares = [(x - y) ** 2 for x, y in zip(p, labels, strict=True)]
    return {
        "accuracy": share(hits, groups=questions, higher_is_better=True),
        "majority_baseline": share([label == majority for label in labels], groups=questions, higher_is_better=True),
        "auc": statistic(area_under_curve, "area under the ROC curve", True),
        "calibration_error": statistic(calibration_error, "probability", False),
        "brier": metric(squares, groups=questions, unit="squared probability", higher_is_better=False),
        "sensitivity": hits_among(1),
        "specificity": hits_among(0),
    }


def write_judge(folder: Path, args: JudgeArguments, held_out: list[Labelled], metrics: dict, p: list[float]) -> None:
    """held_out.jsonl (question, answer, label, p per row) and judge.json, by which an evaluator knows the judge."""
    lines = [
        {"question": row.question, "answer": row.answer, "label": row.label, "p": value}
        for row, value in zip(held_out, p, strict=True)
    ]
    write_lines(folder / "held_out.jsonl", lines)
    judge = {
        "kind": args.kind,
        "protocol": YES_NO[args.kind],
        "threshold": THRESHOLD,
        "max_length": args.max_length,
        "base_model": args.base_model,
        "held_out": metrics,
    }
    write_json(folder / JUDGE_FILE, judge)


if __name__ == "__main__":
    main()
