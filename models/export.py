"""A fused model in the forms that other programs read; mixtral and peft are checked against ours after writing:

python models/export.py --cross_task RUN --to mixtral --output DIR [--dtype float16]
python models/export.py --cross_task RUN --to peft --expert safety --output DIR
python models/export.py --cross_task RUN --to pt --output moe.pt
"""

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
from cli import flag
from config import RESULTS_DIR, UserError


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


if __name__ == "__main__":
    cli.check_early(cli.parse, ExportArguments)

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from data.prompts import WITHOUT_INPUT, render_prompt
from models import base
from models.expert_ffn import PROJECTIONS
from models.llama_moe import ATTENTION_PROJECTIONS, LlamaMoeConfig, LlamaMoeForCausalLM
from models.loading import base_of_run, is_fused, load_run, weights_file
from models.released import expert_key, router_key
from workspace import run_dir

SCRIPT = "export.py"
MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "num_experts_per_tok",
)
INSTRUCTIONS = (
    "Name three birds.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about rain.",
    "Is it safe to mix bleach and vinegar?",
    "Who wrote Hamlet?",
    "Explain what a router does.",
    "Count to ten.",
)
NEW_TOKENS = 16
# Allowed difference of next-token logits from ours, both computed in fp32. float32: the largest of all. Half precision
# rounds the merged weights: relative to the norm, median of the prompts, since rounding may turn a router's choice.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, ExportArguments)
    path = run_dir.find_run(args.cross_task, Path(args.results_dir) / "outputs", args.checkpoint_number)
    if not is_fused(path):
        raise UserError(f"--cross_task {args.cross_task}: is not a fused model; make one with models/llama_moe.py")
    output = Path(args.output)
    if args.to == "pt":
        if output.exists():
            raise UserError(f"--output {output}: is there already; name a new file")
        model, _ = load_run(path, dtype="float32")
        write_whole(output, lambda partial: torch.save(released_state(model, args.dtype), partial))
        print(f"{output}: {output.stat().st_size / 1e6:,.0f} MB, the released code's moe.pt")
        return
    run = run_dir.read_run(path)
    arguments = {
        "base_model": base_of_run(path),
        "data_source": run and run["run"]["arguments"].get("data_source"),
        "run": args.cross_task,
        "to": args.to,
        "task_name": args.expert,
        "dtype": args.dtype,
        "weights_sha256": run_dir.sha256(weights_file(path)),
    }
    if output.is_file():
        raise UserError(f"--output {output}: is a file; name a folder")
    if output.exists() and any(output.iterdir()):
        run_dir.begin(output, SCRIPT, arguments, "move it away, or name another folder with --output")
        print(f"{output} is this export already: nothing to do")
        return
    model, tokenizer = load_run(path, dtype="float32")
    export = export_mixtral if args.to == "mixtral" else export_peft

    def write(partial: Path) -> None:
        partial.mkdir()
        verdict = export(model, tokenizer, partial, args)
        run_dir.finish(partial, SCRIPT, arguments, train={}, meta={"verified": verdict})
        print(f"{output}: {verdict}")

    write_whole(output, write)


def write_whole(output: Path, write) -> None:
    """Let `write` make a file or folder under another name beside `output`, then rename it: whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as workplace:
        write(partial := Path(workplace) / output.name)
        partial.rename(output)


# ---- Mixtral


def export_mixtral(model: LlamaMoeForCausalLM, tokenizer, folder: Path, args: ExportArguments) -> str:
    """Write a MixtralForCausalLM checkpoint into `folder`, one shard per layer, and compare it with `model`."""
    prompts = [tokenizer(render_prompt(text))["input_ids"] for text in INSTRUCTIONS]
    ours = behaviour(model, prompts)
    settings = mixtral_config(model.config, args.dtype)
    save_config(settings, folder)
    GenerationConfig(
        bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model.config, args), encoding="utf-8")
    write_shards(model, getattr(torch, args.dtype), folder)
    attention = model.config._attn_implementation
    model.to("meta")  # ours is not needed any more, and the export is the larger one
    written = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    again = AutoTokenizer.from_pretrained(folder)
    return compare(ours, behaviour(written, [again(render_prompt(t))["input_ids"] for t in INSTRUCTIONS]), args.dtype)


def mixtral_config(moe_config: LlamaMoeConfig, dtype: str) -> MixtralConfig:
    """The same model's configuration as a Mixtral; UserError where Mixtral has no place for something."""
    settings = moe_config.to_dict()
    for name in ("attention_bias", "mlp_bias"):
        if settings[name]:
            raise UserError(f"the base has {name}: Mixtral's form has no biases; use --to peft")
    return MixtralConfig(
        **{name: settings[name] for name in SHARED_SETTINGS},
        architectures=["MixtralForCausalLM"],
        num_local_experts=moe_config.num_experts,
        sliding_window=None,
        output_router_logits=False,
        router_aux_loss_coef=0.0,
        dtype=dtype,
    )


def save_config(settings: MixtralConfig, folder: Path) -> None:
    """config.json, with the rope parameters also under the names that readers older than transformers 5 look for."""
    settings.save_pretrained(folder)
    rope = dict(settings.rope_parameters)
    old_names = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    run_dir.write_json(folder / "config.json", {**run_dir.read_json(folder / "config.json"), **old_names})


def write_shards(model: LlamaMoeForCausalLM, dtype: torch.dtype, folder: Path) -> None:
    """Safetensors and their index: a shard for the embeddings and one per layer, so that one at a time is in memory."""
    num_shards = len(model.blocks) + 1
    weight_map, total_size = {}, 0
    for number in range(num_shards):
        named = layer_weights(model, number - 1) if number else outer_weights(model)
        shard = {name: weight.detach().to(dtype).contiguous() for name, weight in named}
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total_size += sum(weight.nbytes for weight in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    run_dir.write_json(folder / "model.safetensors.index.json", index)


def outer_weights(model: LlamaMoeForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, last norm, and the head unless it is the embeddings."""
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight
    yield "model.norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight


def layer_weights(model: LlamaMoeForCausalLM, number: int) -> Iterator[tuple[str, Tensor]]:
    """One layer's weights under Mixtral's names on disk, everything low-rank merged."""
    prefix, layer = f"model.layers.{number}", model.model.layers[number]
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", layer.get_submodule(name).weight
    for name in ATTENTION_PROJECTIONS:
        yield f"{prefix}.self_attn.{name}.weight", merged_attention(layer.self_attn.get_submodule(name))
    yield f"{prefix}.block_sparse_moe.gate.weight", layer.mlp.router.weight
    for expert in range(model.config.num_experts):
        for name in PROJECTIONS:
            weight = layer.mlp.experts.merged(expert, name, layer.mlp.get_submodule(name).weight)
            yield f"{prefix}.block_sparse_moe.experts.{expert}.{MIXTRAL_NAMES[name]}.weight", weight


def merged_attention(module: nn.Module) -> Tensor:
    """The weight of a projection, with its LoRA where the fusion tuned the attention."""
    if isinstance(module, nn.Linear):
        return module.weight
    return module.base_layer.weight + module.get_delta_weight("default")


def model_card(moe_config: LlamaMoeConfig, args: ExportArguments) -> str:
    """README.md of an exported checkpoint."""
    experts = "\n".join(f"- expert {i}: {e['name']} (rank {e['rank']})" for i, e in enumerate(moe_config.experts))
    name = moe_config.base_model_name_or_path
    return f"""---
{f"base_model: {name}" if not Path(name).exists() else "tags: [mixture-of-experts]"}
library_name: transformers
pipeline_tag: text-generation
---
# {Path(args.cross_task).name}

An H3Fusion mixture of aligned experts (https://arxiv.org/abs/2411.17792) as a plain Mixtral checkpoint, {args.dtype}:
top-{moe_config.num_experts_per_tok} of {moe_config.num_experts} experts per token.

{experts}

The licence of the base model applies to it. The prompt it was aligned on, answers ending at EOS:

```
{WITHOUT_INPUT}
```
"""


# ---- one expert as a PEFT adapter


def export_peft(model: LlamaMoeForCausalLM, tokenizer, folder: Path, args: ExportArguments) -> str:
    """Write one expert as a PEFT adapter and compare base + adapter with `model` routed to that expert alone."""
    names = [expert["name"] for expert in model.config.experts]
    if args.expert not in names:
        raise UserError(f"--expert {args.expert}: the experts of {args.cross_task} are {', '.join(names)}")
    number = names.index(args.expert)
    prompts = [tokenizer(render_prompt(text))["input_ids"] for text in INSTRUCTIONS]

    def to_it_alone(router, args, output):
        router_logits, top_k_index, top_k_weights = output
        return router_logits, torch.full_like(top_k_index[:, :1], number), torch.ones_like(top_k_weights[:, :1])

    hooks = [block.router.register_forward_hook(to_it_alone) for block in model.blocks]
    ours = behaviour(model, prompts)
    for hook in hooks:
        hook.remove()
    base_model = model.config.base_model_name_or_path
    write_adapter(model, number, folder)
    llama = base.load_weights(LlamaForCausalLM, base_model, base.load_base_config(base_model), "float32")
    return compare(ours, behaviour(PeftModel.from_pretrained(llama, str(folder)).eval(), prompts), "float32")


def write_adapter(model: LlamaMoeForCausalLM, expert: int, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors of one expert (and of LoRA on the attention, if tuned).

    Ranks lose their padding. Rank and alpha that most modules share are the adapter's; the others go into patterns.
    """
    weights, ranks, alphas = {}, {}, {}
    for number, layer in enumerate(model.model.layers):
        for p, name in enumerate(PROJECTIONS):
            a, b = (matrix.detach()[expert] for matrix in layer.mlp.experts.matrices(name))
            used = (a.any(1) | b.any(0)).nonzero()
            if len(used):  # else the adapter left this module as it was
                rank = int(used[-1]) + 1
                module = f"model.layers.{number}.mlp.{name}"
                ranks[module], alphas[module] = rank, alpha_of(float(layer.mlp.experts.scaling[p, expert]), rank)
                weights[module] = a[:rank], b[:, :rank]
        for name in ATTENTION_PROJECTIONS if model.config.attention_lora else ():
            module = f"model.layers.{number}.self_attn.{name}"
            lora = layer.self_attn.get_submodule(name)
            ranks[module], alphas[module] = (model.config.attention_lora[key] for key in ("rank", "alpha"))
            weights[module] = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
    ((rank, alpha), _), *_ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)
    projections = sorted({module.rpartition(".")[2] for module in ranks})
    everywhere = len(ranks) == len(projections) * len(model.blocks)
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=projections if everywhere else sorted(ranks),
        rank_pattern={module: value for module, value in ranks.items() if value != rank},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        base_model_name_or_path=base.base_path(model.config.base_model_name_or_path),
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": matrix.contiguous()
        for module, pair in weights.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def alpha_of(scaling: float, rank: int) -> float:
    """The alpha for which PEFT's alpha / rank is `scaling`, to the last bit where there is one (else the nearest)."""
    product = scaling * rank
    around = (product, math.nextafter(product, 0.0), math.nextafter(product, math.inf))
    return min(around, key=lambda alpha: abs(alpha / rank - scaling))


# ---- the released code's moe.pt


def released_state(model: LlamaMoeForCausalLM, dtype: str) -> dict[str, Tensor]:
    """The state dict that the released code loads: all of it in memory, and the head always written out."""
    state = {name: weight for name, weight in outer_weights(model)}
    state["lm_head.weight"] = model.lm_head.weight
    for number in range(len(model.blocks)):
        for name, weight in layer_weights(model, number):
            head, moe, tail = name.partition(".block_sparse_moe.")
            if moe and tail.startswith("gate"):
                name = router_key(number)
            elif moe:
                _, expert, matrix, _ = tail.split(".")
                projection = next(p for p, short in MIXTRAL_NAMES.items() if short == matrix)
                name = expert_key(number, int(expert), projection)
            state[name] = weight
    return {name: weight.detach().to(getattr(torch, dtype), copy=True) for name, weight in state.items()}


# ---- the check


@torch.inference_mode()
def behaviour(model, prompts: list[list[int]]) -> tuple[Tensor, list[list[int]]]:
    """Next-token logits (P, V) of P prompts, one at a time, and their greedy continuations."""
    logits, continuations = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(input_ids=ids).logits[0, -1].float())
        settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        continuations.append(answer[0, len(prompt) :].tolist())
    return torch.stack(logits), continuations


def compare(ours: tuple, theirs: tuple, dtype: str) -> str:
    """One line that says how close the export is; UserError if it is not close enough for the dtype it is kept in."""
    difference = theirs[0] - ours[0]  # (P, V)
    if dtype == "float32":
        size, kind = difference.abs().max(), "at most"
    else:
        size, kind = (difference.norm(dim=1) / ours[0].norm(dim=1)).median(), "relative, median of the prompts:"
    same = sum(a == b for a, b in zip(ours[1], theirs[1], strict=True))
    found = (
        f"next-token logits differ by {kind} {size:.1e} in fp32, {same} of {len(ours[1])} greedy continuations "
        "are the same"
    )
    if not size <= TOLERANCES[dtype] or (dtype == "float32" and same < len(ours[1])):
        needed = f"{TOLERANCES[dtype]:.0e}" + (" and every continuation" if dtype == "float32" else "")
        raise UserError(f"the export is not the model, and was not kept: {found}; needed: {needed}")
    return f"verified: {found}"


if __name__ == "__main__":
    from models.export import main

    main()
