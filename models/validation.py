"""How likely a model finds the answers of given records: what settings are chosen by, on training rows held apart."""

import torch

from data.batching import batches_by_length
from data.encoding import Collator, Encoder
from data.sources import Record
from models.causal_lm import answer_log_probs


@torch.inference_mode()
def mean_nll_per_token(model, encoder: Encoder, records: dict[str, list[Record]], batch_size: int) -> dict[str, float]:
    """{task: nats per answer token, EOS included} and their mean over tasks, "mean_nll_per_token"."""
    base = getattr(model, "get_base_model", lambda: model)()
    collate, nll = Collator(), {}
    for task, of_task in records.items():
        samples, _ = encoder.encode_all(of_task)
        total, count = 0.0, 0
        for batch in batches_by_length(samples, lambda sample: len(sample["input_ids"]), batch_size):
            inputs = {name: tensor.to(base.device) for name, tensor in collate(batch).items()}
            labels = inputs.pop("labels")
            hidden = base.model(**inputs, use_cache=False).last_hidden_state
            log_probs, _ = answer_log_probs(hidden, base.lm_head, labels)
            total, count = total - log_probs.sum().item(), count + len(log_probs)
        nll[task] = total / count
    return {**nll, "mean_nll_per_token": sum(nll.values()) / len(nll)}
