"""The answers that the comparison's page shows: side by side with their judgements, and tinted by expert."""

from pathlib import Path

from config import XSTEST, UserError
from evaluator.metrics import JUDGED, in_order
from evaluator.results_folder import answers_directories, read_result
from workspace.files import as_written, read_json, read_lines
from workspace.run_dir import read_run

SHOWN = "shown_answers.json"  # beside kept runs: `shown_answers` of them


def shown_answers(results_dir: Path, runs: list[str], own: str, split: str) -> dict:
    """What the page shows of a results folder's answers: {data: whose prompts they answer, side_by_side: of the runs,
    tinted: of the reference}. UserError for a folder that has none."""
    with as_written(results_dir / "inference"):
        side = side_by_side(results_dir, runs, split)
    with as_written(results_dir / "observation"):
        tinted = tinted_answers(results_dir, own, split)
    if not side and not tinted:
        raise UserError(f"--show_answers {results_dir}: holds no answers that two of --runs gave to the same prompts")
    records = (read_run(path.parent) for path in sorted((results_dir / "inference").glob(f"*/{split}/*/run.json")))
    sources = (record["run"]["arguments"].get("data_source") for record in records if record)
    data = {Path(source).name for source in sources if source}
    return {"data": ", ".join(sorted(data)), "side_by_side": side, "tinted": tinted}


def side_by_side(results_dir: Path, runs: list[str], split: str, num_questions: int = 12) -> list[dict]:
    """Answers of the runs to the same prompts: {task, question, answers: [{run, text, verdict}]}."""
    items = []
    for task in tasks_answered(results_dir):
        answers: dict[tuple[str, ...], list[dict]] = {}  # by prompt: of other data an id may name another question
        for name in runs:
            for directory in answers_directories(name, task):
                path = results_dir / "inference" / task / split / directory / "outputs.jsonl"
                if not path.exists():
                    continue
                said = verdicts(results_dir, name, task, split)
                for row in read_lines(path):
                    prompt = (row["instruction"], row["input"], row["id"])
                    answer = {"run": name, "text": row["output"], "verdict": ", ".join(said.get(row["id"], []))}
                    answers.setdefault(prompt, []).append(answer)
        shared = [(prompt, given) for prompt, given in answers.items() if len(given) > 1][:num_questions]
        items += [{"task": task, "question": question, "answers": given} for (question, *_), given in shared]
    return items


def tasks_answered(results_dir: Path) -> tuple[str, ...]:
    """What a results folder has answers to: the paper's tasks in order, others by name, XSTest last."""
    answered = {path.name for path in (results_dir / "inference").glob("*") if path.is_dir()}
    return in_order(answered - {XSTEST}) + ((XSTEST,) if XSTEST in answered else ())


def verdicts(results_dir: Path, run: str, task: str, split: str) -> dict[str, list[str]]:
    """What the judges said of a run's answers to a task: {id: ["truth: 1", "information: 0"]}."""
    said: dict[str, list[str]] = {}
    for one in (one for one in JUDGED if one.task == task):
        if (result := read_result(results_dir, one, run, split)) is not None:
            for id, value in zip(result.ids, result.values, strict=True):
                text = "no verdict" if value is None else f"{value:g}"
                said.setdefault(id, []).append(f"{one.heading}: {text}")
    return said


def tinted_answers(results_dir: Path, own: str, split: str, num_answers: int = 3) -> list[dict]:
    """Answers of the reference, token by token: {task, experts, tokens: [{text, expert, weight}]} with the expert that
    has the most routing weight on the token, over all layers, and that weight."""
    items = []
    for task in tasks_answered(results_dir):
        path = results_dir / "observation" / task / split / f"cross_{own}" / "tokens.json"
        for answer in read_json(path, list)[:num_answers] if path.exists() else []:
            tokens = [
                {"text": text, "expert": weights.index(max(weights)), "weight": max(weights)}
                for text, weights in answer["tokens"]
            ]
            items.append({"task": task, "question": answer["question"], "experts": answer["experts"], "tokens": tokens})
    return items
