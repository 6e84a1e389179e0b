"""Keys of the environment go where they belong, and into nothing that a run leaves or says."""

import os
import shutil

import pytest
from conftest import run_script, write_answers
from fake_server import FakeServer

KEYS = {"HF_TOKEN": "hf_planted_4711", "OPENAI_API_KEY": "sk-planted-4712", "SERVER_API_KEY": "planted-4713"}


def holds_a_key(folder) -> list[str]:
    """The files below a folder, hidden ones too, that hold one of the keys."""
    keys = [key.encode() for key in KEYS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(key in path.read_bytes() for key in keys)]


@pytest.mark.slow
def test_planted_keys_appear_nowhere_after_a_whole_run(tmp_path, base_dir, judge_base_dir):
    results = tmp_path / "results"
    short = ["--max_steps", 2, "--batch_size", 2, "--num_samples", 6, "--dtype", "float32"]
    base = ["--base_model", judge_base_dir, "--data_source", "sample"]
    said = ""

    def run(*command, code=0):
        nonlocal said
        done = run_script(*command, "--results_dir", results, TMPDIR=str(temporary), **KEYS)
        assert done.returncode == code, done.stderr
        said += done.stdout + done.stderr

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for task in ("helpfulness", "safety", "truthfulness"):
        run("align_basemodel.py", "--task_name", task, *base, *short)
    run("models/llama_moe.py")
    run("align_basemodel.py", "--moe_flag", 1, *short)
    run("models/merging.py", "--method", "linear")
    run("models/export.py", "--cross_task", "moe", "--output", tmp_path / "export")
    fused = "mix_moe_reg_00000_00000_00000_gate_00000"
    run("evaluator/evaluate_likelihood.py", "--run", f"safety,{fused}", "--num_samples", 2, "--dtype", "float32")
    write_answers(results, "truthfulness", ["Yes.", "No."], run="cross_safety")
    with FakeServer(lambda request: {"text": " yes", "logprobs": LOGPROBS}) as server:
        asked = ["--judge", "m", "--judge_url", server.url]
        run("evaluator/evaluate_truth_and_info.py", "--task_name", "cross_safety", "--mode", 0, *asked)
        served = ["inference.py", "--task_name", "safety", "--cross_task", "served", "--data_source", "sample"]
        served += ["--server_url", server.url, "--server_model", "m", "--num_samples", 2]
        run(*served)
        assert server.keys == {f"Bearer {KEYS['SERVER_API_KEY']}"}
        server.faults[:] = ["401"] * 20  # a server that echoes the key
        shutil.rmtree(results / "inference" / "safety" / "test" / "cross_served")
        run(*served, code=2)
    run("evaluator/report.py", "--runs", f"safety,{fused}", "--reference", fused)
    assert (results / "report" / "index.html").exists()
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
    import align_basemodel

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
