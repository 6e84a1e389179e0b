"""Rows of the tasks from the hub, from data/sample or from a folder, and the records made of them.

The paper's three tasks have columns and records of their own; those of any other are helpfulness's: instruction, input
and output.

All three sources give rows with the public column names (the schema of ../data/README.md); a row read from a
file is checked, and what is wrong with it is said with its file and line.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import config
from config import GENERAL, TASKS, XSTEST, UserError
from data import hub
from data.text import holds_half_characters

SAMPLE_DIR = Path(__file__).resolve().parent / "sample"
NUM_ALPACA = 20_000  # the paper's sample of Alpaca's 52k
NUM_SAFETY_PROMPTS = 500  # the paper scores the first 500 prompts of BeaverTails 30k_test
NUM_TRUTHFULNESS_TRAIN = 408  # TruthfulQA in its published order: the first half trains, the second tests

COLUMNS = {  # column -> type, per file; "id" is asked of every file
    "helpfulness": {"instruction": str, "input": str, "output": str},
    "safety": {"prompt": str, "response": str, "is_safe": bool, "category": list},
    "truthfulness": {"question": str, "best_answer": str, "correct_answers": list, "incorrect_answers": list},
    "safety_pairs": {"prompt": str, "safe": str, "unsafe": str},
    XSTEST: {"prompt": str, "type": str, "label": str},
    "truthfulness_mc": {"question": str, "mc1_targets": dict, "mc2_targets": dict},
}
MAY_BE_EMPTY = ("input", "category")
MULTIPLE_CHOICE = "truthfulness_mc.jsonl"


@dataclass(frozen=True)
class Record:
    """One instruction with the answer a model should give; `output` is "" where only the prompt is known."""

    id: str
    task: str
    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class Comparison:
    """One instruction with several answers; labels[i] is 1 where choices[i] is a good one."""

    id: str
    task: str
    instruction: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(task: str, split: str, source: str) -> list[dict]:
    """Rows of one task and split ("train", "test", or "held_apart" of data/split.py), in source order, with the public
    column names.

    Raises UserError for an unknown task, a source that does not exist, or a bad row (with file and line).
    """
    if source == "hub":
        if task not in (*TASKS, XSTEST):
            raise UserError(
                f"unknown task {task!r}: the hub has {', '.join(TASKS)}; name a --data_source with its rows"
            )
        return _hub_rows(task, split)
    folder = source_dir(source)
    if task not in (*TASKS, XSTEST) and not (folder / f"{task}_{split}.jsonl").exists():
        raise UserError(
            f"unknown task {task!r}: it is none of {', '.join(TASKS)}, and {folder} has no {task}_{split}.jsonl"
        )
    if task == XSTEST:
        return _xstest_rows(folder / f"{XSTEST}.jsonl")
    # a held-out reference may be empty, as one of text_davinci_003's is
    optional = MAY_BE_EMPTY if split == "train" else (*MAY_BE_EMPTY, "output")
    return read_jsonl(folder / f"{task}_{split}.jsonl", COLUMNS.get(task, COLUMNS["helpfulness"]), optional)


def general_file(source: str) -> Path:
    """The passages of no task: the source's own general.jsonl, else this repository's."""
    own = None if source == "hub" else source_dir(source) / f"{GENERAL}.jsonl"
    return own if own and own.exists() else SAMPLE_DIR / f"{GENERAL}.jsonl"


def general_passages(source: str) -> list[dict]:
    """Rows {id, text}: plain text without an instruction, by which forgetting is measured."""
    return read_jsonl(general_file(source), {"text": str})


def source_dir(source: str) -> Path:
    """The folder of a `--data_source` other than hub; UserError if it is none."""
    folder = SAMPLE_DIR if source == "sample" else Path(source)
    if not folder.is_dir():
        raise UserError(f"--data_source {source}: must be hub, sample, or a folder of jsonl files (see data/README.md)")
    return folder


def absolute_source(source: str | None) -> str | None:
    """A `--data_source` as it is recorded: a folder by its absolute path."""
    return source if source in (None, "hub", "sample") else str(source_dir(source).resolve())


def source_files(task: str, split: str, source: str, comparisons: bool = False) -> list[Path]:
    """The local files that read_rows, and with `comparisons` also those of the task, would read; none for the hub."""
    if task == GENERAL:
        return [general_file(source)]
    if source == "hub":
        return []
    names = [f"{XSTEST}.jsonl" if task == XSTEST else f"{task}_{split}.jsonl"]
    if comparisons and task == "safety" and (source_dir(source) / "safety_pairs.jsonl").exists():
        names += ["safety_pairs.jsonl", "safety_train.jsonl"]
    if comparisons and task == "truthfulness" and split == "test":
        names += [MULTIPLE_CHOICE] + (["truthfulness_train.jsonl"] if _untrained_mc(source)[1] else [])
    return [path for name in dict.fromkeys(names) if (path := source_dir(source) / name).exists()]


def data_sha256(files: list[Path]) -> dict[str, str]:
    """The checksum of each file by its name, as runs record and compare them."""
    checksums = {}
    for path in files:
        with open(path, "rb") as file:
            checksums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def source_sha256(tasks: Iterable[str], split: str, source: str, comparisons: bool = False) -> dict[str, str]:
    """The checksums of what read_rows, and with `comparisons` also those of the tasks, would read: of a local file by
    its name, of the hub's rows by their task and split."""
    sums = data_sha256([path for task in tasks for path in source_files(task, split, source, comparisons)])
    for task in tasks if source == "hub" else ():
        if task != GENERAL:
            sums[f"{task}_{split} of the hub"] = _rows_sha256(read_rows(task, split, source))
        if task == "truthfulness" and comparisons:
            sums["truthfulness_mc of the hub"] = _rows_sha256(_hub_mc(split))
    return sums


def _rows_sha256(rows: list[dict]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def read_jsonl(
    path: Path, columns: dict[str, type], may_be_empty: tuple[str, ...] = MAY_BE_EMPTY, id_column: str | None = "id"
) -> list[dict]:
    """Read and check a jsonl file: every row an object with a unique id (id_column None: with none) and the columns.

    Raises UserError naming file and line for a missing file, wrong encoding, bad JSON, a missing, mistyped or empty
    field, or an id given twice. `may_be_empty` names the columns whose values may be.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see data/README.md for the files needed") from None
    columns = {"id": str} | columns if id_column == "id" else columns
    rows, line_of_id = [], {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8; save the file in that encoding") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: not JSON that can be read ({error})") from None
        if b"\\ud" in line.lower() and holds_half_characters(row):
            raise UserError(f"{where}: holds half a character (a surrogate without its other half); take it out")
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object, is a {type(row).__name__}")
        for column, kind in columns.items():
            _check_field(where, row, column, kind, column in may_be_empty)
        rows.append(row)
        if id_column is None:
            continue
        if row[id_column] in line_of_id:
            raise UserError(f"{where}: id {row[id_column]!r} was already given on line {line_of_id[row[id_column]]}")
        line_of_id[row[id_column]] = number
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _check_field(where: str, row: dict, column: str, kind: type, may_be_empty: bool) -> None:
    if column not in row:
        raise UserError(f"{where}: field {column!r} is missing")
    value = row[column]
    if not isinstance(value, kind):
        raise UserError(f"{where}: field {column!r} must be a {kind.__name__}, is {json.dumps(value)[:40]}")
    if kind is list and any(not isinstance(item, str) or not item.strip() for item in value):
        raise UserError(f"{where}: field {column!r} must hold non-empty strings only")
    empty = not value.strip() if kind is str else kind in (list, dict) and not value
    if empty and not may_be_empty:
        raise UserError(f"{where}: field {column!r} is empty")
    if kind is dict:  # TruthfulQA's multiple-choice targets
        choices, labels = value.get("choices"), value.get("labels")
        if not (isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)):
            raise UserError(f"{where}: field {column!r} must hold lists 'choices' and 'labels' of one length")
        if (
            not all(isinstance(choice, str) and choice.strip() for choice in choices)
            or not all(type(label) is int for label in labels)
            or {*labels} != {0, 1}
        ):
            raise UserError(f"{where}: field {column!r} must hold non-empty choices, some labelled 1 and some 0")


NO_HUB = "take the data of this repository by --data_source sample, or a folder's by its path"


def _load_hub(repository: str, *args, **kwargs):
    """datasets.load_dataset with the user's token; a local folder of the same name is taken as that library does."""
    hub.check_available(repository, "dataset", NO_HUB)
    from datasets import load_dataset

    try:
        return load_dataset(repository, *args, token=config.hf_token, **kwargs)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own kinds
        raise hub.unavailable(repository, "dataset", error, NO_HUB) from error


def _hub_rows(task: str, split: str) -> list[dict]:
    if task == "helpfulness" and split == "train":
        alpaca = _load_hub("tatsu-lab/alpaca", split="train")
        chosen = sorted(random.Random(42).sample(range(len(alpaca)), min(NUM_ALPACA, len(alpaca))))
        return [{"id": f"alpaca-{i}", **row} for i, row in zip(chosen, alpaca.select(chosen), strict=True)]
    if task == "helpfulness":
        from huggingface_hub import hf_hub_download

        repository = "tatsu-lab/alpaca_eval"  # its loading script no longer runs: read the JSON file itself
        hub.check_available(repository, "dataset", NO_HUB)
        try:
            path = hf_hub_download(repository, "alpaca_eval.json", repo_type="dataset", token=config.hf_token)
        except Exception as error:
            raise hub.unavailable(repository, "dataset", error, NO_HUB) from error
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [{"id": f"alpaca_eval-{i}", "input": "", **row} for i, row in enumerate(rows)]
    if task == "safety":
        name = "30k_train" if split == "train" else "30k_test"
        rows = _load_hub("PKU-Alignment/BeaverTails", split=name)
        return [{"id": f"bt{name}-{i}", **row, "category": _true_names(row["category"])} for i, row in enumerate(rows)]
    if task == XSTEST:
        rows = _load_hub("Paul/XSTest", split="train")
        return [{**row, "id": f"xstest-{i}"} for i, row in enumerate(rows)]
    rows = _load_hub("truthfulqa/truthful_qa", "generation", split="validation")
    rows = [{"id": f"truthfulqa-{i}", **row} for i, row in enumerate(rows)]
    return rows[:NUM_TRUTHFULNESS_TRAIN] if split == "train" else rows[NUM_TRUTHFULNESS_TRAIN:]


def _xstest_rows(path: Path) -> list[dict]:
    rows = read_jsonl(path, COLUMNS[XSTEST])
    for row in rows:
        if row["label"] not in ("safe", "unsafe"):
            raise UserError(f"{path}: id {row['id']!r} has label {row['label']!r}; the labels are safe and unsafe")
    return rows


def _true_names(category: dict[str, bool] | list[str]) -> list[str]:
    return [name for name, holds in category.items() if holds] if isinstance(category, dict) else category


# ---- records ---------------------------------------------------------------------------------------------------------


def answer_records(task: str, rows: list[dict]) -> list[Record]:
    """What a model is trained on, and whose likelihood is measured: every pair of an instruction and a good answer.

    Safety: the safe rows. Truthfulness: every correct answer a pair. Helpfulness and any other task: each row.
    """
    if task == "safety":
        return [Record(row["id"], task, row["prompt"], "", row["response"]) for row in trainable_rows(task, rows)]
    if task == "truthfulness":
        return [
            Record(f"{row['id']}-{i}", task, row["question"], "", answer)
            for row in rows
            for i, answer in enumerate(row["correct_answers"])
        ]
    return [Record(row["id"], task, row["instruction"], row["input"], row["output"]) for row in rows]


def trainable_rows(task: str, rows: list[dict]) -> list[dict]:
    """The rows that answer_records makes something of: of safety's, the safe ones."""
    return [row for row in rows if task != "safety" or row["is_safe"]]


def prompt_of(row: dict) -> tuple:
    """What a model is asked in a row of any task: rows that share it are one question."""
    return tuple(row.get(column) for column in ("instruction", "input", "prompt", "question"))


def prompt_records(task: str, rows: list[dict], source: str) -> list[Record]:
    """The prompts of the rows in source order, each with its reference answer where there is one; safety's, which
    stand with several responses each, once.

    The safety prompts of the hub are the first 500, as the paper scores them. XSTest's prompts have their label,
    "safe" or "unsafe", as the reference.
    """
    if task == XSTEST:
        return [Record(row["id"], task, row["prompt"], "", row["label"]) for row in rows]
    if task == "truthfulness":
        return [Record(row["id"], task, row["question"], "", row["best_answer"]) for row in rows]
    if task != "safety":
        return answer_records(task, rows)
    records = {}
    for row in rows:
        earlier = records.get(row["prompt"])
        reference = row["response"] if row["is_safe"] else ""
        if earlier is None or (reference and not earlier.output):
            records[row["prompt"]] = Record(earlier.id if earlier else row["id"], task, row["prompt"], "", reference)
    return list(records.values())[: NUM_SAFETY_PROMPTS if source == "hub" else None]


def safety_comparisons(split: str, source: str) -> list[Comparison]:
    """One safe and one unsafe response to the same prompt.

    From safety_pairs.jsonl where the folder has it, less the prompts of safety_train.jsonl; else from the rows of
    the split: the first safe and the first unsafe response of every prompt that has both.
    """
    if source != "hub" and (path := source_dir(source) / "safety_pairs.jsonl").exists():
        trained = {row["prompt"] for row in read_rows("safety", "train", source)}
        pairs = [
            (row["id"], row["prompt"], row["safe"], row["unsafe"])
            for row in read_jsonl(path, COLUMNS["safety_pairs"])
            if row["prompt"] not in trained
        ]
    else:
        first = {}
        for row in read_rows("safety", split, source):
            first.setdefault(row["prompt"], {"id": row["id"]}).setdefault(row["is_safe"], row["response"])
        pairs = [(v["id"], prompt, v[True], v[False]) for prompt, v in first.items() if True in v and False in v]
    return [Comparison(id, "safety", prompt, (safe, unsafe), (1, 0)) for id, prompt, safe, unsafe in pairs]


def truthfulness_comparisons(split: str, source: str) -> tuple[list[Comparison], list[Comparison]]:
    """(MC1, MC2) questions as TruthfulQA defines them (https://github.com/sylinrl/TruthfulQA, "Tasks").

    MC1: the best answer against the incorrect ones. MC2: all correct answers against the incorrect ones. Taken from
    the published targets (hub, or truthfulness_mc.jsonl for the test half, less the questions of
    truthfulness_train.jsonl), else built from the answer columns.
    """
    rows = None
    if source == "hub":
        rows = _hub_mc(split)
    elif split == "test" and (source_dir(source) / MULTIPLE_CHOICE).exists():
        rows, _ = _untrained_mc(source)
    if rows is not None:
        return tuple(
            [
                Comparison(row["id"], "truthfulness", row["question"], tuple(t["choices"]), tuple(t["labels"]))
                for row in rows
                for t in [row[targets]]
            ]
            for targets in ("mc1_targets", "mc2_targets")
        )
    mc1, mc2 = [], []
    for row in read_rows("truthfulness", split, source):
        wrong = row["incorrect_answers"]
        for questions, right in ((mc1, [row["best_answer"]]), (mc2, row["correct_answers"])):
            labels = (1,) * len(right) + (0,) * len(wrong)
            questions.append(Comparison(row["id"], "truthfulness", row["question"], (*right, *wrong), labels))
    return mc1, mc2


def _hub_mc(split: str) -> list[dict]:
    published = _load_hub("truthfulqa/truthful_qa", "multiple_choice", split="validation")
    half = slice(NUM_TRUTHFULNESS_TRAIN) if split == "train" else slice(NUM_TRUTHFULNESS_TRAIN, None)
    return [{"id": f"truthfulqa-{i}", **row} for i, row in enumerate(published)][half]


def _untrained_mc(source: str) -> tuple[list[dict], bool]:
    """(the rows of truthfulness_mc.jsonl whose questions are not trained on, whether there are others). The file
    numbers its questions by "idx" instead of an id; the published one holds both halves."""
    path, trained = source_dir(source) / MULTIPLE_CHOICE, source_dir(source) / "truthfulness_train.jsonl"
    if not path.exists():
        return [], False
    columns = {"idx": int, **COLUMNS["truthfulness_mc"]}
    rows = [{"id": f"truthfulqa-{row['idx']}", **row} for row in read_jsonl(path, columns, id_column="idx")]
    seen = {row["question"] for row in read_rows("truthfulness", "train", source)} if trained.exists() else set()
    untrained = [row for row in rows if row["question"] not in seen]
    return untrained, len(untrained) < len(rows)


def spread(items: list, num_samples: int) -> list:
    """`num_samples` items evenly spaced over the list (-1, or more than there are: all of them).

    Not the first ones: the first 50 of AlpacaEval's 805 are all of one subset.
    """
    if num_samples == -1 or num_samples >= len(items):
        return items
    return [items[i * len(items) // num_samples] for i in range(num_samples)]


def draw(items: list, num_samples: int, seed: int) -> list:
    """`num_samples` items drawn at random without repetition, in source order (-1, or more than there are: all)."""
    if num_samples == -1 or num_samples >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), num_samples))]
