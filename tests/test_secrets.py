"""Keys of the environment go where they belong, and into nothing that a run leaves or says."""

import os
import shutil
import tempfile

import pytest
from conftest import run_script, write_answers
from fake_server import FakeServer

import align_basemodel
import inference
from config import TASKS
from evaluator import evaluate_likelihood, evaluate_truth_and_info, report
from models import export, llama_moe, merging

KEYS = {"HF_TOKEN": "hf_planted_4711", "OPENAI_API_KEY": "sk-planted-4712", "SERVER_API_KEY": "planted-4713"}


def holds_a_key(folder) -> list[str]:
    """The files below a folder, hidden ones too, that hold one of the keys."""
    keys = [key.encode() for key in KEYS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(key in path.read_bytes() for key in keys)]


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Everything a command may know: the keys, and a place of its own for temporary files."""
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    tempfile.tempdir = None


@pytest.mark.slow
def test_planted_keys_appear_nowhere_after_a_whole_run(tmp_path, base_dir, judge_base_dir, planted, capfd):
    results = tmp_path / "results"
    short = ["--max_steps", 2, "--batch_size", 2, "--num_samples", 6, "--dtype", "float32"]
    base = ["--base_model", judge_base_dir, "--data_source", "sample"]

    def run(script, *flags):
        script.main([str(flag) for flag in (*flags, "--results_dir", results)])

    for task in TASKS:
        run(align_basemodel, "--task_name", task, *base, *short)
    run(llama_moe)
    run(align_basemodel, "--moe_flag", 1, *short)
    run(merging, "--method", "linear")
    run(export, "--cross_task", "moe", "--output", tmp_path / "export")
    fused = "mix_moe_reg_00000_00000_00000_gate_00000"
    run(evaluate_likelihood, "--run", f"safety,{fused}", "--num_samples", 2, "--dtype", "float32")
    write_answers(results, "truthfulness", ["Yes.", "No."], run="cross_safety")
    with FakeServer(lambda request: {"text": " yes", "logprobs": LOGPROBS}) as server:
        asked = ["--judge", "m", "--judge_url", server.url]
        run(evaluate_truth_and_info, "--task_name", "cross_safety", "--mode", 0, *asked)
        served = ["--task_name", "safety", "--cross_task", "served", "--data_source", "sample"]
        served += ["--server_url", server.url, "--server_model", "m", "--num_samples", 2]
        run(inference, *served)
        assert server.keys == {f"Bearer {KEYS['SERVER_API_KEY']}"}
        server.faults[:] = ["401"] * 20  # a server that echoes the key
        shutil.rmtree(results / "inference" / "safety" / "test" / "cross_served")
        refused = run_script("inference.py", *served, "--results_dir", results)  # its traceback too, if it had one
        assert refused.returncode == 2
    run(report, "--runs", f"safety,{fused}", "--reference", fused)
    assert (results / "report" / "index.html").exists()
    said = "".join(capfd.readouterr()) + refused.stdout + refused.stderr
    assert "Aligned on mix" in said and "401" in refused.stderr
    assert not any(key in said for key in KEYS.values())
    assert not holds_a_key(tmp_path)


LOGPROBS = {
    "tokens": [" yes"],
    "token_logprobs": [-0.1],
    "top_logprobs": [{" yes": -0.1, " no": -2.3}],
    "text_offset": [0],
}


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "a/b", "..", "."])
def test_a_runs_name_does_not_lead_out_of_the_results(name, base_dir, tmp_path, capsys):
    flags = ["--task_name", "safety", "--base_model", base_dir, "--data_source", "sample", "--num_samples", 4]
    flags += ["--max_steps", 1, "--results_dir", tmp_path / "results", "--run_name", name]
    before = set(os.listdir(tmp_path))
    with pytest.raises(SystemExit):
        align_basemodel.main([str(flag) for flag in flags])
    assert "--run_name" in capsys.readouterr().err
    assert set(os.listdir(tmp_path)) == before


def test_what_a_model_wrote_cannot_steer_a_terminal():
    from models.terminal import printable

    assert "\x1b" not in printable("a\x1b[2Jb\x07\x9b") and "\x9b" not in printable("\x9b")
    assert printable("a\nb\tc") == "a\nb\tc"
