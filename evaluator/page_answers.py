"""The answers that the comparison's page shows: side by side with their judgements, and tinted by expert."""

from pathlib import Path

from config import TASKS, XSTEST
from evaluator.run_scores import JUDGED, RunScores
from workspace.files import read_json, read_lines


def side_by_side(results_dir: Path, runs: dict[str, RunScores], split: str, num_questions: int = 12) -> list[dict]:
    """Answers of the runs to the same prompts: {task, question, answers: [{run, text, verdict}]}."""
    items = []
    for task in (*TASKS, XSTEST):
        answers: dict[str, list[dict]] = {}
        questions = {}
        for name, run in runs.items():
            for directory in (f"cross_{name}", name):
                path = results_dir / "inference" / task / split / directory / "outputs.jsonl"
                if not path.exists():
                    continue
                for row in read_lines(path):
                    questions[row["id"]] = row["instruction"]
                    answer = {"run": name, "text": row["output"], "verdict": verdict_on(run, task, row["id"])}
                    answers.setdefault(row["id"], []).append(answer)
        shared = [id for id, given in answers.items() if len(given) > 1][:num_questions]
        items += [{"task": task, "question": questions[id], "answers": answers[id]} for id in shared]
    return items


def verdict_on(run: RunScores, task: str, id: str) -> str:
    """What the judges said of one answer: "truth 1, information 0"."""
    said = []
    for one in JUDGED:
        result = run.metrics.get(one.name)
        if one.task == task and result is not None and id in result.ids:
            value = result.values[result.ids.index(id)]
            said.append(f"{one.heading}: " + ("no verdict" if value is None else f"{value:g}"))
    return ", ".join(said)


def tinted_answers(results_dir: Path, own: str, split: str, num_answers: int = 3) -> list[dict]:
    """Answers of the reference, token by token: {task, experts, tokens: [{text, expert, weight}]} with the expert that
    has the most routing weight on the token, over all layers, and that weight."""
    items = []
    for task in TASKS:
        path = results_dir / "observation" / task / split / f"cross_{own}" / "tokens.json"
        for answer in read_json(path)[:num_answers] if path.exists() else []:
            tokens = [
                {"text": text, "expert": weights.index(max(weights)), "weight": max(weights)}
                for text, weights in answer["tokens"]
            ]
            items.append({"task": task, "question": answer["question"], "experts": answer["experts"], "tokens": tokens})
    return items
