"""The second part of bench_moe.py: a whole model as dense base, exported Mixtral and ours, and answers per minute.

Each form runs in a process of its own, so that its peak memory is its own.
"""

import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, pipeline
from transformers.utils import logging

from cli import keep_freed_memory
from config import TASKS, UserError
from models import base, export, llama_moe
from models.cost import peak_memory_bytes
from models.expert_ffn import PROJECTIONS
from models.loading import device, load_run
from models.mixture import MixtureConfig, mixture_class

FORMS = ("dense base", "exported Mixtral", "ours")
SIZES = {  # full, quick
    "train": ((8, 256), (2, 16)),
    "prefill": ((8, 512), (2, 16)),
    "decode_batches": ((1, 8, 32), (1, 2)),
    "new_tokens": (64, 4),
    "prompts": (64, 4),
    "repeats": (5, 2),
}
RANDOM_SHAPES = {
    "Llama-2-7B": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "tiny": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    ),
}


def bench_model(base_model: str, quick: bool) -> dict:
    """Figures of each form, and of 64 prompts answered by ours in batches and one at a time as released."""
    sizes = {name: pair[quick] for name, pair in SIZES.items()}
    figures = {"Llama-2-7B, counted": counted_bytes("Llama-2-7B")}
    print("Llama-2-7B, counted: " + ", ".join(f"{k} {v:,.4g}" for k, v in figures["Llama-2-7B, counted"].items()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_fusion(folder, base_model)
        for form in FORMS:
            figures[form] = measured(form, folder, base_model, sizes)
        for way in ("ours, batches of 16", "as released"):
            figures[way] = in_own_process(answer, way, folder, base_model, sizes)
            print(f"{way:<18} {figures[way]['answers_per_minute']:.1f} answers/min")
    speed_up = figures["ours, batches of 16"]["answers_per_minute"] / figures["as released"]["answers_per_minute"]
    print(f"answers per minute, ours / as released: {speed_up:.1f}")
    return figures


def markdown(figures: dict) -> str:
    """The figures of `bench_model` as a table, as docs/performance.md has it."""
    rows = [
        ("weights on disk, MB", "checkpoint_bytes", 1e-6, "{:.0f}"),
        ("prefill, 8 x 512, tokens/s", "prefill_tokens_per_s", 1, "{:,.0f}"),
        *((f"decoding, tokens/s, batch {n}", f"decode_tokens_per_s_batch_{n}", 1, "{:.1f}") for n in (1, 8, 32)),
        ("LoRA training step, 8 x 256, s", "training_step_s", 1, "{:.2f}"),
        ("peak memory answering, GB", "inference_peak_bytes", 1e-9, "{:.1f}"),
        ("peak memory training, GB", "training_peak_bytes", 1e-9, "{:.1f}"),
    ]
    lines = [f"| SmolLM2-135M, whole | {' | '.join(FORMS)} |", "| --- |" + " --- |" * len(FORMS)]
    for heading, name, scale, text in rows:
        lines.append(f"| {heading} | {' | '.join(text.format(figures[form][name] * scale) for form in FORMS)} |")
    return "\n".join(lines)


def bench_random(shape: str, quick: bool) -> dict:
    """Figures of each form of a randomly initialised model; for speed and memory, on a GPU that it fits."""
    sizes = {name: pair[quick] for name, pair in SIZES.items()}
    return {form: measured(form, shape, None, sizes) for form in FORMS}


def measured(form: str, source: Path | str, base_model: str | None, sizes: dict) -> dict[str, float]:
    """The figures of `measure`, made in a process of their own, and printed."""
    figures = in_own_process(measure, form, source, base_model, sizes)
    print(f"{form:<18} " + ", ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    return figures


def build(form: str, shape: str):
    """A randomly initialised model of the form, with torch's default device and dtype; ours keeps its experts fp32."""
    sizes = RANDOM_SHAPES[shape]
    if form == "dense base":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if form == "exported Mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=len(TASKS), sliding_window=None))
    experts = [{"name": task, "task": task} for task in TASKS]
    model = mixture_class(LlamaForCausalLM)(LlamaConfig(**sizes))
    model.become(MixtureConfig(experts, expert_rank=8, num_experts_per_tok=2, base_model_name_or_path="", base=sizes))
    model.seal_base()
    return model


def counted_bytes(shape: str) -> dict[str, float]:
    """Bytes of a model's weights in half precision, ours with fp32 experts, by counting those of models without any."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            models = {form: build(form, shape) for form in FORMS}
    finally:
        torch.set_default_dtype(before)
    figures = {f"{form} bytes": sum(p.nbytes for p in model.parameters()) for form, model in models.items()}
    figures["fused file bytes"] = sum(
        models["ours"].state_dict()[key].nbytes for key in models["ours"].own_state_keys()
    )
    figures["memory, ours / dense base"] = figures["ours bytes"] / figures["dense base bytes"]
    figures["fused file / exported Mixtral"] = figures["fused file bytes"] / figures["exported Mixtral bytes"]
    return figures


def make_fusion(folder: Path, base_model: str) -> None:
    """A fused model of three random adapters of rank 8, and its export in the dtype of this device."""
    path, dtype = base.base_path(base_model), base.dtype_name("auto")
    lora = LoraConfig(r=8, lora_alpha=4, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(path), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.01)
        model.save_pretrained(folder / task)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            llama_moe.main(["--experts_dir", str(folder), "--output", str(folder / "moe")])
            export.main(
                [
                    "--cross_task",
                    str(folder / "moe"),
                    "--output",
                    str(folder / "mixtral"),
                    "--dtype",
                    dtype,
                    "--to",
                    "mixtral",
                ]
            )
    except SystemExit as error:
        raise UserError(said.getvalue().strip().splitlines()[-1]) from error


def in_own_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1, initializer=quiet) as pool:
        return pool.apply(function, arguments)


def quiet() -> None:
    keep_freed_memory()
    logging.disable_progress_bar()


def load(form: str, source: Path | str, base_model: str | None):
    """(model on the device, bytes of its weights in the dtype it runs in; of ours: base + fused file). source: the
    folder of make_fusion, or the name of a random shape."""
    dtype = base.pick_dtype("auto")
    if isinstance(source, str):
        torch.set_default_dtype(dtype)  # this process's own
        with device():
            model = build(form, source)
        return model.eval(), sum(p.nbytes for p in model.parameters())
    if form == "exported Mixtral":
        model = MixtralForCausalLM.from_pretrained(source / "mixtral", dtype=dtype)
        num_bytes = sum(file.stat().st_size for file in (source / "mixtral").glob("*.safetensors"))
    else:
        model, _ = load_run(source / "moe" if form == "ours" else None, base_model)
        own = model.own_state_keys() if form == "ours" else set()
        num_bytes = sum(p.nbytes for name, p in model.named_parameters() if name not in own)
        num_bytes += fused_file(source).stat().st_size if form == "ours" else 0
    return model.to(device()).eval(), num_bytes


def fused_file(folder: Path) -> Path:
    return folder / "moe" / "model.safetensors"


def measure(form: str, source: Path | str, base_model: str | None, sizes: dict) -> dict[str, float]:
    """Checkpoint bytes, prefill and decode tokens/s, training step s, and the peak memory of either, of one form."""
    torch.manual_seed(0)
    model, num_bytes = load(form, source, base_model)
    figures = {"checkpoint_bytes": num_bytes}
    if form == "ours" and isinstance(source, Path):
        figures["of_which_fused_file_bytes"] = fused_file(source).stat().st_size
    ids = random_ids(model, *sizes["prefill"])
    with torch.inference_mode():
        figures["prefill_tokens_per_s"] = ids.numel() / seconds(
            lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True), sizes["repeats"]
        )
        for batch in sizes["decode_batches"]:
            prompt = random_ids(model, batch, 32)
            took = seconds(lambda prompt=prompt: generate(model, prompt, sizes["new_tokens"]), 3)
            figures[f"decode_tokens_per_s_batch_{batch}"] = batch * sizes["new_tokens"] / took
            if torch.cuda.is_available():  # where generate compiles the model for a static cache
                took = seconds(
                    lambda p=prompt: generate(model, p, sizes["new_tokens"], cache_implementation="static"), 3
                )
                figures[f"decode_tokens_per_s_batch_{batch}_static"] = batch * sizes["new_tokens"] / took
    figures["inference_peak_bytes"] = peak_memory_bytes()
    step = training_step(form, model, sizes["train"])
    figures["training_step_s"] = seconds(step, sizes["repeats"])
    figures["training_peak_bytes"] = peak_memory_bytes()
    if form == "ours":
        labelled, every = seconds_in_turn([step, lambda: step(all_logits=True)], sizes["repeats"])
        figures["training_step_in_turn_s"], figures["training_step_all_logits_s"] = labelled, every
    return figures


def training_step(form: str, model, shape: tuple[int, int]):
    """step(all_logits=False): one optimiser step of LoRA of rank 8 on a form's FFN, on random samples (B, T)."""
    model.train()
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # as align_basemodel.py trains on a CPU
    if form == "dense base":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=list(PROJECTIONS)))
    elif form == "exported Mixtral":  # as many low-rank experts as ours, on its dense ones
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=[], target_parameters=experts))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = random_ids(model, *shape)
    labels = ids.clone()
    labels[:, : round(0.65 * ids.shape[1])] = -100  # the prompt: its share in data/sample's three tasks together

    def step(all_logits: bool = False) -> None:
        if all_logits:
            loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        else:
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def answer(way: str, folder: Path, base_model: str, sizes: dict) -> dict[str, float]:
    """Answers per minute: 64 prompts of 24 to 72 tokens, 64 new tokens each, sampled at temperature 0.6."""
    torch.manual_seed(0)
    model, _ = load("ours" if way.startswith("ours") else "exported Mixtral", folder, base_model)
    prompts = [random_ids(model, 1, 24 + 48 * i // sizes["prompts"])[0] for i in range(sizes["prompts"])]
    start = time.perf_counter()
    if way.startswith("ours"):
        for first in range(0, len(prompts), 16):
            batch = prompts[first : first + 16]
            width = max(map(len, batch))
            ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in batch])
            mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in batch])
            with torch.inference_mode():
                generate(model, ids, sizes["new_tokens"], mask, do_sample=True, temperature=0.6)
    else:
        tokenizer = base.load_tokenizer(base_model)
        model.set_experts_implementation("eager")
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = dict(max_new_tokens=sizes["new_tokens"], min_new_tokens=sizes["new_tokens"])
        for prompt in prompts:
            pipe(tokenizer.decode(prompt), do_sample=True, temperature=0.6, **settings)
    took = time.perf_counter() - start
    return {"answers_per_minute": 60 * len(prompts) / took}


def generate(model, ids, new_tokens: int, mask=None, **more):
    """Exactly `new_tokens` for each row of ids (B, T)."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **settings, **{"do_sample": False, **more})


def random_ids(model, *shape: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, shape, device=model.device)


def seconds(work, repeats: int) -> float:
    """Median seconds of `repeats` runs, after one that is not counted."""
    return seconds_in_turn([work], repeats)[0]


def seconds_in_turn(works: list, repeats: int) -> list[float]:
    """Median seconds of each of several works done in turn, after one round that is not counted."""
    taken = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in taken]
