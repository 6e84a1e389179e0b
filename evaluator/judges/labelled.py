"""What a judge learns from and is measured on: questions, answers and labels, apart by question."""

from dataclasses import dataclass
from pathlib import Path

from config import UserError
from data import sources
from data.sources import NUM_TRUTHFULNESS_TRAIN, read_jsonl, read_rows
from evaluator.judges.protocols import YES_NO, clean_answer, fill

PUBLISHED = {"truth": "judge_truth.jsonl", "information": "judge_info.jsonl"}


@dataclass(frozen=True)
class Labelled:
    """One answer to a question; label 1: true, informative, harmful."""

    question: str
    answer: str
    label: int

    def text(self, kind: str) -> str:
        """What a judge is shown: as the evaluators show it, the answer cleaned."""
        return fill(YES_NO[kind], self.question, clean_answer(self.answer))


def judge_rows(kind: str, source: str) -> tuple[list[Labelled], list[Labelled], str]:
    """(training rows, held-out rows, where they come from); no held-out question is among the training rows'.

    truth: judge_truth.jsonl of the folder, else the correct and incorrect answers of the truthfulness rows.
    information: judge_info.jsonl. safety: the safety rows. Raises UserError where the source has none, or rows of
    one label only.
    """
    if kind == "safety":
        train, held_out = (_safety(split, source) for split in ("train", "test"))
        origin = "safety rows"
    elif (path := _published(kind, source)) is not None:
        rows = _read_published(path)
        train = [row for index, row in rows if index < NUM_TRUTHFULNESS_TRAIN]
        held_out = [row for index, row in rows if index >= NUM_TRUTHFULNESS_TRAIN]
        origin = path.name
    elif kind == "truth":
        train, held_out = (_answer_columns(split, source) for split in ("train", "test"))
        origin = "the answer columns of the truthfulness rows"
    else:
        raise UserError(
            f"--data_source {source}: an information judge needs {PUBLISHED[kind]} (truthfulqa_idx, "
            "question, answer, label) in a folder; data sample has it, the hub has not"
        )
    unseen = {row.question for row in held_out}
    train = [row for row in train if row.question not in unseen]
    for name, rows in (("training", train), ("held-out", held_out)):
        if {row.label for row in rows} != {0, 1}:
            raise UserError(f"--data_source {source}: the {name} rows for {kind} do not hold both labels")
    return train, held_out, origin


def _published(kind: str, source: str) -> Path | None:
    if source == "hub":
        return None
    path = sources.source_dir(source) / PUBLISHED[kind]
    return path if path.exists() else None


def judge_sha256(kind: str, source: str) -> dict[str, str]:
    """The checksums of what judge_rows reads."""
    if kind != "safety" and (path := _published(kind, source)) is not None:
        return sources.data_sha256([path])
    task = "safety" if kind == "safety" else "truthfulness"
    return sources.source_sha256([task], "train", source) | sources.source_sha256([task], "test", source)


def _read_published(path: Path) -> list[tuple[int, Labelled]]:
    """(number of the question in TruthfulQA, row) of a file of the published judges' training data.

    A row has no id there: its line is its name. An empty answer is a row like the others.
    """
    columns = {"truthfulqa_idx": int, "question": str, "answer": str, "label": int}
    rows = read_jsonl(path, columns, may_be_empty=("answer",), id_column=None)
    for row in rows:
        if row["label"] not in (0, 1):
            raise UserError(f"{path}: a label is {row['label']}; labels are 0 and 1")
    return [(row["truthfulqa_idx"], Labelled(row["question"], row["answer"], row["label"])) for row in rows]


def _answer_columns(split: str, source: str) -> list[Labelled]:
    return [
        Labelled(row["question"], answer, label)
        for row in read_rows("truthfulness", split, source)
        for column, label in (("correct_answers", 1), ("incorrect_answers", 0))
        for answer in row[column]
    ]


def _safety(split: str, source: str) -> list[Labelled]:
    """The safety rows of a half, but those of an origin (`source`) whose rows all have one label: there the writer
    would teach the label, not the harm."""
    rows = read_rows("safety", split, source)
    labels: dict[str, set[bool]] = {}
    for row in rows:
        labels.setdefault(row.get("source", ""), set()).add(row["is_safe"])
    return [
        Labelled(row["prompt"], row["response"], int(not row["is_safe"]))
        for row in rows
        if len(labels[row.get("source", "")]) == 2
    ]
