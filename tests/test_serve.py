"""runs/serve.sh: export, serve and wait in one step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port
from openai import OpenAI

from data.prompts import render_prompt
from models.loading import load_run


@pytest.mark.slow
def test_a_run_is_served_in_one_step(fused_dir, tmp_path):
    port = free_port()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["bash", ROOT / "runs" / "serve.sh", fused_dir, "--engine", "transformers", "--to", "mixtral", "--port",
               port, "--dtype", "float32", "--results_dir", tmp_path]  # fmt: skip
    server = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)  # fmt: skip
    try:
        said = next((line for line in server.stdout if "answers at" in line), "")
        name = said.partition(" answers at")[0]
        assert f"http://127.0.0.1:{port}/v1" in said and (Path(name) / "model.safetensors.index.json").exists()
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        prompt = render_prompt("Name three birds.")
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0).choices[0].text
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    model, tokenizer = load_run(fused_dir, dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert answer == tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "name the fused run first"),
        (["--port", "1"], "name the fused run first"),
        (["x", "--speed", "1"], "--speed: is no flag"),
        (["x", "--engine", "none"], "must be transformers or vllm"),
        (["x", "--to", "peft"], "must be shared, mixtral or qwen3_moe"),
        (["x", "--port", "http"], "must be a number"),
        (["x", "--engine", "transformers"], "transformers' own classes only"),
        (["x", "--to"], "needs a value"),
    ],
)
def test_its_flags_are_checked(arguments, said):
    run = subprocess.run(["bash", str(ROOT / "runs" / "serve.sh"), *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1
