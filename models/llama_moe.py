"""Fuse aligned experts of one base into a model whose FFNs are routed mixtures of them (models/mixture.py):

python models/llama_moe.py [--experts_dir results/outputs] [--experts helpfulness,safety,truthfulness]
python models/llama_moe.py --router_init prototype --output results/outputs/moe_prototype
python models/llama_moe.py --add politeness --to RUN        (one more expert beside those of an aligned fusion)
python models/llama_moe.py --from_pt moe.pt --base_model meta-llama/Llama-2-7b-chat-hf     (the released code's file)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
import config
from cli import (
    DTYPES,
    TASKS_HELP,
    BaseArguments,
    check,
    check_at_least,
    check_default,
    check_not_given,
    check_seed,
    effective_flags,
    flag,
    flag_with,
    read_tasks,
    resolve_conditional_flags,
)
from config import TASKS, UserError

OF_PROMPTS = {"router_init": ("prototype", "arrow")}
LEFT_OUT_AT = {  # flags that run.json leaves out at these defaults
    "routing": "token",
    "router_init": "random",
    "fresh_rank": None,
    "num_trained": None,
}


@dataclass
class FuseArguments(BaseArguments):
    """Flags of models/llama_moe.py."""

    experts_dir: str | None = flag(None, "folder of the experts (default: outputs in --results_dir)")
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    experts: str | None = flag(
        None,
        "the experts in order, comma-separated: names in --experts_dir, or NAME=DIR for any adapter (default: --tasks)",
    )
    expert_topk: int | None = flag(None, "experts per token (default: 2; with --add, that of --to)")
    routing: str = flag(
        "token",
        "what experts are chosen for: each token, as in the paper, or each prompt, for all its tokens and its answer's",
        choices=["token", "prompt"],
    )
    output: str | None = flag(
        None, "where to write (default: outputs/moe in --results_dir; with --add outputs/<--to>_with_<NAME>)"
    )
    add: str | None = flag(None, "add this expert to --to: a name in --experts_dir or NAME=DIR, where NAME is its task")
    to: str | None = flag(None, "with --add: the fused run, a name under outputs or a folder")
    from_pt: str | None = flag(None, "fuse a moe.pt of the released code; needs --base_model and --experts")
    max_rank: int = flag(32, "with --from_pt: the largest rank that an expert may differ from the base by")
    fresh_rank: int | None = flag(
        None, "control: fuse fresh LoRA of that rank, with B = 0, under the experts' names; needs --base_model"
    )
    router_init: str = flag(
        "random",
        "how routers start: random, from the states of each task's training prompts (prototype), or from what each "
        "expert changes most (arrow)",
        choices=["random", "prototype", "arrow"],
    )
    data_source: str | None = flag_with(
        OF_PROMPTS, None, "data of those prompts: hub, sample or a folder (default: as the experts recorded)"
    )
    num_prompts: int | None = flag_with(OF_PROMPTS, 100, "training prompts per task that the routers start from")
    num_trained: int | None = flag_with(
        OF_PROMPTS,
        None,
        "take them from the rows that an alignment on so many with this --seed draws (default: from all)",
    )
    dtype: str | None = flag_with(OF_PROMPTS, "auto", "precision of the base that reads them", choices=list(DTYPES))
    seed: int = flag(42, "seed of the routers, the prompts and the fresh experts")
    save_dtype: str = flag(
        "auto",
        "precision of the experts on disk: auto keeps the adapters', float16 halves the file",
        choices=["auto", "float16", "float32"],
    )

    def __post_init__(self):
        if (self.add is None) != (self.to is None):
            raise UserError("--add and --to go together: the expert, and the fused run that it joins")
        if self.add is not None:
            self.check_added()
            self.router_init = "prototype"
        elif self.expert_topk is None:
            self.expert_topk = 2
        check_seed(self.seed)
        check_at_least(
            1,
            max_rank=self.max_rank,
            fresh_rank=self.fresh_rank,
            num_prompts=self.num_prompts,
            num_trained=self.num_trained,
        )
        resolve_conditional_flags(self)
        if self.experts is None:
            self.experts = ",".join(read_tasks(self.tasks))
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

    def check_added(self) -> None:
        """UserError for a flag that has no effect with --add."""
        given = {name: getattr(self, name) for name in ("experts", "from_pt", "fresh_rank", "expert_topk")}
        given["router_init"] = None if self.router_init in ("random", "prototype") else self.router_init
        reason = "has no effect with --add, which keeps what --to has"
        check_not_given(reason, **given)
        check_default(self, reason, "tasks", "max_rank", "save_dtype", "num_trained", "routing")


if __name__ == "__main__":
    cli.check_early(cli.parse, FuseArguments)

import torch

from data.encoding import Encoder
from data.sources import absolute_source, source_sha256
from models import base
from models.adapters import FreshExpert, check_one_of_each_task, expert_folders, how_made, open_adapters
from models.add_expert import add_expert, fit_row
from models.base_identity import base_sha256, tokenizer_sha256
from models.expert_ffn import PROJECTIONS
from models.mixture import MixtureForCausalLM, fuse, fused_sha256, load_fused, read_mixture
from models.prototypes import fit_routers
from models.released import read_moe_pt
from workspace import run_dir
from workspace.files import sha256


@cli.command
def main(argv: list[str] | None = None) -> None:
    from models.loading import open_experts  # which loads what this module makes

    args = cli.parse(argv, FuseArguments)
    if args.add is not None:
        add_to_fused(args)
        return
    names = list(expert_folders(args.experts))
    if len(names) < 2:
        raise UserError(f"--experts {args.experts}: name two or more experts, with commas between")
    check("expert_topk", args.expert_topk, 1 <= args.expert_topk <= len(names), f"1 to {len(names)}")
    if args.from_pt:
        experts, base_model, data_source = [], base.default_base_model(args.base_model), None
        origin = {"from_pt_sha256": sha256(Path(args.from_pt)), "max_rank": args.max_rank}
    elif args.fresh_rank:
        base_model, data_source = base.default_base_model(args.base_model), None
        experts = [
            FreshExpert(name, base_model, args.fresh_rank, f"{args.seed} {i}", read_tasks(args.tasks))
            for i, name in enumerate(names)
        ]
        origin = {"fresh_rank": args.fresh_rank}
    else:
        experts, base_model, data_source = open_experts(args)
        check_one_of_each_task([expert.task for expert in experts], f"--experts {args.experts}")
        origin = {"adapters_sha256": [expert.checksum for expert in experts]}
    if args.router_init != "random":
        origin |= prototype_arguments(args, experts, absolute_source(args.data_source) or data_source)
    arguments = {
        "base_model": base_model,
        "base_sha256": base_sha256(base_model),
        "tokenizer_sha256": tokenizer_sha256(base_model),
        "data_source": data_source,
        "experts": names,
        "expert_topk": args.expert_topk,
        "seed": args.seed,
        "save_dtype": args.save_dtype,
        **routing_argument(args),
        **origin,
    }
    output = Path(args.output or config.fused_dir(args.results_dir))
    state = run_dir.begin(output, "llama_moe.py", arguments, "move it away, or name another folder with --output")
    if state == "complete":
        check_tasks(output, [expert.task for expert in experts])
        print(f"{output} is already fused from these experts: nothing to do")
        return
    base_config, routers = base.load_base_config(base_model), None
    if args.from_pt:
        experts, routers = read_moe_pt(
            Path(args.from_pt), base_model, base_config, names, read_tasks(args.tasks), args.max_rank
        )
    else:
        for expert in experts:
            expert.attach(base_config)
    if args.router_init != "random":
        by_experts = experts if args.router_init == "arrow" else None
        tasks = [expert.task for expert in experts]
        trained = -1 if args.num_trained is None else args.num_trained
        routers = fit_routers(
            tasks, base_model, origin["data_source"], args.num_prompts, args.seed, args.dtype, by_experts, trained
        )
    model = fuse(experts, base_config, args.expert_topk, args.seed, routers, **routing_argument(args))
    if args.save_dtype != "auto":
        for block in model.blocks:
            for parameter in block.experts.parameters():
                parameter.data = parameter.data.to(getattr(torch, args.save_dtype))
    model.save_pretrained(output)
    meta = {} if args.from_pt or args.fresh_rank else how_made(experts)
    run_dir.finish(output, "llama_moe.py", arguments, train={}, meta=meta)
    report_sizes(output, model)


def check_tasks(folder: Path, tasks: list[str | None]) -> None:
    """UserError for a finished fusion of these experts by other tasks."""
    fused = [expert["task"] for expert in read_mixture(folder).experts]
    if tasks and fused != tasks:  # of a released file, none are known before it is read
        raise UserError(
            f"{folder}: is fused from experts for {', '.join(map(str, fused))}, and --tasks says "
            f"{', '.join(map(str, tasks))}; move it away, or name another folder with --output"
        )


def add_to_fused(args: FuseArguments) -> None:
    """Write a folder with one more expert beside those of an aligned fusion (--add, --to)."""
    from models.loading import device, resolve_base, run_kind

    outputs = config.outputs_dir(args.results_dir)
    path = run_dir.find_run(args.to, outputs)
    if run_kind(path) != "fused":
        raise UserError(f"--to {args.to}: is not a fused model; make one with models/llama_moe.py")
    mixture, record = read_mixture(path), run_dir.read_run(path)
    recorded = record["run"]["arguments"] if record else {}
    folder_of = expert_folders(args.add)
    if len(folder_of) != 1:
        raise UserError(f"--add {args.add}: name one expert; add another to what this makes")
    (name,) = folder_of
    read_tasks(name, "add")
    (expert,) = open_adapters(folder_of, Path(args.experts_dir or outputs), (name,))
    if name in (known["name"] for known in mixture.experts) or expert.task in mixture.expert_of_task:
        raise UserError(f"--add {args.add}: {args.to} has an expert of that name or task ({name}, {expert.task})")
    base_model = resolve_base(path, args.base_model)
    if base_sha256(resolve_base(expert.folder, args.base_model)) != base_sha256(base_model):
        raise UserError(f"--add {args.add}: stands on another base than {args.to}; align it on {base_model}")
    tasks = [known["task"] for known in mixture.experts] + [expert.task]
    if None in tasks:
        raise UserError(f"--add {args.add}: an expert of {args.to} has no task whose prompts to compare with")
    check_one_of_each_task(tasks, f"--add {args.add}")
    source = absolute_source(args.data_source) or recorded.get("data_source")
    arguments = {
        "base_model": base_model,
        "base_sha256": base_sha256(base_model),
        "tokenizer_sha256": tokenizer_sha256(base_model),
        "to": Path(args.to).name,
        "fused_sha256": fused_sha256(path),
        "experts": [known["name"] for known in mixture.experts] + [name],
        "adapters_sha256": [expert.checksum],
        "expert_topk": mixture.num_experts_per_tok,
        "seed": args.seed,
        **prompt_arguments(args, tasks, source),
    }
    output = Path(args.output or outputs / f"{path.name}_with_{name}")
    state = run_dir.begin(output, "llama_moe.py", arguments, "move it away, or name another folder with --output")
    if state == "complete":
        print(f"{output} has this expert already: nothing to do")
        return
    expert.attach(base.load_base_config(base_model))
    model = load_fused(path, base_model, args.dtype).to(device()).eval()
    encoder = Encoder(base.load_tokenizer(base_model), model.config.max_position_embeddings)
    rows = fit_row(model, encoder, tasks, source, args.num_prompts, args.seed)
    model.to("cpu")
    add_expert(model, expert, rows)
    model.save_pretrained(output)
    meta = how_made([expert], path) | {"fused": recorded}
    run_dir.finish(output, "llama_moe.py", arguments, train={}, meta=meta)
    report_sizes(output, model)


def asked(argv: list[str]) -> dict:
    """What run.json of a command line would record, as far as its flags tell (evaluator/reuse.py)."""
    args = cli.parse(argv, FuseArguments)
    recorded = ("seed",) if args.add is not None else ("expert_topk", "seed", "save_dtype")
    arguments = {name: getattr(args, name) for name in recorded}
    arguments |= routing_argument(args)
    if args.fresh_rank:
        arguments["fresh_rank"] = args.fresh_rank
    if args.router_init != "random":
        of_prompts = {name: getattr(args, name) for name in ("router_init", "num_prompts", "num_trained")}
        arguments |= {name: value for name, value in of_prompts.items() if value is not None}
    return arguments


def routing_argument(args: FuseArguments) -> dict[str, str]:
    """What is recorded of --routing."""
    return {} if args.routing == LEFT_OUT_AT["routing"] else {"routing": args.routing}


def prototype_arguments(args: FuseArguments, experts: list, source: str | None) -> dict:
    """What decides routers by prompts, for run.json. UserError for an expert without a task, or without data."""
    if None in (tasks := [expert.task for expert in experts]):
        raise UserError(
            f"--router_init {args.router_init}: {experts[tasks.index(None)].name} has no task whose prompts to take"
        )
    return prompt_arguments(args, tasks, source)


def prompt_arguments(args: FuseArguments, tasks: list[str], source: str | None) -> dict:
    """Which prompts of which tasks decide routers, for run.json. UserError without data."""
    if source is None:
        raise UserError(
            f"--router_init {args.router_init}: the experts record no data, or different; name it with --data_source"
        )
    read = source_sha256(tasks, "train", source)
    decided = {"router_init": args.router_init, "data_source": source, "data_sha256": read}
    decided |= effective_flags(args) | {"data_source": source, "dtype": base.dtype_name(args.dtype)}
    return {name: value for name, value in decided.items() if value is not None}


def report_sizes(folder: Path, model: MixtureForCausalLM) -> None:
    """Say what was written, beside what a copy of every FFN would take."""
    mixture = model.mixture
    ffn = len(model.blocks) * len(PROJECTIONS) * model.blocks[0].gate_proj.weight.numel()
    own = model.own_state_keys()
    num_base = sum(p.numel() for name, p in model.named_parameters() if name not in own)
    num_own = sum(p.numel() for name, p in model.named_parameters() if name in own)
    names = ", ".join(f"{expert['name']} (rank {expert['rank']})" for expert in mixture.experts)
    copies = (num_base + (mixture.num_experts - 1) * ffn) * 2
    print(
        f"Fused {names}; top-{mixture.num_experts_per_tok} of {mixture.num_experts}, on "
        f"{mixture.base_model_name_or_path}"
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
