"""Kill a command at random moments and give it again until it ends: it must end as if nothing had happened."""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from config import ROOT
from faults.python_shim import serve, write_client
from faults.stages import Stage
from faults.trees import contents, differences, finished_work, lost_work

PRELOADED = ["scripts"]  # what takes seconds to import is imported once, and a command is a fork of that


@dataclass
class Tally:
    """What came of a fault: how often it struck, in how many lives of a stage, and what it did. examples: in words."""

    times: int = 0
    lives: int = 0
    lost: int = 0
    wrong: int = 0
    left: int = 0
    unavailable: str = ""  # why this machine cannot make the fault
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for name in ("times", "lives", "lost", "wrong", "left", "unavailable"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = [*self.examples, *other.examples][:20]

    def note(self, what: str) -> None:
        self.examples = [*self.examples, what][:20]


def fork_server():
    """Where processes are forked from that have all the scripts imported."""
    context = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # it passes over what it cannot import
    context.set_forkserver_preload(PRELOADED)
    return context


def run_stage(stage: Stage, argv: list[str], log: str, shim: Path) -> None:
    """A command in a process of its own, and of a group of its own. shim: the folder of a shell file's `python`."""
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if stage.script.endswith(".sh"):
        os.environ["PATH"] = f"{shim}{os.pathsep}{os.environ['PATH']}"
        os.execvp("bash", ["bash", str(ROOT / stage.script), *argv])
    import torch
    from scripts import MAINS

    faulthandler.dump_traceback_later(stage.at_most, exit=True)
    torch.set_num_threads(1)
    MAINS[stage.script](argv)


def signature(folder: Path) -> set[tuple]:
    """Names and sizes of all files below a folder, as far as they stand still."""
    seen = set()
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                seen.add((parent, name, os.stat(os.path.join(parent, name)).st_size))
            except FileNotFoundError:
                continue
    return seen


def wait(process, folder: Path, seconds: float, changes: float = float("inf")) -> int:
    """Wait for a process's end, so many seconds, or until files have changed so many times; returns the latter."""
    begun, before, seen = time.monotonic(), signature(folder), 0
    while process.is_alive() and time.monotonic() < begun + seconds and seen < changes:
        looked = time.monotonic()
        now = signature(folder)
        seen += now != before
        before = now
        time.sleep(max(0.0005, 3 * (time.monotonic() - looked)))  # a quarter of a core for many files, at most
    return seen


def kill(process) -> None:
    """End a process, and its group where it leads one, unless it has come to its end by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if os.getpgid(process.pid) == process.pid else process.kill()


class Killer:
    """Runs a stage in fresh copies of what it starts from. ready: that; folder: where the copies lie."""

    def __init__(self, context, ready: Path, folder: Path):
        self.context, self.ready, self.folder, self.results = context, ready, folder, folder / "results"
        self.log, self.shim = folder / "log.txt", folder / "bin"
        self.shells: multiprocessing.Process | None = None

    def renew(self) -> None:
        shutil.rmtree(self.results, ignore_errors=True)
        shutil.copytree(self.ready, self.results)

    def start(self, stage: Stage):
        self.log.write_text("")
        if stage.script.endswith(".sh") and self.shells is None:
            self.shells = self.context.Process(target=serve, args=(write_client(self.shim),), daemon=True)
            self.shells.start()
        argv = stage.argv(self.results)
        process = self.context.Process(target=run_stage, args=(stage, argv, str(self.log), self.shim))
        process.start()
        return process

    def undisturbed(self, stage: Stage) -> tuple[dict, float, int]:
        """(what it leaves, its seconds, how often files change as it runs). AssertionError if it fails."""
        self.renew()
        begun, process = time.monotonic(), self.start(stage)
        changes = wait(process, self.results, stage.at_most)
        process.join(1)
        assert process.exitcode == 0, f"{stage.name} fails undisturbed: {self.log.read_text()[-3000:]}"
        return contents(self.results), time.monotonic() - begun, changes

    def killed(self, stage: Stage, expected: dict, seconds: float, changes: int, seed: str) -> Tally:
        """One life of a stage: killed at random moments until it comes to its end before the next one."""
        tally, rng, done = Tally(lives=1), random.Random(seed), set()
        self.renew()
        while True:
            process = self.start(stage)
            if rng.random() < 0.5:
                wait(process, self.results, rng.uniform(0, seconds))
            else:
                wait(process, self.results, stage.at_most, rng.randint(1, max(changes, 1)))
            kill(process)
            process.join()
            if process.exitcode != -signal.SIGKILL:
                break
            tally.times += 1
            now = finished_work(self.results)
            self.compare_work(tally, stage, done, now)
            done = now
        process.join()
        if process.exitcode:
            tally.wrong += 1
            tally.note(f"given again, it fails: {self.log.read_text()[-500:]}")
            return tally
        self.compare_work(tally, stage, done, finished_work(self.results))
        wrong, left = differences(expected, contents(self.results))
        tally.wrong, tally.left = tally.wrong + len(wrong), tally.left + len(left)
        for kind, paths in (("differs", wrong), ("left behind", left)):
            for path in paths:
                tally.note(f"{kind}: {path}")
        return tally

    def compare_work(self, tally: Tally, stage: Stage, before: set, after: set) -> None:
        """Count what was done before the last kill and is not there any more."""
        if lost := lost_work(before, after, stage.rows_at_once):
            tally.lost += lost
            tally.note(f"lost: {sorted(before - after, key=repr)[:3]}")
