"""Faults other than kills: each strikes a command, which must lose nothing, and end as an undisturbed one when it is
given again."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_server import FakeServer

from config import UserError
from faults.kills import Killer, Tally, wait
from faults.stages import Pipeline, Stage
from faults.trees import contents, differences, finished_work, lost_work
from workspace import checkpoints

BEYOND = 200  # lengths tried behind a header
CGROUP = Path("/sys/fs/cgroup/memory")


class Unavailable(Exception):
    """This machine cannot make the fault."""


class Faults:
    """The faults by name, each a function of (how often at least) that gives its Tally."""

    def __init__(self, pipeline: Pipeline, killer: Killer):
        self.pipeline, self.killer, self.rng = pipeline, killer, random.Random()
        self.stage = {stage.name: stage for stage in pipeline.stages()}
        self.expected: dict[str, tuple[dict, float, int]] = {}
        self.written: dict[str, int] = {}  # bytes that a stage takes of a disk

    def all(self) -> dict[str, Callable[[int], Tally]]:
        """Each as a function that says so in its Tally where this machine cannot make the fault."""

        def or_unavailable(fault: Callable[[int], Tally]) -> Callable[[int], Tally]:
            def strike(times: int) -> Tally:
                try:
                    return fault(times)
                except Unavailable as reason:
                    return Tally(unavailable=str(reason))

            return strike

        return {name: or_unavailable(fault) for name, fault in self.by_name().items()}

    def by_name(self) -> dict[str, Callable[[int], Tally]]:
        training, fusion = self.stage["expert training"], self.stage["fusion training"]
        others = "merging", "inference", "judging", "export to shared"
        written = [training, fusion, *(self.stage[name] for name in others)]
        return {
            "a checkpoint's files cut short": lambda times: self.cut_checkpoints([training, fusion], times),
            "a run's weights cut short": lambda times: self.cut_weights(times),
            "answers cut within a character": lambda times: self.cut_answers(self.stage["inference"], times),
            "a database left in a transaction": lambda times: self.hot_journal(self.stage["judging"], times),
            "a disk that fills": lambda times: self.full_disk(written, times),
            "a folder that may only be read": lambda times: self.read_only(written, times),
            "a folder that vanishes": lambda times: self.vanishing(written, times),
            "a clock that jumps back": lambda times: self.clock([*written, self.stage["judge training"]], times),
            "killed for its memory": lambda times: self.out_of_memory(training, times),
            "a loss that is not finite": lambda times: self.not_finite(training, times),
            "two processes at once": lambda times: self.at_once(written, 2, times),
            "ten processes at once": lambda times: self.at_once(written, 10, times),
            "a server that fails": lambda times: self.bad_server("inference by a server", times),
            "a judge's server that fails": lambda times: self.bad_server("judging by a server", times),
        }

    def killed(self, stage: Stage, life: int) -> Tally:
        """One life of a stage, killed at random moments."""
        if stage.name not in self.expected:
            expected = self.undisturbed(stage)
            assert self.killer.undisturbed(stage)[0] == expected, f"{stage.name}: two undisturbed runs differ"
        return self.killer.killed(stage, *self.expected[stage.name], f"{stage.name} {life}")

    # ---- helpers

    def undisturbed(self, stage: Stage) -> dict:
        if stage.name not in self.expected:
            self.expected[stage.name] = self.killer.undisturbed(stage)
            self.written[stage.name] = size_on_disk(self.killer.results) - size_on_disk(self.killer.ready)
        return self.expected[stage.name][0]

    def run(self, stage: Stage) -> tuple[int, str]:
        """(exit code, what it said) of a stage run to its end."""
        process = self.killer.start(stage)
        process.join(2 * stage.at_most)  # which ends itself, with a traceback, after that
        return process.exitcode, self.killer.log.read_text(errors="replace")

    def must_refuse(self, tally: Tally, what: str, code: int, said: str) -> None:
        """Count an end that is not one line and exit code 2."""
        lines = [line for line in said.strip().splitlines() if line.startswith("error: ")]
        if code != 2 or len(lines) != 1 or "Traceback" in said:
            tally.wrong += 1
            tally.note(f"{what}: exit code {code}: {said[-600:]}")

    def must_end_well(
        self, tally: Tally, stage: Stage, what: str, before: set[tuple] = frozenset(), removed: str | None = None
    ) -> None:
        """Run a stage to its end, and count what differs from an undisturbed one, or was done before and is not.

        removed: what was taken away for good, and may be missing, has this in its path.
        """
        expected = self.undisturbed(stage) if stage.name not in self.expected else self.expected[stage.name][0]
        code, said = self.run(stage)
        if code:
            tally.wrong += 1
            tally.note(f"{what}, {stage.name} given again: exit code {code}: {said[-600:]}")
            return
        actual = contents(self.killer.results)
        wrong, left = differences(expected, actual)
        wrong = [path for path in wrong if path in actual or removed is None or removed not in path]
        lost = lost_work(set(before), finished_work(self.killer.results), stage.rows_at_once)
        tally.wrong, tally.left, tally.lost = tally.wrong + len(wrong), tally.left + len(left), tally.lost + lost
        for kind, paths in (("differs", wrong), ("left behind", left)):
            for path in paths:
                tally.note(f"{what}, {stage.name}: {kind}: {path}")

    def half_done(self, stage: Stage, rng: random.Random) -> bool:
        """Start a stage anew and kill it when it has finished some of its work; False if it came to its end."""
        self.undisturbed(stage)
        changes = self.expected[stage.name][2]
        self.killer.renew()
        begun = finished_work(self.killer.results)
        process = self.killer.start(stage)
        wait(process, self.killer.results, stage.at_most, rng.randint(max(changes // 2, 1), max(changes - 1, 1)))
        alive = process.is_alive()
        if alive:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return alive and len(finished_work(self.killer.results)) > len(begun)

    def has_ended(self) -> bool:
        """Whether a stage that was killed had written its run.json."""
        runs = (len(list(folder.rglob("run.json"))) for folder in (self.killer.results, self.pipeline.ready))
        return next(runs) > next(runs)

    # ---- files

    def cut_checkpoints(self, stages: list[Stage], times: int) -> Tally:
        """Each file of a whole checkpoint cut at each length of its header, and BEYOND more: it must be passed over."""
        tally = Tally()
        for stage in stages:
            self.undisturbed(stage)
            self.killer.renew()
            assert self.run(stage)[0] == 0
            folder = self.killer.results / "outputs" / "made"
            last = checkpoints.checkpoints_of(folder)[-1]
            for path in sorted(last.iterdir()):
                whole = path.read_bytes()
                for length in cut_lengths(path, whole):
                    path.write_bytes(whole[:length])
                    tally.times += 1
                    if checkpoints.damage(last) is None:
                        tally.wrong += 1
                        tally.note(f"{path.name} at {length} bytes is taken for whole")
                path.write_bytes(whole)
                assert checkpoints.damage(last) is None
        return tally

    def cut_weights(self, times: int) -> Tally:
        """The weights of finished runs, cut: whoever loads them says so in one line."""
        from models.loading import load_run

        tally = Tally()
        for name in ("safety", "moe"):
            source = self.pipeline.ready / "outputs" / name
            folder = self.killer.folder / "cut"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            (path,) = folder.glob("*.safetensors")
            whole = path.read_bytes()
            for length in cut_lengths(path, whole):
                path.write_bytes(whole[:length])
                tally.times += 1
                try:
                    load_run(folder, str(self.pipeline.llama), "float32")
                    tally.wrong += 1
                    tally.note(f"{name} with {length} bytes of weights loads")
                except UserError as error:
                    if str(folder) not in str(error) and "cut" not in str(error):
                        tally.wrong += 1
                        tally.note(f"{name} with {length} bytes: {error}")
                except Exception as error:
                    tally.wrong += 1
                    tally.note(f"{name} with {length} bytes: {error!r}")
            shutil.rmtree(folder)
        return tally

    def cut_answers(self, stage: Stage, times: int) -> Tally:
        """The answers of an inference that was stopped, with characters of several bytes, cut at any byte."""
        tally, rng = Tally(), self.rng
        self.undisturbed(stage)
        while tally.times < times:
            if not self.half_done(stage, rng):
                continue
            (path,) = (self.killer.results / "inference" / "truthfulness").rglob("cross_mix*/outputs.jsonl")
            if (path.parent / "run.json").exists():  # stopped after the answers
                continue
            lines = path.read_bytes()
            torn = '{"id": "x", "output": "zweiß – 漢字 😀"}'.encode()
            path.write_bytes(lines.rpartition(b"\n")[0] + b"\n" + torn[: rng.randint(1, len(torn) - 1)])
            before = finished_work(self.killer.results)
            tally.times += 1
            self.must_end_well(tally, stage, "cut", before)
        return tally

    def hot_journal(self, stage: Stage, times: int) -> Tally:
        """A process killed within a transaction leaves its database half written, and a journal to undo that."""
        tally, rng = Tally(), self.rng
        while tally.times < times:
            if not self.half_done(stage, rng) or self.has_ended():  # nobody would open the database any more
                continue
            database = self.killer.results / "evaluation" / "judgements.sqlite"
            before = finished_work(self.killer.results)
            if not leave_journal(database):
                continue
            tally.times += 1
            self.must_end_well(tally, stage, "hot journal", before)
        return tally

    # ---- disks and folders

    @contextmanager
    def on_disk(self, free: float) -> Iterator[None]:
        """The results folder as a disk of its own, with so many bytes free. Unavailable without the right."""
        self.killer.renew()
        results, kept = self.killer.results, self.killer.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        results.rename(kept)
        results.mkdir()
        size = size_on_disk(kept) + int(free)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(results)], check=False
        ).returncode:
            raise Unavailable("no right to mount a disk")
        try:
            shutil.copytree(kept, results, dirs_exist_ok=True)
            yield
        finally:
            shutil.copytree(results, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "--lazy", str(results)], check=True)
            results.rmdir()
            kept.rename(results)

    def full_disk(self, stages: list[Stage], times: int) -> Tally:
        tally, rng = Tally(), self.rng
        while tally.times < times:
            stage = self.rng.choice(stages)
            self.undisturbed(stage)
            with self.on_disk(rng.uniform(0, 0.8 * self.written[stage.name])):
                code, said = self.run(stage)
                before = finished_work(self.killer.results)
            if code:
                tally.times += 1
                self.must_refuse(tally, f"{stage.name} on a full disk", code, said)
            self.must_end_well(tally, stage, "full disk", before)
        return tally

    def read_only(self, stages: list[Stage], times: int) -> Tally:
        tally = Tally()
        while tally.times < times:
            stage = self.rng.choice(stages)
            self.undisturbed(stage)
            with self.on_disk(10 * 2**20):
                subprocess.run(["mount", "-o", "remount,ro", str(self.killer.results)], check=True)
                code, said = self.run(stage)
            tally.times += 1
            self.must_refuse(tally, f"{stage.name} in a read-only folder", code, said)
            self.must_end_well(tally, stage, "read-only")
        return tally

    def vanishing(self, stages: list[Stage], times: int) -> Tally:
        """What a command writes into is removed under its hands: it ends in one line, or never noticed."""
        tally, rng = Tally(), self.rng
        while tally.times < times:
            stage = self.rng.choice(stages)
            self.undisturbed(stage)
            changes = self.expected[stage.name][2]
            self.killer.renew()
            before = {path for path in self.killer.results.rglob("*") if path.is_dir()}
            process = self.killer.start(stage)
            wait(process, self.killer.results, stage.at_most, rng.randint(1, max(changes - 1, 1)))
            new = [path for path in self.killer.results.rglob("*") if path.is_dir() and path not in before]
            gone = self.killer.folder / "gone"
            for number, path in enumerate(new):  # each at once, with all that is in it
                with contextlib.suppress(FileNotFoundError):
                    path.rename(gone.with_name(f"gone{number}"))
            for number in range(len(new)):
                shutil.rmtree(gone.with_name(f"gone{number}"), ignore_errors=True)
            process.join(2 * stage.at_most)
            tally.times += 1
            if process.exitcode:
                said = self.killer.log.read_text(errors="replace")
                self.must_refuse(tally, f"{stage.name}, its folder gone", process.exitcode, said)
            self.must_end_well(tally, stage, "vanished", removed="/checkpoint-")
        return tally

    def clock(self, stages: list[Stage], times: int) -> Tally:
        """What a run had written is from the future when it goes on."""
        tally, rng = Tally(), self.rng
        while tally.times < times:
            stage = self.rng.choice(stages)
            if not self.half_done(stage, rng):
                continue
            for path in self.killer.results.rglob("*"):
                os.utime(path, (time.time() + 10 * 365 * 86400,) * 2)
            tally.times += 1
            self.must_end_well(tally, stage, "clock", finished_work(self.killer.results))
        return tally

    # ---- memory, numbers, processes

    def out_of_memory(self, stage: Stage, times: int) -> Tally:
        """Killed by the system in a group of processes that may take little memory."""
        tally, rng = Tally(), self.rng
        self.undisturbed(stage)
        group = CGROUP / "h3fusion_faults"
        try:
            group.mkdir(exist_ok=True)
        except OSError as error:
            raise Unavailable(f"no group of processes with a limit can be made: {error}") from error
        try:
            before_times = -1
            while tally.times < times and tally.times != before_times:
                before_times = tally.times
                for _ in range(5):
                    self.killer.renew()
                    process = self.killer.start(stage)
                    (group / "memory.limit_in_bytes").write_text(str(rng.randint(8, 60) * 2**20))
                    (group / "cgroup.procs").write_text(str(process.pid))
                    process.join(2 * stage.at_most)
                    if process.exitcode == -signal.SIGKILL:
                        tally.times += 1
                        self.must_end_well(tally, stage, "memory", finished_work(self.killer.results))
        finally:
            group.rmdir()
        return tally

    def not_finite(self, stage: Stage, times: int) -> Tally:
        """A learning rate beyond reason: training stops, names the step, and keeps what it had."""
        tally = Tally()
        while tally.times < times:
            self.killer.renew()
            flags = (*stage.flags, "--learning_rate", "1e38", "--save_steps", 1, "--seed", 100 + tally.times)
            code, said = self.run(Stage("diverging", stage.script, flags))
            tally.times += 1
            self.must_refuse(tally, "not finite", code, said)
            kept = checkpoints.checkpoints_of(self.killer.results / "outputs" / "made")
            if "at step" not in said or "samples" not in said or not kept or checkpoints.damage(kept[-1]):
                tally.wrong += 1
                tally.note(f"not finite: {said[-400:]}, {kept}")
        return tally

    def at_once(self, stages: list[Stage], number: int, times: int) -> Tally:
        """Several processes with one command: one works, the others say who does, or that it is done."""
        tally = Tally()
        while tally.times < times:
            stage = self.rng.choice(stages)
            expected = self.undisturbed(stage)
            self.killer.renew()
            processes = [self.killer.start(stage) for _ in range(number)]
            for process in processes:
                process.join(stage.at_most)
            said = self.killer.log.read_text(errors="replace")
            tally.times += 1
            if {process.exitcode for process in processes} - {0, 2} or "Traceback" in said:
                tally.wrong += 1
                tally.note(f"{number} at once, {stage.name}: {[p.exitcode for p in processes]}: {said[-400:]}")
            if not any(process.exitcode == 0 for process in processes):
                tally.wrong += 1
                tally.note(f"{number} at once, {stage.name}: none came to its end: {said[-400:]}")
            wrong, left = differences(expected, contents(self.killer.results))
            tally.wrong, tally.left = tally.wrong + len(wrong), tally.left + len(left)
            for path in (*wrong, *left):
                tally.note(f"{number} at once, {stage.name}: {path}")
        return tally

    # ---- servers

    def bad_server(self, name: str, times: int) -> Tally:
        """A server that goes away, comes back, hangs up, gives errors, is late, says things twice, or answers with
        another model's words or with words that are none of its protocol."""
        tally, rng = Tally(), self.rng
        self.undisturbed(self.stage[name])
        server: FakeServer = self.pipeline.server
        while tally.times < times:
            self.killer.renew()
            server.answered.clear()
            kinds = ["500", "429", "half", "not json", b"{}", b'{"choices": []}', "gone", "late 0.3", "twice"]
            kinds += ["model of-others", None, None, None, None]
            server.faults[:] = [rng.choice(kinds) for _ in range(40)]
            before: set[tuple] = set()
            for _ in range(30):
                code, said = self.run(self.stage[name])
                now = finished_work(self.killer.results)
                tally.lost += lost_work(before, now)
                before = now
                if code == 0:
                    break
                self.must_refuse(tally, "a server's fault", code, said)
            server.faults.clear()
            tally.times += 1
            counts = Counter(request["prompt"] for request in server.answered)
            twice = [prompt for prompt, count in counts.items() if count > 1]
            tally.lost += len(twice)
            if twice:
                tally.note(f"asked again though answered: {twice[:2]}")
            self.must_end_well(tally, self.stage[name], "server", before)
        return tally


def leave_journal(database: Path) -> bool:
    """Kill a process within a transaction; whether it left its journal."""
    writing = (
        "import sqlite3, sys, os, signal\n"
        "c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA cache_size = 1')\n"
        "c.execute('UPDATE judgement SET value = ?', ('0' * 9000,))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", writing, str(database)], check=False)
    return database.with_name(f"{database.name}-journal").exists()


def size_on_disk(folder: Path) -> int:
    """The bytes that the files of a folder take in blocks of 4 kB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def cut_lengths(path: Path, whole: bytes) -> list[int]:
    """Every length of a file's header, and BEYOND spread over the rest; a file is never cut to its whole length."""
    if whole.endswith(b"\n"):
        whole = whole[:-1]  # without it a document of JSON is as whole
    header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else min(len(whole), 512)
    rest = len(whole) - header
    beyond = {header + rest * i // BEYOND for i in range(BEYOND)} if rest > 0 else set()
    return sorted({*range(min(header, len(whole))), *beyond} - {len(whole)})
