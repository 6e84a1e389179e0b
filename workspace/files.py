"""JSON and jsonl files and checksums: what is damaged is told in one line, what is written is whole or not there."""

import glob
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from config import UserError
from data.text import holds_half_characters


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """UserError naming a file, or a folder, whose contents have not the form that this project gives them."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "restore it, or move the folder away"
        raise UserError(f"{path}: is not as this project writes it ({said}); {remedy}") from error


def read_json(path: Path, kind: type = dict):
    """A JSON file that this project wrote, an object or what `kind` says; UserError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower() and holds_half_characters(value):
            raise ValueError("half a character")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); move the folder away and run again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a {kind.__name__}; move the folder away")
    return value


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path, *, killed: bool = False) -> list[dict]:
    """The rows of a jsonl file that this project wrote; UserError if one is damaged.

    killed: the file is that of a process that may have been killed as it wrote: what it left of a row is passed over.
    """
    rows = []
    try:
        content = path.read_bytes()
        for line in filter(None, content.split(b"\n")):
            with suppress(ValueError) if killed else nullcontext():
                rows.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move the folder away and run again") from error
    if b"\\ud" in content.lower() and holds_half_characters(rows):
        raise UserError(f"{path}: holds half a character; move the folder away and run again")
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: has a line that is no JSON object; move the folder away and run again")
    return rows


def line_of(row: dict) -> str:
    """A row as a line of a jsonl file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(map(line_of, rows)))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. What a process of this machine that was killed left of it is removed."""
    host = platform.node().replace(".", "_")
    for partial in path.parent.glob(f".{glob.escape(path.name)}.{host}.*"):
        pid = partial.suffix[1:]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            partial.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{host}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:  # a full disk, a key pressed
        partial.unlink(missing_ok=True)
        raise
