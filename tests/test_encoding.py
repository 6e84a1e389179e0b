"""Token ids, labels, cuts, padding and masks."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import align_basemodel
import inference
from config import TASKS, UserError
from data.encoding import Collator, Encoder, chat_ids, chat_turn_ids, describe
from data.sources import Record
from models import alignment
from models.terminal import turn_ids

HEAD = "Below is an instruction that describes a task"
OPENING = f"{HEAD}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
OPENING_WITH_INPUT = (
    f"{HEAD}, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n"
)
MARK = "\n\n### Response:"
PLAIN = Record("a", "helpfulness", "Name three rivers of Europe.", "", "The Rhine, the Po and the Volga.")
WITH_INPUT = Record("b", "safety", "Translate.", "Guten Tag", "Good day")
PROMPTS = {
    "a": f"{OPENING}{PLAIN.instruction}{MARK}",
    "b": f"{OPENING_WITH_INPUT}Translate.\n\n### Input:\nGuten Tag{MARK}",
}
IGNORED = -100
EOS = 1


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def whole(tokenizer, record: Record) -> tuple[list[int], list[int]]:
    """Prompt and answer of an uncut sample."""
    return ids(tokenizer, PROMPTS[record.id]), [*ids(tokenizer, record.output), EOS]


@pytest.fixture(scope="module")
def bos_tokenizer():
    """Puts BOS before every text, as Llama's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def merging_tokenizer():
    """Has merged tokens of ":" and what an answer may begin with."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [f"### Response:{mark}x" for mark in ("-", '"', ".", '."', "--")] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [PLAIN, WITH_INPUT])
def test_labels_are_the_answer_and_eos(tokenizer, record):
    sample = Encoder(tokenizer, 512).encode(record)
    labelled = [label != IGNORED for label in sample["labels"]]
    border = labelled.index(True)
    assert all(labelled[border:]) and len(labelled) == len(sample["input_ids"])
    assert tokenizer.decode(sample["input_ids"][:border]) == PROMPTS[record.id]
    assert tokenizer.decode(sample["labels"][border:]) == record.output + "</s>"
    assert sample["input_ids"][border:] == sample["labels"][border:]
    assert sample["labels"].count(EOS) == 1 and sample["cut"] == ""


@pytest.mark.parametrize("answer", ["- one\n- two", '"Yes," she said.', "...", '."', "--x", "Yes"])
def test_the_border_is_exact_where_prompt_and_answer_would_merge(merging_tokenizer, answer):
    joined = merging_tokenizer(PROMPTS["a"] + answer)["input_ids"]
    prompt = ids(merging_tokenizer, PROMPTS["a"])
    assert (joined[: len(prompt)] == prompt) == (answer == "Yes")  # tokenised as one string, the border would be lost
    sample = Encoder(merging_tokenizer, 512).encode(Record("a", "safety", PLAIN.instruction, "", answer))
    assert sample["input_ids"][: len(prompt)] == prompt
    assert sample["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert merging_tokenizer.decode(sample["labels"][len(prompt) :]) == answer + "</s>"


class Recorder:
    """A model that keeps what it is fed and answers nothing."""

    config = SimpleNamespace(max_position_embeddings=2048)
    device = "cpu"

    def generate(self, input_ids, attention_mask, **_):
        self.fed = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.full((len(input_ids), 1), EOS)], dim=1)


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_prompt_tokens_are_what_inference_feeds(name, request):
    tokenizer, model, records = request.getfixturevalue(name), Recorder(), [PLAIN, WITH_INPUT]
    inference.generate(model, tokenizer, records, inference.InferArguments(task_name="safety"), seed=1)
    for fed, sample in zip(model.fed, Encoder(tokenizer, 512).encode_all(records)[0], strict=True):
        assert fed == sample["input_ids"][: sample["labels"].count(IGNORED)]
        assert sample["input_ids"].count(0) == (name == "bos_tokenizer")  # BOS once, never before the answer


# ---- opening, masks, padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer", "merging_tokenizer"])
@pytest.mark.parametrize("instruction", ["Name three rivers.", "42", '"Hi"', "### What?", " apples", "Über {x}?"])
def test_opening_is_the_template_before_the_instruction(name, instruction, request):
    tokenizer = request.getfixturevalue(name)
    for given, expected in (("", OPENING), (" \n", OPENING), ("Apples", OPENING_WITH_INPUT), ("7", OPENING_WITH_INPUT)):
        sample = Encoder(tokenizer, 512).encode(Record("x", "safety", instruction, given, "Yes"))
        opening, rest = sample["input_ids"][: sample["opening"]], sample["input_ids"][sample["opening"] :]
        assert tokenizer.decode(opening).removeprefix("<s>") == expected
        assert tokenizer.decode(rest).startswith(f"{instruction}\n\n### ")


@pytest.mark.parametrize("name", ["tokenizer", "padded_tokenizer"])
def test_padding_is_marked_by_position(name, request):
    """Whether there is no pad token or it is the EOS that ends an answer."""
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.eos_token_id == EOS and tokenizer.pad_token_id == (EOS if name == "padded_tokenizer" else None)
    samples, _ = Encoder(tokenizer, 512).encode_all([PLAIN, WITH_INPUT])
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert lengths[0] != lengths[1]
    batch = Collator()(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for i, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        padding = max(lengths) - length
        assert batch["input_ids"][i, :length].tolist() == sample["input_ids"]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * padding
        assert batch["labels"][i].tolist() == sample["labels"] + [IGNORED] * padding
        assert [batch[key][i, length - 1].item() for key in ("input_ids", "attention_mask", "labels")] == [EOS, 1, EOS]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_routing_mask_skips_the_opening_or_nothing(tokenizer):
    samples, _ = Encoder(tokenizer, 512).encode_all([PLAIN, WITH_INPUT])
    after_opening, everything = (Collator(routing=True, gate_tokens=g)(samples) for g in ("instruction", "all"))
    assert after_opening["task_ids"].tolist() == [0, 1]
    assert everything["routing_mask"].equal(everything["attention_mask"])
    for i, text in enumerate((PROMPTS["a"] + PLAIN.output, PROMPTS["b"] + WITH_INPUT.output)):
        averaged = after_opening["input_ids"][i][after_opening["routing_mask"][i].bool()]
        opening = (OPENING, OPENING_WITH_INPUT)[i]
        assert tokenizer.decode(averaged) == text.removeprefix(opening) + "</s>"


# ---- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("too_many", [0, 1, 5, 60])
def test_a_long_prompt_loses_its_beginning(tokenizer, too_many):
    prompt, answer = whole(tokenizer, PLAIN)
    sample = Encoder(tokenizer, len(prompt) + len(answer) - too_many).encode(PLAIN)
    assert sample["input_ids"] == prompt[too_many:] + answer
    assert sample["labels"] == [IGNORED] * (len(prompt) - too_many) + answer
    assert sample["cut"] == ("prompt" if too_many else "")
    assert tokenizer.decode(sample["input_ids"]).endswith(f"{MARK}{PLAIN.output}</s>")
    assert sample["opening"] == max(len(ids(tokenizer, OPENING)) - too_many, 0)


@pytest.mark.parametrize("too_many", [1, 30, 60])
def test_a_prompt_that_is_cut_keeps_its_bos(bos_tokenizer, too_many):
    prompt, answer = whole(bos_tokenizer, PLAIN)
    assert prompt[0] != bos_tokenizer.bos_token_id == 0
    sample = Encoder(bos_tokenizer, 1 + len(prompt) + len(answer) - too_many).encode(PLAIN)
    assert sample["input_ids"] == [0, *prompt[too_many:], *answer]
    assert sample["labels"] == [IGNORED] * (1 + len(prompt) - too_many) + answer
    assert sample["opening"] == max(1 + len(ids(bos_tokenizer, OPENING)) - too_many, 1)


def test_a_bos_stands_before_the_response_mark_alone(bos_tokenizer):
    mark, answer = ids(bos_tokenizer, MARK), whole(bos_tokenizer, PLAIN)[1]
    for missing in (0, 3):
        sample = Encoder(bos_tokenizer, 1 + len(mark) + len(answer) - missing).encode(PLAIN)
        assert sample["input_ids"] == [0, *mark, *answer[: len(answer) - missing]]
        assert sample["cut"] == ("answer" if missing else "prompt") and sample["opening"] == 1


def test_room_for_another_answer_cuts_the_prompt_as_that_one_would(tokenizer):
    prompt, answer = whole(tokenizer, PLAIN)
    for room in (0, len(answer), len(answer) + 7):
        sample = Encoder(tokenizer, len(prompt) + len(answer) + 2).encode(PLAIN, room)
        cut = max(room - len(answer) - 2, 0)
        assert sample["input_ids"] == prompt[cut:] + answer and sample["cut"] == ("prompt" if cut else "")


def test_a_prompt_is_cut_down_to_the_response_mark_and_then_the_answer(tokenizer):
    mark, answer = ids(tokenizer, MARK), whole(tokenizer, PLAIN)[1]
    fits = Encoder(tokenizer, len(mark) + len(answer)).encode(PLAIN)
    assert (fits["input_ids"], fits["cut"], fits["opening"]) == (mark + answer, "prompt", 0)
    for missing in (1, 2, len(answer) - 2):
        sample = Encoder(tokenizer, len(mark) + len(answer) - missing).encode(PLAIN)
        assert sample["input_ids"] == mark + answer[:-missing]
        assert sample["labels"] == [IGNORED] * len(mark) + answer[:-missing]
        assert sample["cut"] == "answer" and EOS not in sample["labels"]


def test_what_is_cut_and_dropped_is_counted(tokenizer):
    limit = len(sum(whole(tokenizer, PLAIN), []))
    long_prompt = Record("c", "safety", "Why? " * 100, "", "No.")
    long_answer = Record("d", "truthfulness", "Why?", "", "No. " * 300)
    empty = [Record("e", "helpfulness", "Why?"), Record("f", "helpfulness", "Why? " * 400, "", "")]
    records = [PLAIN, empty[0], long_prompt, long_answer, empty[1], long_prompt]
    samples, counts = Encoder(tokenizer, limit).encode_all(records)
    assert counts == {"samples": 4, "dropped_without_answer": 2, "cut_prompts": 2, "cut_answers": 1}
    assert [sample["cut"] for sample in samples] == ["", "prompt", "answer", "prompt"]
    assert max(len(sample["input_ids"]) for sample in samples) == limit
    assert describe(counts).startswith("4 samples (2 prompts and 1 answers cut to ") and "2 dropped" in describe(counts)


# ---- mixed data, errors ----------------------------------------------------------------------------------------------


def test_a_sample_of_no_task_and_of_tasks_by_other_names(tokenizer):
    samples, _ = Encoder(tokenizer, 512).encode_all([PLAIN, WITH_INPUT])
    samples[0]["task"] = ""
    assert Collator(routing=True)(samples)["task_ids"].tolist() == [-1, 1]
    samples[1]["task"] = "kindness"
    assert Collator(routing=True, tasks=("mercy", "wit", "kindness"))(samples)["task_ids"].tolist() == [-1, 2]


def test_every_sample_of_mixed_data_has_its_tasks_index(tokenizer, tiny_source, capsys):
    args = align_basemodel.AlignArguments(moe_flag=1, data_source=str(tiny_source))
    samples = alignment.training_samples(args, 42, tokenizer)
    rows = {
        task: [json.loads(line) for line in (tiny_source / f"{task}_train.jsonl").read_text().splitlines()]
        for task in ("helpfulness", "safety", "truthfulness")
    }
    answers = [
        [row["output"] for row in rows["helpfulness"]],
        [row["response"] for row in rows["safety"] if row["is_safe"]],
        [answer for row in rows["truthfulness"] for answer in row["correct_answers"]],
    ]
    expected = [(answer, index) for index, texts in enumerate(answers) for answer in texts]
    actual = [(tokenizer.decode([i for i in s["labels"] if i != IGNORED]), TASKS.index(s["task"])) for s in samples]
    assert [(text.removesuffix("</s>"), index) for text, index in actual] == expected
    assert len(answers[1]) < 12 < len(answers[2])
    assert Collator(routing=True)(samples)["task_ids"].tolist() == [index for _, index in expected]
    assert f"truthfulness: {len(answers[2])} samples" in capsys.readouterr().out


def test_max_length_must_leave_room_for_an_answer(tokenizer):
    mark = len(ids(tokenizer, MARK))
    for max_length in (1, mark, mark + 1):
        with pytest.raises(UserError, match=f"--max_length {max_length}: must be above {mark + 1}"):
            Encoder(tokenizer, max_length)
    sample = Encoder(tokenizer, mark + 2).encode(PLAIN)
    assert tokenizer.decode(sample["input_ids"][:mark]) == MARK and len(sample["input_ids"]) == mark + 2


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(UserError, match="no EOS"):
        Encoder(without, 300)


def test_an_eos_that_a_tokenizer_ends_texts_with_is_not_put_before_the_answer(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", EOS)])
    assert Encoder(ending, 300).prompt_ids(PLAIN) == Encoder(tokenizer, 300).prompt_ids(PLAIN)
    turns = [("Hi.", "Hello."), ("Why?", "")]
    assert turn_ids(ending, turns, False) == turn_ids(tokenizer, turns, False)


def test_a_chat_prompt_is_what_the_template_itself_tokenises():
    """By a tokenizer like Llama-2's, whose words begin with a mark for the space before them: a piece that is tokenised
    by itself would begin with one more."""
    words = ["<unk>", "<s>", "</s>", "▁", "[", "INST", "]", "/", "▁Hello", "Hello", "▁["]
    like_llama = LlamaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    like_llama.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    spoken = [{"role": "user", "content": "Hello"}]
    expected = like_llama.apply_chat_template(spoken, add_generation_prompt=True, return_dict=False)
    assert chat_turn_ids(like_llama, [("Hello", "")]) == expected


def test_text_that_spells_a_special_token_is_text(tokenizer):
    sample = Encoder(tokenizer, 300).encode(Record("x", "safety", "What is </s> in HTML?", "", "</s> closes <s>."))
    assert sample["input_ids"].count(tokenizer.eos_token_id) == 1 and sample["input_ids"][-1] == tokenizer.eos_token_id


CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_conversation_is_the_chat_templates(tokenizer):
    """Of several turns; text that spells a special token is text, the template's own are not."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    turns = [("Hi.", "Hello."), ("What is </s>?", "An end."), ("Why?", "")]
    expected = []
    for i, text in enumerate(("Hi.", "Hello.", "What is </s>?", "An end.", "Why?")):
        role = ("user", "assistant")[i % 2]
        expected += [*ids(chat, f"[{role}] "), *chat(text, split_special_tokens=True)["input_ids"], EOS]
    assert chat_turn_ids(chat, turns) == [*expected, *ids(chat, "[assistant] ")]
    record = Record("x", "safety", "Translate.", "Guten Tag", "")
    assert chat_ids(chat, record) == chat_turn_ids(chat, [("Translate.\n\nGuten Tag", "")])
    assert chat_ids(chat, Record("x", "safety", "Why?")) == chat_turn_ids(chat, [("Why?", "")])
    assert Encoder(chat, 300, chat=True).prompt_ids(record) == chat_ids(chat, record)
    with pytest.raises(UserError, match="has no chat template; leave it out"):
        chat_turn_ids(tokenizer, turns)
