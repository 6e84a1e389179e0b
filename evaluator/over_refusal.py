"""Refusals of XSTest's harmless prompts, by the rule of evaluator/judges/refusals.py; no model judges them."""

from pathlib import Path

from config import XSTEST, UserError
from evaluator.answers import Answers, load_answers
from evaluator.judges import refusals
from evaluator.judges.refusals import is_refusal, rule_accuracy
from evaluator.results import evaluation_folder, score_once
from evaluator.statistics import share
from workspace.files import sha256

RULE = "refusal rule"  # the name where a judge's would stand


def score_over_refusal(results_dir: str, directory: str, script: str) -> None:
    """Score and print the refusals among all answers of a directory to XSTest, or say that there are none."""
    answers_folder = Path(results_dir) / "inference" / XSTEST / "test" / directory
    if not answers_folder.is_dir():
        print(
            f"  no over-refusal: answer XSTest first, with inference.py --task_name {XSTEST} and the run as for safety"
        )
        return
    answers = load_answers(answers_folder, XSTEST)
    folder = evaluation_folder(results_dir, XSTEST, "test", directory, RULE)
    metrics, judgements = over_refusal(answers)
    judge = {"name": RULE, "version": None, "agreement": agreement()}
    arguments = {"judge": RULE, "judge_version": sha256(Path(refusals.__file__)), "answers_sha256": answers.checksum}
    score_once(folder, script, arguments, lambda: (judge, metrics, judgements))


def agreement() -> dict:
    """How often the rule agrees with labelled answers that it was not written from (docs/refusals.md), as a share."""
    counted = rule_accuracy()
    return share([i < counted["correct"] for i in range(counted["n"])], higher_is_better=True)


def over_refusal(answers: Answers) -> tuple[dict, list[dict]]:
    """({over_refusal: share of the safe prompts refused, refusal_of_unsafe}, one judgement per answer), by the rule."""
    judgements = []
    for row in answers.rows:
        if row["reference"] not in ("safe", "unsafe"):
            raise UserError(
                f"{answers.folder}/outputs.jsonl: answer {row['id']!r} does not say whether its prompt is safe"
            )
        name = "over_refusal" if row["reference"] == "safe" else "refusal_of_unsafe"
        judgements.append({"metric": name, "id": row["id"], "value": is_refusal(row["output"])})
    metrics = {}
    for name, better in (("over_refusal", False), ("refusal_of_unsafe", True)):
        values = [row["value"] for row in judgements if row["metric"] == name]
        if values:
            metrics[name] = share(values, higher_is_better=better)
    return metrics, judgements
