"""What a training costs is told whole."""

import json
import platform
import resource
import time
from types import SimpleNamespace

import pytest
import torch

from models import cost
from models.cost import TrainingCost, peak_memory_bytes


@pytest.mark.parametrize("system, expected", [("Linux", 5 * 1024), ("Darwin", 5)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, system, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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
    second.resume(str(tmp_path))
    assert second.total() == {"seconds": 40.0, "peak_memory_bytes": 7}
