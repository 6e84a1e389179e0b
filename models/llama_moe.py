"""The fused model: a Llama whose FFNs are routed mixtures of aligned experts. Run it to fuse three adapters:

python models/llama_moe.py [--experts_dir results/outputs] [--experts helpfulness,safety,truthfulness]
python models/llama_moe.py --router_init prototype --output results/outputs/moe_prototype
python models/llama_moe.py --from_pt moe.pt --base_model meta-llama/Llama-2-7b-chat-hf     (the released code's file)
"""

import sys
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
import config
from cli import (
    DTYPES,
    BaseArguments,
    check,
    check_at_least,
    effective_flags,
    flag,
    flag_with,
    resolve_conditional_flags,
)
from config import TASKS, UserError

OF_PROMPTS = {"router_init": ("prototype", "arrow")}


@dataclass
class FuseArguments(BaseArguments):
    """Flags of models/llama_moe.py."""

    experts_dir: str | None = flag(None, "folder of the experts (default: outputs in --results_dir)")
    experts: str = flag(
        ",".join(TASKS), "the experts in order, with commas: folders there, or NAME=DIR for adapters anywhere"
    )
    expert_topk: int = flag(2, "experts per token, 1 to their number")
    output: str | None = flag(None, "where the fused model is written (default: outputs/moe in --results_dir)")
    from_pt: str | None = flag(
        None, "a moe.pt of the released code instead of adapters; takes --base_model and --experts"
    )
    max_rank: int = flag(32, "with --from_pt: the largest rank an expert's change of the base may have")
    fresh_rank: int | None = flag(
        None, "a control: fresh LoRA of that rank, with B = 0, under the experts' names; takes --base_model"
    )
    router_init: str = flag(
        "random",
        "the routers' start: random, by the states of each task's training prompts (prototype), or by what each expert "
        "changes most (arrow)",
        choices=["random", "prototype", "arrow"],
    )
    data_source: str | None = flag_with(
        OF_PROMPTS, None, "hub, sample or a folder, for the prompts (default: as the experts recorded)"
    )
    num_prompts: int | None = flag_with(OF_PROMPTS, 100, "training prompts per task")
    dtype: str | None = flag_with(OF_PROMPTS, "auto", "of the base that reads them", choices=list(DTYPES))
    seed: int = flag(42, "of the router's initial weights, of the prompts drawn and of fresh experts")
    save_dtype: str = flag(
        "auto",
        "of the experts on disk: auto keeps the adapters' own, float16 halves the file",
        choices=["auto", "float16", "float32"],
    )

    def __post_init__(self):
        check_at_least(1, max_rank=self.max_rank, fresh_rank=self.fresh_rank, num_prompts=self.num_prompts)
        resolve_conditional_flags(self)
        if self.from_pt and self.router_init != "random":
            raise UserError(f"--router_init {self.router_init}: a moe.pt brings its routers; leave it out")
        if self.fresh_rank and (self.from_pt or self.experts_dir or not self.base_model):
            raise UserError("--fresh_rank takes --base_model, and no --experts_dir or --from_pt")
        if self.fresh_rank and self.router_init == "arrow":
            raise UserError("--router_init arrow: fresh experts change nothing yet; leave it out")
        if self.from_pt and self.experts_dir:
            raise UserError("--experts_dir names adapters and --from_pt a fused file: give one of them")
        if self.from_pt and not Path(self.from_pt).is_file():
            raise UserError(f"--from_pt {self.from_pt}: no such file")
        if self.from_pt and not self.base_model:
            raise UserError("--from_pt: name the model the file was fused onto with --base_model")


if __name__ == "__main__":
    cli.check_early(cli.parse, FuseArguments)

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.output_capturing import OutputRecorder

from data.sources import absolute_source, data_sha256, source_files
from models import base, four_bit
from models.adapters import Expert, FreshExpert, expert_folders, how_made
from models.base_identity import base_sha256
from models.expert_ffn import PROJECTIONS, LowRankExperts
from models.llama import AnswerLossLlama
from models.losses import low_rank_change
from models.prototypes import fit_routers
from models.released import RecoveredExpert, read_moe_pt
from workspace import run_dir
from workspace.files import sha256

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LlamaMoeConfig(LlamaConfig):
    """A Llama's configuration plus the mixture's: experts (name, task and rank of each, in order), their common
    `expert_rank` (the largest), top-k (`num_experts_per_tok`), the base model's name, and the rank, alpha and dropout
    of LoRA on the attention where it was tuned."""

    model_type = "llama_moe"

    experts: list | None = None
    expert_rank: int = 8
    num_experts_per_tok: int = 2
    base_model_name_or_path: str | None = None
    attention_lora: dict | None = None

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def expert_of_task(self) -> dict[str, int]:
        """Index of the expert of each task; an expert whose task is not known has none."""
        return {expert["task"]: i for i, expert in enumerate(self.experts) if expert["task"]}


def route(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """router_logits (N, E) fp32 -> top_k_index, top_k_weights (N, K): softmax, its top-k kept and renormalised."""
    top_k_weights, top_k_index = router_logits.softmax(-1).topk(top_k, dim=-1)
    return top_k_index, top_k_weights / top_k_weights.sum(-1, keepdim=True)


class LlamaMoeRouter(nn.Module):
    """Linear router, without a bias of its own. Its logits and softmax are fp32 whatever the model's dtype.

    The logits it returns are for the gating loss: with `gate_gradient` "all" that loss trains the routers and the
    experts below them, as the paper's sum of losses does; with "router" the routers' own weights and nothing else.
    """

    def __init__(self, config: LlamaMoeConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate_gradient = "all"
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        for name in ("bias", "off"):  # (E,), (E,) bool: models/expert_bias.py's, which no checkpoint has
            self.register_buffer(name, None, persistent=False)

    def forward(self, x):
        """x (N, D) -> router_logits (N, E), top_k_index (N, K), top_k_weights (N, K)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            router_logits = F.linear(x.to(dtype), self.weight.to(dtype))  # (N, E)
            if self.bias is not None:
                router_logits = (router_logits + self.bias).masked_fill(self.off, torch.finfo(dtype).min)
            top_k_index, top_k_weights = route(router_logits, self.top_k)
            if self.gate_gradient == "router" and x.requires_grad:
                router_logits = F.linear(x.detach().to(dtype), self.weight.to(dtype))
        return router_logits, top_k_index, top_k_weights


class LlamaMoeBlock(LlamaMLP):
    """The base FFN (gate_proj, up_proj, down_proj: plain frozen nn.Linear), its router and its low-rank experts."""

    def __init__(self, config: LlamaMoeConfig):
        super().__init__(config)
        self.router = LlamaMoeRouter(config)
        self.experts = LowRankExperts(
            config.hidden_size, config.intermediate_size, config.num_experts, config.expert_rank
        )

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)."""
        flat = x.flatten(0, -2)  # (N, D)
        _, top_k_index, top_k_weights = self.router(flat)
        base = self.gate_proj, self.up_proj, self.down_proj
        return self.experts(flat, top_k_index, top_k_weights, *base).view_as(x)


class LlamaMoeModel(LlamaModel):
    """LlamaModel with mixtures for FFNs; `output_router_logits=True` adds one (B*T, E) tensor per layer."""

    config_class = LlamaMoeConfig
    _can_record_outputs = {**LlamaModel._can_record_outputs, "router_logits": OutputRecorder(LlamaMoeRouter, index=0)}

    def __init__(self, config: LlamaMoeConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = LlamaMoeBlock(config)
        self.post_init()


class LlamaMoeForCausalLM(AnswerLossLlama):
    """Causal language model of the mixture. Saves its router and experts only; the base is named, not copied."""

    config_class = LlamaMoeConfig
    inner_class = LlamaMoeModel
    _keys_to_ignore_on_load_missing = (r"\.mlp\.(router|experts)\.",)  # not the base's: load_fused brings them

    def __init__(self, config: LlamaMoeConfig):
        super().__init__(config)
        if config.hidden_act != "silu":
            raise UserError(f"the base's activation is {config.hidden_act}: the shared-base mixture is for silu")
        self.model = self.inner_class(config)
        self.post_init()

    @property
    def blocks(self) -> list[LlamaMoeBlock]:
        return [layer.mlp for layer in self.model.layers]

    def set_top_k(self, top_k: int) -> None:
        """Use `top_k` experts per token from now on, and record it in the configuration."""
        check("expert_topk", top_k, 1 <= top_k <= self.config.num_experts, f"1 to {self.config.num_experts}")
        self.config.num_experts_per_tok = top_k
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

    def add_attention_lora(self, rank: int, alpha: float, dropout: float) -> None:
        """Put fp32 LoRA on q, k, v and o of every layer, recorded in the configuration (by PEFT's injection)."""
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(ATTENTION_PROJECTIONS))
        inject_adapter_in_model(lora, self)
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()  # injected in the base's dtype
        self.config.attention_lora = {"rank": rank, "alpha": alpha, "dropout": dropout}
        self.seal_base()

    def start_of_fusion(self) -> list[dict[str, torch.Tensor]]:
        """A frozen copy of the experts' matrices, per layer: what `drift` measures from."""
        return [{n: p.detach().clone() for n, p in block.experts.named_parameters()} for block in self.blocks]

    def drift(self, start: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Drift of each expert, (E,): || change of its effective weights since `start` ||_F, mean over layers and
        projections."""
        changes = [
            low_rank_change(*block.experts.matrices(p), then[f"{p}_A"], then[f"{p}_B"].mT, block.experts.scaling[i])
            for block, then in zip(self.blocks, start, strict=True)
            for i, p in enumerate(PROJECTIONS)
        ]
        return torch.stack([change.to(changes[0].device) for change in changes]).mean(0)


def load_fused(
    folder: Path, base_model: str, dtype: str, model_class: type[LlamaMoeForCausalLM] = LlamaMoeForCausalLM
) -> LlamaMoeForCausalLM:
    """The fused model of a folder: the named base's weights as --dtype has them, fp32 router and experts from here."""
    moe_config = model_class.config_class.from_pretrained(folder)
    attention_lora, moe_config.attention_lora = moe_config.attention_lora, None
    model = base.load_weights(model_class, base_model, moe_config, dtype)
    four_bit.make_trainable(model)
    if attention_lora:
        model.add_attention_lora(**attention_lora)
    saved = load_file(folder / "model.safetensors")
    saved_shapes, state = {(key, tensor.shape) for key, tensor in saved.items()}, model.state_dict()
    if odd := saved_shapes ^ {(key, state[key].shape) for key in model.own_state_keys()}:
        raise UserError(f"{folder}: model.safetensors does not fit its config.json (tensor {min(odd)[0]}); fuse again")
    for block in model.blocks:
        block.router.float(), block.experts.masters()
    model.load_state_dict(saved, strict=False)
    model.seal_base()
    return model


def fuse(
    experts: list[Expert | RecoveredExpert],
    base_config: LlamaConfig,
    top_k: int,
    seed: int,
    routers: list[torch.Tensor] | None = None,
    model_class: type[LlamaMoeForCausalLM] = LlamaMoeForCausalLM,
    **more,
) -> LlamaMoeForCausalLM:
    """The fused model of experts already attached to the base, ready to be saved: its base weights are empty.

    The experts' matrices are padded with zeros to the largest rank. The layers' routers (E, D) are as given, else they
    start at random from `seed`. model_class: of a mixture that is routed in another way; more: into its configuration.
    """
    settings = {
        key: value for key, value in base_config.to_dict().items() if key not in ("model_type", "architectures")
    }
    moe_config = model_class.config_class(
        **settings,
        **more,
        experts=[{"name": expert.name, "task": expert.task, "rank": expert.rank} for expert in experts],
        expert_rank=max(expert.rank for expert in experts),
        num_experts_per_tok=top_k,
        base_model_name_or_path=experts[0].base_model,
    )
    with torch.device("meta"):
        model = model_class(moe_config)
    generator = torch.Generator().manual_seed(seed)
    dtype = reduce(torch.promote_types, (expert.dtype for expert in experts))
    for number, layer in enumerate(model.model.layers):
        for weight in layer.mlp.router.parameters():
            router = torch.empty(weight.shape).normal_(std=moe_config.initializer_range, generator=generator)
            layer.mlp.router.weight = nn.Parameter(router if routers is None else routers[number])
        layer.mlp.experts = stack_experts(experts, number, moe_config, dtype)
    model.seal_base()
    return model


def stack_experts(experts: list, layer: int, moe_config: LlamaMoeConfig, dtype: torch.dtype) -> LowRankExperts:
    """The low-rank deltas of all experts on one layer, in one module."""
    stacked = LowRankExperts(moe_config.hidden_size, moe_config.intermediate_size, len(experts), moe_config.expert_rank)
    for parameter in stacked.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for (i, projection), (j, expert) in product(enumerate(PROJECTIONS), enumerate(experts)):
            if (delta := expert.delta(layer, projection)) is None:
                continue
            a, b, scaling = delta  # (r, in), (out, r)
            matrix_a, matrix_b = stacked.matrices(projection)
            matrix_a[j, : len(a)] = a
            matrix_b[j, :, : len(a)] = b
            stacked.scaling[i, j] = scaling
    return stacked


@cli.command
def main(argv: list[str] | None = None) -> None:
    from models.loading import open_experts  # which loads what this module makes

    args = cli.parse(argv, FuseArguments)
    names = list(expert_folders(args.experts))
    if len(names) < 2:
        raise UserError(f"--experts {args.experts}: name two or more experts, with commas between")
    check("expert_topk", args.expert_topk, 1 <= args.expert_topk <= len(names), f"1 to {len(names)}")
    if args.from_pt:
        experts, base_model, data_source = [], base.default_base_model(args.base_model), None
        origin = {"from_pt_sha256": sha256(Path(args.from_pt)), "max_rank": args.max_rank}
    elif args.fresh_rank:
        base_model, data_source = base.default_base_model(args.base_model), None
        experts = [FreshExpert(name, base_model, args.fresh_rank, args.seed + i) for i, name in enumerate(names)]
        origin = {"fresh_rank": args.fresh_rank}
    else:
        experts, base_model, data_source = open_experts(args)
        origin = {"adapters_sha256": [expert.checksum for expert in experts]}
    if args.router_init != "random":
        origin |= prototype_arguments(args, experts, absolute_source(args.data_source) or data_source)
    arguments = {
        "base_model": base_model,
        "base_sha256": base_sha256(base_model),
        "data_source": data_source,
        "experts": names,
        "expert_topk": args.expert_topk,
        "seed": args.seed,
        "save_dtype": args.save_dtype,
        **origin,
    }
    output = Path(args.output or config.fused_dir(args.results_dir))
    state = run_dir.begin(output, "llama_moe.py", arguments, "move it away, or name another folder with --output")
    if state == "complete":
        print(f"{output} is already fused from these experts: nothing to do")
        return
    base_config, routers = base.load_base_config(base_model), None
    if args.from_pt:
        experts, routers = read_moe_pt(Path(args.from_pt), base_model, base_config, names, args.max_rank)
    else:
        for expert in experts:
            expert.attach(base_config)
    if args.router_init != "random":
        by_experts = experts if args.router_init == "arrow" else None
        tasks = [expert.task for expert in experts]
        routers = fit_routers(
            tasks, base_model, origin["data_source"], args.num_prompts, args.seed, args.dtype, by_experts
        )
    model = fuse(experts, base_config, args.expert_topk, args.seed, routers)
    if args.save_dtype != "auto":
        for block in model.blocks:
            for parameter in block.experts.parameters():
                parameter.data = parameter.data.to(getattr(torch, args.save_dtype))
    model.save_pretrained(output)
    meta = {} if args.from_pt or args.fresh_rank else {"experts": how_made(experts)}
    run_dir.finish(output, "llama_moe.py", arguments, train={}, meta=meta)
    report_sizes(output, model)


def asked(argv: list[str]) -> dict:
    """What run.json of a command line would record, as far as its flags tell (evaluator/reuse.py)."""
    args = cli.parse(argv, FuseArguments)
    arguments = {name: getattr(args, name) for name in ("expert_topk", "seed", "save_dtype")}
    if args.fresh_rank:
        arguments["fresh_rank"] = args.fresh_rank
    if args.router_init != "random":
        arguments |= {"router_init": args.router_init, "num_prompts": args.num_prompts}
    return arguments


def prototype_arguments(args: FuseArguments, experts: list, source: str | None) -> dict:
    """What decides routers by prompts, for run.json. UserError for an expert without a task, or without data."""
    if None in (tasks := [expert.task for expert in experts]):
        raise UserError(
            f"--router_init {args.router_init}: {experts[tasks.index(None)].name} has no task whose prompts to take"
        )
    if source is None:
        raise UserError(
            f"--router_init {args.router_init}: the experts record no data, or different; name it with --data_source"
        )
    files = [path for task in tasks for path in source_files(task, "train", source)]
    decided = {"router_init": args.router_init, "data_source": source, "data_sha256": data_sha256(files)}
    return decided | effective_flags(args) | {"data_source": source, "dtype": base.dtype_name(args.dtype)}


def report_sizes(folder: Path, model: LlamaMoeForCausalLM) -> None:
    """Say what was written, beside what a copy of every FFN would take."""
    moe_config = model.config
    ffn = len(model.blocks) * 3 * moe_config.hidden_size * moe_config.intermediate_size
    own = model.own_state_keys()
    num_base = sum(p.numel() for name, p in model.named_parameters() if name not in own)
    num_own = sum(p.numel() for name, p in model.named_parameters() if name in own)
    names = ", ".join(f"{expert['name']} (rank {expert['rank']})" for expert in moe_config.experts)
    copies = (num_base + (moe_config.num_experts - 1) * ffn) * 2
    print(
        f"Fused {names}; top-{moe_config.num_experts_per_tok} of {moe_config.num_experts}, on "
        f"{moe_config.base_model_name_or_path}"
    )
    size = (folder / "model.safetensors").stat().st_size
    print(
        f"{folder}: {size / 1e6:.1f} MB ({num_own / 1e6:.1f} M parameters of router and experts; the base's "
        f"{num_base / 1e6:.1f} M are named, not copied). "
        f"Copies of every FFN would take {copies / 1e6:,.0f} MB in fp16."
    )


if __name__ == "__main__":
    from models.llama_moe import main

    main()
