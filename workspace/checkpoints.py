"""The checkpoint-N folders of a training run: sealed when whole, so that a damaged one is never resumed from."""

import sys
from pathlib import Path

from workspace.files import read_json, sha256, write_json
from workspace.run_dir import remove

SEAL = "files.json"  # {file: sha256} of a checkpoint, written last


def seal(checkpoint: Path) -> None:
    """Record the checksums of all files of a checkpoint, which is whole by now."""
    checksums = {str(path.relative_to(checkpoint)): sha256(path) for path in files_of(checkpoint)}
    write_json(checkpoint / SEAL, {"sha256": checksums})


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was sealed."""
    if not (checkpoint / SEAL).exists():
        return "was not written to its end"
    try:
        sealed = read_json(checkpoint / SEAL)["sha256"]
        return next((f"{name} is damaged" for name in sealed if sha256(checkpoint / name) != sealed[name]), None)
    except Exception as error:  # a seal that is damaged itself, a file that is gone
        return f"cannot be checked ({error!r})"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoint-N folders of a run by rising N."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=step_of)


def last_whole(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run, None without one. What is passed over is said, and why."""
    for checkpoint in reversed(checkpoints_of(folder)):
        if (fault := damage(checkpoint)) is None:
            return checkpoint
        print(f"warning: {checkpoint}: {fault}; an earlier one is taken, if there is any", file=sys.stderr)
    return None


def keep_last(folder: Path, number: int | None) -> None:
    """Remove all checkpoints of a run but the last `number` by their step (None, or below 1: keep all), whatever the
    clock says."""
    for checkpoint in checkpoints_of(folder)[:-number] if number and number > 0 else ():
        remove(checkpoint)
