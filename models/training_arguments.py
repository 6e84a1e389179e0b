"""transformers.TrainingArguments as this project trains by it: the paper's values as defaults."""

import math
import sys
from dataclasses import dataclass

from transformers import HfArgumentParser, TrainingArguments

import cli
from cli import HELP_ALL, check, flag
from config import UserError


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

    def __post_init__(self):
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
    try:
        trained, unknown = parser.parse_args_into_dataclasses(
            rest, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError, OSError, TypeError) as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        raise UserError(f"{' '.join(unknown)}: not a flag of this script (--help and {HELP_ALL} list them)")
    return args, trained
