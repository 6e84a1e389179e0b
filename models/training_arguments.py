"""transformers.TrainingArguments as this project trains by it: the paper's values as defaults."""

import math
import os
import sys
from dataclasses import MISSING, dataclass, fields

import torch
from transformers import HfArgumentParser, TrainingArguments

import cli
from cli import HELP_ALL, check, flag
from config import UserError
from data.sampling import STRATEGIES
from models.base import dtype_name, pick_dtype


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with the paper's values (and quiet, resumable) as defaults."""

    learning_rate: float = flag(5e-4, "of the LoRA matrices")
    num_train_epochs: float = flag(3.0, "epochs")
    per_device_train_batch_size: int = flag(8, "samples per device and step")
    lr_scheduler_type: str = flag("linear", "decay of the learning rate")
    seed: int = flag(42, "of the data order, the samples drawn and the initial weights")
    train_sampling_strategy: str = flag("group_by_length", "batches of samples of like length")
    logging_steps: float = flag(10, "log every that many steps")
    save_strategy: str = flag("epoch", "when to write a checkpoint to resume from")
    report_to: str | None = flag("none", "for example tensorboard")
    remove_unused_columns: bool | None = flag(False, "the collator makes the columns")
    use_cache: bool = flag(False, "the key-value cache is for generation")
    ddp_find_unused_parameters: bool | None = flag(False, "every trained matrix is used in every batch")
    bf16: bool | None = flag(None, "short for --dtype bfloat16", nargs="?", const=True)
    fp16: bool | None = flag(None, "short for --dtype float16, which needs a GPU", nargs="?", const=True)

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value > 0, "a finite number above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("seed", "weight_decay", "max_grad_norm", "warmup_steps"):
            check(
                name, getattr(self, name), math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "0 or more"
            )
        cli.check_seed(self.seed)
        if self.use_cpu and self.fsdp:
            raise UserError("--fsdp shards over GPUs, and this run is on the CPU: leave it out")
        strategy = self.train_sampling_strategy
        check("train_sampling_strategy", strategy, strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
        super().__post_init__()
        if self.activation_checkpointing:
            settings = {"use_reentrant": False, **(self.activation_checkpointing_kwargs or {})}
            if settings["use_reentrant"]:
                raise UserError(
                    "--activation_checkpointing_kwargs use_reentrant: must be false; the routers would get no "
                    "gradient from the gating loss"
                )
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = settings

    @property
    def n_gpu(self) -> int:
        """At most one: of several GPUs a single process uses the first (torch's DataParallel, which transformers would
        take, weighs the samples' losses wrongly)."""
        return min(super().n_gpu, 1)

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimiser step: processes x samples per device x batches."""
        return self.world_size * self.train_batch_size * self.gradient_accumulation_steps

    def describe_batch(self) -> str:
        """The effective batch in words, and the GPUs that stand idle."""
        idle = super().n_gpu - self.n_gpu
        factors = f"{self.world_size} x {self.train_batch_size} x {self.gradient_accumulation_steps}"
        text = f"{self.effective_batch_size} samples per step ({factors}: processes, samples, batches)"
        return text + (f"; {idle} GPUs stand idle: torchrun --nproc_per_node {idle + 1} uses all" if idle > 0 else "")

    def compared(self) -> dict:
        """The arguments that change what is learnt: a run with others never takes a finished or begun run's folder."""
        settings = self.to_dict()
        return {name: settings[name] for name in COMPARED} | {"effective_batch_size": self.effective_batch_size}

    def recorded(self) -> dict:
        """The arguments that change how fast, and in which pieces, the same is learnt: a run may be resumed with
        others."""
        settings = self.to_dict()
        return {"processes": self.world_size} | {name: settings[name] for name in RECORDED}


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Every field of transformers.TrainingArguments is in one of these four (tests/test_training_arguments.py).
COMPARED = words("""
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed train_sampling_strategy tf32
""")
RECORDED = words("""
    per_device_train_batch_size gradient_accumulation_steps bf16 fp16 use_cpu full_determinism
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
""")
FREE = words("""
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id save_strategy save_steps save_total_limit save_on_each_node
    debug skip_memory_metrics local_rank
""")
REFUSED = {  # reason: fields
    "--results_dir and --run_name (a judge's --output) say where a run is written": words("output_dir"),
    "a command given again resumes by itself": words("""
        resume_from_checkpoint ignore_data_skip save_only_model restore_callback_states_from_checkpoint do_train
        enable_jit_checkpoint
    """),
    "--seed orders the data": words("data_seed dataloader_in_order dataloader_drop_last"),
    "the loss is the cross-entropy of the answers' tokens, each weighing alike": words("""
        label_smoothing_factor average_tokens_across_devices label_names
    """),
    "held-out rows are scored by evaluator/evaluate_likelihood.py": words("""
        eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        bf16_full_eval fp16_full_eval do_eval do_predict load_best_model_at_end metric_for_best_model greater_is_better
    """),
    "nothing is uploaded; for gated models set HF_TOKEN in the environment": words("""
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    """),
    "this project does not honour it": words("""
        optim_target_modules use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha auto_find_batch_size
        accelerator_config parallelism_config remove_unused_columns length_column_name
    """),
}


def refuse_ignored(settings: dict, training: type) -> None:
    """UserError for a field of REFUSED that is not as the dataclass `training` has it by default."""
    defaults = {
        field.name: field.default_factory() if field.default is MISSING else field.default for field in fields(training)
    }
    for reason, names in REFUSED.items():
        for name in names:
            if settings[name] != defaults[name]:
                raise UserError(f"--{name}: {reason}; leave it out")


class TrainParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line (TrainingArguments alone has over a hundred flags to print)."""

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')} ({HELP_ALL} lists every flag)")


def parse(argv: list[str] | None, arguments: type, training: type = TrainArguments) -> tuple:
    """(a script's own flags, TrainingArguments) from `argv` (default: the command line); UserError on a bad flag."""
    argv = sys.argv[1:] if argv is None else argv
    parser = TrainParser(training, allow_abbrev=False, add_help=False)
    if HELP_ALL in argv:
        cli.Parser(arguments).print_help()
        print("\ntransformers.TrainingArguments:\n" + parser.format_help().partition("options:")[2])
        sys.exit(0)
    args, rest = cli.parse_known(argv, arguments, cli.TRAINING_EPILOG)
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UserError(f"{' '.join(unknown)}: not a flag of this script (--help and {HELP_ALL} list them)")
    settings = vars(namespace)
    if args.batch_size is not None:
        flags = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in rest}
        if "per_device_train_batch_size" in flags:
            raise UserError("--batch_size is short for --per_device_train_batch_size: give one of them")
        settings["per_device_train_batch_size"] = args.batch_size
    refuse_ignored(settings, training)
    args.dtype = resolve_precision(args.dtype, settings["bf16"], settings["fp16"], settings["use_cpu"])
    compute_dtype = pick_dtype(args.dtype)
    settings |= {"bf16": compute_dtype == torch.bfloat16, "fp16": compute_dtype == torch.float16}
    try:
        trained = training(**settings)
    except (ValueError, ImportError, OSError, TypeError) as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error
    if trained.mixed_precision != (wanted := "bf16" if trained.bf16 else "fp16" if trained.fp16 else "no"):
        raise UserError(
            f"accelerate's mixed precision is {trained.mixed_precision}, and --dtype asks for {wanted}: leave "
            "mixed_precision out of accelerate's configuration; --dtype decides it"
        )
    if trained.process_index > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (of several processes the first one speaks)
    return args, trained


def resolve_precision(dtype: str, bf16: bool | None, fp16: bool | None, use_cpu: bool = False) -> str:
    """The one --dtype that --dtype, --bf16 and --fp16 ask for; UserError where they contradict each other.

    Frozen weights are held and products run in it; the trained matrices, the router, its losses and the drift are fp32.
    TrainingArguments must be made with bf16 and fp16 as it says: they fix Accelerate's mixed precision when made.
    """
    if bf16 and fp16:
        raise UserError("--bf16 1 contradicts --fp16 1: give one of them")
    if dtype == "auto":
        dtype = "bfloat16" if bf16 else "float16" if fp16 else dtype_name(dtype)
        if (dtype, False) in (("bfloat16", bf16), ("float16", fp16)):
            dtype = "float32"
    compute_dtype = pick_dtype(dtype)
    for name, value, stands_for in (("bf16", bf16, torch.bfloat16), ("fp16", fp16, torch.float16)):
        if value is not None and value != (compute_dtype == stands_for):
            raise UserError(f"--dtype {dtype} contradicts --{name} {int(value)}: leave one of them out")
    if use_cpu and compute_dtype == torch.float16:
        raise UserError("--dtype float16 contradicts --use_cpu: float16 needs a GPU")
    return dtype
