"""A run's folder: what was asked, whether it is complete, who writes it, what made it. `run.json` is written last."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from config import RAW, RAW_CHAT, ROOT, UserError
from workspace.files import as_written, read_json, write_json

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "mergekit", "sacrebleu", "scikit-learn")
UNFINISHED = "arguments.json"  # there while a run is under way
COMPLETE = "run.json"


# What tells a base model, data and a judge, wherever they lie: with these alike, their places are not compared.
DIGESTS = {"base_sha256": "base_model", "data_sha256": "data_source", "judge_version": "judge"}
LATER_DIGESTS = (
    *("tokenizer_sha256", "weights_sha256", "answers_sha256", "reference_sha256", "judgements_sha256"),
    "judge_data_sha256",
)
_held: dict[Path, FileLock] = {}  # the folders that this process writes
_begun: dict[Path, dict] = {}  # what it has begun in each


def begin(folder: Path, script: str, arguments: dict, remedy: str) -> str:
    """Open a run's folder for this process alone. Returns "new", "resume" (begun with these arguments) or "complete".

    A begun folder in which nothing lies that could be lost is taken by any arguments: "new". Raises UserError, naming
    what differs, if a run with other arguments or on other data is there, if something else is, or if another process
    writes there.
    """
    arguments = json.loads(json.dumps(arguments))
    lock(folder)
    for name, state in ((COMPLETE, "complete"), (UNFINISHED, "resume")):
        if not (folder / name).exists():
            continue
        if name == UNFINISHED and not holds_work(folder):
            break
        if state == "resume":
            remove_torn(folder)
        run = read_record(folder / name)["run"]
        if run["script"] != script:
            raise UserError(f"{folder}: holds a run of {run['script']}; {remedy}")
        with as_written(folder / name):
            compare_arguments(folder, run["arguments"], arguments, remedy)
        _begun[folder] = {"run": run}
        if state == "complete":
            (folder / UNFINISHED).unlink(missing_ok=True)  # of a process that was killed after its last word
            remove(partial_of(folder))
            release(folder)
        return state
    if folder.exists() and not (folder / UNFINISHED).exists() and holds_others(folder):
        raise UserError(f"{folder}: is no run of this project; {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    remove_torn(folder)
    _begun[folder] = {"run": {"script": script, "arguments": arguments}}
    write_json(folder / UNFINISHED, _begun[folder])
    return "new"


def begin_again(folder: Path) -> None:
    """Make a folder that `begin` opened once more if it has vanished: what this process still writes there is then
    known as its run's."""
    if not (folder / UNFINISHED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / UNFINISHED, _begun[folder])


def remove_torn(folder: Path) -> None:
    """Remove what safetensors leaves of a file when its process is killed as it writes."""
    for torn in folder.glob(".tmp??????"):
        torn.unlink()


def holds_others(folder: Path) -> bool:
    """Whether a folder that was not begun holds more than what a process left that was killed as it began it."""
    return any(not path.name.startswith(f".{UNFINISHED}.") for path in folder.iterdir())


def holds_work(folder: Path) -> bool:
    """Whether a begun folder holds more than its arguments and logs: a checkpoint, answers, judgements."""
    return any(path.name not in (UNFINISHED, "runs") and path.name[0] != "." for path in folder.iterdir())


def compare_arguments(folder: Path, before: dict, now: dict, remedy: str) -> None:
    """UserError naming the first argument, or data file, in which two runs differ."""
    for digest, location in DIGESTS.items():
        if not before.get(digest):  # recorded by an earlier version: its location is what tells
            now = {key: value for key, value in now.items() if key != digest}
        elif before[digest] and now.get(digest):
            before, now = ({k: v for k, v in one.items() if k != location} for one in (before, now))
    unrecorded = [digest for digest in LATER_DIGESTS if not before.get(digest)]  # nor by every version
    before, now = ({key: value for key, value in one.items() if key not in unrecorded} for one in (before, now))
    files, files_now = before.pop("data_sha256", None), now.pop("data_sha256", None)
    for file in sorted({**(files or {}), **(files_now or {})}):
        if (files or {}).get(file) != (files_now or {}).get(file):
            raise UserError(f"{folder}: the data file {file} is not the one that this run has read; {remedy}")
    for field in sorted(set(before) | set(now)):
        if before.get(field) != now.get(field):
            raise UserError(
                f"{folder}: holds a run with {field}={before.get(field)}, this one has {field}={now.get(field)}; "
                f"{remedy}"
            )


def lock(folder: Path) -> None:
    """Keep every other process out of a run's folder until `release`, or this one's end.

    The lock file lies beside the folder, with a note of who holds it. UserError if another process does.
    """
    folder = folder.absolute()  # "." has no name
    if folder in _held:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    note = folder.with_name(f"{folder.name}.lock.json")
    held = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        try:
            holder = "process {pid} on {host}, since {since}".format(**json.loads(note.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            holder = "another process"
        raise UserError(f"{folder}: is being written by {holder}; wait until it has ended, or stop it") from None
    _held[folder] = held
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(note, {"pid": os.getpid(), "host": platform.node(), "since": since})


def release(folder: Path) -> None:
    """Let other processes have a folder that this one has locked."""
    folder = folder.absolute()
    held = _held.pop(folder, None)
    if held is not None:
        folder.with_name(f"{folder.name}.lock.json").unlink(missing_ok=True)
        held.release()


@contextmanager
def open_partial(output: Path) -> Iterator[Path]:
    """`<output>.partial`, where to write what is then renamed to `output`: whole or not at all.

    UserError if another process writes there. What a killed process left is removed first, what this one leaves last;
    a run's folder that it left complete is renamed.
    """
    partial = partial_of(output)
    lock(output)
    try:
        if (partial / COMPLETE).exists() and not output.exists():
            partial.rename(output)
        remove(partial)
        yield partial
    finally:
        remove(partial)
        release(output)


def partial_of(output: Path) -> Path:
    return output.absolute().with_name(f"{output.absolute().name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def finish(folder: Path, script: str, arguments: dict, train: dict, meta: dict) -> None:
    """Write run.json, last: what was run, what training measured, and what made it."""
    meta = {"command": command_line(script), **environment(), **meta}
    run = {"run": {"script": script, "arguments": arguments}, "train": train, "meta": meta}
    write_json(folder / COMPLETE, run)
    (folder / UNFINISHED).unlink(missing_ok=True)
    release(folder)


def read_run(folder: Path) -> dict | None:
    """The run.json of a run's folder, or of the run that a checkpoint-N folder belongs to (if unfinished: its
    arguments); None where there is none."""
    for of_run in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        for name in (COMPLETE, UNFINISHED):
            if (of_run / name).exists():
                return read_record(of_run / name)
    return None


def read_record(path: Path) -> dict:
    """A run.json, or the arguments of a run under way. UserError if it has not their form."""
    record = {"train": {}, "meta": {}, **read_json(path)}
    with as_written(path):
        form = {"run": dict, "train": dict, "meta": dict}, {"script": str, "arguments": dict}
        for part, kinds in zip((record, record["run"]), form, strict=True):
            for name, kind in kinds.items():
                if not isinstance(part[name], kind):
                    raise TypeError(f"{name} must be a {kind.__name__}")
        for name in ("base_model", "data_source", "task_name"):
            if not isinstance(record["run"]["arguments"].get(name), str | None):
                raise TypeError(f"{name} must be a text")
    return record


def find_run(name: str, outputs: Path, checkpoint: int | None = None) -> Path | None:
    """The folder of a run by its name under `outputs` or its path (also from the repository's root); None for the raw
    base, by either prompt. UserError if it is not there."""
    if name in (RAW, RAW_CHAT):
        if checkpoint is not None:
            raise UserError(f"--checkpoint_number {checkpoint}: the raw base model has no checkpoints")
        return None
    folder = next((path for path in (outputs / name, Path(name), ROOT / name) if path.is_dir()), None)
    if folder is None:
        available = sorted(path.name for path in outputs.iterdir() if path.is_dir()) if outputs.is_dir() else []
        raise UserError(
            f"no run {name!r} under {outputs} (there are: {', '.join(available) or 'none'}); align it first"
        )
    if checkpoint is None:
        if (folder / UNFINISHED).exists() and not (folder / COMPLETE).exists():
            raise UserError(f"{folder}: is not complete; re-run the command that began it to resume it")
        return folder
    if not (folder / f"checkpoint-{checkpoint}").is_dir():
        steps = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
        available = sorted(int(step) for step in steps if step.isdecimal())
        raise UserError(f"--checkpoint_number {checkpoint}: {folder} has {available or 'none'}")
    return folder / f"checkpoint-{checkpoint}"


def resolve_setting(flag: str, given, recorded, default):
    """A setting that an earlier stage recorded: as recorded, else as given, else the default; UserError if they
    contradict each other."""
    if given is not None and recorded is not None and str(given) != str(recorded):
        raise UserError(
            f"--{flag} {given}: the earlier stage recorded {recorded}; leave the flag out, or run that "
            "stage again in another --results_dir"
        )
    return recorded if recorded is not None else given if given is not None else default


def command_line(script: str) -> str | None:
    """The command that this process was started by, from the repository's root; None if that is another script's."""
    path = Path(sys.argv[0]).resolve()
    if path.name != script or not path.is_relative_to(ROOT):
        return None
    return shlex.join(["python", str(path.relative_to(ROOT)), *sys.argv[1:]])


def environment() -> dict:
    """What made a run: commit, package versions, device (of a CPU: how many of its cores compute)."""
    import torch  # here, so that a script's flags are parsed without it

    threads, cores = torch.get_num_threads(), os.cpu_count()
    cpu = f"{cpu_name()}, {cores} cores" if threads == cores else f"{cpu_name()}, {threads} of {cores} cores"
    return {
        "commit": commit(),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
    }


def cpu_name() -> str:
    """The processor's model name where the system tells it, and whether it has AMX, which the name does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return f"{name} with AMX" if any(" amx_tile" in line for line in lines) else name
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def commit() -> str | None:
    """The checkout's commit, marked if there are changes on top; None without git or outside a checkout."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]  # one that is killed leaves no lock behind
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")
