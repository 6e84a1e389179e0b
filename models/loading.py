"""The one loader of every run: raw base, aligned expert, fused mixture, and any checkpoint of them."""

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

import config
from cli import out_of_memory, read_tasks
from config import PAPER_BASE_MODEL, TASKS, UserError
from data.sources import absolute_source
from models import base
from models.adapters import Expert, adapter_sha256, expert_folders, one_line, open_adapters
from models.base_identity import base_sha256, tokenizer_sha256
from models.causal_lm import is_verified
from models.ensemble import load_ensemble
from models.expert_bias import ExpertBias, set_expert_bias
from models.mixture import ENSEMBLE, SHARED, load_fused, read_mixture
from models.processes import check_one_process
from models.shared import load_shared, named_base
from workspace.files import as_written, read_json, sha256
from workspace.run_dir import read_run

WHOLE = ("causal_lm", "shared")  # kinds of run that are their own base
# what PEFT keeps beside an adapter where a vocabulary grew
EMBEDDING = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")


def run_kind(folder: Path | None) -> str:
    """ "raw" (None), "adapter", "fused", "ensemble", "shared" (an export that holds its base), "shared_by_name" (one
    that names it) or "causal_lm" (another whole model: an export, a merge, a base itself).

    UserError for anything else: an empty or torn checkpoint, a run without its weights, a model of another task.
    """
    if folder is None:
        return "raw"
    if (folder / "adapter_config.json").exists():
        check_weights([folder / "adapter_model.safetensors"])
        return "adapter"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds neither an adapter nor a model (adapter_config.json or config.json)")
    if (mixture := read_mixture(folder)) is not None:
        kind = {ENSEMBLE: "ensemble", SHARED: "shared"}.get(mixture.model_type, "fused")
        if kind == "shared" and named_base(folder) is not None:
            kind = "shared_by_name"
        check_weights(base.weight_files(folder) if kind in WHOLE else [folder / "model.safetensors"])
        return kind
    with as_written(folder / "config.json"):
        architectures = read_json(folder / "config.json").get("architectures")
        architecture = str((architectures or ["model of no architecture"])[0])
    if not architecture.endswith("ForCausalLM"):
        raise UserError(f"{folder}: holds a {architecture}; a causal language model is needed")
    check_weights(base.weight_files(folder))
    return "causal_lm"


def check_weights(files: list[Path]) -> None:
    """UserError naming a file of weights that is missing or, if safetensors, torn. Reads headers only."""
    for path in files:
        if not path.exists():
            raise UserError(f"{path.parent}: holds no {path.name}; name a folder with its weights")
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is torn or no safetensors file ({error}); take another checkpoint") from error


def is_fused(folder: Path | None) -> bool:
    """Whether a run's folder holds a fused model, with its base or without. UserError for a folder that holds no
    model."""
    return run_kind(folder) in ("fused", "shared", "shared_by_name")


def base_of_run(folder: Path) -> str:
    """The base model that a run, an adapter or a fused model names; a whole model's folder is its own base."""
    if run_kind(folder) in WHOLE:
        return str(folder.resolve())
    run = read_run(folder)
    if run:
        with as_written(folder):
            return run["run"]["arguments"]["base_model"]
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).exists():
            named = read_json(folder / name).get("base_model_name_or_path") or str(folder)
            if not isinstance(named, str):
                raise UserError(f"{folder / name}: base_model_name_or_path {named} is no name of a model")
            return named


def resolve_base(folder: Path, given: str | None) -> str:
    """The base model to load under a run: the one that it names, or `given`, the same base at another place. A whole
    model's is its own folder, whatever it was made from.

    UserError if `given` is another base, if the base is gone from where the run names it, or if its tokenizer is
    another than the run's.
    """
    kind = run_kind(folder)
    if kind == "shared_by_name":
        return resolve_named_base(folder, given)
    named = base.default_base_model(base_of_run(folder))
    if given is None and Path(named).is_absolute() and not Path(named).is_dir():
        raise UserError(f"{folder}: its base model is no longer at {named}; give its new place with --base_model")
    base_model = named if given is None else same_base_at(folder, named, base.default_base_model(given))
    if kind in WHOLE:
        return named
    recorded = (read_run(folder) or {"run": {"arguments": {}}})["run"]["arguments"].get("tokenizer_sha256")
    if recorded not in (None, tokenizer_sha256(base_model)):
        raise UserError(
            f"{folder}: was made with another tokenizer (or chat template) than {base_model} has now; give the base "
            "as it was with --base_model"
        )
    return base_model


def same_base_at(folder: Path, named: str, given: str) -> str:
    """`given`, where it is the base of a run that names `named`; UserError where it is another."""
    if run_kind(folder) in WHOLE and base.same_base(given, named):
        return given
    run = read_run(folder)
    digest = run["run"]["arguments"].get("base_sha256") if run else None
    if digest is None and not base.same_base(given, named):
        if Path(named).is_absolute() and not Path(named).is_dir():
            print(f"warning: {folder} names a base at {named} and no digest of it: taking {given}", file=sys.stderr)
            return given
        digest = base_sha256(named)
    if digest is not None and base_sha256(given) != digest:
        raise UserError(f"--base_model {given}: is not the base of {folder} ({named}); leave the flag out")
    return given


def resolve_named_base(folder: Path, given: str | None) -> str:
    """The base of an export that names it: from the hub, or `given`. UserError for another than at export."""
    named = named_base(folder)
    base_model = base.default_base_model(given or named["id"])
    if base_sha256(base_model) != named["sha256"]:
        remedy = "leave the flag out" if given else "give that one's folder with --base_model"
        raise UserError(
            f"--base_model {base_model}: is not the base of {folder}, {named['id']} as it was at export; {remedy}"
        )
    return base_model


def one_base(experts: list[Expert], given: str | None) -> str:
    """The one base model of all experts, at its place or at `given`; UserError if they, or `--base_model`, differ."""
    bases = [resolve_base(expert.folder, given) for expert in experts]
    for expert, base_model in zip(experts[1:], bases[1:], strict=True):
        if base_sha256(base_model) != base_sha256(bases[0]):
            raise UserError(
                f"the experts have different bases: {experts[0].name} {bases[0]}, {expert.name} {base_model}; align "
                "them on one"
            )
    return bases[0]


def open_experts(args) -> tuple[list[Expert], str, str | None]:
    """(the adapters of --experts, their one base, the data that all record; None where they differ or record none).

    args: experts, tasks, experts_dir, base_model and results_dir. UserError for fewer than two, or different bases.
    """
    folder_of = expert_folders(args.experts)
    if len(folder_of) < 2:
        raise UserError(f"--experts {args.experts}: name two or more experts, with commas between")
    experts_dir = Path(args.experts_dir or config.outputs_dir(args.results_dir))
    experts = open_adapters(folder_of, experts_dir, read_tasks(args.tasks))
    sources = {expert.data_source for expert in experts}
    return experts, one_base(experts, args.base_model), sources.pop() if len(sources) == 1 else None


def load_run(
    path: Path | str | None,
    base_model: str | None = None,
    dtype: str = "auto",
    bias: ExpertBias | None = None,
    device_map: str | dict | None = None,
):
    """(model, tokenizer) of a run's folder, in evaluation mode, on the CPU or as `device_map` says (from_pretrained's).

    path: an aligned expert (a PEFT adapter), a fused model, one of their checkpoint-N folders, an ensemble, a causal
    language model's own folder (an export, a merge, a base), or None for the raw `base_model`. base_model: the base's
    place, if it is not where the run names it. dtype: of the base, as --dtype has it; fused experts get the one that
    the base computes in, adapters and routers are fp32. bias: of a fused model's routers (expert_bias.read_bias).
    UserError for a folder that holds none of these, or for another base.
    """
    path = Path(path) if path is not None else None
    kind = run_kind(path)
    base_model = base.default_base_model(base_model) if kind == "raw" else resolve_base(path, base_model)
    if kind in ("fused", "ensemble", "shared", "shared_by_name"):
        if kind in ("shared", "shared_by_name"):
            model = load_shared(path, base_model, dtype, device_map)
        else:
            model = (load_fused if kind == "fused" else load_ensemble)(path, base_model, dtype, device_map)
        if bias is not None:
            set_expert_bias(model, bias)
        if (compute_dtype := base.pick_dtype(dtype)) != torch.float32:
            for block in model.blocks:
                block.experts.fold_scaling(compute_dtype)
    elif kind == "causal_lm" and not is_verified(base.load_config(base_model)):
        model = base.load_weights(AutoModelForCausalLM, base_model, base.load_config(base_model), dtype, device_map)
    else:
        model = base.load_base(base_model, dtype, device_map=device_map)
    with suppress(ValueError):  # of a family that has none: what it was loaded with computes the same
        model.set_attn_implementation("sdpa")  # without gradients the faster one on a CPU too
    # transformers fills what a generation leaves open from the base's own settings (a repetition penalty, say)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    model.generation_config = GenerationConfig(eos_token_id=ends)
    if kind == "adapter":
        model = with_adapter(model, path)
    return model.eval(), base.load_tokenizer(base_model)


def with_adapter(model, folder: Path) -> PeftModel:
    """A base with a PEFT adapter. UserError for one whose tensors are not all used, or do not fit, and for virtual
    tokens, which are no part of the layers."""
    settings = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise UserError(f"{folder}: is a {settings.peft_type.value} adapter; virtual tokens cannot be run here")
    try:
        model = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:  # tensors of another shape, or modules that it has not
        if out_of_memory(error):
            raise
        raise UserError(f"{folder}: does not fit its base ({one_line(error)})") from error
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        held = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if missing := expected - held:
        raise UserError(
            f"{folder}: has no tensor {min(missing)}, one of {len(missing)} that its adapter_config.json asks for: an "
            "adapter of another model, or of other names"
        )
    if odd := {key for key in held - expected if not EMBEDDING.search(key)}:
        raise UserError(f"{folder}: its tensor {min(odd)} has no place in its base; an adapter of another model")
    return model


def load_on_device(args, path: Path | None, base_model: str, bias: ExpertBias | None):
    """`load_run` as the flags dtype and device_map of `args` say, on `device` or spread over all GPUs."""
    model, tokenizer = load_run(path, base_model, args.dtype, bias, args.device_map)
    return model if args.device_map else model.to(device()), tokenizer


def check_device_map(device_map: str | None) -> None:
    """UserError where --device_map would be ignored."""
    if device_map and not torch.cuda.is_available():
        raise UserError(f"--device_map {device_map}: spreads a base over GPUs, and this machine has none; leave it out")
    if device_map:
        check_one_process(f"--device_map {device_map}")


def weights_sha256(path: Path | None) -> str | None:
    """The digest of what a run learnt, and of the settings that its answers depend on; None for the raw base."""
    kind = run_kind(path)
    if kind == "raw":
        return None
    if kind == "adapter":
        return adapter_sha256(path)
    mixture = read_mixture(path)
    if kind in WHOLE:
        of_form = read_json(path / "config.json").get("num_experts_per_tok", 2)
        top_k = mixture.num_experts_per_tok if mixture else of_form
        return base_sha256(str(path)) + (f", top-{top_k}" if top_k != 2 else "")
    settings = [
        f"routed by {mixture.routing}" if mixture.routing else "",
        f"top-{mixture.num_experts_per_tok}" if mixture.num_experts_per_tok != 2 and kind != "ensemble" else "",
        f"average of {mixture.average}" if mixture.average not in (None, "probabilities") else "",
    ]
    return ", ".join(filter(None, [sha256(path / "model.safetensors"), *settings]))


def run_sources(
    path: Path | None, base_model: str | None, data_source: str | None, results_dir: str
) -> tuple[str, str]:
    """(base model, data source) for inference or scoring of a run, None for the raw base.

    The base as `resolve_base` has it; for the raw base the one that the aligned experts in `results_dir` stand on, if
    none is given, else the paper's. The data as given, else as recorded, else the hub's: they may differ on purpose.
    """
    if path is not None:
        run = read_run(path)
        recorded = run["run"]["arguments"] if run else {}
        base_model = resolve_base(path, base_model)
    else:
        recorded = recorded_by_experts(Path(results_dir) / "outputs", base_model)
        if base_model is not None:
            base_model = base.default_base_model(base_model)
            digest = recorded.get("base_sha256")
            same = base.same_base(base_model, recorded.get("base_model", base_model))
            if not same and (digest is None or base_sha256(base_model) != digest):
                recorded = {}  # the raw form of another base than the experts' is a fair question
        else:
            base_model = recorded.get("base_model") or PAPER_BASE_MODEL
    return base_model, absolute_source(data_source) or recorded.get("data_source") or "hub"


def recorded_by_experts(outputs: Path, base_model: str | None) -> dict:
    """What the first aligned expert of a results folder recorded, the paper's before others; {} without any. UserError
    where none is given and the experts stand on different bases."""
    names = [*TASKS, *sorted(path.name for path in outputs.glob("*") if path.is_dir() and path.name not in TASKS)]
    records = [record for name in names if (record := read_run(outputs / name)) is not None]
    experts = [
        record["run"]["arguments"]
        for record in records
        if record["run"]["script"] == "align_basemodel.py" and not record["run"]["arguments"].get("moe_flag")
    ]
    if base_model is None and len({arguments.get("base_sha256") for arguments in experts}) > 1:
        raise UserError(f"{outputs}: its experts stand on different bases; say which raw base with --base_model")
    return experts[0] if experts else {}


def device() -> torch.device:
    """Where inference and scoring run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
