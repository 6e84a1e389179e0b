"""What a training costs: seconds and memory, over all the parts of a run that was stopped and resumed."""

import json
import platform
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

STATUS = Path("/proc/self/status")  # Linux: what this process alone has held; getrusage begins with its parent's


def peak_memory_bytes() -> int:
    """The most memory held by this process so far: the GPU's if there is one, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TrainingCost(TrainerCallback, ExportableState):
    """Seconds since `started` (time.perf_counter) and peak memory, kept in the Trainer's checkpoints.

    After `resume` they include what the checkpoint had cost; work done after a run's last checkpoint is lost, and so is
    its time.
    """

    def __init__(self, started: float):
        self.started, self.earlier = started, {"seconds": 0.0, "peak_memory_bytes": 0}

    def resume(self, checkpoint: Path) -> None:
        """Add the cost kept in a checkpoint-N folder."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self.earlier |= state.get("stateful_callbacks", {}).get("TrainingCost", {}).get("attributes", {})

    def total(self) -> dict:
        """{"seconds", "peak_memory_bytes"} of all parts."""
        seconds = self.earlier["seconds"] + time.perf_counter() - self.started
        peak = max(self.earlier["peak_memory_bytes"], peak_memory_bytes())
        return {"seconds": round(seconds, 1), "peak_memory_bytes": peak}

    def state(self) -> dict:
        """What a checkpoint keeps (transformers' ExportableState)."""
        return {"args": {}, "attributes": self.total()}
