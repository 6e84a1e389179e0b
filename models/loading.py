"""The one loader of every run: raw base, aligned expert, fused mixture, and any checkpoint of them."""

import json
from pathlib import Path

import torch
from peft import PeftModel

from config import PAPER_BASE_MODEL, TASKS, UserError
from data.sources import absolute_source
from models import base, llama_moe
from models.llama import AnswerLossLlama
from workspace.run_dir import read_run, settle


def base_of_run(folder: Path) -> str:
    """The base model that a run, an adapter or a fused model stands on."""
    run = read_run(folder)
    if run:
        return run["run"]["arguments"]["base_model"]
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).exists():
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            return named or str(folder)
    raise UserError(f"{folder}: holds neither an adapter nor a model")


def is_fused(folder: Path | None) -> bool:
    """Whether a run's folder holds a fused model."""
    if folder is None or not (folder / "config.json").exists():
        return False
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings["model_type"] == llama_moe.LlamaMoeConfig.model_type


def load_run(path: Path | str | None, base_model: str | None = None, dtype: str = "auto"):
    """(model, tokenizer) of a run's folder, in evaluation mode on the CPU.

    path: an aligned expert (a PEFT adapter), a fused model, one of their checkpoint-N folders, a base model's folder,
    or None for the raw `base_model`. `dtype`: of the base, as --dtype has it; fused experts get the one that the base
    computes in, adapters and routers are fp32.
    """
    path = Path(path) if path is not None else None
    if path is not None:
        base_model = base_of_run(path)
    if is_fused(path):
        model = llama_moe.load_fused(path, base_model, dtype)
        if (kind := base.pick_dtype(dtype)) != torch.float32:
            for block in model.blocks:
                block.experts.fold_scaling(kind)
    else:
        model = base.load_weights(AnswerLossLlama, base_model, base.load_base_config(base_model), dtype)
    model.set_attn_implementation("sdpa")  # without gradients the faster one on a CPU too
    if path is not None and (path / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, str(path))
    return model.eval(), base.load_tokenizer(base_model)


def weights_file(path: Path | None) -> Path | None:
    """The file of what a run learnt, for its checksum; None for the raw base."""
    names = ("adapter_model.safetensors", "model.safetensors")
    return next((path / name for name in names if (path / name).exists()), None) if path else None


def run_sources(
    path: Path | None, base_model: str | None, data_source: str | None, results_dir: str
) -> tuple[str, str]:
    """(base model, data source) for inference or scoring of a run, None for the raw base.

    As the run recorded; for the raw base as the aligned experts in `results_dir` did; else as given, else the paper's.
    UserError if a given base model contradicts what was recorded. The data may differ on purpose.
    """
    recorded = {}
    if path is not None:
        run = read_run(path)
        recorded = {**(run["run"]["arguments"] if run else {}), "base_model": base_of_run(path)}
    else:
        runs = (read_run(Path(results_dir) / "outputs" / task) for task in TASKS)
        recorded = next((run["run"]["arguments"] for run in runs if run), {})
        if recorded and base_model is not None and not base.same_base(base_model, recorded["base_model"]):
            recorded = {}  # the raw form of another base than the experts' is a fair question
    given = base.default_base_model(base_model) if base_model else None
    settled = settle("base_model", given, recorded.get("base_model"), PAPER_BASE_MODEL)
    return settled, absolute_source(data_source) or recorded.get("data_source") or "hub"


def device() -> torch.device:
    """Where inference and scoring run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
