"""Two processes of inference and scoring (gloo, on the CPU) share the batches and write what one writes."""

import json

import pytest
from conftest import run_script

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0", "--"]  # without it torchrun takes --run for its own --run-path
SCORE = ["evaluator/evaluate_likelihood.py", "--num_samples", 5, "--batch_size", 2, "--dtype", "float32"]
ANSWER = ["inference.py", "--task_name", "safety", "--num_samples", 7, "--batch_size", 2, "--max_new_tokens", 8]
ANSWER += ["--dtype", "float32"]


def run(launcher, *flags):
    return run_script(*launcher, *flags, OMP_NUM_THREADS="1")


def written(folder):
    """{path: text} of all that a command wrote, but for what tells when, how fast and by which command."""
    texts = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")):
        text = path.read_text()
        if path.name == "run.json":
            record = json.loads(text)
            text = json.dumps([record["run"], record["train"].get("answers")])
        texts[str(path.relative_to(folder))] = text
    return texts


@pytest.mark.parametrize("run_name", ["raw", "fused"])
def test_two_processes_score_as_one(run_name, base_dir, fused_dir, tiny_source, tmp_path):
    named = {"raw": ["--run", "raw", "--base_model", base_dir], "fused": ["--run", fused_dir]}[run_name]
    flags = [*SCORE, *named, "--data_source", tiny_source]
    one = run([], *flags, "--results_dir", tmp_path / "one")
    two = run(TORCHRUN, *flags, "--results_dir", tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout.count("nll_per_token") == two.stdout.count("nll_per_token") > 2  # one process speaks
    scores = written(tmp_path / "one")
    assert sum(path.endswith("judgements.jsonl") for path in scores) == 4  # three tasks and general
    assert written(tmp_path / "two") == scores
    again = run(TORCHRUN, *flags, "--results_dir", tmp_path / "two")
    assert again.returncode == 0 and again.stdout.count("scored already") == 1


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_two_processes_answer_as_one(temperature, fused_dir, tiny_source, tmp_path):
    """Greedy and sampled answers, whole and resumed after a stop; 4 batches, the last one of 1."""
    flags = [*ANSWER, "--cross_task", fused_dir, "--data_source", tiny_source, "--temperature", temperature]
    one = run([], *flags, "--results_dir", tmp_path / "one")
    two = run(TORCHRUN, *flags, "--results_dir", tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    answers = written(tmp_path / "one")
    assert any(path.endswith("outputs.jsonl") for path in answers) and any("routing.json" in path for path in answers)
    assert written(tmp_path / "two") == answers
    (folder,) = (path.parent for path in (tmp_path / "two").rglob("outputs.jsonl"))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    (folder / "arguments.json").write_text(json.dumps({"run": record["run"]}))
    lines = (folder / "outputs.jsonl").read_text().splitlines(keepends=True)
    (folder / "outputs.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    resumed = run(TORCHRUN, *flags, "--results_dir", tmp_path / "two")
    assert resumed.returncode == 0 and "Going on after" in resumed.stdout, resumed.stderr
    assert written(tmp_path / "two") == answers


def test_a_mistake_is_told_once_and_ends_both(base_dir, tiny_source, tmp_path):
    flags = [*SCORE, "--run", "raw", "--base_model", base_dir, "--data_source", tiny_source, "--results_dir", tmp_path]
    flags += ["--task_name", "safety"]
    assert run([], *flags).returncode == 0
    other = run(TORCHRUN, *flags, "--max_length", 100)
    assert other.returncode != 0 and other.stderr.count("error: ") == 1 and "max_length" in other.stderr


def test_what_one_process_does_is_refused(fused_dir):
    two = run(TORCHRUN, "inference.py", "--prompt", "Hi", "--cross_task", fused_dir)
    assert two.returncode != 0 and "--prompt Hi: is for one process; run it without torchrun" in two.stderr
