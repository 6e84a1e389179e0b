"""The fused model as a transformers checkpoint that holds the base once, or names it, with the modeling file that runs
it."""

import importlib.util
import json
import re
from collections.abc import Iterator
from inspect import getsource
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from config import BASE_MODELS_DIR, UserError
from models import base, expert_ffn, four_bit, router
from models.base_identity import base_sha256
from models.causal_lm import activation_name, model_class_of, save_generation_config, skeleton
from models.embedded import PACKAGES
from models.expert_ffn import PROJECTIONS
from models.mixture import ATTENTION_PROJECTIONS, SHARED, MixtureConfig, MixtureForCausalLM, mixture_class, read_mixture
from workspace.files import read_json, sha256, write_json

MODELING = "modeling_h3fusion"
AUTO_CLASSES = {
    "AutoConfig": "H3FusionConfig",
    "AutoModel": "H3FusionModel",
    "AutoModelForCausalLM": "H3FusionForCausalLM",
}


def modeling_source(base_config: PreTrainedConfig) -> str:
    """The modeling file of a family: the template, and in it the project's own kernel and router."""
    causal = model_class_of(base_config)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    names = {
        "config": type(base_config).__name__,
        "causal": causal.__name__,
        "model": type(skeleton(base_config).model).__name__,
    }
    return environment.get_template(f"{MODELING}.py.j2").render(kernel=kernel_source(), **names)


def read_back(folder: Path, attention: str, base_folder: Path | None = None) -> PreTrainedModel:
    """A written checkpoint in fp32, run by its own modeling file, as AutoModelForCausalLM would (which copies that file
    into a cache of its own). base_folder: where the base lies that it names."""
    spec = importlib.util.spec_from_file_location(MODELING, folder / f"{MODELING}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.H3FusionForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation=attention, base_model=base_folder
    )


def named_base(folder: Path) -> dict | None:
    """What a written checkpoint has of the base that it names: `id` on the hub, `sha256` (base_identity's), `files`
    ({name: sha256}); None where it holds the base."""
    return read_json(folder / "config.json")["mixture"].get("base")


def load_shared(folder: Path, base_model: str, dtype: str, device_map: str | dict | None = None) -> MixtureForCausalLM:
    """A written checkpoint as this project's own model, without its modeling file. base_model: the folder itself, or
    the base that it names. UserError for a torn one."""
    model = base.load_base(base_model, dtype, mixture_class, True, device_map)
    model.become(read_mixture(folder))
    if named_base(folder) is None:
        index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", "pt") as file:
            index = dict.fromkeys(file.keys(), "model.safetensors")
    own = {key: file for key, file in index.items() if ".mlp.router." in key or ".mlp.low_rank." in key}
    wanted = {key.replace(".mlp.experts.", ".mlp.low_rank.") for key in model.own_state_keys()}
    if odd := set(own) ^ {key for key in wanted if not key.endswith("scaling")}:
        raise UserError(f"{folder}: its index does not fit its config.json (tensor {min(odd)}); export it again")
    for file in set(own.values()):
        tensors = {key: tensor for key, tensor in load_file(folder / file).items() if key in own}
        named = {key.replace(".mlp.low_rank.", ".mlp.experts."): tensor for key, tensor in tensors.items()}
        model.load_state_dict(named, strict=False)
    model.seal_base()
    return model


def kernel_source() -> str:
    """What the modeling file has of this project, line by line: 4 bits, the expert kernel, the router."""
    whole = getsource(expert_ffn)
    kernel = whole[whole.index("PROJECTIONS = ") :].replace("four_bit.", "")
    of_4_bits = [getsource(part) for part in (four_bit.is_quantized, four_bit.dense_weight, four_bit.dequantised_again)]
    routing = [getsource(part) for part in (router.route, router.Router)]
    return "\n\n".join([kernel, *of_4_bits, *routing])


def id_of_base(run_base: str, base_model: str, given: str | None, mixture: MixtureConfig) -> str:
    """The hub's name of a fused run's base, for a checkpoint that names it.

    run_base: as the run recorded it; base_model: as it is loaded; given: --base_id. UserError for a base that others
    cannot load by a name, and for a run that changed it.
    """
    remedy = "take --base copied"
    if mixture.attention_lora is not None:
        raise UserError(f"--base by-name: the run has a tuned attention, which is merged into the base's; {remedy}")
    for name in (base_model, run_base):
        if name in PACKAGES or Path(name).parent == BASE_MODELS_DIR:
            raise UserError(
                f"--base by-name: {Path(name).name} is converted from a GGUF file, and is not the hub's model of that "
                f"name; {remedy}"
            )
    name = given or (run_base if Path(base_model).is_absolute() else base_model)
    if given is None and Path(name).is_absolute():
        raise UserError(f"--base by-name: the base is a local folder, {name}; name it on the hub with --base_id")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--base_id {name}: is no name on the hub; write it as there, organisation/model") from error
    return name


def write_shared(
    run_dir: Path,
    mixture: MixtureConfig,
    tokenizer,
    folder: Path,
    base_model: str,
    dtype: str,
    base_id: str | None = None,
) -> None:
    """Write configuration, modeling file, tokenizer and weights in `dtype`, the base one file at a time. run_dir: the
    fused run's; base_id: the base's name on the hub, which then stands for its weights. UserError for a named base
    whose weights are no safetensors."""
    base_config = base.load_base_config(base_model)
    settings = shared_settings(base_config, mixture, dtype)
    if base_id is not None:
        settings["mixture"] |= {"base_model_name_or_path": base_id, "base": describe_base(base_model, base_id)}
    (folder / f"{MODELING}.py").write_text(modeling_source(base_config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    save_generation_config(tokenizer, base_config, folder)
    write_json(folder / "config.json", settings)
    if base_id is None:
        write_weights(run_dir, mixture, base_model, base_config, getattr(torch, dtype), folder)
    else:
        own = own_tensors(load_file(run_dir / "model.safetensors"))
        save_tensors(own, getattr(torch, dtype), folder / "model.safetensors")


def describe_base(base_model: str, base_id: str) -> dict:
    """What a checkpoint has of a base that it names (named_base)."""
    files = base.weight_files(base.local_folder(base_model))
    if pickles := [path.name for path in files if path.suffix != ".safetensors"]:
        raise UserError(f"{pickles[0]}: by name only safetensors of the base are loaded; take --base copied")
    return {"id": base_id, "sha256": base_sha256(base_model), "files": {path.name: sha256(path) for path in files}}


def shared_settings(base_config: PreTrainedConfig, mixture: MixtureConfig, dtype: str) -> dict:
    """config.json. Nothing in it is called num_experts: engines would take it for a mixture of their own kind."""
    settings = json.loads(base_config.to_json_string(use_diff=False))
    settings.pop("_name_or_path", None)
    named = mixture.base_model_name_or_path
    return settings | {
        "model_type": SHARED,
        "base_model_type": base_config.model_type,
        "architectures": ["H3FusionForCausalLM"],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in AUTO_CLASSES.items()},
        "dtype": dtype,
        "mixture": {
            "experts": mixture.experts,
            "rank": mixture.expert_rank,
            "top_k": mixture.num_experts_per_tok,
            "activation": activation_name(skeleton(base_config).model.layers[0].mlp.act_fn),
            "base_model_name_or_path": None if Path(named).is_absolute() else named,
        },
    }


def write_weights(
    run_dir: Path, mixture: MixtureConfig, base_model: str, base_config, dtype: torch.dtype, folder: Path
) -> None:
    """The base's files one by one, LoRA on its attention merged, and a file of routers and experts; and their index."""
    own = load_file(run_dir / "model.safetensors")
    files = base.weight_files(base.local_folder(base_model))
    total = len(files) + 1
    weight_map, size = {}, 0

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        name = f"model-{number:05}-of-{total:05}.safetensors"
        size += save_tensors(tensors, dtype, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    for number, path in enumerate(files, start=1):
        kept = {}
        for key, tensor in base_tensors(path):
            tied = key == "lm_head.weight" and base_config.tie_word_embeddings
            if not (tied or key.endswith("rotary_emb.inv_freq")):
                kept[key] = with_attention_lora(key, tensor, own, mixture)
        save(number, kept)
    save(total, own_tensors(own))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def save_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, path: Path) -> int:
    """Write tensors in `dtype`; the sum of their bytes."""
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def base_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a base's file, one after the other."""
    if path.suffix != ".safetensors":
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            yield key, file.get_tensor(key)


def with_attention_lora(key: str, tensor: Tensor, own: dict[str, Tensor], mixture: MixtureConfig) -> Tensor:
    """A base tensor, with the LoRA on it where the fusion tuned the attention."""
    module = key.removesuffix(".weight")
    if mixture.attention_lora is None or module.rpartition(".")[2] not in ATTENTION_PROJECTIONS or module == key:
        return tensor
    a, b = (own[f"{module}.lora_{letter}.default.weight"].double() for letter in "AB")
    scaling = mixture.attention_lora["alpha"] / mixture.attention_lora["rank"]
    return tensor.double() + scaling * b @ a


def own_tensors(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Routers and experts under their names in the checkpoint, scalings multiplied in as the kernel has them."""
    tensors = {}
    for key, tensor in own.items():
        layer, _, name = key.rpartition(".")
        if ".mlp.router." in key:
            tensors[key] = tensor
        elif (matrix := re.fullmatch(r"(gate_proj|up_proj|down_proj)_([AB])", name)) is not None:
            projection, side = matrix.groups()
            if side == ("B" if projection == "down_proj" else "A"):
                scaling = own[f"{layer}.scaling"][PROJECTIONS.index(projection)].float()
                tensor = tensor.float() * scaling[:, None, None]  # fp32, whatever the experts are kept in
            tensors[f"{layer.replace('.mlp.experts', '.mlp.low_rank')}.{name}"] = tensor
    return tensors
