"""Judges that run on this machine: yes/no causal models, moderation classifiers, guards that write their verdict."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

import config
from config import UserError
from data import hub
from data.batching import batches_by_length, pad
from evaluator.judges.protocols import HARM_CATEGORIES
from models import base
from models.causal_lm import multiply_head_once
from models.loading import device, resolve_base
from workspace.files import sha256

NO_JUDGE = (
    "give another --judge, set HF_TOKEN if it is gated, or train a judge on this machine with evaluator/train_judge.py"
)
KEPT_TAIL = 16  # tokens at a text's end that stay when its middle is cut: the protocol's last words


# ---- which judge -----------------------------------------------------------------------------------------------------


def judge_version(judge: str) -> str:
    """What tells a judge's weights from others: the checksum of a folder's weight files, the commit of a hub id."""
    folder = Path(base.base_path(judge))
    if folder.is_dir():
        files = sorted(path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
        if not files:
            raise UserError(f"--judge {judge}: no weights (*.safetensors) in that folder")
        joined = hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()
        return f"sha256 {joined[:16]}"
    return f"commit {_from_hub(AutoConfig, judge)._commit_hash}"


def _from_hub(auto_class, judge: str, **settings):
    """`from_pretrained` of a judge's part; UserError naming --judge if it cannot be had."""
    path = base.base_path(judge)
    hub.check_available(path, "model", NO_JUDGE)
    try:
        return auto_class.from_pretrained(path, token=config.hf_token, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--judge {judge}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def load_judge_tokenizer(judge: str):
    """A judge's tokenizer alone."""
    return _from_hub(AutoTokenizer, judge)


def load_causal(judge: str, dtype: torch.dtype, base_model: str | None = None):
    """(model, tokenizer) of a causal LM by hub id or folder, or of a PEFT adapter's folder with its base.

    base_model: the base's place, if it is not where the adapter names it.
    """
    adapter = (Path(judge) / "adapter_config.json").exists()
    whole = resolve_base(Path(judge), base_model) if adapter else judge
    model = _from_hub(AutoModelForCausalLM, whole, dtype=dtype)
    multiply_head_once(model.get_output_embeddings())
    tokenizer = _from_hub(AutoTokenizer, whole)
    if adapter:
        model = PeftModel.from_pretrained(model, judge)
    return model.to(device()).eval(), tokenizer


# ---- yes or no -------------------------------------------------------------------------------------------------------


def yes_no_ids(tokenizer, text: str) -> tuple[int, int]:
    """The tokens " yes" and " no" after a text, whatever the tokenizer calls them ("▁yes", "Ġyes").

    Raises UserError where one of them is not a single token, or changes the tokens before it.
    """
    ids = []
    for word in (" yes", " no"):
        before, after = (tokenizer(t, split_special_tokens=True)["input_ids"] for t in (text, text + word))
        eos = [token for token in before[-1:] if token == tokenizer.eos_token_id]  # some tokenizers end every text
        before, after = before[: len(before) - len(eos)], after[: len(after) - len(eos)]
        if after[:-1] != before:
            raise UserError(
                f"--judge {tokenizer.name_or_path}: its tokenizer makes no single token of {word!r} after "
                f"{text[-8:]!r}; such a model cannot be asked for p(yes)"
            )
        ids.append(after[-1])
    return ids[0], ids[1]


def token_ids(tokenizer, text: str, max_length: int) -> list[int]:
    """A text's tokens, at most `max_length`: of a longer one the middle goes, so that question and ending stay."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return ids if len(ids) <= max_length else ids[: max_length - KEPT_TAIL] + ids[-KEPT_TAIL:]


@torch.inference_mode()
def yes_probabilities(
    model,
    tokenizer,
    texts: list[str],
    batch_size: int,
    max_length: int | None = None,
    description: str | None = None,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, float]]:
    """(text, probability of " yes" as the next token, over the whole vocabulary), in batches of like length.

    One forward pass a batch, padded on the left, so that only the last position needs logits. description: of a
    progress bar, where the caller shows none. wanted: as `_padded_batches` has it.
    """
    max_length = max_length or model.config.max_position_embeddings
    yes, _ = yes_no_ids(tokenizer, texts[0])
    ids_of_text = {text: token_ids(tokenizer, text, max_length) for text in texts}
    batches = list(_padded_batches(ids_of_text, batch_size, wanted, left=True))
    for batch, ids, mask in tqdm(batches, desc=description, unit="batch", disable=description is None):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        probabilities = outputs.logits[:, -1].float().softmax(-1)[:, yes]
        check_finite(probabilities, model)
        yield from zip(batch, probabilities.tolist(), strict=True)


def check_finite(probabilities: Tensor, model) -> None:
    """UserError for a judge's numbers that are none: they would count as a no."""
    if not probabilities.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(
            f"--judge {model.config.name_or_path}: gives probabilities that are not finite in {dtype}; take another "
            "--dtype (bfloat16 or float32 hold larger numbers than float16), or another judge"
        )


def _padded_batches(
    ids_of_text: dict[str, list[int]], batch_size: int, wanted: Collection[str] | None, *, left: bool
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """(texts, ids, mask) of batches of like length, ids and mask (B, T) on the device.

    wanted: only batches that hold one of these texts (None: all). A text's number depends, in its last bits, on what
    it shares a batch with: whoever goes on after half of them finds the others' numbers in the batches they would
    have had.
    """
    for batch in batches_by_length(list(ids_of_text.items()), lambda item: len(item[1]), batch_size):
        texts, rows = zip(*batch, strict=True)
        if wanted is not None and not any(text in wanted for text in texts):
            continue
        ids, mask = pad(list(rows), left=left)
        yield list(texts), ids.to(device()), mask.to(device())


# ---- moderation classifiers ------------------------------------------------------------------------------------------


class LlamaModeration(LlamaForSequenceClassification):
    """beaver-dam-7b's form: a Llama with a linear head, without bias, on the last real token.

    The weights have LlamaForSequenceClassification's names. That class finds the last token by the padding id, which
    fails where a text holds that id or the configuration has none; here the attention mask says where a text ends.
    """

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """input_ids, attention_mask (B, T), padded on the right. Returns logits (B, labels)."""
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(-1) - 1
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return SequenceClassifierOutputWithPast(logits=logits)


def check_labels(judge: str) -> None:
    """UserError naming the labels of a classifier that does not have the 14; no weight is loaded."""
    labels = list(_from_hub(AutoConfig, judge).id2label.values())
    if set(labels) != set(HARM_CATEGORIES):
        shown = ", ".join(map(str, labels[:6])) + (", ..." if len(labels) > 6 else "")
        raise UserError(
            f"--judge {judge}: its labels are {shown}; a safety classifier needs beaver-dam's 14 "
            f"({HARM_CATEGORIES[0]}, ...); name another way of asking with --judge_protocol"
        )


def load_classifier(judge: str, dtype: torch.dtype):
    """(model, tokenizer) of a sequence classifier, a Llama as LlamaModeration."""
    llama = _from_hub(AutoConfig, judge).model_type == "llama"
    model = _from_hub(LlamaModeration if llama else AutoModelForSequenceClassification, judge, dtype=dtype)
    return model.to(device()).eval(), _from_hub(AutoTokenizer, judge)


@torch.inference_mode()
def category_probabilities(
    model, tokenizer, texts: list[str], batch_size: int, max_length: int, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """(text, {category: sigmoid of its logit}), in batches of like length, padded on the right. wanted: as
    `_padded_batches` has it.

    EOS follows every text, and what is longer than `max_length` with it loses its end, EOS included, as in PKU's
    script. The published slow tokenizer gives "</s>" in the text that same one token; transformers 5 has one Llama
    tokenizer, whose splitting of special tokens is switched off here for what a model wrote.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ids_of(text: str) -> list[int]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        return (ids if ids[-1:] == end else ids + end)[:max_length]

    if model.config.pad_token_id is None and not isinstance(model, LlamaModeration):
        batch_size = 1  # such a model cannot tell padding from text
    for batch, ids, mask in _padded_batches({text: ids_of(text) for text in texts}, batch_size, wanted, left=False):
        if not isinstance(model, LlamaModeration) and model.config.pad_token_id is not None:
            ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
        probabilities = model(input_ids=ids, attention_mask=mask).logits.float().sigmoid()
        check_finite(probabilities, model)
        for text, row in zip(batch, probabilities.tolist(), strict=True):
            yield text, {model.config.id2label[i]: value for i, value in enumerate(row)}


# ---- guards that write ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def written_answers(
    model, tokenizer, texts: list[str], batch_size: int, max_new_tokens: int, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(text, what the model writes after it, greedily). The texts are whole prompts: special tokens in them count.
    wanted: as `_padded_batches` has it."""
    special = {
        text: tokenizer(text, add_special_tokens=not _opens_itself(tokenizer, text))["input_ids"] for text in texts
    }
    end = tokenizer.eos_token_id
    for batch, ids, mask in _padded_batches(special, batch_size, wanted, left=True):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=end if end is not None else 0,
        )
        for text, tokens in zip(batch, written[:, ids.shape[1] :], strict=True):
            yield text, tokenizer.decode(tokens, skip_special_tokens=True)


def _opens_itself(tokenizer, text: str) -> bool:
    """Whether a chat template has already put the beginning-of-text token before the text."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def chat_prompt(tokenizer, question: str, answer: str) -> str:
    """A question and its answer in the tokenizer's own chat template, as Llama Guard is asked.

    Llama-Guard-3-8B's template takes contents as text, the 1B's as a list of parts: whichever shows both turns.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"--judge {tokenizer.name_or_path}: its tokenizer has no chat template to ask Llama Guard by")
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [{"role": "user", "content": wrap(question)}, {"role": "assistant", "content": wrap(answer)}]
        try:
            prompt = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template raises jinja's own errors on the form it does not take
            continue
        if question.strip() in prompt and answer.strip() in prompt and "'type': 'text'" not in prompt:
            return prompt
    raise UserError(f"--judge {tokenizer.name_or_path}: its chat template shows no question and answer")
