"""A fused model in the forms that other programs read; all but pt are checked against ours after writing:

python models/export.py --cross_task RUN --output DIR [--dtype float16] [--verify 0]                   the base once
python models/export.py --cross_task RUN --base by-name --output DIR                                   the base by name
python models/export.py --cross_task RUN --to mixtral --output DIR                                     Llama and Mistral
python models/export.py --cross_task RUN --to qwen3_moe --output DIR                                   Qwen3
python models/export.py --cross_task RUN --to peft --expert safety --output DIR
python models/export.py --cross_task RUN --to pt --output moe.pt
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import flag
from config import RESULTS_DIR, UserError

MEMORY = """memory: the fused model is held in float32, 4 bytes per parameter of the base (27 GB for 7 B).
  --to shared   the check reads the export back after ours is let go; --verify 0 needs one file of the base at a time
  --to mixtral, qwen3_moe:
                the check reads the export back in float32 after ours is let go: 4 bytes per parameter of the base with
                all its experts as dense FFNs (62 GB for three on 7 B); --verify 0 needs the fused model and one layer
  --to peft     the check holds a second base: 8 bytes per parameter (54 GB); --verify 0 needs half
  --to pt       the whole file lies in memory beside the model: 27 GB and 31 GB in float16"""


@dataclass
class ExportArguments:
    """Flags of models/export.py."""

    cross_task: str | None = flag(None, "the fused run to export: a name under results/outputs, or its folder")
    to: str = flag(
        "shared",
        "shared: a checkpoint that holds the base once and brings its code; mixtral, qwen3_moe: transformers' own "
        "classes, with dense experts; peft: one expert as an adapter; pt: the released code's moe.pt",
        choices=["shared", "mixtral", "qwen3_moe", "peft", "pt"],
    )
    base: str = flag(
        "copied",
        "with --to shared, the base's weights. copied: into the checkpoint; by-name: left out, to be loaded by the "
        "base's name on the hub and checked by their sha256",
        choices=["copied", "by-name"],
    )
    base_id: str | None = flag(
        None, "with --base by-name, the base's name on the hub (default: as the run recorded; a local folder has none)"
    )
    output: str | None = flag(None, "where to write: a new folder, or with --to pt a new file")
    expert: str | None = flag(None, "with --to peft: which expert")
    base_model: str | None = flag(None, "where the run's base model lies (default: as the run recorded)")
    dtype: str = flag(
        "auto",
        "of the written weights; auto: the base's own, as its config.json records it (peft: always float32)",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    verify: int | None = flag(
        None, "1: read the export back and compare it with ours (default: 1; pt: 0)", choices=[0, 1]
    )
    checkpoint_number: int | None = flag(None, "export the run's checkpoint-N instead of its end")
    results_dir: str = flag(str(RESULTS_DIR), "the folder that runs are read from (default: results)")

    def __post_init__(self):
        if not self.cross_task or not self.output:
            raise UserError("name the fused run with --cross_task and where to write with --output")
        if (self.to == "peft") != (self.expert is not None):
            raise UserError("--expert names the one expert that --to peft writes: give both or neither")
        if self.to == "peft" and self.dtype not in ("auto", "float32"):
            raise UserError(f"--dtype {self.dtype}: an adapter is written in float32; leave the flag out")
        if self.base == "by-name" and self.to != "shared":
            raise UserError(f"--base by-name: goes with --to shared, not with --to {self.to}; leave it out")
        if self.base_id is not None and self.base != "by-name":
            raise UserError(f"--base_id {self.base_id}: goes with --base by-name; leave it out")
        if self.to == "pt" and self.verify:
            raise UserError("--verify 1: the released code reads moe.pt and is not part of this project; leave it out")
        if self.verify is None:
            self.verify = int(self.to != "pt")


def parse(argv: list[str] | None) -> ExportArguments:
    return cli.parse(argv, ExportArguments, MEMORY)


if __name__ == "__main__":
    cli.check_early(parse)

import torch
from peft import PeftModel
from torch import Tensor

from models import base
from models.adapters import save_adapter
from models.base_identity import base_sha256
from models.behaviour import behaviour, compare, greedy_texts, tokenized
from models.dense_experts import FORMS, form_config, layer_weights, outer_weights, write_dense_experts
from models.expert_ffn import PROJECTIONS
from models.loading import base_of_run, load_run, run_kind, run_sources, weights_sha256
from models.mixture import ATTENTION_PROJECTIONS, MixtureForCausalLM, read_mixture
from models.model_card import model_card
from models.released import expert_key, router_key
from models.shared import id_of_base, read_back, write_shared
from workspace import run_dir
from workspace.drawn import drawn_by, recorded
from workspace.files import read_json, write_json, write_text

SCRIPT = "export.py"
NOT_VERIFIED = "written, not verified"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    path = run_dir.find_run(args.cross_task, Path(args.results_dir) / "outputs", args.checkpoint_number)
    if run_kind(path) != "fused":
        raise UserError(f"--cross_task {args.cross_task}: is not a fused model; make one with models/llama_moe.py")
    if read_mixture(path).routing is not None and args.to != "peft":
        raise UserError(
            f"--cross_task {args.cross_task}: is routed by prompt, which no form but peft, one expert, has a place for"
        )
    base_model, _ = run_sources(path, args.base_model, None, args.results_dir)
    if args.base == "by-name":
        args.base_id = id_of_base(base_of_run(path), base_model, args.base_id, read_mixture(path))
    if args.to == "peft":
        args.dtype = "float32"
    elif args.dtype == "auto":
        args.dtype = str(base.own_dtype(base.load_base_config(base_model))).removeprefix("torch.")
    with run_dir.open_partial(Path(args.output)) as partial:
        if args.to == "pt":
            export_file(path, base_model, args, partial)
        else:
            export_folder(path, base_model, args, partial)


def export_file(path: Path, base_model: str, args: ExportArguments, partial: Path) -> None:
    """Write the released code's moe.pt, and beside it what it was made of; or say that it is complete."""
    output = Path(args.output)
    record = output.with_name(f"{output.name}.{run_dir.COMPLETE}")
    arguments = export_arguments(path, base_model, args)
    if output.exists():
        if not record.exists():
            raise UserError(f"--output {output}: exists; name a new file")
        made_of = read_json(record)["run"]["arguments"]
        run_dir.compare_arguments(output, made_of, arguments, "move it away, or name another file with --output")
        print(f"{output} is this export already: nothing to do")
        return
    if (model_type := read_mixture(path).base["model_type"]) != "llama":
        raise UserError(f"--to pt: the released code loads a Llama, and the base is a {model_type} model")
    model, _ = load_run(path, base_model, dtype="float32")
    torch.save(released_state(model, getattr(torch, args.dtype)), partial)
    write_json(record, {"run": {"script": SCRIPT, "arguments": arguments}, "meta": run_dir.environment()})
    partial.rename(output)
    print(f"{output}: {output.stat().st_size / 1e6:,.0f} MB, the released code's moe.pt")


def export_arguments(path: Path, base_model: str, args: ExportArguments) -> dict:
    """What decides an export, for its run.json."""
    run = run_dir.read_run(path)
    task_of = {known["name"]: known["task"] for known in read_mixture(path).experts}
    return {
        "base_model": base_model,
        "base_sha256": base_sha256(base_model),
        "data_source": run and run["run"]["arguments"].get("data_source"),
        "run": Path(args.cross_task).name,
        "to": args.to,
        "task_name": task_of.get(args.expert),
        **({"expert": args.expert} if args.expert else {}),
        "dtype": args.dtype,
        "weights_sha256": weights_sha256(path),
    }


def export_folder(path: Path, base_model: str, args: ExportArguments, partial: Path) -> None:
    """Write a Mixtral checkpoint or an adapter, its run.json last; or say that it is complete."""
    output, arguments = Path(args.output), export_arguments(path, base_model, args)
    drawn = drawn_by(path)
    meta = {}
    if args.base_id is not None:  # it is made to be passed on: nothing in it says where things lie on this machine
        source = arguments["data_source"]
        named_source = None if source and Path(source).is_absolute() else source
        named = {"base": args.base, "base_id": args.base_id, "base_model": args.base_id}
        arguments |= {**named, "data_source": named_source}
        drawn = [replace(one, data_source=named_source) for one in drawn]
        meta = {"command": None}
    if output.is_file():
        raise UserError(f"--output {output}: is a file; name a folder")
    if args.to in FORMS:
        form_config(read_mixture(path), args.to, args.dtype)
    if output.exists() and any(output.iterdir()):
        run_dir.begin(output, SCRIPT, arguments, "move it away, or name another folder with --output")
        written = run_dir.read_run(output)["meta"]["verified"]
        if args.verify and written == NOT_VERIFIED:
            raise UserError(f"{output}: holds this export, written with --verify 0; remove it to write and verify it")
        print(f"{output} is this export already ({written}): nothing to do")
        return
    partial.mkdir()
    if args.to == "shared":
        verdict = export_shared(path, partial, args, base_model)
    else:
        model, tokenizer = load_run(path, base_model, dtype="float32")
        export = export_dense_experts if args.to in FORMS else export_peft
        verdict = export(model, tokenizer, partial, args, base_model)
    if args.to != "peft":  # whose card is PEFT's
        write_text(partial / "README.md", card(path, base_model, args))
    run_dir.finish(partial, SCRIPT, arguments, train={}, meta={**meta, "drawn": recorded(drawn), "verified": verdict})
    partial.rename(output)
    print(f"{output}: {verdict}")


def card(path: Path, base_model: str, args: ExportArguments) -> str:
    """The model card of a checkpoint."""
    form = FORMS[args.to].model_class.__name__ if args.to in FORMS else "transformers model (trust_remote_code)"
    if args.base_id is not None:
        form += f" that loads the weights of its base from {args.base_id}"
    return model_card(read_mixture(path), form, path, args.base_id or base_model, args.dtype, Path(args.results_dir))


# ---- the base once


def export_shared(path: Path, folder: Path, args: ExportArguments, base_model: str) -> str:
    """Write a checkpoint that holds the base once, or names it, into `folder`; unless --verify 0, read it back and
    compare it with the run."""
    mixture, tokenizer = read_mixture(path), base.load_tokenizer(base_model)
    write_shared(path, mixture, tokenizer, folder, base_model, args.dtype, args.base_id)
    if not args.verify:
        return NOT_VERIFIED
    model, _ = load_run(path, base_model, dtype="float32")
    ours = behaviour(model, greedy_texts(model, tokenized(tokenizer)))
    attention = model.config._attn_implementation
    model.to("meta")  # ours is not needed any more
    same_tokens(folder, tokenizer)
    base_folder = None if args.base_id is None else base.local_folder(base_model)
    return compare(ours, behaviour(read_back(folder, attention, base_folder), ours.texts), args.dtype)


def same_tokens(folder: Path, tokenizer) -> None:
    """UserError where an export's tokenizer gives other tokens than ours."""
    if tokenized(base.load_tokenizer(str(folder))) != tokenized(tokenizer):
        raise UserError("the export is not the model, and was not kept: its tokenizer gives other tokens")


# ---- dense experts


def export_dense_experts(
    model: MixtureForCausalLM, tokenizer, folder: Path, args: ExportArguments, base_model: str
) -> str:
    """Write dense experts into `folder`; unless --verify 0, read them back and compare them with `model`."""
    if not args.verify:
        write_dense_experts(model, tokenizer, folder, args.to, args.dtype)
        return NOT_VERIFIED
    ours = behaviour(model, greedy_texts(model, tokenized(tokenizer)))
    write_dense_experts(model, tokenizer, folder, args.to, args.dtype)
    attention = model.config._attn_implementation
    model.to("meta")  # ours is not needed any more, and the export is the larger one
    same_tokens(folder, tokenizer)
    written = FORMS[args.to].model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return compare(ours, behaviour(written, ours.texts), args.dtype)


# ---- one expert as a PEFT adapter


def export_peft(model: MixtureForCausalLM, tokenizer, folder: Path, args: ExportArguments, base_model: str) -> str:
    """Write one expert as a PEFT adapter; unless --verify 0, compare base + adapter with `model` routed to it alone."""
    names = [expert["name"] for expert in model.mixture.experts]
    if args.expert not in names:
        raise UserError(f"--expert {args.expert}: the experts of {args.cross_task} are {', '.join(names)}")
    number = names.index(args.expert)
    write_adapter(model, number, folder, base_model)
    if not args.verify:
        return NOT_VERIFIED

    def to_it_alone(router, args, output):
        router_logits, top_k_index, top_k_weights = output
        return router_logits, torch.full_like(top_k_index[:, :1], number), torch.ones_like(top_k_weights[:, :1])

    hooks = [block.router.register_forward_hook(to_it_alone) for block in model.blocks]
    ours = behaviour(model, greedy_texts(model, tokenized(tokenizer)))
    for hook in hooks:
        hook.remove()
    dense = base.load_base(base_model, "float32")
    return compare(ours, behaviour(PeftModel.from_pretrained(dense, str(folder)).eval(), ours.texts), "float32")


def write_adapter(model: MixtureForCausalLM, expert: int, folder: Path, base_model: str) -> None:
    """One expert (and LoRA on the attention, if tuned) as an adapter's folder. Ranks lose their padding."""
    weights, alphas = {}, {}
    for number, layer in enumerate(model.model.layers):
        for p, name in enumerate(PROJECTIONS):
            a, b = (matrix.detach()[expert] for matrix in layer.mlp.experts.matrices(name))
            used = (a.any(1) | b.any(0)).nonzero()
            if len(used):  # else the adapter left this module as it was
                rank = int(used[-1]) + 1
                module = f"model.layers.{number}.mlp.{name}"
                alphas[module] = alpha_of(float(layer.mlp.experts.scaling[p, expert]), rank)
                weights[module] = a[:rank], b[:, :rank]
        for name in ATTENTION_PROJECTIONS if model.mixture.attention_lora else ():
            module = f"model.layers.{number}.self_attn.{name}"
            lora = layer.self_attn.get_submodule(name)
            alphas[module] = model.mixture.attention_lora["alpha"]
            weights[module] = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
    save_adapter(folder, weights, alphas, base_model)


def alpha_of(scaling: float, rank: int) -> float:
    """The alpha for which PEFT's alpha / rank is `scaling`, to the last bit where there is one (else the nearest)."""
    product = scaling * rank
    around = (product, math.nextafter(product, 0.0), math.nextafter(product, math.inf))
    return min(around, key=lambda alpha: abs(alpha / rank - scaling))


# ---- the released code's moe.pt


def released_state(model: MixtureForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict that the released code loads: all of it in memory, and the head always written out."""
    form = FORMS["mixtral"]

    def copied(weight: Tensor) -> Tensor:
        return weight.detach().to(dtype, copy=True)

    state = {name: copied(weight) for name, weight in outer_weights(model)}
    state["lm_head.weight"] = copied(model.lm_head.weight)
    for number in range(len(model.blocks)):
        for name, weight in layer_weights(model, number, form):
            _, moe, tail = name.partition(".block_sparse_moe.")
            if moe and tail.startswith("gate"):
                name = router_key(number)
            elif moe:
                _, expert, matrix, _ = tail.split(".")
                projection = next(p for p, short in form.expert_names.items() if short == matrix)
                name = expert_key(number, int(expert), projection)
            state[name] = copied(weight)
    return state


if __name__ == "__main__":
    from models.export import main

    main()
