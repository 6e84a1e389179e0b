"""Tiny models and adapters, built on the spot, and a way to run the scripts as a user does."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny products are slower on more threads

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED_DATA = ROOT.parent / "shared" / "data"  # slices of the public data sets, where a checkout has them beside it
FFN = ["gate_proj", "up_proj", "down_proj"]
needs_attention_in_bfloat16 = pytest.mark.skipif(
    bool(torch.cpu.get_capabilities().get("amx_bf16")) and torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="PyTorch's attention in bfloat16 fails on a CPU with AMX where ATEN_CPU_CAPABILITY switches AVX-512 off",
)


def make_tokenizer(more: str = "", **special) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on data/sample and `more`; without a pad token, as Llama-2 has it."""
    text = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "sample").glob("*_train.jsonl"))]
    text.append(more)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def padded_tokenizer():
    """The same with pad token = EOS, as SmolLM2 has it."""
    return make_tokenizer(pad_token="</s>")


def tiny_config(**changes) -> LlamaConfig:
    """A Llama of 3 layers with grouped-query attention and tied embeddings."""
    settings = dict(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer) -> Path:
    """A tiny base model's folder, laid out as on the hub."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def other_base(base_dir: Path, folder: Path) -> Path:
    """A base of the same shape and name with other weights: Llama-2 and its chat version are two bases."""
    model = LlamaForCausalLM.from_pretrained(base_dir)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def padded_base_dir(tmp_path, base_dir, padded_tokenizer) -> Path:
    """The same base with a tokenizer whose pad token is EOS."""
    folder = shutil.copytree(base_dir, tmp_path / "padded" / "tiny-llama")
    padded_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_base_dir(tmp_path_factory) -> Path:
    """A tiny base whose tokenizer has " yes" and " no" as one token each, as a judge's must."""
    folder = tmp_path_factory.mktemp("judge_base") / "tiny-judge"
    torch.manual_seed(0)
    # weights large enough that one word of 600 can become likely, with the embeddings frozen
    LlamaForCausalLM(tiny_config(num_hidden_layers=2, initializer_range=0.4)).save_pretrained(folder)
    make_tokenizer("True: yes no\n" * 2000).save_pretrained(folder)
    return folder


def decode(model, *args, **inputs):
    """(last hidden states (B, T, D), router logits of each layer) of a fused model's decoder."""
    from models.router import recorded_router_logits

    with recorded_router_logits(model) as router_logits:
        hidden = model.model(*args, **inputs).last_hidden_state
    return hidden, tuple(router_logits)


def save_adapter(folder: Path, base_dir: Path, seed: int, **lora) -> Path:
    """A PEFT adapter with random A and B (so that it changes the base visibly), saved by PEFT itself."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": FFN, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory, base_dir) -> list[Path]:
    """Three adapters of different ranks, alphas, one with rslora, one with rank and alpha patterns."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(root / "helpfulness", base_dir, 1, r=4, lora_alpha=6),
        save_adapter(root / "safety", base_dir, 2, r=8, lora_alpha=4, use_rslora=True),
        save_adapter(
            root / "truthfulness",
            base_dir,
            3,
            r=2,
            lora_alpha=4,
            rank_pattern={"layers.1.mlp.up_proj": 6},
            alpha_pattern={"down_proj": 9},
        ),
    ]


@pytest.fixture(scope="session")
def fused_dir(tmp_path_factory, adapter_dirs) -> Path:
    """The three adapters fused by the command itself."""
    from models import llama_moe

    folder = tmp_path_factory.mktemp("fused") / "moe"
    llama_moe.main(["--experts_dir", str(adapter_dirs[0].parent), "--output", str(folder)])
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_answers(
    results_dir: Path, task: str, texts: list[str], run: str = "raw", questions: list[str] | None = None, **changes
) -> Path:
    """A finished inference of given answers, as inference.py leaves it; returns its outputs.jsonl."""
    questions = questions or [f"Question number {i}?" for i in range(len(texts))]
    folder = results_dir / "inference" / task / "test" / run
    rows = [
        {
            "id": f"{task}-{i}",
            "instruction": questions[i],
            "input": "",
            "output": text,
            "task": task,
            "reference": "",
            "new_tokens": 3,
            "finish_reason": "stop",
            "generator": run,
            **changes,
        }
        for i, text in enumerate(texts)
    ]
    write_jsonl(folder / "outputs.jsonl", rows)
    run_json = {"run": {"script": "inference.py", "arguments": {}}, "train": {"answers": len(rows)}, "meta": {}}
    (folder / "run.json").write_text(json.dumps(run_json), encoding="utf-8")
    return folder / "outputs.jsonl"


def run_script(*arguments, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Run a script as a user does; no hub, no GPU."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture
def tiny_source(tmp_path) -> Path:
    """A --data_source folder of a few rows per task, cut from data/sample."""
    folder = tmp_path / "source"
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines()[:12]
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def real_server(tmp_path_factory, base_dir):
    """`transformers serve`, an OpenAI-compatible server, and the tiny Llama for it: (address, model)."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    LlamaForCausalLM.from_pretrained(base_dir).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    port = free_port()
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--port", port, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=file)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def four_tasks(tmp_path_factory):
    """data/sample with a fourth task."""
    folder = tmp_path_factory.mktemp("four")
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        shutil.copyfile(path, folder / path.name)
    for half, number in (("train", 30), ("test", 8)):
        rows = [
            {"id": f"{half}-{i}", "instruction": f"Ask a neighbour for {i} eggs.", "input": "",
             "output": f"Good morning! Might I borrow {i} eggs, please?"}
            for i in range(number)
        ]  # fmt: skip
        write_jsonl(folder / f"politeness_{half}.jsonl", rows)
    return folder
