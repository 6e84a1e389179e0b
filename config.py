"""Paths, the paper's tasks in order, and the names of runs."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RESULTS_DIR = ROOT / "results"
BASE_MODELS_DIR = RESULTS_DIR / "base_models"  # the embedded model, converted once

TASKS = ("helpfulness", "safety", "truthfulness")  # the paper's, in the order of its experts; --tasks names others
GENERAL = "general"  # plain passages of no task: what a run has forgotten
XSTEST = "xstest"  # prompts that only look unsafe, and unsafe ones: answered and scored, never trained on
PAPER_BASE_MODEL = "meta-llama/Llama-2-7b-hf"
EMBEDDED_MODEL = "smollm2"  # of the small models that come as Python packages (models/embedded.py), the demo's
HELD_APART = "held_apart"  # training questions that no run has seen: a third half, to choose settings by
RAW, RAW_CHAT = "raw", "raw_chat"  # the base itself, asked by our prompt or by its own chat template
FUSED = "moe"  # the name of the fused model before its alignment
BIAS = "_bias_"  # between a fused run's name and --expert_bias, in the names of its answers and scores

# A Hugging Face token for gated models. Assign it here or set HF_TOKEN; it is never written to disk.
hf_token = os.environ.get("HF_TOKEN")


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback, with exit code 2."""


def outputs_dir(results_dir: str | Path) -> Path:
    """Where the runs of a results folder lie, each under its name."""
    return Path(results_dir) / "outputs"


def fused_dir(results_dir: str | Path) -> Path:
    """Where models/llama_moe.py writes the fused model of a results folder, and where its alignment looks for it."""
    return outputs_dir(results_dir) / FUSED


def answering_task(task: str) -> str:
    """The task whose expert answers these prompts where no run is named: XSTest's are the safety expert's."""
    return "safety" if task == XSTEST else task


def weight_text(value: float) -> str:
    """A loss weight in a run name: %.4f without its dot, and more digits where four decimals would lose it.

    One value, one text: with more than four decimals the dot goes only below 1, where the leading zero keeps it apart.
    """
    decimals = next((d for d in range(4, 40) if float(f"{value:.{d}f}") == value), 40)
    text = f"{value:.{decimals}f}"
    return text if decimals > 4 and value >= 1 else text.replace(".", "")


def expert_run_name(args) -> str:
    """The task; of one LoRA on mixed data `mix`, and what its tasks have or lack beside the paper's: `mix_politeness`,
    `mix_without_safety`. args: align_basemodel.py's AlignArguments."""
    if args.task_name != "mix":
        return args.task_name
    others = [task for task in args.trained_tasks if task not in TASKS]
    missing = [task for task in TASKS if task not in args.trained_tasks]
    return "_".join(["mix", *others, *(["without", *missing] if missing else [])])


def fused_run_name(args, seed: int) -> str:
    """`mix_moe_reg_{g1}_{g2}_{g3}_gate_{lambda}`, and one more part for each method flag off its default.

    args: align_basemodel.py's AlignArguments.
    """
    weights = args.all_drift_weights
    gammas = "_".join(weight_text(weights.get(task, 0.0)) for task in TASKS)
    others = "".join(f"_{task}_{weight_text(weights[task])}" for task in weights if task not in TASKS)
    name = f"{args.task_name}_moe_reg_{gammas}{others}_gate_{weight_text(args.gate_loss_weight)}"
    off_default = {
        "without": ("_".join(task for task in TASKS if task not in weights), ""),
        "topk": (2 if args.expert_topk is None else args.expert_topk, 2),
        "answer_topk": (args.answer_topk, None),
        "router": ("frozen" if not args.train_router else "trained", "trained"),
        "experts": ("frozen" if not args.train_experts else "trained", "trained"),
        "expert_dropout": (args.expert_dropout, 0.0),
        "attention": ("tuned" if args.tune_attention else "frozen", "frozen"),
        "gate_tokens": (args.gate_tokens, "instruction"),
        "gate_gradient": (args.gate_gradient, "all"),
        "gate_balance": (args.gate_balance, "task"),
        "gate_schedule": (args.gate_schedule, "constant"),
        "seed": (seed, 42),
    }
    return name + "".join(f"_{part}_{value}" for part, (value, default) in off_default.items() if value != default)
