"""The stages of the pipeline at toy size, each as its own command, and what they start from."""

import hashlib
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch
from conftest import make_tokenizer, tiny_config
from fake_server import FakeServer
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

TASKS = ("helpfulness", "safety", "truthfulness")
FUSED = "mix_moe_reg_00010_00000_00000_gate_05000"
FORMS = ("shared", "by-name", "mixtral", "qwen3_moe", "peft", "pt")  # qwen3_moe of a base of its own
ROWS_AT_ONCE = 3


@dataclass(frozen=True)
class Stage:
    """A command: its script, and its flags but --results_dir. rows_at_once: answers that are made in one go. below: its
    results' place in the folder that it starts from. at_most: seconds that it may take."""

    name: str
    script: str
    flags: tuple
    rows_at_once: int = 1
    below: str = ""
    at_most: int = 120

    def argv(self, results: Path) -> list[str]:
        flags = (*self.flags, "--results_dir", results / self.below)
        return [str(flag).replace("{results}", str(results)) for flag in flags]


def answer(request: dict) -> dict:
    """A server's answer by its prompt alone; a judge's if it is asked for probabilities."""
    if "messages" in request:
        return {"message": {"role": "assistant", "content": "Yes."}}
    share = int(hashlib.sha256(request["prompt"].encode()).hexdigest()[:4], 16) / 2**16 * 0.8 + 0.1
    words = {" yes": math.log(share), " no": math.log(1 - share)}
    logprobs = {"tokens": [" yes"], "token_logprobs": [words[" yes"]], "top_logprobs": [words], "text_offset": [0]}
    return {"text": f" {share:.6f} is all I have to say.", "logprobs": logprobs}


def make_bases(folder: Path) -> tuple[Path, Path]:
    """(a Llama whose tokenizer has " yes" and " no" as a judge's must, a Qwen3 of the same tokenizer)."""
    llama, qwen = folder / "tiny-llama", folder / "tiny-qwen3"
    if not qwen.exists():
        tokenizer = make_tokenizer("True: yes no\n" * 2000)
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config(num_hidden_layers=2)).save_pretrained(llama)
        settings = {**tiny_config(num_hidden_layers=2).to_dict(), "head_dim": 8, "model_type": "qwen3"}
        partial = folder / "partial"
        Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(partial)
        for base in (llama, partial):
            tokenizer.save_pretrained(base)
        partial.rename(qwen)
    return llama, qwen


def make_source(folder: Path, root: Path) -> Path:
    """A data folder of a few rows per file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (root / "data" / "sample").glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines()[:40]
        (folder / path.name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


class Pipeline:
    """The commands, and what they work on below a folder: bases, data, and `ready`, the results folder that every stage
    starts from a copy of."""

    def __init__(self, folder: Path, root: Path, server: FakeServer):
        self.folder, self.ready, self.server = folder, folder / "ready", server
        self.llama, self.qwen = make_bases(folder)
        self.source = make_source(folder / "source", root)
        quiet = ("--dtype", "float32", "--batch_size", 2, "--disable_tqdm", 1)
        self.training = ("--data_source", self.source, "--num_samples", 12, *quiet)
        self.saving = ("--save_strategy", "steps", "--save_steps", 3, "--max_steps", 10, "--logging_steps", 2)
        self.fusing = ("--num_samples", 8, *quiet, "--gate_loss_weight", 0.5, "--helpfulness_weight", 0.001)
        sizes = ("--num_samples", 12, "--max_new_tokens", 6, "--batch_size", ROWS_AT_ONCE, "--dtype", "float32")
        self.answering = ("--task_name", "truthfulness", *sizes)
        self.answering_safety = ("--task_name", "safety", *sizes)
        self.scoring = ("--num_samples", 5, "--batch_size", 4, "--dtype", "float32")
        judge = ("--kind", "safety", "--base_model", self.llama, "--data_source", self.source)
        judge += ("--num_samples", 20, "--num_held_out", 12)
        self.judge = (*judge, *quiet, "--gradient_accumulation_steps", 1)
        self.runs = f"raw,{FUSED},{','.join(TASKS)}"

    def make_ready(self, mains: dict) -> None:
        """Make what the stages start from, once."""
        if (self.folder / "prepared").exists():
            return
        shutil.rmtree(self.ready, ignore_errors=True)

        def run(script: str, *flags, results: Path = self.ready) -> None:
            mains[script]([*map(str, flags), "--results_dir", str(results)])

        for base, results in ((self.llama, self.ready), (self.qwen, self.ready / "qwen3")):
            for task in TASKS:
                expert = ("--task_name", task, "--base_model", base, *self.training, "--max_steps", 3)
                run("align_basemodel.py", *expert, results=results)
            run("models/llama_moe.py", results=results)
            run("align_basemodel.py", "--moe_flag", 1, *self.fusing, "--max_steps", 3, results=results)
        for name in TASKS:
            run("inference.py", "--cross_task", name, *self.answering_safety)
        run("inference.py", "--cross_task", "truthfulness", *self.answering)
        run("evaluator/train_judge.py", *self.judge, "--max_steps", 4)
        run("evaluator/evaluate_likelihood.py", "--run", self.runs, "--base_model", self.llama, *self.scoring)
        (self.folder / "prepared").touch()

    def stages(self) -> list[Stage]:
        made = "{results}/outputs/made"
        by_prompts = ("--output", made, "--router_init", "prototype", "--num_prompts", 6)
        served = ("--cross_task", "served", "--task_name", "truthfulness", "--base_model", self.llama)
        served += ("--data_source", self.source, "--server_url", self.server.url, "--server_model", "m")
        judged = ("--task_name", "cross_safety", "--judge", "{results}/judges/safety", "--batch_size", 2)
        asked = ("--task_name", "cross_truthfulness", "--mode", 0, "--judge", "m", "--judge_url", self.server.url)
        answers = ",".join(f"cross_{name}" for name in TASKS)
        expert = ("--task_name", "safety", "--run_name", "made", "--base_model", self.llama)
        tuned = ("--method", "tsv_m", "--num_held_apart", 4, "--dtype", "float32")
        report = ("--runs", self.runs, "--reference", FUSED, "--data_source", self.source)
        align, fuse, merge = "align_basemodel.py", "models/llama_moe.py", "models/merging.py"
        evaluate, select = "evaluator/evaluate_", "evaluator/select_answers.py"
        compared = ("--quick", 1, "--base_model", self.llama, "--data_source", self.source, "--dtype", "float32")
        compared += ("--num_samples", 8, "--num_scored", 4, "--save", "{results}/kept")
        chosen = ("--task_name", "safety", "--name", "consensus", "--answers", answers)
        return [
            Stage("expert training", align, (*expert, *self.training, *self.saving)),
            Stage("fusing", fuse, ("--output", made)),
            Stage("fusing by prompts", fuse, by_prompts),
            Stage("fusion training", align, ("--moe_flag", 1, "--run_name", "made", *self.fusing, *self.saving)),
            Stage("merging", merge, ("--method", "ties")),
            Stage("merging, tuned", merge, tuned),
            Stage("inference", "inference.py", ("--cross_task", FUSED, *self.answering), ROWS_AT_ONCE),
            Stage("inference by a server", "inference.py", (*served, "--concurrency", 2)),
            Stage("likelihood", f"{evaluate}likelihood.py", ("--run", FUSED, "--dataset_type", "train", *self.scoring)),
            Stage("judge training", "evaluator/train_judge.py", (*self.judge, "--output", "{results}/judges/made")),
            Stage("judging", f"{evaluate}safety.py", (*judged, "--dtype", "float32")),
            Stage("judging by a server", f"{evaluate}truth_and_info.py", (*asked, "--concurrency", 2)),
            Stage("selecting", select, chosen),
            *map(export, FORMS),
            Stage("report", "evaluator/report.py", report),
            Stage("comparison", "runs/comparison.sh", compared, below="comparison", at_most=900),
        ]


def export(form: str) -> Stage:
    """An export to a form."""
    results = "{results}/qwen3" if form == "qwen3_moe" else "{results}"
    to = ("--to", "shared" if form == "by-name" else form, "--output", f"{{results}}/exports/{form}")
    more = {"by-name": ("--base", "by-name", "--base_id", "someone/tiny"), "peft": ("--expert", "safety")}.get(form, ())
    return Stage(f"export to {form}", "models/export.py", (*to, *more, "--cross_task", f"{results}/outputs/{FUSED}"))
