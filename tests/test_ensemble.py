"""The ensemble against the experts, each merged densely by PEFT, one after the other."""

import pytest
import torch
from conftest import save_adapter
from peft import PeftModel
from transformers import LlamaForCausalLM

import align_basemodel
import inference
from config import TASKS
from data.encoding import Encoder
from data.sources import Record
from evaluator import evaluate_likelihood
from evaluator.scoring import score_answers
from models import ensemble
from models.loading import load_run, run_kind

AVERAGES = ("probabilities", "log_probabilities")


@pytest.fixture(scope="module")
def results(tmp_path_factory, base_dir):
    folder = tmp_path_factory.mktemp("ensembles")
    for seed, task in enumerate(TASKS):
        save_adapter(folder / "outputs" / task, base_dir, seed, r=3 + seed)
    for average in AVERAGES:
        ensemble.main(["--results_dir", str(folder), "--average", average])
    return folder


@pytest.fixture(scope="module")
def experts(results, base_dir):
    return [
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), results / "outputs" / task)
        .merge_and_unload()
        .eval()
        for task in TASKS
    ]


def load(results, average):
    return load_run(results / "outputs" / f"ensemble_{average}", dtype="float32")


def log_average(experts, ids, average):
    log_probs = torch.stack([expert(ids).logits.log_softmax(-1) for expert in experts])
    return log_probs.exp().mean(0).log() if average == "probabilities" else log_probs.mean(0).log_softmax(-1)


@pytest.mark.parametrize("average", AVERAGES)
@torch.no_grad()
def test_it_predicts_the_average(results, experts, average):
    model, _ = load(results, average)
    ids = torch.randint(2, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = log_average(experts, ids, average)
    actual = model(ids).logits
    assert torch.allclose(actual, expected, atol=1e-5) and torch.allclose(actual.exp().sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("average", AVERAGES)
@torch.no_grad()
def test_it_generates_by_the_average_with_and_without_its_cache(results, experts, average):
    """Greedily, two prompts of different length in one batch."""
    model, _ = load(results, average)
    prompts = [[5, 6, 7, 8, 9, 10], [300, 301]]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in prompts:
        expected = torch.tensor([prompt])
        for _ in range(8):
            token = log_average(experts, expected, average)[0, -1].argmax()
            expected = torch.cat((expected, token.view(1, 1)), dim=1)
        for use_cache in (True, False):
            assert torch.equal(model.generate(torch.tensor([prompt]), use_cache=use_cache, **settings), expected)
    ids = torch.tensor([prompts[0], [0] * 4 + prompts[1]])
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    together = model.generate(ids, attention_mask=mask, **settings)[:, 6:]
    for prompt, answer in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :], answer)


@torch.no_grad()
def test_its_scores_are_those_of_the_average(results, experts):
    model, tokenizer = load(results, "probabilities")
    encoder = Encoder(tokenizer, 512)
    records = [Record(str(i), "safety", "Can I?", "", answer) for i, answer in enumerate(("No.", "Yes, you can."))]
    records.append(Record("2", "safety", "Another question", "", "An answer"))
    scored = score_answers(model, encoder, records, 2, "cpu", "ensemble")
    for record in records:
        sample = encoder.encode(record)
        ids = torch.tensor([sample["input_ids"]])
        log_probs = log_average(experts, ids, "probabilities")[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        answer = log_probs[-len(encoder.answer_ids(record)) :]
        assert torch.allclose(scored[record].log_probs, answer[:-1], atol=1e-4)
        assert scored[record].end_log_prob == pytest.approx(answer[-1].item(), abs=1e-4)
        assert scored[record].routing_probs is None


def test_it_is_a_run_like_any_other(results, tiny_source, capsys):
    name = "ensemble_probabilities"
    folder = results / "outputs" / name
    assert run_kind(folder) == "ensemble"
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "run.json"}
    common = ["--results_dir", str(results), "--data_source", str(tiny_source), "--num_samples", "3"]
    answer = ["--task_name", "safety", "--cross_task", name, "--max_new_tokens", "4", "--temperature", "0", *common]
    inference.main(answer)
    evaluate_likelihood.main(["--run", name, *common])
    assert not (results / "observation").exists()  # nothing is routed
    capsys.readouterr()
    ensemble.main(["--results_dir", str(results), "--average", "probabilities"])
    assert "nothing to do" in capsys.readouterr().out
    answers = (results / "inference" / "safety" / "test" / f"cross_{name}" / "outputs.jsonl").read_text()
    (results / "inference").rename(results / "with_dynamic_cache")
    inference.main([*answer, "--cache_implementation", "static"])
    assert (results / "inference" / "safety" / "test" / f"cross_{name}" / "outputs.jsonl").read_text() == answers


def test_it_is_no_fused_model(results, tiny_source, capsys):
    moe = str(results / "outputs" / "ensemble_probabilities")
    with pytest.raises(SystemExit) as exit_:
        align_basemodel.main(["--moe_flag", "1", "--moe_dir", moe, "--results_dir", str(results), "--max_steps", "1"])
    assert exit_.value.code == 2 and "no fused model" in capsys.readouterr().err
