"""What a results folder holds, so that two can be compared: numbers bit for bit, without clocks and places."""

import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

# Fields that tell how long something took, how much memory, by which process, of which commit: two runs differ in them.
MEASURED = (
    "seconds",
    "train_seconds",
    "training_seconds",
    "peak_memory_bytes",
    "new_tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "tokens_per_second",
    "made_by",
    "commit",
)
# A seal holds the checksums of files with clocks in them; random states hold the place of Python's own generator; a
# report's table.md and page are drawn from its table.json
UNCOMPARED = re.compile(r"(rng_state.*\.pth|files\.json|table\.md|.*\.png|.*\.html|.*\.lock)$")


def contents(folder: Path) -> dict[str, object]:
    """{path: what is comparable of a file's contents} of all files below a folder."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path):
    if UNCOMPARED.match(path.name):
        return None
    if path.suffix == ".safetensors":
        return tensors(load_file(path))
    if path.suffix in (".pt", ".pth", ".bin"):
        return tensors(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return without_clocks(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".sqlite":
        return rows_of(path)
    return path.read_bytes()


def tensors(state) -> object:
    """A state with a checksum in the place of each tensor."""
    if isinstance(state, torch.Tensor):
        whole = state.detach().contiguous()
        digest = hashlib.sha256(whole.view(torch.uint8).numpy().tobytes() if whole.dim() else repr(whole).encode())
        return str(whole.dtype), tuple(whole.shape), digest.hexdigest()
    if isinstance(state, dict):
        return {key: tensors(value) for key, value in state.items()}
    return [tensors(value) for value in state] if isinstance(state, list | tuple) else state


def without_clocks(value):
    """A JSON document without what is measured by a clock."""
    if isinstance(value, dict):
        return {key: without_clocks(one) for key, one in value.items() if key not in MEASURED}
    return [without_clocks(one) for one in value] if isinstance(value, list) else value


def rows_of(database: Path) -> list[tuple]:
    """All rows of a file of judgements, read from a copy: who reads what a killed process left behind mends it."""
    with tempfile.TemporaryDirectory() as folder:
        for path in database.parent.glob(f"{database.name}*"):  # with its journal
            shutil.copy(path, folder)
        connection = sqlite3.connect(Path(folder) / database.name)
        try:
            return sorted(connection.execute("SELECT * FROM judgement"))
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):  # killed before it was there
                raise
            return []
        finally:
            connection.close()


def differences(expected: dict, actual: dict) -> tuple[list[str], list[str]]:
    """(what is missing or has other contents, what should not be there) of two folders' contents."""
    wrong = [path for path in expected if path not in actual or actual[path] != expected[path]]
    return wrong, sorted(set(actual) - set(expected))


def finished_work(folder: Path) -> set[tuple]:
    """What is done in a folder in which a process was killed: complete rows, judgements, sealed checkpoints, runs."""
    done = set()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        if path.suffix == ".jsonl":
            whole = path.read_bytes().rpartition(b"\n")[0].split(b"\n")
            done |= {("row", hashlib.sha256(line).hexdigest()) for line in whole if line}
        elif path.suffix == ".sqlite":
            done |= {("judgement", *row) for row in rows_of(path)}
        elif path.name == "run.json":
            done.add(("run", str(path.parent)))
        elif path.name == "files.json":
            done.add(("checkpoint", str(path.parent.parent), int(path.parent.name.removeprefix("checkpoint-"))))
    return done


def lost_work(before: set[tuple], after: set[tuple], rows_at_once: int = 1) -> int:
    """How much of what was done is not there any more. A checkpoint may give way to a later one, and of rows that are
    made `rows_at_once` fewer may be made again."""
    latest: dict[str, int] = {}
    for kind, *rest in after:
        if kind == "checkpoint":
            latest[rest[0]] = max(latest.get(rest[0], -1), rest[1])
    lost = before - after
    replaced = {one for one in lost if one[0] == "checkpoint" and one[2] < latest.get(one[1], -1)}
    rows = {one for one in lost if one[0] == "row"}
    return len(lost - replaced - rows) + len(rows) // rows_at_once
