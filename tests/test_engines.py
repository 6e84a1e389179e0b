"""The exports in other people's engines, each in an environment of its own: vLLM, lm-evaluation-harness.

Skipped where they are not installed. H3FUSION_VLLM and H3FUSION_LM_EVAL name their commands (default: on the PATH).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import pytest
import torch
from conftest import ROOT, free_port, make_tokenizer, save_adapter, tiny_config
from transformers import LlamaForCausalLM

from benchmarks import bench_serving, profile_serving
from data.prompts import render_prompt
from data.sources import truthfulness_comparisons
from evaluator import evaluate_likelihood
from models import export, llama_moe
from models.loading import load_run
from workspace.files import read_json

VLLM = shutil.which(os.environ.get("H3FUSION_VLLM", "vllm"))
LM_EVAL = shutil.which(os.environ.get("H3FUSION_LM_EVAL", "lm_eval"))
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed (H3FUSION_VLLM: its command)")
needs_lm_eval = pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed (H3FUSION_LM_EVAL: its command)")
QUESTIONS = (
    "Name three birds.",
    "Can I tame a fox?",
    "Is glass a liquid?",
    "Why is the sky blue?",
    "Say no.",
    "Who am I?",
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{form: folder} of a fused model in bfloat16, with heads of a size that vLLM takes and an even number of them. Its
    experts differ by little: where rounding decides which of two is chosen, an answer must not turn on it."""
    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, intermediate_size=192, initializer_range=0.06)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, task in enumerate(("helpfulness", "safety", "truthfulness")):
        save_adapter(folder / "adapters" / task, folder / "base", seed, lora_alpha=1)
    llama_moe.main(["--experts_dir", str(folder / "adapters"), "--output", str(folder / "moe")])
    for form in ("shared", "mixtral"):
        export.main(["--cross_task", str(folder / "moe"), "--to", form, "--output", str(folder / form)])
    return {form: folder / form for form in ("shared", "mixtral")}


@contextmanager
def served(folder, log, *flags, **settings):
    """A client of vLLM, which serves this folder."""
    port = free_port()
    command = [VLLM, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", *flags]
    path = f"{os.path.dirname(VLLM)}:{os.environ['PATH']}"
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": path,
    } | settings
    with open(log, "w") as file:
        environment = {**os.environ, **settings}
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(900):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def greedy(client, folder, prompts, new_tokens=32):
    """Token ids of each prompt's answer."""
    settings = {
        "max_tokens": new_tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    choices = client.completions.create(model=str(folder), prompt=prompts, **settings).choices
    return [choice.token_ids for choice in sorted(choices, key=lambda choice: choice.index)]


def differences(folder, prompts, answers, dtype):
    """Of each answer's first token that is not ours: the difference of the two tokens' logits in fp32, as a share of
    the logits' standard deviation. [] where all answers are ours."""
    model, exact = load_run(folder, dtype=dtype)[0], load_run(folder, dtype="float32")[0]
    model.generation_config.eos_token_id = None
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": len(answer), "do_sample": False, "pad_token_id": 1}
        with torch.no_grad():
            own = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
            if own == answer:
                continue
            place = next(i for i, (ours, theirs) in enumerate(zip(own, answer, strict=True)) if ours != theirs)
            context = torch.tensor([prompt + own[:place]])
            logits = exact(context).logits[0, -1]
        gaps.append(float((logits[own[place]] - logits[answer[place]]).abs() / logits.std()))
    return gaps


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "form, dtype, more, within",
    [
        ("shared", "float32", {}, 1e-3),
        ("shared", "bfloat16", {}, 0.05),
        ("shared", "float32", {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, 1e-3),  # by two processes
        ("mixtral", "bfloat16", {}, 0.05),
    ],
)
def test_vllm_answers_as_we_do(exports, tmp_path, form, dtype, more, within):
    """Where an answer differs, the two tokens are as likely but for rounding."""
    prompts = [make_tokenizer()(render_prompt(question)).input_ids for question in QUESTIONS]
    flags = ["--trust-remote-code", "--model-impl", "transformers"] if form == "shared" else []
    flags += ["--tensor-parallel-size", "2"] if more else []
    with served(exports[form], tmp_path / "log", "--dtype", dtype, *flags, **more) as client:
        answers = greedy(client, exports[form], prompts)
    gaps = differences(exports[form], prompts, answers, dtype)
    assert max(gaps, default=0.0) < within and len(set(map(tuple, answers))) == len(QUESTIONS)


@needs_vllm
@pytest.mark.slow
def test_a_run_is_served_in_one_step(exports, tmp_path):
    port, run = free_port(), exports["shared"].with_name("moe")
    path = f"{os.path.dirname(sys.executable)}:{os.path.dirname(VLLM)}:{os.environ['PATH']}"
    settings = {"PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = ["bash", ROOT / "runs" / "serve.sh", run, "--port", port, "--results_dir", tmp_path]
    server = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        name = next(line.partition(" answers at")[0] for line in server.stdout if " answers at" in line)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        assert len(greedy(client, name, [[5, 6, 7]], new_tokens=4)[0]) == 4
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@needs_vllm
@pytest.mark.slow
def test_the_benchmark_serves_every_form(exports, capsys):
    run = exports["shared"].with_name("moe")
    bench_serving.main(["--cross_task", str(run), "--vllm", VLLM, "--quick", "1", "--rounds", "1"])
    kept = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["form"] for row in kept["results"] if row["engine"] == "vLLM"] == ["dense base", "shared", "mixtral"]
    assert all(value > 0 for row in kept["results"] for value in row.values() if isinstance(value, int | float))
    assert set(kept["vllm"]) == {"vllm", "torch", "transformers"}


@needs_vllm
@pytest.mark.slow
def test_a_served_step_is_profiled(exports, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile_serving, "KEPT", tmp_path / "profile.json")
    profile_serving.main(["--cross_task", str(exports["shared"].with_name("moe")), "--vllm", VLLM])
    figures = read_json(tmp_path / "profile.json")["results"]
    assert list(figures) == ["dense base", "shared", "mixtral"]
    for form, one in figures.items():
        assert set(one["profiled_s"]) == set(profile_serving.KINDS) and one["tokens_per_s"] > 0
        assert all(one["profiled_s"][name] > 0 for name in (profile_serving.FFN, profile_serving.ATTENTION)), form
        assert (one["profiled_s"][profile_serving.LOW_RANK] > 0) == (form == "shared")
    assert profile_serving.table(figures) in capsys.readouterr().out


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
process_results: !function metrics.{name}
metric_list: [{{metric: {name}, aggregation: mean, higher_is_better: true}}]
"""
METRICS = """import numpy

def mc1(doc, results):
    values = numpy.array([value for value, _ in results])
    good = numpy.array(doc["labels"]) == 1
    return {"mc1": float(values[good].max() > values[~good].max())}

def mc2(doc, results):
    values = numpy.array([value for value, _ in results])
    shares = numpy.exp(values - values.max())
    return {"mc2": shares[numpy.array(doc["labels"]) == 1].sum() / shares.sum()}
"""


@needs_lm_eval
@pytest.mark.slow
def test_lm_evaluation_harness_scores_as_we_do(exports, tmp_path):
    """But for answers that begin where a token of ours ends: the harness tokenises prompt and answer as one text. No
    answer of data/sample does."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "metrics.py").write_text(METRICS)
    for name, questions in zip(("mc1", "mc2"), truthfulness_comparisons("test", "sample"), strict=True):
        rows = [
            {"prompt": render_prompt(one.instruction), "choices": one.choices, "labels": one.labels}
            for one in questions
        ]
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, rows=tasks / f"{name}.jsonl"))
    model = f"pretrained={exports['shared']},trust_remote_code=True,dtype=float32"
    command = [LM_EVAL, "--model", "hf", "--model_args", model, "--include_path", tasks, "--tasks", "mc1,mc2"]
    command += ["--device", "cpu", "--batch_size", "8", "--output_path", tmp_path / "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    harness = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert harness.returncode == 0, harness.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    flags = ["--run", exports["shared"], "--task_name", "truthfulness", "--data_source", "sample"]
    flags += ["--dtype", "float32", "--results_dir", tmp_path]
    evaluate_likelihood.main(list(map(str, flags)))
    metrics = tmp_path / "evaluation" / "truthfulness" / "test" / "shared" / "likelihood" / "metrics.json"
    ours = json.loads(metrics.read_text())["metrics"]
    assert theirs["mc1"]["mc1,none"] == pytest.approx(ours["mc1"]["value"], abs=1e-6)
    assert theirs["mc2"]["mc2,none"] == pytest.approx(ours["mc2"]["value"], abs=1e-4)
    assert 0.01 < ours["mc2"]["value"] < 0.99
