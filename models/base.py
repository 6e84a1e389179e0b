"""The base model: which one, where it lies, in which dtype it is loaded."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import config
from cli import NF4
from config import EMBEDDED_MODEL, PAPER_BASE_MODEL, UserError
from data import hub
from models import four_bit
from models.causal_lm import (
    VERIFIED,
    answer_loss_class,
    is_verified,
    model_class_of,
    skeleton,
    why_computes_otherwise,
    why_unfit,
)
from models.embedded import PACKAGES, embedded_model_dir
from workspace.files import read_json

NO_HUB = (
    "set HF_TOKEN to a token whose account has accepted the model's licence on huggingface.co, or run the embedded "
    f"model with --base_model {EMBEDDED_MODEL} --data_source sample"
)


def base_path(base_model: str) -> str:
    """What `from_pretrained` takes for a `--base_model`: a hub id or local folder as it is, an embedded model
    converted."""
    return str(embedded_model_dir(base_model)) if base_model in PACKAGES else base_model


def same_base(first: str, second: str) -> bool:
    """Whether two spellings name one base model (a folder by any path to it)."""
    return first == second or (Path(first).is_dir() and Path(second).is_dir() and Path(first).samefile(second))


def local_folder(base_model: str) -> Path:
    """The folder that holds a base model's files: its own, or the hub's cache after downloading what is missing."""
    path = base_path(base_model)
    if Path(path).is_dir():
        return Path(path)
    check_available(base_model)
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "tokenizer*", "*.jinja", weights]
            folder = Path(snapshot_download(base_model, token=config.hf_token, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # huggingface_hub and the network below it each raise their own kinds
        raise hub.unavailable(base_model, "model", error, NO_HUB) from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that a model folder's weights are read from. UserError if it has none, or not all that its index
    names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            files = sorted({folder / file for file in read_json(index)["weight_map"].values()})
            if missing := [file.name for file in files if not file.exists()]:
                raise UserError(f"{folder}: {missing[0]} is missing, which {index.name} names")
            return files
    raise UserError(f"{folder}: holds no weights (model.safetensors, or the files of an index)")


def check_available(base_model: str) -> None:
    """UserError, within seconds, if a base is neither a folder nor to be had from the hub."""
    if base_model not in PACKAGES and not Path(base_model).is_dir():
        hub.check_available(base_model, "model", NO_HUB)


def load_config(base_model: str):
    """The configuration of a model of any architecture; of an export that holds its base, the base's. UserError if it
    cannot be had. Needs no weights."""
    check_available(base_model)
    path = Path(base_path(base_model))
    try:
        settings = read_json(path / "config.json") if (path / "config.json").exists() else {}
        if "base_model_type" in settings:  # models/shared.py's: its own class is code that this project does not run
            dropped = ("auto_map", "mixture", "architectures", "model_type", "base_model_type")
            return AutoConfig.for_model(
                settings["base_model_type"], **{k: v for k, v in settings.items() if k not in dropped}
            )
        return AutoConfig.from_pretrained(str(path) if path.exists() else base_model, token=config.hf_token)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def load_base_config(base_model: str, with_experts: bool = False) -> PreTrainedConfig:
    """The configuration of a base model that the mixture fits, with a warning where nobody has tried its family. Needs
    no weights. UserError if it cannot be had, or does not fit."""
    base_config = load_config(base_model)
    if not with_experts and (does := holds_or_names_base(base_model)):
        raise UserError(
            f"--base_model {base_model}: is a fused model that {does} its base; name it as a run, and give its base "
            "here"
        )
    try:
        unfit = why_unfit(skeleton(base_config))
    except UserError as error:
        raise UserError(f"--base_model {base_model}: {error}") from error
    if unfit:
        raise _unfit(base_model, base_config, unfit)
    if base_config.model_type not in VERIFIED:
        warn_of_family(base_model, base_config.model_type)
    return base_config


def holds_or_names_base(base_model: str) -> str | None:
    """What a shared export (models/shared.py) does with its base, "holds" or "names"; None for another model."""
    path = Path(base_path(base_model)) / "config.json"
    settings = read_json(path) if path.exists() else {}
    if "base_model_type" not in settings:
        return None
    return "names" if settings["mixture"].get("base") else "holds"


@cache  # once
def warn_of_family(base_model: str, model_type: str) -> None:
    print(
        f"warning: {base_model} is a {model_type} model: its FFN is of the form that the mixture needs, but no test "
        f"covers its family; covered are {', '.join(VERIFIED.values())}",
        file=sys.stderr,
    )


def _unfit(base_model: str, base_config: PreTrainedConfig, why: str) -> UserError:
    return UserError(f"--base_model {base_model}: the mixture does not fit a {base_config.model_type} model: {why}")


def load_base(
    base_model: str,
    dtype: torch.dtype | str,
    with_class: Callable[[type[PreTrainedModel]], type[PreTrainedModel]] = answer_loss_class,
    with_experts: bool = False,
    device_map: str | dict | None = None,
) -> PreTrainedModel:
    """A base model in a torch.dtype or what a --dtype says, as its family's class that `with_class` adds to. UserError
    if it cannot be had, or does not fit the mixture, or holds experts too (with_experts: whose base is wanted)."""
    base_config = load_base_config(base_model, with_experts)
    model = load_weights(with_class(model_class_of(base_config)), base_model, base_config, dtype, device_map)
    if not is_verified(base_config) and (why := why_computes_otherwise(model)):
        raise _unfit(base_model, base_config, why)
    return model


def load_tokenizer(base_model: str):
    """The base model's tokenizer; UserError if it cannot be had."""
    own_config = load_config(base_model)
    try:
        return AutoTokenizer.from_pretrained(base_path(base_model), token=config.hf_token, config=own_config)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def _not_loaded(base_model: str, error: Exception) -> UserError:
    if Path(base_model).exists():
        return UserError(f"--base_model {base_model}: no model folder ({' '.join(str(error).split())[:200]})")
    return hub.unavailable(base_model, "model", error, NO_HUB)


def load_weights(
    model_class, base_model: str, base_config, dtype: torch.dtype | str, device_map: str | dict | None = None
):
    """`model_class.from_pretrained` on the base's weights, in a torch.dtype or what a --dtype says; UserError if they
    cannot be had. On the CPU (in 4 bits on the GPU if there is one), or where accelerate puts them by `device_map`:
    UserError if some would not fit on the GPUs."""
    transformers_logging.disable_progress_bar()  # "Loading weights": over in a second, or the hub shows its own
    kind = pick_dtype(dtype) if isinstance(dtype, str) else dtype
    check_available(base_model)
    settings = {"quantization_config": four_bit.quantization(kind)} if dtype == NF4 else {}
    if device_map is not None:
        settings["device_map"] = device_map
    try:
        model = model_class.from_pretrained(
            base_path(base_model),
            config=base_config,
            dtype=kind,
            token=config.hf_token,
            attn_implementation=training_attention(),
            **settings,
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error
    if dtype == NF4:
        four_bit.keep_order(model)
    if any(parameter.is_meta for parameter in model.parameters()):  # left on the CPU or the disk, fetched at each call
        raise UserError(f"--device_map {device_map}: {base_model} does not fit on the GPUs; take --dtype nf4, or more")
    return model


def training_attention() -> str:
    """The attention that trains here: on a CPU, sequences of a few hundred tokens go faster without PyTorch's fused
    one."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def pick_dtype(name: str) -> torch.dtype:
    """The dtype the base computes in; "auto" is bfloat16 where the device is fast in it, else
    float16 on a GPU and float32 on a CPU."""
    if name not in ("auto", NF4):
        if name == "float16" and not torch.cuda.is_available():
            raise UserError("--dtype float16: needs a GPU; on this machine take bfloat16 or float32")
        return getattr(torch, name)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    # AVX-512's bfloat16 alone does not pay: on a Xeon without AMX a training step took 1.8 times as long as in float32,
    # scoring 1.4 times, and decoding the same.
    # With ATEN_CPU_CAPABILITY below AVX512 PyTorch's attention in bfloat16 fails on a CPU with AMX.
    amx = torch.cpu.get_capabilities().get("amx_bf16") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if amx else torch.float32


def own_dtype(base_config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a base's weights are kept in, as its configuration records it; float32 where it does not."""
    return base_config.dtype or torch.float32


def dtype_name(name: str) -> str:
    """A --dtype as runs record it: what "auto" is on this device, else itself."""
    return name if name == NF4 else str(pick_dtype(name)).removeprefix("torch.")


def default_base_model(given: str | None) -> str:
    """`--base_model` of a first stage: as given (a folder by its absolute path), else the paper's."""
    if given is None:
        return PAPER_BASE_MODEL
    return str(Path(given).resolve()) if Path(given).is_dir() else given
