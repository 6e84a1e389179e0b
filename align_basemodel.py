"""Align one LoRA expert on one task (--moe_flag 0), or the fused mixture on all three (--moe_flag 1)."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import cli
import config
from cli import (
    TASKS_HELP,
    SourceArguments,
    check,
    check_at_least,
    check_default,
    check_not_given,
    check_num_samples,
    effective_flags,
    flag,
    flag_with,
    is_positive,
    read_number,
    read_pairs,
    read_tasks,
    resolve_conditional_flags,
)
from config import RAW, RAW_CHAT, TASKS, UserError

OF_EXPERT, OF_MIXTURE = {"moe_flag": 0}, {"moe_flag": 1}
OF_TRAINED_ROUTER = OF_MIXTURE | {"train_router": 1}
OF_TRAINED_EXPERTS = OF_MIXTURE | {"train_experts": 1}
OF_ATTENTION = OF_MIXTURE | {"tune_attention": 1}

# Flags that earlier versions did not have: at these defaults they are not recorded, so that their runs stay the same
LEFT_OUT_AT = {
    "train_experts": 1,
    "expert_dropout": 0.0,
    "gate_schedule": "constant",
    "answer_topk": None,
    "init_adapter": None,
    "drift_weights": None,
    "tasks": ",".join(TASKS),
}


@dataclass
class AlignArguments(SourceArguments):
    """What align_basemodel.py adds to transformers.TrainingArguments."""

    task_name: str | None = flag(
        None, "the task to align on, or mix for all of --tasks (default with --moe_flag 1: mix)"
    )
    tasks: str | None = flag(
        None, f"with --task_name mix: {TASKS_HELP} (default: the paper's, or those of the fused experts)"
    )
    moe_flag: int = flag(0, "0: align one expert (LoRA on the base); 1: align the fused mixture", choices=[0, 1])
    num_samples: int = flag(-1, "training rows per task, drawn with --seed; -1 takes all")
    max_length: int = flag(300, "longest sample in tokens; a longer one loses the beginning of its prompt")
    batch_size: int | None = flag(None, "samples per device and step; short for --per_device_train_batch_size")
    estimate: int = flag(0, "1: print what the training would take of memory, and do nothing else", choices=[0, 1])
    # one expert
    rank: int | None = flag_with(OF_EXPERT, 8, "LoRA rank r")
    alpha: float | None = flag_with(OF_EXPERT, 4.0, "LoRA alpha")
    lora_dropout: float | None = flag_with(OF_EXPERT, 0.1, "LoRA dropout")
    init_adapter: str | None = flag(
        None, "with --moe_flag 0: continue from this adapter (a run's name or a folder) of the same rank and alpha"
    )
    # the mixture
    moe_dir: str | None = flag(
        None, "the fused model that --moe_flag 1 starts from (default: outputs/moe in --results_dir)"
    )
    expert_topk: int | None = flag_with(OF_MIXTURE, None, "experts per token (default: as fused)")
    answer_topk: int | None = flag_with(
        OF_MIXTURE, None, "experts per token once aligned, if not those of the training"
    )
    gate_loss_weight: float | None = flag_with(OF_MIXTURE, 0.0, "lambda of the gating loss")
    gate_schedule: str | None = flag_with(
        OF_MIXTURE,
        "constant",
        "how lambda changes over the training: constant, or linear to 0",
        choices=["constant", "linear"],
    )
    helpfulness_weight: float | None = flag_with(OF_MIXTURE, 0.0, "gamma_1: weight of the helpfulness expert's drift")
    safety_weight: float | None = flag_with(OF_MIXTURE, 0.0, "gamma_2: weight of the safety expert's drift")
    truthfulness_weight: float | None = flag_with(OF_MIXTURE, 0.0, "gamma_3: weight of the truthfulness expert's drift")
    drift_weights: str | None = flag_with(
        OF_MIXTURE, None, "drift weights of other tasks' experts: TASK=VALUE, comma-separated"
    )
    gate_tokens: str | None = flag_with(
        OF_MIXTURE,
        "instruction",
        "tokens the gating loss averages over: those after the template's opening, or all, as in the paper",
        choices=["instruction", "all"],
    )
    gate_gradient: str | None = flag_with(
        OF_MIXTURE,
        "all",
        "what the gating loss trains: routers and experts (all, as in the paper), or the routers alone",
        choices=["all", "router"],
    )
    gate_balance: str | None = flag_with(
        OF_MIXTURE,
        "task",
        "what has equal weight in the gating loss: each task, or each sample as in the paper",
        choices=["task", "sample"],
    )
    train_router: int | None = flag_with(OF_MIXTURE, 1, "0: freeze the router (ablation)", choices=[0, 1])
    router_learning_rate: float | None = flag_with(OF_TRAINED_ROUTER, 0.1, "learning rate of the router")
    train_experts: int | None = flag_with(OF_MIXTURE, 1, "0: freeze the experts (ablation)", choices=[0, 1])
    expert_dropout: float | None = flag_with(OF_TRAINED_EXPERTS, 0.0, "dropout on the experts' low-rank states")
    tune_attention: int | None = flag_with(
        OF_MIXTURE, 0, "1: add LoRA on q, k, v, o, as the released code does", choices=[0, 1]
    )
    attention_rank: int | None = flag_with(OF_ATTENTION, 8, "rank of that LoRA")
    attention_alpha: float | None = flag_with(OF_ATTENTION, 4.0, "alpha of that LoRA")
    attention_dropout: float | None = flag_with(OF_ATTENTION, 0.1, "dropout of that LoRA")

    def __post_init__(self):
        if self.task_name is None:
            if not self.moe_flag:
                raise UserError(f"--moe_flag 0 aligns one expert: name it with --task_name {{{','.join(TASKS)},mix}}")
            self.task_name = "mix"
        if self.task_name != "mix":
            read_tasks(self.task_name, "task_name")
            check_not_given("is of the mixed data, --task_name mix", tasks=self.tasks)
        if self.tasks is not None:
            self.tasks = ",".join(read_tasks(self.tasks))
        check_at_least(1, rank=self.rank, attention_rank=self.attention_rank, expert_topk=self.expert_topk)
        check_at_least(1, batch_size=self.batch_size, answer_topk=self.answer_topk)
        for name in ("alpha", "attention_alpha", "router_learning_rate"):
            value = getattr(self, name)
            check(name, value, value is None or is_positive(value), "a finite number above 0")
        for name in ("lora_dropout", "attention_dropout", "expert_dropout"):
            value = getattr(self, name)
            check(name, value, value is None or 0 <= value < 1, "in [0, 1)")
        check_at_least(16, max_length=self.max_length)
        check_num_samples(num_samples=self.num_samples)
        for name in ("gate_loss_weight", *(f"{task}_weight" for task in TASKS)):
            value = getattr(self, name)
            if value is not None:
                check(name, value, math.isfinite(value) and value >= 0, "a finite number, 0 or more")
                setattr(self, name, abs(value))  # -0.0 is 0
        resolve_conditional_flags(self)
        self.other_drift_weights = self.read_drift_weights()
        if self.drift_weights is not None:
            self.drift_weights = (
                ",".join(f"{name}={value!r}" for name, value in self.other_drift_weights.items()) or None
            )
        if self.moe_flag and self.init_adapter:
            raise UserError(f"--init_adapter {self.init_adapter}: is for one expert; a fusion starts from --moe_dir")
        if self.moe_flag and not (self.train_router or self.train_experts or self.tune_attention):
            raise UserError("--train_router 0, --train_experts 0: leave nothing to train; give one of them, or neither")
        if self.moe_flag:
            self.check_gate()
        if self.moe_flag and not self.train_experts:
            for name in (f"{task}_weight" for task in TASKS):
                check(name, getattr(self, name), getattr(self, name) == 0, "0 with --train_experts 0: nothing drifts")
            check_not_given("has no effect with --train_experts 0: nothing drifts", drift_weights=self.drift_weights)

    def check_gate(self) -> None:
        """UserError for settings of the gating loss where it has no effect."""
        if not self.gate_loss_weight:
            of_gate = ("gate_tokens", "gate_gradient", "gate_balance", "gate_schedule")
            check_default(self, "has no effect with --gate_loss_weight 0", *of_gate)
        elif self.gate_gradient == "router" and not self.train_router:
            raise UserError(
                "--gate_gradient router: trains the router alone, which --train_router 0 freezes; leave one of them out"
            )

    def read_drift_weights(self) -> dict[str, float]:
        """--drift_weights by task. UserError for what is no TASK=VALUE, or is one of the paper's tasks."""
        if self.drift_weights is None:
            return {}
        pairs = read_pairs(self.drift_weights, "drift_weights", "TASK=VALUE")
        weights = {name: read_number(value) for name, value in pairs.items()}
        for name, weight in weights.items():
            if name in TASKS:
                raise UserError(f"--drift_weights {self.drift_weights}: {name}: give it as --{name}_weight")
            read_tasks(name, "drift_weights")
            check("drift_weights", f"{name}={pairs[name]}", is_positive(weight) or weight == 0, "0 or more")
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The tasks whose data the run is aligned on."""
        return read_tasks(self.tasks or ",".join(TASKS)) if self.task_name == "mix" else (self.task_name,)

    @property
    def all_drift_weights(self) -> dict[str, float]:
        """gamma by task: of the tasks aligned on, and of others that were given one."""
        weights = {task: getattr(self, f"{task}_weight") for task in TASKS} | self.other_drift_weights
        tasks = self.trained_tasks if self.task_name == "mix" else TASKS
        given = [task for task, weight in weights.items() if weight and task not in tasks]
        return {task: weights.get(task, 0.0) for task in (*tasks, *given)}


if __name__ == "__main__":
    cli.check_early(cli.parse_known, AlignArguments, cli.TRAINING_EPILOG)

from data.sources import absolute_source, source_sha256
from models import base, training_arguments
from models.alignment import estimate, expert_trainer, mixture_trainer, training_samples
from models.base_identity import base_sha256, tokenizer_sha256
from models.loading import resolve_base, run_kind
from models.mixture import fused_sha256, read_mixture
from models.processes import on_first_process
from models.training_arguments import TrainArguments
from workspace import run_dir
from workspace.drawn import drawn_by, recorded
from workspace.files import sha256

SCRIPT = "align_basemodel.py"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args, training = training_arguments.parse(argv, AlignArguments)
    resolve_sources(args)
    if args.estimate:
        print(estimate(args, training))
        return
    name = run_name(args, training)
    folder = Path(args.results_dir) / "outputs" / name
    arguments = result_arguments(args, training)
    window = base.load_config(args.base_model).max_position_embeddings
    cli.check("max_length", args.max_length, args.max_length <= window, f"at most {window}, the base's window")
    remedy = "give this run a name of its own with --run_name, or move that one"
    state = on_first_process(lambda: run_dir.begin(folder, SCRIPT, arguments, remedy))
    if state == "complete":
        print(f"{folder} is complete: nothing to do")
        return
    began_with = how_it_began(args)  # before hours of training: a record that cannot be read is said now
    training.output_dir = str(folder)
    print(training.describe_batch())
    started = time.perf_counter()
    tokenizer = base.load_tokenizer(args.base_model)
    samples = training_samples(args, training.seed, tokenizer)
    trainer = (mixture_trainer if args.moe_flag else expert_trainer)(args, training, samples)
    trained = trainer.train_into(folder, state == "resume", started)
    if trained is None:
        return
    train = {
        "samples": len(samples),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "dtype": arguments["dtype"],
        **trained,
    }
    run_dir.finish(folder, SCRIPT, arguments, train, {"training": training.recorded(), **began_with})
    print(f"Aligned on {args.task_name} in {train['seconds']:.0f} s: {folder}")


def how_it_began(args: AlignArguments) -> dict:
    """For run.json: how the fusion or the adapter that the training starts from was made; {} for a new expert."""
    name, folder = ("fused", args.moe_dir) if args.moe_flag else ("init", args.init_adapter)
    record = run_dir.read_run(Path(folder)) if folder else None
    if record is None:
        return {}
    made = {name: record["run"]["arguments"], "experts": record["meta"].get("experts")}
    return made | {"drawn": recorded(drawn_by(Path(folder)))}


def resolve_sources(args: AlignArguments) -> None:
    """The base model and the data: given now for an expert, recorded at fusion for the mixture."""
    if not args.moe_flag:
        if args.init_adapter:
            init = run_dir.find_run(args.init_adapter, config.outputs_dir(args.results_dir))
            if (kind := run_kind(init)) != "adapter":
                raise UserError(f"--init_adapter {args.init_adapter}: is no adapter ({kind}); name an expert")
            args.base_model, args.init_adapter = resolve_base(init, args.base_model), str(init)
        args.base_model = base.default_base_model(args.base_model)
        args.data_source = absolute_source(args.data_source) or "hub"
        return
    args.moe_dir = args.moe_dir or str(config.fused_dir(args.results_dir))
    moe_dir = Path(args.moe_dir)
    fused = run_dir.read_run(moe_dir)
    if fused is None:
        raise UserError(f"--moe_dir {moe_dir}: no fused model there; fuse the experts first with models/llama_moe.py")
    if moe_dir.name.startswith("checkpoint-"):
        raise UserError(f"--moe_dir {moe_dir}: is a checkpoint; name its run, {moe_dir.parent}")
    if not (moe_dir / run_dir.COMPLETE).exists():
        raise UserError(f"--moe_dir {moe_dir}: its fusion did not finish; run models/llama_moe.py again")
    if run_kind(moe_dir) != "fused":
        raise UserError(f"--moe_dir {moe_dir}: holds no fused model; fuse the experts first with models/llama_moe.py")
    recorded = fused["run"]["arguments"]
    args.base_model = resolve_base(moe_dir, args.base_model)
    # the fusion may be aligned on other data than the experts were
    args.data_source = absolute_source(args.data_source) or absolute_source(recorded["data_source"])
    if args.data_source is None:
        raise UserError("the experts were aligned on different data, or do not record it: name it with --data_source")
    mixture = read_mixture(moe_dir)
    if args.expert_topk is None:
        args.expert_topk = mixture.num_experts_per_tok
    if args.answer_topk == args.expert_topk:
        args.answer_topk = None
    for name in ("expert_topk", "answer_topk"):
        value, most = getattr(args, name), mixture.num_experts
        check(name, value, value is None or 1 <= value <= most, f"1 to {most}")
    of_experts, all_known = set(mixture.expert_of_task), len(mixture.expert_of_task) == mixture.num_experts
    others = of_experts != set(TASKS) if all_known else not of_experts <= set(TASKS)
    if args.tasks is None and args.task_name == "mix" and others:
        args.tasks = ",".join(mixture.expert_of_task)
    weights = args.all_drift_weights
    for task in {**dict.fromkeys(args.trained_tasks), **weights}:
        named = f"{task}_weight" if task in TASKS else "drift_weights"
        for name, weight in (("gate_loss_weight", args.gate_loss_weight), (named, weights.get(task, 0.0))):
            trained = task in args.trained_tasks or name != "gate_loss_weight"
            if weight and task not in mixture.expert_of_task and trained:
                tasks = ", ".join(mixture.expert_of_task) or "no task"
                raise UserError(f"--{name} {weight}: needs an expert for {task}; {moe_dir} has experts for {tasks}")


def run_name(args: AlignArguments, training: TrainArguments) -> str:
    """The folder under results/outputs: --run_name, else the task, else the paper's name of a fused run."""
    if training.run_name:
        reserved = training.run_name in (RAW, RAW_CHAT, "..") or training.run_name.startswith("checkpoint-")
        if reserved or Path(training.run_name).name != training.run_name:
            raise UserError(f"--run_name {training.run_name}: must be a folder name, not raw, raw_chat or checkpoint-N")
        return training.run_name
    return config.fused_run_name(args, training.seed) if args.moe_flag else config.expert_run_name(args)


def result_arguments(args: AlignArguments, training: TrainArguments) -> dict:
    """What run.json records and a later command with the same folder must repeat."""
    arguments = {
        "base_model": args.base_model,
        "data_source": args.data_source,
        "base_sha256": base_sha256(args.base_model),  # a base that is not there is said before data that are not
        "tokenizer_sha256": tokenizer_sha256(args.base_model),
        **flag_arguments(args, training),
    }
    if args.moe_flag:
        arguments["fused_sha256"] = fused_sha256(Path(args.moe_dir))
        if routing := read_mixture(Path(args.moe_dir)).routing:
            arguments["routing"] = routing
    if args.init_adapter:
        arguments["init_sha256"] = sha256(Path(args.init_adapter) / "adapter_model.safetensors")
    return arguments


def flag_arguments(args: AlignArguments, training: TrainArguments) -> dict:
    """The part of `result_arguments` that the flags and the data decide, whatever was aligned before."""
    shared = ("dtype", "task_name", "moe_flag", "num_samples", "max_length", "tasks")
    arguments = {name: getattr(args, name) for name in shared} | effective_flags(args)
    if args.tasks is None:
        del arguments["tasks"]
    if args.init_adapter:
        arguments["init_adapter"] = Path(args.init_adapter).name
    for name, default in LEFT_OUT_AT.items():
        if arguments.get(name) == default:
            arguments.pop(name, None)
    read = source_sha256(args.trained_tasks, "train", args.data_source)
    return arguments | {"data_sha256": read} | training.compared()


def asked(argv: list[str]) -> dict:
    """What run.json of a command line would record, as far as its flags tell (evaluator/reuse.py)."""
    args, training = training_arguments.parse(argv, AlignArguments)
    args.data_source = absolute_source(args.data_source)
    return flag_arguments(args, training)


if __name__ == "__main__":
    main()
