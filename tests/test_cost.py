"""What a training costs is told whole."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from config import ROOT
from models import cost
from models.cost import TrainingCost, peak_memory_bytes


@pytest.mark.slow
@pytest.mark.skipif(not cost.STATUS.exists(), reason="Linux tells a process's own peak")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = b"1" * len(ballast[::4096])  # every page is used
    code = "from models.cost import peak_memory_bytes; print(peak_memory_bytes())"
    settings = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}
    child = subprocess.run([sys.executable, "-c", code], **settings, capture_output=True, text=True, check=True)
    assert 50_000_000 < int(child.stdout) < len(ballast)


@pytest.mark.parametrize("system, expected", [("FreeBSD", 5 * 1024), ("Darwin", 5)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, tmp_path, system, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cost, "STATUS", tmp_path / "none")
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5))
    assert peak_memory_bytes() == expected


def test_a_resumed_training_costs_what_all_its_parts_cost(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "perf_counter", lambda: 130.0)
    monkeypatch.setattr(cost, "peak_memory_bytes", lambda: 7)
    first = TrainingCost(started=100.0)
    assert first.total() == {"seconds": 30.0, "peak_memory_bytes": 7}
    saved = {"stateful_callbacks": {"TrainingCost": first.state()}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(saved))
    monkeypatch.setattr(cost, "peak_memory_bytes", lambda: 5)
    second = TrainingCost(started=120.0)
    second.resume(tmp_path)
    assert second.total() == {"seconds": 40.0, "peak_memory_bytes": 7}
