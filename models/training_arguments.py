"""transformers.TrainingArguments as this project trains by it: the paper's values as defaults."""

import math
import sys
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser, TrainingArguments

import cli
from cli import HELP_ALL, check, flag
from config import UserError
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
        samplers = ("random", "sequential", "group_by_length", "batch_rebalance")
        check(
            "train_sampling_strategy",
            self.train_sampling_strategy,
            self.train_sampling_strategy in samplers,
            f"one of {', '.join(samplers)}",
        )
        check(
            "eval_strategy",
            self.eval_strategy,
            self.eval_strategy == "no",
            "no: held-out rows are scored by evaluator/evaluate_likelihood.py",
        )
        super().__post_init__()


# TrainingArguments that change what is learnt: a run with others never takes a finished or begun run's folder.
TRAINING_FIELDS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
    "gradient_accumulation_steps", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "seed", "data_seed", "train_sampling_strategy",
)  # fmt: skip


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
        if any(argument.partition("=")[0] == "--per_device_train_batch_size" for argument in rest):
            raise UserError("--batch_size is short for --per_device_train_batch_size: give one of them")
        settings["per_device_train_batch_size"] = args.batch_size
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
