"""Paths, the three tasks in order, every flag with its check, and the names of runs."""

import ctypes
import functools
import math
import os
import platform
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent
RESULTS_DIR = ROOT / "results"
BASE_MODELS_DIR = RESULTS_DIR / "base_models"  # the embedded model, converted once
MOE_DIR = ROOT / "models" / "moe"  # the fused model before its alignment

TASKS = ("helpfulness", "safety", "truthfulness")  # the order of the experts
XSTEST = "xstest"  # prompts that only look unsafe, and unsafe ones: answered and scored, never trained on
PAPER_BASE_MODEL = "meta-llama/Llama-2-7b-hf"
EMBEDDED_MODEL = "smollm2"
DTYPES = ("auto", "bfloat16", "float16", "float32")
NF4 = "nf4"  # QLoRA's 4-bit data type (https://arxiv.org/abs/2305.14314)
BEAVER_DAM_JUDGE = "PKU-Alignment/beaver-dam-7b"  # the paper's safety judge

# A Hugging Face token for gated models. Assign it here or set HF_TOKEN; it is never written to disk.
hf_token = os.environ.get("HF_TOKEN")

# The paper's truth and information judges are fine-tuned OpenAI engines: name yours here for --judge openai.
truthful_engine_name = None
informative_engine_name = None


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback, with exit code 2."""


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: handing it back and faulting it in again costs a CPU training step a quarter."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def command(main):
    """Decorate a script's `main`: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's use of an old name
        keep_freed_memory()
        transformers_logging.disable_progress_bar()  # "Loading weights": over in a second, or the hub shows its own
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    return run


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line (TrainingArguments alone has over a hundred flags to print)."""

    def __init__(self, *dataclass_types, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists every flag)")


def parse(argv: list[str] | None, *dataclass_types) -> tuple:
    """Parse `argv` (default: the command line) into one instance per dataclass; UserError on any bad flag."""
    try:
        return Parser(*dataclass_types).parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError, OSError, TypeError) as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error


def check(flag: str, value, holds: bool, allowed: str) -> None:
    """Raise a UserError naming the flag, its value and what is allowed, unless `holds`."""
    if not holds:
        raise UserError(f"--{flag} {value}: must be {allowed}")


def flag(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class BaseArguments:
    """The base model (None: as the earlier stage recorded, else the paper's) and the place of all results."""

    base_model: str | None = flag(
        None, f"hub id, local folder, or '{EMBEDDED_MODEL}' for the embedded model (default: {PAPER_BASE_MODEL})"
    )
    results_dir: str = flag(str(RESULTS_DIR), "where every run is written and looked for")


@dataclass
class SourceArguments(BaseArguments):
    """And the data (None: as the earlier stage recorded), and the precision of the base."""

    data_source: str | None = flag(None, "'hub' (default), 'sample' (in this repository), or a folder of jsonl files")
    dtype: str = flag(
        "auto",
        "of the base weights: auto (bfloat16 where the device is fast in it), float32, ...; nf4: "
        "4 bits by bitsandbytes, multiplied in what auto says",
        choices=[*DTYPES, NF4],
    )


@dataclass
class AlignArguments(SourceArguments):
    """What align_basemodel.py adds to transformers.TrainingArguments."""

    task_name: str | None = flag(
        None, "which data to align on (default with --moe_flag 1: mix)", choices=[*TASKS, "mix"]
    )
    moe_flag: int = flag(0, "0: align one expert (LoRA on the base); 1: align the fused mixture", choices=[0, 1])
    moe_dir: str = flag(str(MOE_DIR), "the fused model that --moe_flag 1 starts from")
    num_samples: int = flag(-1, "training rows per task, drawn with --seed; -1: all")
    max_length: int = flag(300, "tokens; of a longer sample the prompt is cut first")
    batch_size: int | None = flag(None, "samples per device and step; short for --per_device_train_batch_size")
    # one expert
    rank: int = flag(8, "LoRA rank r")
    alpha: float = flag(4, "LoRA alpha")
    lora_dropout: float = flag(0.1, "LoRA dropout (experts, and attention with --tune_attention 1)")
    # the mixture
    expert_topk: int | None = flag(None, "experts per token, 1 to their number (default: as fused)")
    gate_loss_weight: float = flag(0.0, "lambda of the gating loss")
    helpfulness_weight: float = flag(0.0, "gamma_1: weight of the helpfulness expert's drift")
    safety_weight: float = flag(0.0, "gamma_2: weight of the safety expert's drift")
    truthfulness_weight: float = flag(0.0, "gamma_3: weight of the truthfulness expert's drift")
    gate_tokens: str = flag(
        "instruction",
        "tokens the gating loss averages over: those after the template's opening, or all (the paper)",
        choices=["instruction", "all"],
    )
    gate_gradient: str = flag(
        "all",
        "what the gating loss trains: all (routers and experts: the paper), or the routers alone",
        choices=["all", "router"],
    )
    gate_balance: str = flag(
        "task", "whether tasks weigh alike in the gating loss, or samples (the paper)", choices=["task", "sample"]
    )
    router_learning_rate: float = flag(0.1, "learning rate of the router")
    train_router: int = flag(1, "0: freeze the router (ablation)", choices=[0, 1])
    tune_attention: int = flag(0, "1: add LoRA on q, k, v, o, as the released code does", choices=[0, 1])

    def __post_init__(self):
        if self.task_name is None:
            if not self.moe_flag:
                raise UserError(f"--moe_flag 0 aligns one expert: name it with --task_name {{{','.join(TASKS)},mix}}")
            self.task_name = "mix"
        check("rank", self.rank, self.rank >= 1, "1 or more")
        check("alpha", self.alpha, math.isfinite(self.alpha) and self.alpha > 0, "a finite number above 0")
        check("expert_topk", self.expert_topk, self.expert_topk is None or self.expert_topk >= 1, "1 or more")
        check("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")
        check("max_length", self.max_length, self.max_length >= 16, "16 or more")
        check("num_samples", self.num_samples, self.num_samples == -1 or self.num_samples > 0, "-1 (all) or positive")
        for name in ("gate_loss_weight", *(f"{task}_weight" for task in TASKS)):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value >= 0, "a finite number, 0 or more")
            setattr(self, name, abs(value))  # -0.0 is 0
        rate = self.router_learning_rate
        check("router_learning_rate", rate, math.isfinite(rate) and rate > 0, "a finite number above 0")

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.task_name == "mix" else (self.task_name,)

    @property
    def drift_weights(self) -> dict[str, float]:
        return {task: getattr(self, f"{task}_weight") for task in TASKS}


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
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "train_sampling_strategy",
)


@dataclass
class InferArguments(SourceArguments):
    """Flags of inference.py."""

    task_name: str | None = flag(
        None,
        f"whose prompts to answer; {XSTEST}: those that only look unsafe, for the over-refusal",
        choices=[*TASKS, XSTEST],
    )
    dataset_type: str = flag("test", "which half", choices=["train", "test"])
    num_samples: int = flag(-1, "prompts, evenly spaced over the half; -1: all")
    cross_task: str | None = flag(None, "the run that answers: a name under results/outputs, or a run's folder")
    aligned_flag: int | None = flag(
        None, "without --cross_task: 1 (default) the task's own aligned expert, 0 the raw base model", choices=[0, 1]
    )
    checkpoint_number: int | None = flag(None, "answer with the run's checkpoint-N instead of its end")
    prompt: str | None = flag(None, "answer this instruction in the terminal instead")
    batch_size: int = flag(16, "prompts per batch")
    temperature: float = flag(0.6, "sampling temperature; 0: greedy")
    max_new_tokens: int = flag(512, "longest answer")
    seed: int = flag(42, "of the sampling")
    cache_implementation: str = flag(
        "dynamic",
        "generate's key-value cache; on a GPU it compiles the model for a static one",
        choices=["dynamic", "static"],
    )
    server_url: str | None = flag(
        None,
        "an OpenAI-compatible server that runs the model (vLLM, SGLang, llama.cpp, "
        "transformers serve), such as http://localhost:8000/v1",
    )
    server_model: str | None = flag(None, "the model's name on that server")
    concurrency: int = flag(32, "requests to the server at a time")

    def __post_init__(self):
        if (self.server_url is None) != (self.server_model is None):
            raise UserError("--server_url and --server_model go together: the server, and the model's name on it")
        check("concurrency", self.concurrency, self.concurrency >= 1, "1 or more")
        if self.task_name is None and (self.prompt is None or not (self.cross_task or self.aligned_flag == 0)):
            raise UserError(
                f"name the prompts to answer with --task_name {{{','.join(TASKS)}}}, or give --prompt "
                "with --cross_task RUN or --aligned_flag 0"
            )
        if self.task_name == XSTEST and self.dataset_type != "test":
            raise UserError(f"--dataset_type {self.dataset_type}: {XSTEST} has a test half only")
        if self.cross_task and self.aligned_flag == 0:
            raise UserError("--aligned_flag 0 asks for the raw base and --cross_task for a run: give one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: give it an instruction")
        check("num_samples", self.num_samples, self.num_samples == -1 or self.num_samples > 0, "-1 (all) or positive")
        check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        check("temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more")
        check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")

    @property
    def run(self) -> str:
        """The run that answers, as `models.loading.find_run` takes it."""
        if self.cross_task:
            return self.cross_task
        aligned = "safety" if self.task_name == XSTEST else self.task_name
        return "raw" if self.aligned_flag == 0 else aligned


@dataclass
class LikelihoodArguments(SourceArguments):
    """Flags of evaluator/evaluate_likelihood.py."""

    run: str = flag("raw", "what to score, with commas: raw, names under results/outputs, or runs' folders")
    checkpoint_number: int | None = flag(None, "score the run's checkpoint-N instead of its end")
    task_name: str = flag("all", "which task's held-out rows", choices=[*TASKS, "all"])
    dataset_type: str = flag("test", "which half", choices=["train", "test"])
    num_samples: int = flag(-1, "rows per score, evenly spaced over the half; -1: all")
    max_length: int = flag(300, "tokens; of a longer sample the prompt is cut first")
    batch_size: int = flag(16, "samples per batch")

    def __post_init__(self):
        check("num_samples", self.num_samples, self.num_samples == -1 or self.num_samples > 0, "-1 (all) or positive")
        check("max_length", self.max_length, self.max_length >= 16, "16 or more")
        check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.task_name == "all" else (self.task_name,)


@dataclass
class EvaluateArguments:
    """What the three judged scores share: which answers, and how they are judged."""

    task_name: str | None = flag(
        None,
        "the answers' directory under results/inference/<task>/<split>: raw, aligned or cross_<run> (default: aligned)",
    )
    aligned_flag: int | None = flag(
        None, "without --task_name: 1 the aligned expert's answers, 0 the raw base's", choices=[0, 1]
    )
    checkpoint_number: int | None = flag(None, "the answers of checkpoint-N")
    dataset_type: str = flag("test", "which half was answered", choices=["train", "test"])
    num_samples: int = flag(-1, "answers to judge, evenly spaced over the file; -1: all")
    judge: str | None = flag(None, "who judges")
    judge_url: str | None = flag(
        None, "an OpenAI-compatible server that runs the judge (default: OPENAI_BASE_URL, else OpenAI's)"
    )
    judge_model: str | None = flag(None, "the judge's model name on that server")
    concurrency: int = flag(8, "requests to a server at a time")
    dry_run: int = flag(
        0, "1: say how many requests and tokens a server would be asked, and the price; ask nothing", choices=[0, 1]
    )
    batch_size: int = flag(16, "texts per batch of a local judge")
    dtype: str = flag(
        "auto", "of a local judge's weights: auto (bfloat16 where the device is fast in it), ...", choices=list(DTYPES)
    )
    results_dir: str = flag(str(RESULTS_DIR), "where answers are read and scores written")

    def __post_init__(self):
        if self.task_name and self.aligned_flag is not None:
            raise UserError("--task_name names the answers' directory and --aligned_flag another: give one of them")
        if self.judge:  # a folder, also by its path from the repository's root
            found = next((place for place in (Path(self.judge), ROOT / self.judge) if place.is_dir()), None)
            self.judge = str(found.resolve()) if found else self.judge
        if self.task_name and Path(self.task_name).name != self.task_name:
            raise UserError(
                f"--task_name {self.task_name}: must be a directory's name, such as raw, aligned, cross_<run>"
            )
        check("num_samples", self.num_samples, self.num_samples == -1 or self.num_samples > 0, "-1 (all) or positive")
        check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        check("concurrency", self.concurrency, self.concurrency >= 1, "1 or more")

    @property
    def directory(self) -> str:
        """The answers' directory, as inference.py names it."""
        name = self.task_name or ("raw" if self.aligned_flag == 0 else "aligned")
        return name if self.checkpoint_number is None else f"{name}_{self.checkpoint_number}"


@dataclass
class HelpfulnessArguments(EvaluateArguments):
    """Flags of evaluator/evaluate_helpfulness.py."""

    judge: str | None = flag(
        None,
        "an annotator of alpaca_eval (alpaca_eval_gpt4: the paper's; "
        "weighted_alpaca_eval_gpt4_turbo: AlpacaEval 2's), or a folder with a configs.yaml like "
        "theirs (default: write the files for alpaca_eval and judge nothing)",
    )
    reference_outputs: str | None = flag(
        None,
        "a .json list or .jsonl file of instruction and output to compare with "
        "(default: the answers that came with the prompts)",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.judge is None and (self.judge_url or self.judge_model or self.dry_run):
            raise UserError(
                "--judge_url, --judge_model and --dry_run are of a judge: name it with --judge, such as "
                "alpaca_eval_gpt4"
            )


@dataclass
class SafetyArguments(EvaluateArguments):
    """Flags of evaluator/evaluate_safety.py."""

    judge: str | None = flag(
        BEAVER_DAM_JUDGE,
        "a hub id or a folder: a classifier with beaver-dam's 14 labels, "
        "WildGuard, Llama Guard, or a judge of train_judge.py",
    )
    judge_protocol: str | None = flag(
        None,
        "how the judge is asked (default: by its name)",
        choices=["beaver-dam", "wildguard", "llama-guard", "yes-no"],
    )
    max_length: int = flag(
        256, "tokens a beaver-dam classifier reads; the rest of a longer answer is cut, as in the paper's script"
    )

    def __post_init__(self):
        super().__post_init__()
        check("max_length", self.max_length, self.max_length >= 16, "16 or more")


@dataclass
class TruthArguments(EvaluateArguments):
    """Flags of evaluator/evaluate_truth_and_info.py."""

    mode: int | None = flag(None, "0: truth, 1: information", choices=[0, 1])
    judge: str | None = flag(
        None, "a hub id or a folder of a causal LM, or openai (default: allenai's Llama-2-7B judge of the mode)"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mode is None:
            raise UserError("say what to judge: --mode 0 (truth) or --mode 1 (information)")

    @property
    def kind(self) -> str:
        return ("truth", "information")[self.mode]


@dataclass
class JudgeArguments(SourceArguments):
    """What evaluator/train_judge.py adds to JudgeTrainArguments."""

    kind: str | None = flag(None, "what the judge is to tell", choices=["truth", "information", "safety"])
    output: str | None = flag(None, "where the judge is written (default: judges/<kind> in --results_dir)")
    num_samples: int = flag(-1, "training rows, drawn with --seed; -1: all")
    num_held_out: int = flag(1000, "held-out rows the judge is measured on, evenly spaced; -1: all")
    max_length: int = flag(192, "tokens; of a longer text the middle of the answer is cut")
    batch_size: int | None = flag(None, "short for --per_device_train_batch_size")
    dtype: str = flag(
        "auto",
        "of the base weights: auto (bfloat16 where the device is fast in it), float32, ...",
        choices=list(DTYPES),
    )
    rank: int = flag(16, "LoRA rank r")
    alpha: float = flag(32, "LoRA alpha")
    lora_dropout: float = flag(0.0, "LoRA dropout; drawing it is slow on a CPU")

    def __post_init__(self):
        if self.kind is None:
            raise UserError("say what the judge is to tell: --kind {truth,information,safety}")
        for name in ("num_samples", "num_held_out"):
            value = getattr(self, name)
            check(name, value, value == -1 or value > 0, "-1 (all) or positive")
        check("max_length", self.max_length, self.max_length >= 32, "32 or more")
        check("batch_size", self.batch_size, self.batch_size is None or self.batch_size >= 1, "1 or more")
        check("rank", self.rank, self.rank >= 1, "1 or more")
        check("alpha", self.alpha, math.isfinite(self.alpha) and self.alpha > 0, "a finite number above 0")
        check("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")


@dataclass
class JudgeTrainArguments(TrainArguments):
    """TrainArguments with what trains a judge best in a few minutes."""

    learning_rate: float = flag(4e-4, "of the LoRA matrices")
    num_train_epochs: float = flag(1.0, "epochs")
    per_device_train_batch_size: int = flag(8, "samples per device and batch")
    gradient_accumulation_steps: int = flag(2, "batches per step")
    save_strategy: str = flag("steps", "when to write a checkpoint to resume from")
    save_steps: float = flag(0.25, "every that many steps, or that share of them all")
    save_total_limit: int | None = flag(1, "checkpoints kept")


@dataclass
class FuseArguments(BaseArguments):
    """Flags of models/llama_moe.py."""

    experts_dir: str | None = flag(None, "folder of the experts (default: outputs in --results_dir)")
    experts: str = flag(",".join(TASKS), "the experts' folders there, in order, with commas")
    expert_topk: int = flag(2, "experts per token, 1 to their number")
    output: str = flag(str(MOE_DIR), "where the fused model is written")
    from_pt: str | None = flag(
        None, "a moe.pt of the released code instead of adapters; takes --base_model and --experts"
    )
    max_rank: int = flag(32, "with --from_pt: the largest rank an expert's change of the base may have")
    seed: int = flag(42, "of the router's initial weights")
    save_dtype: str = flag(
        "auto",
        "of the experts on disk: auto keeps the adapters' own, float16 halves the file",
        choices=["auto", "float16", "float32"],
    )

    def __post_init__(self):
        check("max_rank", self.max_rank, self.max_rank >= 1, "1 or more")
        if self.from_pt and self.experts_dir:
            raise UserError("--experts_dir names adapters and --from_pt a fused file: give one of them")
        if self.from_pt and not Path(self.from_pt).is_file():
            raise UserError(f"--from_pt {self.from_pt}: no such file")
        if self.from_pt and not self.base_model:
            raise UserError("--from_pt: name the model the file was fused onto with --base_model")


@dataclass
class ExportArguments:
    """Flags of models/export.py."""

    cross_task: str | None = flag(None, "the fused run to export: a name under results/outputs, or its folder")
    to: str = flag(
        "mixtral",
        "mixtral: a MixtralForCausalLM checkpoint; peft: one expert as an adapter; pt: the released code's moe.pt",
        choices=["mixtral", "peft", "pt"],
    )
    output: str | None = flag(None, "where to write: a new folder, or with --to pt a new file")
    expert: str | None = flag(None, "with --to peft: which expert")
    dtype: str = flag(
        "float32", "of the written weights (peft: always float32)", choices=["bfloat16", "float16", "float32"]
    )
    checkpoint_number: int | None = flag(None, "export the run's checkpoint-N instead of its end")
    results_dir: str = flag(str(RESULTS_DIR), "where runs are looked for")

    def __post_init__(self):
        if not self.cross_task or not self.output:
            raise UserError("name the fused run with --cross_task and where to write with --output")
        if (self.to == "peft") != (self.expert is not None):
            raise UserError("--expert names the one expert that --to peft writes: give both or neither")


def weight_text(value: float) -> str:
    """A loss weight in a run name: %.4f without its dot, and more digits where four decimals would lose it.

    One value, one text: with more than four decimals the dot goes only below 1, where the leading zero keeps it apart.
    """
    decimals = next((d for d in range(4, 40) if float(f"{value:.{d}f}") == value), 40)
    text = f"{value:.{decimals}f}"
    return text if decimals > 4 and value >= 1 else text.replace(".", "")


def fused_run_name(args: AlignArguments, seed: int, topk_as_fused: int = 2) -> str:
    """`mix_moe_reg_{g1}_{g2}_{g3}_gate_{lambda}`, and one more part for each method flag off its default."""
    gammas = "_".join(weight_text(args.drift_weights[task]) for task in TASKS)
    name = f"{args.task_name}_moe_reg_{gammas}_gate_{weight_text(args.gate_loss_weight)}"
    top_k = topk_as_fused if args.expert_topk is None else args.expert_topk
    off_default = {
        "topk": (top_k, 2),
        "router": ("frozen" if not args.train_router else "trained", "trained"),
        "attention": ("tuned" if args.tune_attention else "frozen", "frozen"),
        "gate_tokens": (args.gate_tokens, "instruction"),
        "gate_gradient": (args.gate_gradient, "all"),
        "gate_balance": (args.gate_balance, "task"),
        "seed": (seed, 42),
    }
    return name + "".join(f"_{part}_{value}" for part, (value, default) in off_default.items() if value != default)
