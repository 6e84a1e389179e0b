"""The benchmarks run, compare outputs before they time anything, and end in one line of JSON."""

import json

import pytest
import torch
from conftest import run_script

from benchmarks import bench_moe
from config import UserError


def test_the_forms_are_one_function_and_one_that_is_not_is_refused(monkeypatch):
    torch.manual_seed(0)
    layer = bench_moe.Layer(32, 48, torch.float32)
    inputs = bench_moe.inputs(9, 32, 2, torch.float32, "cpu")
    forms = bench_moe.forms(compiled=False)
    assert bench_moe.left_out(forms, layer, *inputs) == {}
    monkeypatch.setattr(bench_moe, "BATCHED_MM_LIMIT_BYTES", 1)
    assert list(bench_moe.left_out(forms, layer, *inputs)) == ["Mixtral batched_mm"]
    forms["expert loop"] = lambda *args: bench_moe.mixlora_sharing(*args) * 1.01
    with pytest.raises(UserError, match="expert loop is not the mixture"):
        bench_moe.left_out(forms, layer, *inputs)


def test_quick_ffn_ends_in_json(capsys):
    bench_moe.main(["--quick", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["ffn"]["results"]
    assert {row["pass"] for row in rows} == {"forward", "forward + backward"}
    assert {"dense", "ours", "expert loop", "MixLoRA", "Mixtral eager"} <= {row["form"] for row in rows}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_quick_model_ends_in_json(base_dir):
    result = run_script("benchmarks/bench_moe.py", "--model", 1, "--quick", 1, "--base_model", base_dir)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["model"]["results"]
    assert found["dense base"]["checkpoint_bytes"] < found["ours"]["checkpoint_bytes"]
    assert found["ours"]["of_which_fused_file_bytes"] > 0
    peaks = {form: found[form]["inference_peak_bytes"] for form in ("dense base", "exported Mixtral", "ours")}
    assert len(set(peaks.values())) == 3  # each process's own, not their parent's
    assert all(value > 0 for form in found.values() for value in form.values())
