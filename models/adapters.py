"""LoRA adapters by PEFT: a new one on a base, to be trained; an expert's, read from its folder and refused where a
mixture cannot represent it."""

import dataclasses
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from config import RAW, RAW_CHAT, UserError
from models import base
from models.causal_lm import skeleton
from models.expert_ffn import PROJECTIONS
from workspace.drawn import drawn_by, recorded
from workspace.files import read_json, sha256
from workspace.run_dir import find_run, read_run

# LoraConfig fields that leave the form W + s B A as it is; any other one off its default is refused by name.
HARMLESS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "eva_config",
    "runtime_config",
}
DECIDING = (  # of them, those that decide the change which an adapter's tensors make
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
BASE_KEEPING_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others (pissa, loftq, ...) change the base


def how_made(experts: list, fused: Path | None = None) -> dict[str, dict | list]:
    """For the run.json of what is made from experts, and from the fusion of this folder: "experts", what theirs says
    that each was made with (None where there is none, as of an adapter from elsewhere), and "drawn", the training rows
    that all of it has seen."""
    records = {expert.name: read_run(expert.folder) for expert in experts}
    made = {name: record and record["run"]["arguments"] for name, record in records.items()}
    record = read_run(fused) if fused else None
    before = record and record["meta"].get("experts") or {}
    folders = [*(expert.folder for expert in experts), *filter(None, [fused])]
    return {"experts": before | made, "drawn": recorded(drawn_by(*folders))}


def add_lora(args, targets: list[str], seed: int, load: Callable = base.load_base) -> PeftModel:
    """A base with fp32 LoRA on the `targets`, all else frozen; args: base_model, dtype, rank, alpha, lora_dropout.
    load: what makes the base of (base_model, dtype)."""
    model = load(args.base_model, args.dtype)
    torch.manual_seed(seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )
    return get_peft_model(model, lora)


def load_adapter(model: PeftModel, folder: Path, rank: int, alpha: float) -> None:
    """Put a saved adapter's matrices into a new LoRA of the same form. UserError for an adapter of another form."""
    saved = Expert(folder)
    patterns = saved.config.rank_pattern or saved.config.alpha_pattern or saved.config.use_rslora
    if patterns or (saved.config.r, saved.config.lora_alpha) != (rank, alpha):
        said = (
            "has no one rank and alpha"
            if patterns
            else f"has --rank {saved.config.r} --alpha {saved.config.lora_alpha:g}"
        )
        raise UserError(f"--init_adapter {folder}: {said}; give the same here")
    weights = {f"base_model.model.{key}": value for key, value in saved.weights.items()}
    own = {key.replace(".default.", ".") for key in model.state_dict() if ".lora_" in key}
    if odd := own ^ set(weights):
        raise UserError(f"--init_adapter {folder}: is LoRA on other projections than these ({min(odd)})")
    set_peft_model_state_dict(model, weights)


def save_adapter(
    folder: Path, weights: dict[str, tuple[Tensor, Tensor]], alphas: dict[str, float], base_model: str
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of {module: (A (r, in), B (out, r))} and {module: alpha}.

    Rank and alpha that most modules share are the adapter's; the others go into patterns.
    """
    ranks = {module: len(a) for module, (a, _) in weights.items()}
    ((rank, alpha), _), *_ = Counter((ranks[module], alphas[module]) for module in weights).most_common(1)
    projections = sorted({module.rpartition(".")[2] for module in ranks})
    everywhere = len(ranks) == len(projections) * base.load_base_config(base_model).num_hidden_layers
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=projections if everywhere else sorted(ranks),
        rank_pattern={module: value for module, value in ranks.items() if value != rank},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        base_model_name_or_path=base.base_path(base_model),
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": matrix.contiguous()
        for module, pair in weights.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_sha256(folder: Path) -> str:
    """The digest of an adapter's tensors and, where no run.json says how it was made, of what in its configuration
    decides what they do."""
    weights = sha256(folder / "adapter_model.safetensors")
    if read_run(folder) is not None:
        return weights
    settings = read_json(folder / "adapter_config.json")
    deciding = {name: settings.get(name) for name in DECIDING}
    if isinstance(deciding["target_modules"], list):
        deciding["target_modules"] = sorted(deciding["target_modules"])
    return f"{weights}, as {hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]}"


def one_line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Expert:
    """A LoRA adapter of one base's FFN projections, with PEFT's own scaling of each module.

    name: as given, else its folder's; task: as its run.json records, else its name where that is one of `tasks`, else
    None; rank: the largest of its modules. Raises UserError for what is no such adapter.
    """

    def __init__(self, folder: Path, name: str | None = None, tasks: tuple[str, ...] = ()):
        self.folder, self.name = folder, name or folder.name
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"{folder}: holds no adapter_config.json; align the expert first, or name a PEFT adapter")
        weights = folder / "adapter_model.safetensors"
        if not weights.exists():
            raise UserError(f"{folder}: holds no adapter_model.safetensors (weights are read as safetensors only)")
        try:
            self.config = PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # PEFT raises whatever a wrong value leads to
            raise UserError(f"{folder}: its adapter_config.json is none of PEFT's ({one_line(error)})") from error
        self._refuse_other_forms()
        if not isinstance(self.config.base_model_name_or_path, str | None):
            raise self._refused(f"base_model_name_or_path={self.config.base_model_name_or_path}")
        run = read_run(folder)
        recorded = run["run"]["arguments"] if run else {}
        self.base_model = recorded.get("base_model") or self.config.base_model_name_or_path
        self.data_source = recorded.get("data_source")
        self.task = recorded.get("task_name") or (self.name if self.name in tasks else None)
        if name in tasks and self.task != name:
            raise UserError(f"--experts {name}={folder}: that adapter was aligned on {self.task}")
        if self.task == "mix":  # of all tasks: of none
            self.task = None
        try:
            loaded = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights}: is torn or no safetensors file ({one_line(error)})") from error
        if not loaded:
            raise UserError(f"{weights}: holds no tensors; align the expert again")
        self.weights = {key.removeprefix("base_model.model."): value for key, value in loaded.items()}
        for key, value in self.weights.items():
            if not value.is_floating_point() or not value.isfinite().all():
                raise self._refused(f"tensor {key} holds what is no finite number")
        self.checksum = adapter_sha256(folder)
        self.dtype = next(iter(self.weights.values())).dtype
        self.layers: dict[str, LoraLayer] = {}
        self.rank = 0

    def _refuse_other_forms(self) -> None:
        if not isinstance(self.config, LoraConfig):
            raise self._refused(f"it is a {self.config.peft_type} adapter, not LoRA")
        for item in dataclasses.fields(self.config):
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            value = getattr(self.config, item.name)
            if item.name not in HARMLESS and value != default and value:
                raise self._refused(f"{item.name}={value}")
        if self.config.init_lora_weights not in BASE_KEEPING_INITS:
            raise self._refused(f"init_lora_weights={self.config.init_lora_weights!r}, which changes the base weights")

    def _refused(self, reason: str) -> UserError:
        return UserError(f"{self.folder}: cannot be an expert of a shared-base mixture: {reason}")

    def attach(self, base_config: PreTrainedConfig) -> None:
        """Let PEFT lay the adapter over an empty model of the base's shape, and check that the weights fit it."""
        empty = skeleton(base_config)
        with torch.device("meta"):
            try:
                inject_adapter_in_model(self.config, empty)
            except Exception as error:  # PEFT raises whatever a wrong value leads to
                raise self._refused(one_line(error)) from error
        self.layers = {name: module for name, module in empty.named_modules() if isinstance(module, LoraLayer)}
        others = sorted({name.rsplit(".", 1)[1] for name in self.layers} - set(PROJECTIONS))
        if others:
            raise self._refused(f"it also changes {', '.join(others)}; only {', '.join(PROJECTIONS)} can differ")
        expected = {}
        for name, layer in self.layers.items():
            expected[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight.shape
            expected[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.shape
        for key in sorted(set(expected) ^ set(self.weights)):
            raise self._refused(f"tensor {key} is {'missing' if key in expected else 'not one of a LoRA on this base'}")
        for key, shape in expected.items():
            if self.weights[key].shape != shape:
                raise self._refused(f"tensor {key} is {tuple(self.weights[key].shape)}, the base needs {tuple(shape)}")
        for name, layer in self.layers.items():
            if not math.isfinite(layer.scaling["default"]):
                raise self._refused(f"lora_alpha of {name} is no finite number")
        self.rank = max(layer.r["default"] for layer in self.layers.values())

    def delta(self, layer: int, projection: str) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, in), B (out, r), scaling) of one module, or None where the adapter leaves it as it is."""
        name = f"model.layers.{layer}.mlp.{projection}"
        if name not in self.layers:
            return None
        scaling = self.layers[name].scaling["default"]
        return self.weights[f"{name}.lora_A.weight"], self.weights[f"{name}.lora_B.weight"], scaling


class FreshExpert:
    """A LoRA adapter as training finds it, A random and B zero: a control of what aligned experts bring to a fusion."""

    dtype = torch.float32

    def __init__(self, name: str, base_model: str, rank: int, seed: str, tasks: tuple[str, ...]):
        self.name, self.base_model, self.rank = name, base_model, rank
        self.task = name if name in tasks else None
        self.generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))  # no other seed's neighbour

    def attach(self, base_config: PreTrainedConfig) -> None:
        """Take the base's shape."""
        hidden, width = base_config.hidden_size, base_config.intermediate_size
        self.sizes = {name: (hidden, width) if name != "down_proj" else (width, hidden) for name in PROJECTIONS}

    def delta(self, layer: int, projection: str) -> tuple[Tensor, Tensor, float]:
        """(A (r, in), B (out, r), scaling) of one module: A as PEFT starts it, scaling 4 / 8 as an expert's."""
        size_in, size_out = self.sizes[projection]
        a = torch.empty(self.rank, size_in).uniform_(-1, 1, generator=self.generator) / size_in**0.5
        return a, torch.zeros(size_out, self.rank), 0.5


def expert_folders(text: str) -> dict[str, str]:
    """--experts as {name: folder}, in order: "safety" is the folder of that name, "safety=DIR" DIR under that name."""
    folder_of = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, named, folder = part.partition("=")
        if name in folder_of or (named and not folder):
            raise UserError(f"--experts {text}: {part!r} is {'there twice' if name in folder_of else 'no NAME=DIR'}")
        folder_of[name] = folder or name
    return folder_of


def open_adapters(folder_of: dict[str, str], experts_dir: Path, tasks: tuple[str, ...]) -> list[Expert]:
    """The PEFT adapters of these names; a folder is one under `experts_dir`, or a path. A name that is one of `tasks`
    is the expert's task."""
    if {RAW, RAW_CHAT} & set(folder_of.values()):
        raise UserError("--experts raw: the raw base model is no expert; name folders with PEFT adapters")
    experts: list[Expert] = []
    for name, folder in folder_of.items():
        expert = Expert(find_run(folder, experts_dir), None if folder == name else name, tasks)
        if expert.name in [known.name for known in experts]:
            raise UserError(f"--experts {name}: another one is called {expert.name} too; name it, as in NAME={folder}")
        experts.append(expert)
    return experts


def check_one_of_each_task(tasks: list[str | None], named: str) -> None:
    """UserError for two experts of one task: the gating loss sends a task's prompts to its expert, not to several."""
    known = [task for task in tasks if task is not None]
    if twice := [task for task in known if known.count(task) > 1]:
        raise UserError(
            f"{named}: two experts are of the task {twice[0]}, and a router has one for each; take one of them"
        )
