"""The fused model: a causal language model whose FFNs are routed mixtures of aligned experts, of any family that fits
(models/causal_lm.py)."""

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cache, reduce
from itertools import chain, product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from cli import check
from config import TASKS, UserError
from models import base, four_bit
from models.adapters import Expert
from models.causal_lm import AnswerLoss, activation_name, model_class_of
from models.expert_ffn import PROJECTIONS, LowRankExperts
from models.losses import low_rank_change
from models.released import RecoveredExpert
from models.router import Router, RowRouter
from workspace.files import as_written, read_json, sha256, write_json

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED, ENSEMBLE = "h3fusion_moe", "h3fusion_ensemble"  # model_type in config.json
SHARED = "h3fusion"  # of an export that holds its base (models/shared.py)
EARLIER_TYPES = {"llama_moe": FUSED, "llama_ensemble": ENSEMBLE}  # of versions for Llama alone, all settings in a row


@dataclass
class MixtureConfig:
    """config.json of a mixture: experts (name, task and rank of each, in order), their common `expert_rank` (the
    largest), top-k, the base model's name and configuration, rank, alpha and dropout of LoRA on the attention where it
    was tuned; of an ensemble (models/ensemble.py) what of the predictions is averaged; routing: "prompt", where experts
    are not chosen by token (models/prompt_routing.py)."""

    experts: list[dict]
    expert_rank: int
    num_experts_per_tok: int
    base_model_name_or_path: str
    base: dict = field(repr=False)
    attention_lora: dict | None = None
    average: str | None = None
    routing: str | None = None
    model_type: str = FUSED

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def expert_of_task(self) -> dict[str, int]:
        """Index of the expert of each task; an expert whose task is not known has none."""
        return {expert["task"]: i for i, expert in enumerate(self.experts) if expert["task"]}

    def check(self) -> None:
        """ValueError, or another error of values, for a configuration that no mixture has."""
        named = [isinstance(one["name"], str) and isinstance(one["task"], str | None) for one in self.experts]
        if not self.experts or not all(named):
            raise ValueError("experts must each have a name, and a task or null")
        top_k, rank = self.num_experts_per_tok, self.expert_rank
        if not (type(top_k) is int and 1 <= top_k <= self.num_experts and type(rank) is int and rank >= 1):
            raise ValueError(f"num_experts_per_tok {top_k}, expert_rank {rank}: none of {self.num_experts} experts")
        if self.routing not in (None, "prompt"):
            raise ValueError(f"routing {self.routing}: is prompt, or left out")
        if not isinstance(self.base, dict) or not isinstance(self.base_model_name_or_path, str):
            raise TypeError("base must be a configuration, and base_model_name_or_path its name")

    def save(self, folder: Path) -> None:
        write_json(folder / "config.json", {key: value for key, value in asdict(self).items() if value is not None})


def fused_sha256(folder: Path) -> str:
    """What tells one fusion from another: its tensors, and where they are not the paper's in its order, its experts'
    tasks. The same adapters under other tasks have the same tensors."""
    tensors, tasks = sha256(folder / "model.safetensors"), [expert["task"] for expert in read_mixture(folder).experts]
    return tensors if tasks == [*TASKS] else hashlib.sha256(json.dumps([tensors, tasks]).encode()).hexdigest()


def read_mixture(folder: Path | None) -> MixtureConfig | None:
    """The config.json of a fused model's or an ensemble's folder, or of an export that holds its base; None for a
    folder of something else, and for None."""
    if not folder or not (folder / "config.json").exists():
        return None
    with as_written(folder / "config.json"):
        mixture = mixture_of(read_json(folder / "config.json"), folder)
        if mixture is not None:
            mixture.check()
        return mixture


def mixture_of(settings: dict, folder: Path) -> MixtureConfig | None:
    """The configuration in a config.json; None in that of something else."""
    own = {name: settings.get(name) for name in MixtureConfig.__dataclass_fields__ if name in settings}
    if (earlier := EARLIER_TYPES.get(settings.get("model_type"))) is not None:
        other = {name: value for name, value in settings.items() if name not in own}
        return MixtureConfig(**{**own, "model_type": earlier, "base": {**other, "model_type": "llama"}})
    if settings.get("model_type") == SHARED:
        mixture = settings["mixture"]
        base_settings = {**settings, "model_type": settings["base_model_type"]}
        return MixtureConfig(
            mixture["experts"], mixture["rank"], mixture["top_k"], str(folder), base_settings, model_type=SHARED
        )
    return MixtureConfig(**own) if settings.get("model_type") in (FUSED, ENSEMBLE) else None


class MixtureFFN(nn.Module):
    """The base FFN (gate_proj, up_proj, down_proj: its own frozen linear layers), a router and low-rank experts."""

    def __init__(self, ffn: nn.Module, mixture: MixtureConfig):
        """Routers and experts are zero, fp32, on the device of the base FFN."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        hidden, width = ffn.gate_proj.in_features, ffn.gate_proj.out_features
        if mixture.average is None:
            self.router = Router(hidden, mixture.num_experts, mixture.num_experts_per_tok)
        else:
            self.router = RowRouter(mixture.num_experts)
        self.experts = LowRankExperts(
            hidden, width, mixture.num_experts, mixture.expert_rank, activation_name(ffn.act_fn)
        )
        device = ffn.gate_proj.weight.device
        self.router.float().to(device), self.experts.masters().to(device)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)."""
        flat = x.flatten(0, -2)  # (N, D)
        _, top_k_index, top_k_weights = self.router(flat)
        base = self.gate_proj, self.up_proj, self.down_proj
        return self.experts(flat, top_k_index, top_k_weights, *base).view_as(x)


class MixtureForCausalLM(AnswerLoss):
    """Put before a causal language model's class, as AnswerLoss; `become` makes it the mixture. Saves its router and
    experts only; the base is named, not copied."""

    mixture: MixtureConfig
    _keys_to_ignore_on_load_unexpected = (r"\.mlp\.(router|low_rank)\.",)  # an export's: models/shared.py loads them

    def become(self, mixture: MixtureConfig) -> None:
        """Put a mixture in the place of each FFN, its routers and experts zero."""
        self.mixture = mixture
        for layer in self.model.layers:
            layer.mlp = MixtureFFN(layer.mlp, mixture)

    @property
    def blocks(self) -> list[MixtureFFN]:
        return [module for module in self.modules() if isinstance(module, MixtureFFN)]

    def set_top_k(self, top_k: int, recorded: int | None = None) -> None:
        """Use `top_k` experts per token from now on; the configuration records it, or `recorded`, for those who load
        what is saved."""
        check("expert_topk", top_k, 1 <= top_k <= self.mixture.num_experts, f"1 to {self.mixture.num_experts}")
        self.mixture.num_experts_per_tok = recorded or top_k
        for block in self.blocks:
            block.router.top_k = top_k

    def own_state_keys(self) -> set[str]:
        """Names of what is not the base's: router, experts, and LoRA on the attention if there is any."""
        return {key for key in self.state_dict() if ".mlp.router." in key or ".mlp.experts." in key or ".lora_" in key}

    def seal_base(self) -> None:
        """Freeze the base and leave it out of every checkpoint."""
        own = self.own_state_keys()
        self._keys_to_ignore_on_save = set(self.state_dict()) - own
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in own)

    def save_pretrained(self, save_directory, state_dict: dict | None = None, is_main_process: bool = True, **_):
        """Write config.json and model.safetensors of what is not the base's; state_dict: of all, if it was gathered."""
        if not is_main_process:
            return
        folder, state = Path(save_directory), state_dict or self.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        self.mixture.save(folder)
        own = {key: state[key].contiguous() for key in sorted(self.own_state_keys())}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})

    def add_attention_lora(self, rank: int, alpha: float, dropout: float) -> None:
        """Put fp32 LoRA on q, k, v and o of every layer, recorded in the configuration (by PEFT's injection)."""
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(ATTENTION_PROJECTIONS))
        inject_adapter_in_model(lora, self)
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()  # injected in the base's dtype
        self.mixture.attention_lora = {"rank": rank, "alpha": alpha, "dropout": dropout}
        self.seal_base()

    def start_of_fusion(self) -> list[dict[str, Tensor]]:
        """A frozen copy of the experts' matrices, per layer: what `drift` measures from."""
        return [{n: whole(p).detach().clone() for n, p in block.experts.named_parameters()} for block in self.blocks]

    def drift(self, start: list[dict[str, Tensor]]) -> Tensor:
        """Drift of each expert, (E,): || change of its effective weights since `start` ||_F, mean over layers and
        projections. Of sharded experts each process gathers all, and has the gradient of its shard."""
        changes = []
        for block, then in zip(self.blocks, start, strict=True):
            with gathered(block.experts):
                now = {name: whole(parameter) for name, parameter in block.experts.named_parameters()}
                for i, p in enumerate(PROJECTIONS):
                    matrices = now[f"{p}_A"], now[f"{p}_B"].mT, then[f"{p}_A"], then[f"{p}_B"].mT
                    changes.append(low_rank_change(*matrices, block.experts.scaling[i]))
        return torch.stack([change.to(changes[0].device) for change in changes]).mean(0)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered from all processes where each holds a shard of it (FSDP2)."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def gather_with_experts(model: MixtureForCausalLM) -> None:
    """Tell DeepSpeed's ZeRO-3 that the experts' kernel reads the base's FFN weights, whose layers are never called."""
    from deepspeed.runtime.zero import register_external_parameter

    for block in model.blocks:
        for parameter in chain.from_iterable(p.parameters() for p in (block.gate_proj, block.up_proj, block.down_proj)):
            register_external_parameter(block.experts, parameter)


def gathered(module: nn.Module) -> AbstractContextManager:
    """Where a module's parameters are whole, if DeepSpeed's ZeRO-3 has dealt them to processes. A result must keep none
    of them for its gradient: they are dealt again at its end."""
    parameters = list(module.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


@cache
def mixture_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A family's causal language model that can become a mixture."""
    return type(f"Mixture{model_class.__name__}", (MixtureForCausalLM, model_class), {})


def load_fused(folder: Path, base_model: str, dtype: str, device_map: str | dict | None = None) -> MixtureForCausalLM:
    """The fused model of a folder: the named base's weights as --dtype and --device_map have them, fp32 router and
    experts from here, each beside its layer."""
    model = with_mixture(base.load_base(base_model, dtype, mixture_class, device_map=device_map), read_mixture(folder))
    saved = load_file(folder / "model.safetensors")
    saved_shapes, state = {(key, tensor.shape) for key, tensor in saved.items()}, model.state_dict()
    if odd := saved_shapes ^ {(key, state[key].shape) for key in model.own_state_keys()}:
        raise UserError(f"{folder}: model.safetensors does not fit its config.json (tensor {min(odd)[0]}); fuse again")
    model.load_state_dict(saved, strict=False)
    return model


def with_mixture(model: MixtureForCausalLM, mixture: MixtureConfig) -> MixtureForCausalLM:
    """A base as the fused model of a configuration: its routers, experts and LoRA on the attention new, all else
    frozen."""
    attention_lora, mixture.attention_lora = mixture.attention_lora, None
    model.become(mixture)
    four_bit.make_trainable(model)
    if attention_lora:
        model.add_attention_lora(**attention_lora)
    model.seal_base()
    return model


def fuse(
    experts: list[Expert | RecoveredExpert],
    base_config: PreTrainedConfig,
    top_k: int,
    seed: int,
    routers: list[Tensor] | None = None,
    average: str | None = None,
    routing: str | None = None,
) -> MixtureForCausalLM:
    """The fused model of experts already attached to the base, ready to be saved: its base weights are empty.

    The experts' matrices are padded with zeros to the largest rank. The layers' routers (E, D) are as given, else they
    start at random from `seed`. average: of an ensemble, which has no routers. routing: as MixtureConfig has it.
    """
    mixture = MixtureConfig(
        experts=[{"name": expert.name, "task": expert.task, "rank": expert.rank} for expert in experts],
        expert_rank=max(expert.rank for expert in experts),
        num_experts_per_tok=top_k,
        base_model_name_or_path=experts[0].base_model,
        base=without_name(json.loads(base_config.to_json_string(use_diff=False))),
        average=average,
        routing=routing,
        model_type=FUSED if average is None else ENSEMBLE,
    )
    with torch.device("meta"):
        model = mixture_class(model_class_of(base_config))(deepcopy(base_config))
        model.become(mixture)
    generator = torch.Generator().manual_seed(seed)
    dtype = reduce(torch.promote_types, (expert.dtype for expert in experts))
    for number, block in enumerate(model.blocks):
        if average is None:
            weight = torch.empty(block.router.weight.shape)
            weight.normal_(std=base_config.initializer_range, generator=generator)
            block.router.weight = nn.Parameter(weight if routers is None else routers[number])
        block.experts = stack_experts(experts, number, block.experts, dtype)
    model.seal_base()
    return model


def without_name(settings: dict) -> dict:
    """A configuration without the place that it was read from."""
    return {key: value for key, value in settings.items() if key != "_name_or_path"}


def stack_experts(experts: list, layer: int, empty: LowRankExperts, dtype: torch.dtype) -> LowRankExperts:
    """The low-rank deltas of all experts on one layer, in one module like `empty`, in `dtype`."""
    stacked = empty.to_empty(device="cpu")
    for parameter in stacked.parameters():
        parameter.data = torch.zeros(parameter.shape, dtype=dtype)
    stacked.scaling.fill_(1)
    with torch.no_grad():
        for (i, projection), (j, expert) in product(enumerate(PROJECTIONS), enumerate(experts)):
            put_delta(stacked, j, i, expert.delta(layer, projection))
    return stacked


def put_delta(stacked: LowRankExperts, expert: int, number: int, delta: tuple[Tensor, Tensor, float] | None) -> None:
    """Write an expert's change of a projection (its number in PROJECTIONS) into its place; None: it has none."""
    if delta is None:
        return
    a, b, scaling = delta  # (r, in), (out, r)
    matrix_a, matrix_b = stacked.matrices(PROJECTIONS[number])
    matrix_a[expert, : len(a)] = a
    matrix_b[expert, :, : len(a)] = b
    stacked.scaling[number, expert] = scaling
