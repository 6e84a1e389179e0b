"""What a base model is, wherever it lies and whatever it is called: one digest of its shape and its tensors, and one of
its tokenizer."""

import hashlib
import json
from functools import cache
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from config import BASE_MODELS_DIR, UserError
from models import base
from workspace.files import write_json

# A model's shape as every version of transformers writes it; names of layers, tokens and files are not part of it.
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)
OTHER_SHAPE = (  # what other families than Llama have beside it
    "hidden_activation",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)
PROBE = (
    "### Instruction:\nWhy 3.14, 1 000 or 2^10?\t(don't  guess)\r\n\n### Response:\n Ärger, naïveté, ΑΒΓ; Жизнь! "
    "שלום 日本語 한국어 हिन्दी العربية 🙂 <s></s> def f(x): return x_1 == 'y'"
)
EARLIER = ("llama", "mixtral")  # whose digests were made before there were others
KEPT = BASE_MODELS_DIR / "identities.json"  # digests already made: reading 13 GB takes a minute
CHUNK_BYTES = 2**24
SHOW_PROGRESS_BYTES = 10**9


def base_sha256(base_model: str) -> str:
    """The digest of a `--base_model`: its configuration and the contents of its tensors, not its path or files.

    Made once per set of weight files (by size and time of change) and kept in results/base_models. The weights of a
    hub id are downloaded first. UserError if the base or its weights cannot be had.
    """
    folder = base.local_folder(base_model)
    settings = base.load_config(base_model)
    shape = {name: getattr(settings, name, None) for name in SHAPE}
    if settings.model_type not in EARLIER:
        shape |= {name: getattr(settings, name, None) for name in OTHER_SHAPE}
    files = [
        [path.name, stat.st_size, stat.st_mtime_ns] for path in base.weight_files(folder) for stat in [path.stat()]
    ]
    kept = read_digests().get(str(folder.resolve()), {})
    if kept.get("files") != files:
        sha256 = tensors_sha256([folder / name for name, *_ in files], bool(shape["tie_word_embeddings"]))
        kept = {"files": files, "sha256": sha256}
        keep_digest(folder.resolve(), kept)
    return hashlib.sha256(json.dumps([shape, kept["sha256"]], sort_keys=True).encode()).hexdigest()


@cache
def tokenizer_sha256(base_model: str) -> str:
    """The digest of how a `--base_model` makes tokens of text: its vocabulary, the tokens of a text of many scripts,
    those at a text's ends, and its chat template. UserError if the tokenizer cannot be had."""
    tokenizer = base.load_tokenizer(base_model)
    seen = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer(PROBE)["input_ids"],
        tokenizer(PROBE, split_special_tokens=True)["input_ids"],
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def tensors_sha256(files: list[Path], tied: bool) -> str:
    """One digest of all tensors' names, dtypes, shapes and bytes, however they are spread over files.

    A tied head and rotary frequencies, which some files repeat and others leave out, do not count.
    """
    lines = []
    size = sum(file.stat().st_size for file in files)
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="base model's digest", disable=size < SHOW_PROGRESS_BYTES
    ) as bar:
        for path in files:
            with open(path, "rb") as file:
                if path.suffix != ".safetensors":
                    lines.append(f"{path.name} {chunks_sha256(file, path.stat().st_size, bar)}")
                    continue
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                header.pop("__metadata__", None)
                for name, tensor in header.items():
                    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                        continue
                    begin, end = tensor["data_offsets"]
                    file.seek(start + begin)
                    lines.append(f"{name} {tensor['dtype']} {tensor['shape']} {chunks_sha256(file, end - begin, bar)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def chunks_sha256(file, num_bytes: int, bar: tqdm) -> str:
    digest = hashlib.sha256()
    while num_bytes > 0:
        chunk = file.read(min(num_bytes, CHUNK_BYTES))
        if not chunk:
            raise UserError(f"{file.name}: ends before its last tensor; download it again")
        digest.update(chunk)
        num_bytes -= len(chunk)
        bar.update(len(chunk))
    return digest.hexdigest()


def read_digests() -> dict[str, dict]:
    """{folder: {files: [[name, size, time of change in ns], ...], sha256}} of what was read before; an unreadable file
    is as none."""
    try:
        return json.loads(KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def keep_digest(folder: Path, kept: dict) -> None:
    """Add a folder's digest, and forget those of folders that are gone."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT.with_suffix(".lock")):
        digests = {path: value for path, value in read_digests().items() if Path(path).is_dir()}
        write_json(KEPT, {**digests, str(folder): kept})
