"""How likely a model finds given answers: log-probabilities per token, every prompt read once for all its answers."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import UserError
from data.batching import batches_by_length, pad
from data.encoding import IGNORED, Encoder
from data.sources import Record
from models.causal_lm import is_verified, why_scored_otherwise
from models.losses import mean_routing_probs
from models.processes import is_first, merge_shares, own_share
from models.prompt_routing import routed_by_prompt
from models.router import recorded_router_logits


@dataclass(frozen=True)
class Scored:
    """One answer: log_probs of its tokens (A,) and of the EOS after them (None if it was cut); for a fused model the
    mean routing probabilities (E,) over the instruction, which is what a router sees of a question, and over
    instruction and answer, else None; cut: whether the prompt or the answer lost tokens to the window."""

    log_probs: Tensor
    end_log_prob: float | None
    routing_probs: Tensor | None = None
    routing_probs_with_answer: Tensor | None = None
    cut: bool = False


@dataclass
class _Row:
    """A prompt followed by several answers to it; each answer sees the prompt and itself only."""

    prompt: list[int]
    opening: int
    records: list[Record]
    answers: list[list[int]]
    cut: list[str]  # as Encoder.encode says it

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def score_answers(model, encoder: Encoder, records: list[Record], batch_size: int, device, name: str) -> dict:
    """{record: Scored} for every different record; a record without an answer token is left out.

    A question's choices (records alike but for their output) follow the same prompt: where the longest does not fit the
    encoder's max_length, the prompt is cut for all of them.
    Answers to one prompt share a row of the batch by a block mask: the same numbers as one row each (rounding
    apart), at a fraction of the tokens.
    """
    rows = _rows(encoder, list(dict.fromkeys(records)))
    rows.sort(key=lambda row: row.length)
    share = own_share([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])
    scored = {}
    with tqdm(total=sum(map(len, share)), desc=name, unit="prompt", disable=not is_first()) as bar:
        for batch in share:
            scored.update(_score_batch(model, batch, device))
            bar.update(len(batch))
    return merge_shares(scored)


def _rows(encoder: Encoder, records: list[Record]) -> list[_Row]:
    longest: dict[Record, int] = {}
    for record in records:
        question = replace(record, output="")
        longest[question] = max(longest.get(question, 0), len(encoder.answer_ids(record)))
    rows: dict[tuple, _Row] = {}
    for record in records:
        sample = encoder.encode(record, room=longest[replace(record, output="")])
        answer = [label for label in sample["labels"] if label != IGNORED]
        if not answer:
            continue
        prompt = sample["input_ids"][: -len(answer)]
        row = rows.setdefault(tuple(prompt), _Row(prompt, sample["opening"], [], [], []))
        row.records.append(record)
        row.answers.append(answer)
        row.cut.append(sample["cut"])
    return list(rows.values())


@torch.inference_mode()
def _score_batch(model, rows: list[_Row], device) -> dict:
    base = getattr(model, "get_base_model", lambda: model)()
    length = max(row.length for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    part = torch.full((len(rows), length), -1)  # 0: prompt, 1, 2, ...: answers, -1: padding
    for i, row in enumerate(rows):
        end = len(row.prompt)
        ids[i, :end], positions[i, :end], part[i, :end] = torch.tensor(row.prompt), torch.arange(end), 0
        for number, answer in enumerate(row.answers, start=1):
            columns = slice(end, end + len(answer))
            ids[i, columns], part[i, columns] = torch.tensor(answer), number
            positions[i, columns] = len(row.prompt) + torch.arange(len(answer))
            end += len(answer)
    own = part[:, :, None] == part[:, None, :]
    seen = (own | (part[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()  # (B, query, key)
    seen |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no row of the softmax is empty
    openings = torch.tensor([row.opening for row in rows])
    of_prompt = (part == 0) & (torch.arange(length) >= openings[:, None])
    with routed_by_prompt(base, of_prompt), recorded_router_logits(base) as of_layers:
        outputs = base.model(
            input_ids=ids.to(device),
            attention_mask=_masks(base, seen, positions, device),
            position_ids=positions.to(device),
            use_cache=False,
        )
    answers = [(i, number) for i, row in enumerate(rows) for number in range(1, len(row.answers) + 1)]
    samples = torch.tensor([i for i, _ in answers])
    lengths = [len(rows[i].answers[number - 1]) for i, number in answers]
    sources = []  # position t predicts t + 1
    for i, number in answers:
        columns = (part[i] == number).nonzero()[:, 0]
        sources.append(torch.cat((torch.tensor([len(rows[i].prompt) - 1]), columns[:-1])))
    hidden = outputs.last_hidden_state[samples.repeat_interleave(torch.tensor(lengths)), torch.cat(sources)]
    tokens = torch.tensor([token for i, number in answers for token in rows[i].answers[number - 1]])
    log_probs = (
        torch.cat(
            [
                _log_probs(base.lm_head(some), targets)  # (512, V) at most
                for some, targets in zip(hidden.split(512), tokens.split(512), strict=True)
            ]
        )
        .cpu()
        .split(lengths)
    )
    probs = probs_with_answer = [None] * len(answers)
    if of_layers:
        counted = torch.stack([of_prompt[i] | (part[i] == number) for i, number in answers])  # (answers, T)
        router_logits = [x.view(len(rows), length, -1)[samples].to(device) for x in of_layers]
        probs = mean_routing_probs(router_logits, of_prompt[samples].to(device)).cpu()
        probs_with_answer = mean_routing_probs(router_logits, counted.to(device)).cpu()
    scored = {}
    for (i, number), of_answer, *routing_probs in zip(answers, log_probs, probs, probs_with_answer, strict=True):
        cut = rows[i].cut[number - 1]
        ended = cut != "answer"
        scored[rows[i].records[number - 1]] = Scored(
            of_answer[:-1] if ended else of_answer,
            of_answer[-1].item() if ended else None,
            *routing_probs,
            cut=bool(cut),
        )
    return scored


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(M, V), (M,) -> (M,) fp32. The head of a model that is spread over GPUs may lie on another one than its input."""
    return -F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def _masks(base, seen: Tensor, positions: Tensor, device) -> Tensor | dict[str, Tensor]:
    """What a decoder adds to its scores where `seen` (B, query, key) says which keys a query sees: (B, 1, query, key);
    of layers with a sliding window one of their own, in which a query sees no further back than the window."""

    def added(seen: Tensor) -> Tensor:
        lowest = torch.finfo(base.dtype).min
        return torch.zeros(seen.shape, dtype=base.dtype).masked_fill_(~seen, lowest)[:, None].to(device)

    window = getattr(base.config, "sliding_window", None)
    if window is None:
        return added(seen)
    near = (positions[:, :, None] - positions[:, None, :]) < window
    layer_types = getattr(base.config, "layer_types", None)
    if layer_types is None:  # all layers are alike
        return added(seen & near)
    masks = {"full_attention": seen, "sliding_attention": seen & near}
    return {name: added(masks[name]) for name in sorted(set(layer_types))}


def check_scored(model) -> None:
    """UserError for a model, of a family that no test holds, whose likelihoods are not those of its head alone."""
    base = getattr(model, "get_base_model", lambda: model)()
    if not is_verified(base.config) and (why := why_scored_otherwise(base)):
        raise UserError(f"a {base.config.model_type} model cannot be scored by likelihood here: {why}")


@torch.inference_mode()
def score_texts(
    model, tokenizer, texts: list[str], window: int, batch_size: int, device
) -> list[tuple[float, int, bool]]:
    """(log-probability, number of tokens scored, whether it was cut) of each plain text, its first `window` tokens:
    every token given those before it, the first one (BOS, where the tokenizer adds it) not counted. A text has no
    prompt: what is routed by prompt is routed by token here."""
    base = getattr(model, "get_base_model", lambda: model)()
    ids = tokenizer(texts, split_special_tokens=True)["input_ids"]
    samples = [(number, of_text[:window]) for number, of_text in enumerate(ids)]
    scored = {}
    for batch in own_share(batches_by_length(samples, lambda sample: len(sample[1]), batch_size)):
        rows, mask = (tensor.to(device) for tensor in pad([of_text for _, of_text in batch], left=False))
        hidden = base.model(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
        for (number, of_text), states in zip(batch, hidden, strict=True):
            count = len(of_text) - 1
            logits = base.lm_head(states[:count]).float()
            targets = torch.tensor(of_text[1:], device=logits.device)
            log_prob = -F.cross_entropy(logits, targets, reduction="sum").item()
            scored[number] = (log_prob, count, len(ids[number]) > window)
    scored = merge_shares(scored)
    return [scored[number] for number in range(len(texts))]
