"""runs/serve.sh: export, serve and wait in one step."""

import os
import signal
import socket
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


VLLM = """#!{python}
import http.server, sys
from pathlib import Path
Path(__file__).with_name("asked").write_text("\\n".join(sys.argv[1:]))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.mark.slow
def test_vllm_is_asked_for_the_dtype_of_the_export_and_for_a_folder_with_a_space(fused_dir, tmp_path):
    """A stand-in for vLLM, which tests/test_engines.py runs."""
    port, engine, results = free_port(), tmp_path / "bin" / "vllm", tmp_path / "my results"
    engine.parent.mkdir()
    engine.write_text(VLLM.format(python=sys.executable))
    engine.chmod(0o755)
    path = f"{engine.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [
        "bash",
        ROOT / "runs" / "serve.sh",
        fused_dir,
        "--port",
        port,
        "--dtype",
        "float32",
        "--results_dir",
        results,
    ]
    server = subprocess.Popen(list(map(str, command)), env={**os.environ, "PATH": path}, stdout=subprocess.PIPE,
                              text=True, start_new_session=True)  # fmt: skip
    try:
        assert next((line for line in server.stdout if "answers at" in line), "")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    output = results / "exports" / f"{fused_dir.name}_shared_float32"
    asked = (engine.parent / "asked").read_text().splitlines()
    assert asked == ["serve", str(output), "--host", "127.0.0.1", "--port", str(port), "--trust-remote-code",
                     "--model-impl", "transformers", "--dtype", "float32"]  # fmt: skip
    assert (output / "config.json").exists()


def test_a_port_that_is_taken_is_refused_before_anything_is_written(fused_dir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [
            "bash",
            str(ROOT / "runs" / "serve.sh"),
            str(fused_dir),
            "--port",
            port,
            "--results_dir",
            str(tmp_path),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == f"error: --port {port}: something else listens there; take another\n"
    assert not list(tmp_path.iterdir())


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
