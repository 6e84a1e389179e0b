"""README.md of an exported checkpoint: what it is, what it was made from and how, its scores, its prompt."""

from pathlib import Path

from config import TASKS
from data.prompts import WITHOUT_INPUT
from models.loading import weights_sha256
from models.mixture import MixtureConfig
from workspace import run_dir
from workspace.files import read_json

HUB_DATASETS = {
    "helpfulness": "tatsu-lab/alpaca",
    "safety": "PKU-Alignment/BeaverTails",
    "truthfulness": "truthfulqa/truthful_qa",
}
NLL = "nll_per_token"


def model_card(
    mixture: MixtureConfig, form: str, run_folder: Path, base_model: str, dtype: str, results_dir: Path | None = None
) -> str:
    """form: what kind of checkpoint it is, in words; run_folder: the fused run's; base_model: the base's name, or its
    place, which is not told; results_dir: where the run's scores are, if there are any."""
    record = run_dir.read_run(run_folder)
    arguments = record["run"]["arguments"] if record else {}
    tasks = list(dict.fromkeys(expert["task"] for expert in mixture.experts if expert["task"]))
    of_hub = arguments.get("data_source") == "hub"
    datasets = [HUB_DATASETS[task] for task in tasks if task in HUB_DATASETS] if of_hub else []
    head = [f"base_model: {base_model}"] if not Path(base_model).exists() and "/" in base_model else []
    head += ["library_name: transformers", "pipeline_tag: text-generation", "license: other"]
    head += ["license_name: the-base-models", "tags:", "- mixture-of-experts"]
    head += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    experts = "\n".join(f"- expert {i}: {e['name']} (rank {e['rank']})" for i, e in enumerate(mixture.experts))
    parts = [
        "---\n" + "\n".join(head) + f"\n---\n# {run_folder.name}",
        f"An H3Fusion mixture of aligned experts (https://arxiv.org/abs/2411.17792) as a plain {form}, {dtype}: "
        f"top-{mixture.num_experts_per_tok} of {mixture.num_experts} experts per token.",
        experts,
        "## How it was made\n" + how_made(record, arguments, datasets),
        scores(run_folder, tuple(tasks) or TASKS, results_dir),
        "The licence of the base model applies to it, and those of the data it was trained on.",
        f"The prompt it was aligned on, answers ending at EOS:\n\n```\n{WITHOUT_INPUT}\n```\n",
    ]
    return "\n\n".join(part for part in parts if part)


def how_made(record: dict | None, arguments: dict, datasets: list[str]) -> str:
    """The fused run's own record, in words."""
    if arguments.get("to"):  # with one more expert beside those of a fusion
        before = {"run": {"script": None}, "train": {}}
        fused = record["meta"].get("fused") or {}
        if fused and not fused.get("moe_flag"):
            before["run"]["script"] = "llama_moe.py"
        return f"{how_made(before, fused, datasets)} {arguments['experts'][-1]} was then added, without training."
    if record and record["run"]["script"] == "llama_moe.py":
        return "The experts were fused; the fusion was not aligned."
    if not arguments.get("moe_flag"):
        return "It is not recorded."
    source = arguments.get("data_source") or "data that are not recorded"
    data = ", ".join(datasets) if datasets else "a folder of its own" if Path(source).is_absolute() else source
    drift = [f"{task} {value}" for task in TASKS if (value := arguments.get(f"{task}_weight")) is not None]
    drift += [arguments["drift_weights"].replace("=", " ")] if arguments.get("drift_weights") else []
    settings = {
        "samples": record["train"].get("samples"),
        "epochs": arguments.get("num_train_epochs"),
        "optimiser steps": record["train"].get("steps"),
        "samples per step": arguments.get("effective_batch_size"),
        "learning rate": arguments.get("learning_rate"),
        "the routers'": arguments.get("router_learning_rate"),
        "weight of the gating loss": arguments.get("gate_loss_weight"),
        "weights of the drift": ", ".join(drift) or None,
        "seed": arguments.get("seed"),
    }
    listed = "; ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"The experts, each aligned on its own task, were fused, and the fusion was aligned on {data}: {listed}."


def scores(run_folder: Path, tasks: tuple[str, ...], results_dir: Path | None) -> str:
    """The likelihoods of held-out answers by these weights, as evaluator/evaluate_likelihood.py has written them; ""
    without."""
    lines = []
    for task in tasks if results_dir is not None else ():
        folder = results_dir / "evaluation" / task / "test" / run_folder.name / "likelihood"
        record = run_dir.read_run(folder)
        if record is None or record["run"]["arguments"].get("weights_sha256") != weights_sha256(run_folder):
            continue  # not scored, or another run of this name
        score = read_json(folder / "metrics.json")["metrics"][NLL]
        interval = " [{:.3f}, {:.3f}]".format(*score["interval"]) if score["interval"] else ""
        value = f"{score['value']:.3f}{interval}"
        lines.append(f"- {task}: {value} nats per token of held-out answers (n = {score['n']})")
    return "## Scores\n" + "\n".join(lines) if lines else ""
