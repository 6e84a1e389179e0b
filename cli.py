"""The command line: flags as dataclasses, one line and exit code 2 for a user's mistake, flags that scripts share."""

import argparse
import ctypes
import dataclasses
import functools
import math
import platform
import re
import sqlite3
import sys
import typing
import warnings
from dataclasses import dataclass, field

from config import EMBEDDED_MODEL, GENERAL, PAPER_BASE_MODEL, RESULTS_DIR, XSTEST, UserError

DTYPES = ("auto", "bfloat16", "float16", "float32")
NF4 = "nf4"  # QLoRA's 4-bit data type (https://arxiv.org/abs/2305.14314)
HELP_ALL = "--help_all"
# How safetensors and PyTorch say that the system would not write: in errors that are no OSError
WRITE_FAILED = ("(os error ", "PytorchStreamWriter", "iostream error", "inline_container.cc")
NO_TASKS = (
    "raw",
    "raw_chat",
    "mix",
    "moe",
    "all",
    "aligned",
    "mean",
    GENERAL,
    XSTEST,
)  # what else stands where a task may
TASKS_HELP = (
    "the tasks, comma-separated and in order; any other than the paper's is read from NAME_train.jsonl and "
    "NAME_test.jsonl"
)
TRAINING_EPILOG = f"""every field of transformers.TrainingArguments is a flag too ({HELP_ALL} lists them), such as
--learning_rate 5e-4 --num_train_epochs 3 --per_device_train_batch_size 8 --lr_scheduler_type linear --seed 42"""


def command(main):
    """Decorate a script's `main`: a UserError, or a file or disk that fails, becomes one line on stderr and exit code
    2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's use of an old name
        keep_freed_memory()
        try:
            main(argv)
        except UserError as error:
            exit_with(error)
        except Exception as error:
            if out_of_memory(error):
                remedy = "take a smaller --batch_size where it has one, or another --dtype; what was finished is kept"
                exit_with(UserError(f"out of memory ({said(error)}); {remedy}"))
            if (problem := file_problem(error)) is None:
                raise
            exit_with(UserError(f"{problem}; what was finished is kept: mend this, and run the same command again"))
        except KeyboardInterrupt:
            print("stopped: run the same command again to resume", file=sys.stderr)
            sys.exit(130)

    return run


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch could not allocate memory, on a GPU or (it has no class of its own for that) on the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def said(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split())[:400]


def file_problem(error: Exception) -> str | None:
    """What failed, in one line, if it was a file, a disk or a database; None for another error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, sqlite3.Error):
        return f"the file of judgements: {said(error)}"
    if isinstance(error, OSError) or any(sign in str(error) for sign in WRITE_FAILED):
        return said(error)
    return None


def exit_with(error: UserError) -> typing.NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: handing it back and faulting it in again costs a CPU training step a quarter."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


# ---- flags -----------------------------------------------------------------------------------------------------------


def flag(default, text: str, **metadata):
    """A dataclass field that is a flag: its default, its help and, as `choices`, the values it takes."""
    return field(default=default, metadata={"help": text, **metadata})


def flag_with(only_with: dict, default, text: str, **metadata):
    """A `flag` that has an effect only where other flags, given before it, have the values of `only_with` (of a tuple:
    one of them)."""
    text = text if default is None else f"{text} (default: {default})"
    return flag(None, text, only_with=only_with, default_value=default, **metadata)


def resolve_conditional_flags(args) -> None:
    """Give the conditional flags of a dataclass their defaults; UserError for one that would be ignored."""
    for item in dataclasses.fields(args):
        if getattr(args, item.name) is None and "only_with" in item.metadata:
            setattr(args, item.name, item.metadata["default_value"])
            continue
        for name, needed in item.metadata.get("only_with", {}).items():
            if not has_one_of(args, name, needed):
                value, values = getattr(args, item.name), " or ".join(map(str, one_or_more(needed)))
                raise UserError(f"--{item.name} {value}: has an effect with --{name} {values} only; leave it out")


def one_or_more(needed) -> tuple:
    return needed if isinstance(needed, tuple) else (needed,)


def has_one_of(args, name: str, needed) -> bool:
    """Whether a flag has the value, or one of the values, that another flag needs."""
    return getattr(args, name) in one_or_more(needed)


def effective_flags(args) -> dict:
    """The conditional flags of a dataclass whose conditions hold: name to value."""
    return {
        item.name: getattr(args, item.name)
        for item in dataclasses.fields(args)
        if (only_with := item.metadata.get("only_with"))
        and all(has_one_of(args, name, needed) for name, needed in only_with.items())
    }


def check(name: str, value, holds: bool, allowed: str) -> None:
    """Raise a UserError naming the flag, its value and what is allowed, unless `holds`."""
    if not holds:
        raise UserError(f"--{name} {value}: must be {allowed}")


def check_not_given(reason: str, **values) -> None:
    """Raise a UserError for a flag (None: not given) that would be ignored, and say why."""
    for name, value in values.items():
        if value is not None:
            raise UserError(f"--{name} {value}: {reason}; leave it out")


def check_default(args, reason: str, *names: str) -> None:
    """Raise a UserError for a flag that is not at its default although it would be ignored, and say why."""
    defaults = {item.name: item.metadata.get("default_value", item.default) for item in dataclasses.fields(args)}
    check_not_given(reason, **{n: getattr(args, n) if getattr(args, n) != defaults[n] else None for n in names})


def check_at_least(minimum: int, **values: int | None) -> None:
    """`check` of whole numbers; None passes."""
    for name, value in values.items():
        check(name, value, value is None or value >= minimum, f"{minimum} or more")


def check_seed(seed: int | None) -> None:
    """`check` of a seed, which all generators of random numbers take; None passes."""
    check("seed", seed, seed is None or 0 <= seed < 2**32, "from 0 to 4294967295")


def check_num_samples(**values: int) -> None:
    """`check` of numbers of rows: -1 stands for all."""
    for name, value in values.items():
        check(name, value, value == -1 or value > 0, "-1 (all) or positive")


def read_tasks(text: str, flag: str = "tasks") -> tuple[str, ...]:
    """--tasks, or another flag of tasks, as names, in order. UserError for one that is none, is given twice, or means
    something else."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in NO_TASKS or "_seed_" in name or "_bias_" in name:
            said = f"must be small letters, digits and _, and not {', '.join(NO_TASKS)}"
            raise UserError(f"--{flag} {text}: {name}: {said}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--{flag} {text}: name each task once, with commas")
    return names


def read_pairs(text: str, flag: str, form: str) -> dict[str, str]:
    """NAME=VALUE pairs of a flag, comma-separated. UserError for what is none (form: how to write one), or a name given
    twice."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not name or not equals:
            raise UserError(f"--{flag} {text}: {part.strip() or 'an empty part'}: write {form}, comma-separated")
        if name in pairs:
            raise UserError(f"--{flag} {text}: {name} is given twice")
        pairs[name] = value
    return pairs


def read_number(value: str) -> float:
    """A number; NaN for what is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


class Parser(argparse.ArgumentParser):
    """The flags of one dataclass. Errors are a UserError of one line."""

    def __init__(self, arguments: type, epilog: str | None = None):
        about = (sys.modules[arguments.__module__].__doc__ or "").partition("\n\n")[0].rstrip(":")
        super().__init__(
            description=about,
            allow_abbrev=False,
            usage="%(prog)s [--flag value ...]",
            epilog=epilog,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120),
        )
        hints = typing.get_type_hints(arguments)
        for item in dataclasses.fields(arguments):
            (kind,) = set(typing.get_args(hints[item.name]) or (hints[item.name],)) - {type(None)}
            text = item.metadata["help"].replace("%", "%%")
            default = "" if item.default is None else f" (default: {item.default})"
            choices = item.metadata.get("choices")
            metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
            self.add_argument(
                f"--{item.name}",
                type=kind,
                default=item.default,
                choices=choices,
                metavar=metavar,
                help=text + (default if "(default" not in text else ""),
            )

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def parse(argv: list[str] | None, arguments: type, epilog: str | None = None):
    """One instance of the dataclass `arguments` from `argv` (default: the command line); UserError on a bad flag.

    epilog: text below the flags in --help.
    """
    return arguments(**vars(Parser(arguments, epilog).parse_args(argv)))


def parse_known(argv: list[str] | None, arguments: type, epilog: str) -> tuple:
    """(an instance of `arguments`, the other flags as they stand), for a script that also takes a library's flags."""
    known, rest = Parser(arguments, epilog).parse_known_args(argv)
    return arguments(**vars(known)), rest


def check_early(parse_flags, *args) -> None:
    """Parse the command line of a script before its heavy imports, so that --help and mistakes answer at once."""
    if HELP_ALL in sys.argv[1:]:
        return  # needs those imports
    try:
        parse_flags(None, *args)
    except UserError as error:
        exit_with(error)


# ---- flags that several scripts share --------------------------------------------------------------------------------


@dataclass
class BaseArguments:
    """The base model (None: as the earlier stage recorded, else the paper's) and the place of all results."""

    base_model: str | None = flag(
        None, f"the base model: a hub id, a local folder, {EMBEDDED_MODEL} or gemma3 (default: {PAPER_BASE_MODEL})"
    )
    results_dir: str = flag(str(RESULTS_DIR), "the folder that runs are written to and read from (default: results)")


@dataclass
class SourceArguments(BaseArguments):
    """And the data (None: as the earlier stage recorded), and the precision of the base."""

    data_source: str | None = flag(
        None, "hub, sample (the rows in this repository), or a folder of jsonl files (default: as recorded, else hub)"
    )
    dtype: str = flag(
        "auto",
        "precision of the base's weights; auto: bfloat16 where the device is fast in it, else float16 on a GPU, "
        "float32 on a CPU; nf4: 4 bits by bitsandbytes",
        choices=[*DTYPES, NF4],
    )


@dataclass
class AnsweringArguments(SourceArguments):
    """And where a model that answers or is scored lies."""

    device_map: str | None = flag(
        None, "auto: spread a base larger than one GPU over all of them (accelerate)", choices=["auto"]
    )
