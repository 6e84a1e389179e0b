"""Which expert answers what: routing counted over tokens, per layer and expert, and its picture."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.batching import batches_by_length, pad
from data.encoding import Encoder
from data.sources import Record
from models.mixture import MixtureForCausalLM
from models.prompt_routing import prompt_mask, routed_by_prompt
from models.router import recorded_router_logits, route

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")  # one per expert


@torch.inference_mode()
def routing_usage(
    model: MixtureForCausalLM, tokenizer, answered: list[Record], batch_size: int, progress: bool = True
) -> dict:
    """Routing over the tokens of prompts and answers (the records' outputs), as far as the model's window reaches:
    padding never counts, and every token counts once.

    Returns experts, top_k, tokens, and per layer (a list of L lists of E): weight, the mean routing weight after top-k
    (each row sums to 1), and selected, the share of tokens that select the expert (each row sums to K).
    """
    window = model.config.max_position_embeddings
    encoder, samples = Encoder(tokenizer, window), []
    for record in answered:
        prompt = encoder.prompt_ids(record)
        ids = (prompt + encoder.answer_ids(record)[:-1])[:window]
        samples.append((ids, range(encoder.opening(record), len(prompt))))
    return token_usage(model, samples, batch_size, progress)


@torch.inference_mode()
def token_usage(
    model: MixtureForCausalLM, samples: list[tuple[list[int], range]], batch_size: int, progress: bool = True
) -> dict:
    """`routing_usage` of token ids, each with where the prompt stands in them after the template's opening."""
    weight, selected = torch.zeros(2, len(model.blocks), model.mixture.num_experts, dtype=torch.float64)  # each (L, E)
    tokens = 0
    batches = batches_by_length(samples, lambda sample: len(sample[0]), batch_size)
    for batch in tqdm(batches, desc="routing", unit="batch", disable=not progress):
        ids, mask = (tensor.to(model.device) for tensor in pad([ids for ids, _ in batch], left=False))
        of_prompt = prompt_mask([prompt for _, prompt in batch], ids.shape[1])
        with routed_by_prompt(model, of_prompt), recorded_router_logits(model) as of_layers:
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        real = mask.flatten().bool().cpu()
        for layer, router_logits in enumerate(of_layers):
            chosen = route(router_logits.cpu()[real], model.mixture.num_experts_per_tok)
            top_k_index, top_k_weights = (x.flatten().cpu() for x in chosen)
            weight[layer].index_add_(0, top_k_index, top_k_weights.double())
            selected[layer] += top_k_index.bincount(minlength=model.mixture.num_experts)
        tokens += int(real.sum())
    return {
        "experts": [expert["name"] for expert in model.mixture.experts],
        "top_k": model.mixture.num_experts_per_tok,
        "tokens": tokens,
        "weight": (weight / tokens).tolist(),
        "selected": (selected / tokens).tolist(),
    }


@torch.inference_mode()
def token_routing(model: MixtureForCausalLM, tokenizer, record: Record) -> list[tuple[str, list[float]]]:
    """(text, mean routing weights over all layers (E) after top-k) of each token of a record's answer. The weights are
    those with which the token itself is read; pieces of one character are put to its last token."""
    window = model.config.max_position_embeddings
    encoder = Encoder(tokenizer, window)
    prompt = encoder.prompt_ids(record)
    answer = encoder.answer_ids(record)[:-1][: max(window - len(prompt), 0)]
    ids = torch.tensor([[*prompt, *answer][:window]], device=model.device)
    of_prompt = prompt_mask([range(encoder.opening(record), len(prompt))], ids.shape[1])
    with routed_by_prompt(model, of_prompt), recorded_router_logits(model) as of_layers:
        model.model(input_ids=ids, use_cache=False)
    weights = torch.zeros(ids.shape[1], model.mixture.num_experts)
    for router_logits in of_layers:
        index, top_k_weights = (x.cpu() for x in route(router_logits, model.mixture.num_experts_per_tok))
        weights.scatter_add_(1, index, top_k_weights.float() / len(model.blocks))
    pieces, said = [], ""
    for end in range(1, len(answer) + 1):
        text = tokenizer.decode(answer[:end], skip_special_tokens=True)
        piece = "" if text.endswith("\ufffd") else text[len(said) :]
        said += piece
        pieces.append((piece, [round(weight, 3) for weight in weights[len(prompt) + end - 1].tolist()]))
    return [piece for piece in pieces if piece[0]]


def usage_line(usage: dict) -> str:
    """How much each expert was used, over all layers, for a person."""
    means = Tensor(usage["weight"]).mean(0).tolist()
    shares = ", ".join(f"{name} {mean:.0%}" for name, mean in zip(usage["experts"], means, strict=True))
    return f"experts used: {shares} (mean routing weight, {usage['tokens']} tokens x {len(usage['weight'])} layers)"


def draw_heat_map(usage: dict, path: Path, title: str) -> None:
    """Layers x experts; a cell is its expert's colour, as strong as the expert's mean routing weight there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    weight = torch.tensor(usage["weight"])  # (L, E)
    colours = torch.tensor([to_rgb(colour) for colour in COLOURS[: weight.shape[1]]])
    picture = 1 - weight[:, :, None] * (1 - colours)  # white at 0
    figure, axes = plt.subplots(figsize=(1.6 + 1.2 * weight.shape[1], 1.5 + 0.24 * len(weight)), layout="constrained")
    axes.imshow(picture, aspect="auto")
    for layer, row in enumerate(weight.tolist()):
        for expert, value in enumerate(row):
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(weight.shape[1]), usage["experts"], rotation=20)
    axes.set_yticks(range(0, len(weight), 5))
    axes.set_ylabel("layer")
    axes.set_title(f"{title}\nmean routing weight, {usage['tokens']} tokens", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
