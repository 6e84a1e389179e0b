"""Helpfulness as the paper scores it: AlpacaEval's win rate of a run's answers against text_davinci_003's.

    python evaluate_helpfulness.py [--task_name <answers' directory>]

writes aligned.json and reference_model.json, which the command `alpaca_eval` takes; with --judge, runs that library
itself. alpaca_eval_gpt4 is the paper's judge (AlpacaEval 1), weighted_alpaca_eval_gpt4_turbo that of AlpacaEval 2.
"""

import hashlib
import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import check_not_given, flag
from config import UserError
from evaluator.answers import CONCURRENCY, Answers, EvaluateArguments, load_answers


@dataclass
class HelpfulnessArguments(EvaluateArguments):
    """Flags of evaluator/evaluate_helpfulness.py."""

    judge: str | None = flag(
        None,
        "an annotator of alpaca_eval (alpaca_eval_gpt4: the paper's; "
        "weighted_alpaca_eval_gpt4_turbo: AlpacaEval 2's), or a folder with a configs.yaml like "
        "theirs (default: write the files for alpaca_eval and judge nothing)",
    )
    reference_outputs: str | None = flag(
        None,
        "a .json list or .jsonl file of instruction and output to compare with "
        "(default: the answers that came with the prompts)",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.judge is None:
            check_not_given(
                "is of a judge, and none is named; name it with --judge, such as alpaca_eval_gpt4",
                judge_url=self.judge_url,
                judge_model=self.judge_model,
                concurrency=self.concurrency,
                dry_run=self.dry_run or None,
                num_samples=None if self.num_samples == -1 else self.num_samples,
            )
        elif importlib.util.find_spec("alpaca_eval") is None:
            raise UserError(f"--judge {self.judge}: needs AlpacaEval: pip install -r requirements-eval.txt")


if __name__ == "__main__":
    cli.check_early(cli.parse, HelpfulnessArguments)

import numpy as np

from data.sources import spread
from evaluator.judges import alpaca
from evaluator.results import REMEDY, evaluation_folder, score_once
from evaluator.statistics import metric
from workspace import run_dir
from workspace.client import OPENAI_URL
from workspace.files import read_json, write_json

SCRIPT = "evaluate_helpfulness.py"
TASK = "helpfulness"
NUM_ALPACA_EVAL = 805


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, HelpfulnessArguments)
    answers = load_answers(args.answers_folder(TASK), TASK)
    model, reference = output_pairs(answers.rows, args.reference_outputs, answers.folder)
    folder = evaluation_folder(args.results_dir, TASK, args.dataset_type, args.directory, "").resolve()
    files = write_once(folder / "aligned.json", model), write_once(folder / "reference_model.json", reference)
    empty = sum(not row["output"].strip() for row in reference)
    print(f"{len(model)} items ({answers.num_empty} empty answers, {empty} empty references): {folder}")
    if args.judge is None:
        print(
            "AlpacaEval's own command on them, with the paper's judge (IS_ALPACA_EVAL_2=True: AlpacaEval 2):\n  "
            + shlex.join(official_command(*files, folder / "alpaca_eval_annotations.json"))
        )
    else:
        judge_answers(args, answers, model, reference)


def official_command(model_path: Path, reference_path: Path, cache_path: Path) -> list[str]:
    """AlpacaEval's own command on two files. It sends OPENAI_API_KEY to OPENAI_BASE_URL: to OpenAI, whatever is set."""
    environment = [f"OPENAI_BASE_URL={OPENAI_URL}", f"OPENAI_API_BASE={OPENAI_URL}", "IS_ALPACA_EVAL_2=False"]
    files = {"model_outputs": model_path, "reference_outputs": reference_path, "caching_path": cache_path}
    flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    return ["env", *environment, "alpaca_eval", *flags]


def output_pairs(rows: list[dict], reference_outputs: str | None, folder: Path) -> tuple[list[dict], list[dict]]:
    """(the run's outputs, the reference's) in AlpacaEval's format and the same order; the texts as they are."""
    standard = all(row["id"].startswith("alpaca_eval-") for row in rows)
    dataset = "alpaca_eval"
    if not standard:
        dataset = run_dir.read_record(folder / run_dir.COMPLETE)["run"]["arguments"].get("data_source") or folder.name
    given = None if reference_outputs is None else read_reference(Path(reference_outputs))
    model, reference = [], []
    for row in rows:
        # one field for both, as AlpacaEval made its instructions of AlpacaFarm's
        instruction = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        common = {"instruction": instruction, "dataset": Path(dataset).name}
        model.append({**common, "output": row["output"], "generator": row["generator"]})
        if given is None:
            compared = {"output": row["reference"], "generator": "text_davinci_003" if standard else "reference"}
        elif (compared := given.get(instruction)) is None:
            raise UserError(
                f"--reference_outputs {reference_outputs}: has no output for {instruction[:80]!r} "
                f"(answer {row['id']!r}); it must cover every instruction"
            )
        reference.append({**common, **compared})
    return model, reference


def read_reference(path: Path) -> dict[str, dict]:
    """{instruction: {output, generator}} of a .json list or .jsonl file; UserError names what is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"--reference_outputs {path}: cannot be read as {path.suffix or 'JSON'} ({error})") from error
    outputs = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise UserError(f"--reference_outputs {path}: item {number} must have the texts 'instruction' and 'output'")
        value = {"output": row["output"], "generator": str(row.get("generator", path.stem))}
        if outputs.setdefault(row["instruction"], value) != value:
            raise UserError(f"--reference_outputs {path}: item {number} gives a second output for the same instruction")
    return outputs


def write_once(path: Path, rows: list[dict]) -> Path:
    """Write a JSON file; UserError for one of other content, of which scores may exist."""
    if path.exists() and read_json(path, list) != rows:
        raise UserError(f"{path}: holds other answers or another reference; {REMEDY}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return path


def judge_answers(args: HelpfulnessArguments, answers: Answers, model: list[dict], reference: list[dict]) -> None:
    """Judge --num_samples of the pairs and write results/evaluation/helpfulness/<split>/<run>/<judge>/."""
    annotators, source = alpaca.load_annotators(args.judge)
    annotators, url = alpaca.derive_annotators(annotators, args.judge_url, args.judge_model)
    if url is None:
        check_not_given(f"the annotators of {args.judge} ask by APIs of their own", concurrency=args.concurrency)
    chosen = spread(range(len(model)), args.num_samples)
    ids, model, reference = ([rows[i] for i in chosen] for rows in (answers.ids, model, reference))
    if args.dry_run:
        print(alpaca.dry_run(annotators, url, args.results_dir, model, reference))
        return
    name = source.name + (f"_{args.judge_model}".replace("/", "_") if args.judge_model else "")
    folder = evaluation_folder(args.results_dir, TASK, args.dataset_type, args.directory, name)
    references = [[row["instruction"], row["output"]] for row in reference]
    arguments = {
        "judge": args.judge,
        "judge_url": url,
        "judge_model": args.judge_model,
        "num_samples": args.num_samples,
        "annotator_sha256": alpaca.checksum(annotators),
        "answers_sha256": answers.checksum,
        "pairs_sha256": checksum([model, reference]),
        "reference_sha256": checksum(references),
    }

    def score():
        concurrency = args.concurrency or CONCURRENCY
        configuration = alpaca.write_configuration(folder, annotators, url, args.results_dir, concurrency)
        # KeptClient keeps the answers of OpenAI's protocol; those that others give, the library
        caching_path = folder / "annotations.json" if url is None else None
        annotations = alpaca.annotate(configuration, model, reference, caching_path)
        described = {
            "name": name,
            "version": f"alpaca_eval {version('alpaca_eval')}",
            "models": sorted(a["completions_kwargs"].get("model_name", "?") for a in annotators.values()),
            "url": url,
            "human_agreement": None if args.judge_model else alpaca.human_agreement(source),
        }
        return described, win_rates(annotations, ids, model, reference), item_judgements(ids, annotations)

    score_once(folder, SCRIPT, arguments, score)


def checksum(rows: list) -> str:
    """The sha256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def win_rates(annotations: list[dict], ids: list[str], model: list[dict], reference: list[dict]) -> dict[str, dict]:
    """AlpacaEval's figures as shares: the win rate is the mean preference (0: the reference's answer, 1: the run's),
    its standard error that mean's; and the answers' mean lengths, of which the judges are known to think much."""
    wins = np.array([preference(row) for row in annotations], dtype=float)
    judged = wins[~np.isnan(wins)]
    if not len(judged):
        raise UserError(
            "none of the judge's answers is a preference in the annotator's format; take a judge that keeps to it"
        )
    metrics = {
        "win_rate": {
            **metric(judged, unit="share", higher_is_better=True),
            "standard_error": deviation(judged),
            "without_preference": len(wins) - len(judged),
        }
    }
    if ids == [f"alpaca_eval-{i}" for i in range(NUM_ALPACA_EVAL)]:
        controlled = alpaca.length_controlled(annotations)
        if controlled is not None:
            # no interval: it would have to fit the library's model anew for each bootstrap sample
            value = {
                "value": float(controlled.mean()),
                "n": len(controlled),
                "interval": None,
                "unit": "share",
                "higher_is_better": True,
                "standard_error": deviation(controlled),
            }
            metrics["length_controlled_win_rate"] = value
    else:
        print(f"no length-controlled win rate: it is defined for AlpacaEval's own {NUM_ALPACA_EVAL} items only")
    for name, outputs in (("answer_length", model), ("reference_length", reference)):
        lengths = [len(row["output"]) for row in outputs]
        empty = sum(not row["output"].strip() for row in outputs)
        metrics[name] = {**metric(lengths, unit="characters", higher_is_better=None), "empty_texts": empty}
    return metrics


def preference(annotation: dict) -> float | None:
    """From 0 (the reference's answer is better) to 1 (the run's), 0.5 for a draw (0 in the library, which counts it as
    half too); None where the judge gave none, as the library drops what is not from 1 to 2."""
    value = annotation["preference"]
    if value == 0:
        return 0.5
    return float(value) - 1 if value is not None and 1 <= value <= 2 else None


def deviation(values: np.ndarray) -> float | None:
    """Standard error of the mean; None below two values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def item_judgements(ids: list[str], annotations: list[dict]) -> list[dict]:
    """One judgement per item, with the judge's own words, whose first answer may be either's: the library draws the
    order in which the two are shown."""
    judgements = []
    for item, row in zip(ids, annotations, strict=True):
        judgement = {
            "metric": "win_rate",
            "id": item,
            "value": preference(row),
            "annotator": row.get("annotator"),
            "raw_completion": row.get("preference_raw_completion"),
        }
        judgements.append({key: None if isinstance(v, float) and np.isnan(v) else v for key, v in judgement.items()})
    return judgements


if __name__ == "__main__":
    main()
