"""Routing by prompt: a sample's experts are chosen once, wherever a fusion is run."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_llama_moe import dense_logits, merged_models
from test_trainer import make_trainer, trained_state

import align_basemodel
from config import TASKS, UserError
from data.encoding import Encoder
from data.sources import Record, answer_records, read_rows
from evaluator import evaluate_likelihood
from evaluator.scoring import score_answers
from models import export, llama_moe
from models.expert_bias import read_bias
from models.generation import generate
from models.loading import load_run
from models.prompt_routing import prompt_mask, routed_by_prompt
from models.router import recorded_router_logits
from models.routing import routing_usage, token_routing
from workspace.files import read_json

GREEDY = SimpleNamespace(temperature=0.0, max_new_tokens=12, cache_implementation=None, run="by_prompt")
RECORDS = [
    Record("a", "safety", "Name three birds."),
    Record("b", "safety", "Why is the sky blue at noon and red later?", "Be brief."),
]


@pytest.fixture(scope="module")
def by_prompt_dir(tmp_path_factory, adapter_dirs):
    output = tmp_path_factory.mktemp("by_prompt") / "moe"
    place = ["--experts_dir", str(adapter_dirs[0].parent), "--output", str(output)]
    llama_moe.main([*place, "--routing", "prompt"])
    model, _ = load_run(output, dtype="float32")
    torch.manual_seed(3)
    for block in model.blocks:  # routers that choose: of these prompts not all alike
        torch.nn.init.normal_(block.router.weight, std=1.0)
    model.save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def samples(tokenizer):
    encoder = Encoder(tokenizer, max_length=300)
    rows = [record for task in TASKS for record in answer_records(task, read_rows(task, "train", "sample"))[:3]]
    return encoder.encode_all(rows)[0][:8]


def double(folder, bias=None):
    model, tokenizer = load_run(folder, dtype="float32", bias=read_bias(bias, folder))
    model.double().set_attn_implementation("sdpa")
    return model, tokenizer


def test_a_fusion_says_how_it_is_routed(by_prompt_dir, fused_dir, adapter_dirs, capsys):
    assert read_json(by_prompt_dir / "config.json")["routing"] == "prompt"
    assert read_json(by_prompt_dir / "run.json")["run"]["arguments"]["routing"] == "prompt"
    assert "routing" not in read_json(fused_dir / "config.json")
    assert "routing" not in read_json(fused_dir / "run.json")["run"]["arguments"]
    place = ["--experts_dir", str(adapter_dirs[0].parent), "--output", str(by_prompt_dir)]
    with pytest.raises(SystemExit):  # by token into the same folder
        llama_moe.main(place)
    assert "routing" in capsys.readouterr().err
    assert llama_moe.asked(["--routing", "prompt"])["routing"] == "prompt" and "routing" not in llama_moe.asked([])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_sample_is_computed_by_the_dense_experts_that_its_prompt_chose(
    top_k, by_prompt_dir, fused_dir, base_dir, adapter_dirs
):
    model, _ = double(by_prompt_dir)
    model.set_top_k(top_k)
    ids = torch.randint(2, 600, (2, 11), generator=torch.Generator().manual_seed(0))
    of_prompt = prompt_mask([range(2, 5), range(1, 8)], 11)
    assert of_prompt.sum(1).tolist() == [3, 7]
    routers = [block.router.weight.detach() for block in model.blocks]
    with torch.no_grad():
        with routed_by_prompt(model, of_prompt), recorded_router_logits(model) as logits:
            ours = model(ids).logits
        by_token = model(ids).logits
    assert all(len(of_layer.view(2, 11, -1)[sample].unique(dim=0)) == 1 for of_layer in logits for sample in (0, 1))
    assert (ours - dense_logits(base_dir, adapter_dirs, routers, top_k, ids, of_prompt)).abs().max() < 1e-10
    assert (ours - by_token).abs().max() > 1e-4
    other, _ = double(fused_dir)  # which is routed by token, whatever is said of its prompts
    with torch.no_grad(), routed_by_prompt(other, of_prompt):
        assert torch.equal(other(ids).logits, double(fused_dir)[0](ids).logits)


def test_a_router_has_the_gradient_of_what_it_chooses(by_prompt_dir):
    """Against finite differences."""
    model, _ = double(by_prompt_dir)
    ids = torch.randint(2, 600, (2, 9), generator=torch.Generator().manual_seed(2))
    weight = model.blocks[0].router.weight

    def loss():
        with routed_by_prompt(model, prompt_mask([range(2, 5), range(1, 8)], 9)):
            return model(ids).logits.log_softmax(-1)[..., 7].sum()

    weight.data = weight.data.double()
    (gradient,) = torch.autograd.grad(loss(), weight)
    for place in ((0, 0), (1, 5), (2, 31)):
        sides = []
        for step in (0.01, -0.01):  # Llama's norms are fp32 whatever goes in: a smaller step drowns in their rounding
            weight.data[place] += step
            sides.append(loss().item())
            weight.data[place] -= step
        assert (sides[0] - sides[1]) / 0.02 == pytest.approx(gradient[place].item(), rel=0.01, abs=1e-3)
    assert gradient.abs().max() > 1e-4


def greedy(model, tokenizer, record):
    """Without a cache: the whole text anew for every token."""
    encoder = Encoder(tokenizer, 512)
    prompt = encoder.prompt_ids(record)
    ids, opening = list(prompt), encoder.opening(record)
    for _ in range(GREEDY.max_new_tokens):
        of_prompt = prompt_mask([range(opening, len(prompt))], len(ids))
        with torch.no_grad(), routed_by_prompt(model, of_prompt):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_an_answer_keeps_its_prompts_choice(by_prompt_dir):
    """From a cache, in a batch padded on the left, or anew for every token: the same answers."""
    model, tokenizer = double(by_prompt_dir)
    together = [row["output"] for row in generate(model, tokenizer, RECORDS, GREEDY, 0)]
    alone = [generate(model, tokenizer, [record], GREEDY, 0)[0]["output"] for record in RECORDS]
    assert together == alone == [greedy(model, tokenizer, record) for record in RECORDS]


def test_answers_to_one_question_are_scored_as_each_by_itself(by_prompt_dir):
    model, tokenizer = double(by_prompt_dir)
    encoder = Encoder(tokenizer, 512)
    answers = [
        Record(str(i), "safety", "Name three birds.", "", text)
        for i, text in enumerate(("A crow.", "No idea, ask me later."))
    ]
    answers.append(Record("2", "safety", "Why is the sky blue?", "", "It scatters."))
    scored = score_answers(model, encoder, answers, 4, "cpu", "")
    for record in answers:
        sample = encoder.encode(record)
        prompt = len(encoder.prompt_ids(record))
        ids = torch.tensor([sample["input_ids"]])
        of_prompt = prompt_mask([range(sample["opening"], prompt)], ids.shape[1])
        with torch.no_grad(), routed_by_prompt(model, of_prompt), recorded_router_logits(model) as logits:
            log_probs = model(ids).logits[0].log_softmax(-1)
        own = log_probs[torch.arange(prompt - 1, ids.shape[1] - 1), ids[0, prompt:]]
        expected = torch.cat((scored[record].log_probs, torch.tensor([scored[record].end_log_prob])))
        assert (own - expected).abs().max() < 1e-5
        probs = torch.stack([of_layer[0].softmax(-1) for of_layer in logits]).mean(0)
        assert torch.allclose(scored[record].routing_probs.double(), probs, atol=1e-5)
        assert torch.allclose(scored[record].routing_probs, scored[record].routing_probs_with_answer, atol=1e-6)


def test_usage_and_tokens_are_those_of_the_choice(by_prompt_dir):
    """All tokens of a question and its answer have the same weights."""
    model, tokenizer = load_run(by_prompt_dir, dtype="float32")
    record = Record("a", "safety", "Name three birds.", "", "A crow, a tit and a jay.")
    usage = routing_usage(model, tokenizer, [record], 1, progress=False)
    pieces = token_routing(model, tokenizer, record)
    (weights,) = {tuple(weights) for _, weights in pieces}
    assert torch.allclose(torch.tensor(usage["weight"]).mean(0), torch.tensor(weights), atol=1e-3)
    assert all(sorted(share for share in layer if share) == [1.0, 1.0] for layer in usage["selected"])


@pytest.mark.parametrize("number", range(3))
def test_an_expert_alone_is_its_dense_merge(by_prompt_dir, base_dir, adapter_dirs, number):
    model, _ = double(by_prompt_dir, f"{TASKS[number]}=only")
    dense = list(merged_models(base_dir, adapter_dirs))[number]
    ids = torch.randint(2, 600, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), routed_by_prompt(model, prompt_mask([range(11), range(3)], 11)):
        assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-12


def test_one_batch_of_eight_equals_eight_of_one(by_prompt_dir, samples, tmp_path):
    states = [
        trained_state(make_trainer(by_prompt_dir, samples, tmp_path / str(size), gate=0.5, sgd=True, **sizes))
        for size, sizes in enumerate(
            ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8})
        )
    ]
    start = dict(load_run(by_prompt_dir, dtype="float32")[0].named_parameters())
    for name, value in states[0].items():
        assert (value - states[1][name]).abs().max() < 1e-6
        assert (value - start[name]).abs().max() > 0


def test_an_alignment_keeps_the_routing_and_its_scores_say_so(
    by_prompt_dir, tiny_source, tmp_path, capsys, monkeypatch
):
    place = ["--results_dir", str(tmp_path / "results"), "--data_source", str(tiny_source)]
    align = ["--moe_flag", "1", "--moe_dir", str(by_prompt_dir), "--max_steps", "1", "--use_cpu", "1", *place]
    align += ["--gate_loss_weight", "0.3", "--dtype", "float32", "--run_name", "aligned"]
    align_basemodel.main(align)
    run = tmp_path / "results" / "outputs" / "aligned"
    assert read_json(run / "config.json")["routing"] == "prompt"
    assert read_json(run / "run.json")["run"]["arguments"]["routing"] == "prompt"
    by_token = shutil.copytree(run, run.with_name("by_token"))
    config = read_json(run / "config.json")
    (by_token / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "routing"}))
    scores = ["--num_samples", "2", "--tasks", "helpfulness", "--dtype", "float32", *place]
    evaluate_likelihood.main(["--run", "aligned,by_token", *scores])
    values = [
        read_json(tmp_path / "results" / "evaluation" / "helpfulness" / "test" / name / "likelihood" / "metrics.json")
        for name in ("aligned", "by_token")
    ]
    assert values[0]["metrics"]["nll_per_token"]["value"] != values[1]["metrics"]["nll_per_token"]["value"]
    for more, said in (
        (["--gate_tokens", "all"], "is routed by prompt"),
        (["--gate_gradient", "router"], "is routed by prompt"),
        (["--activation_checkpointing", "1"], "after the choice by prompt"),
        (["--torch_compile", "true"], "which is not compiled"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            align_basemodel.main([*align[:-1], "other", *more])
        assert said in capsys.readouterr().err
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")  # as `accelerate launch` hands its yaml on
    with pytest.raises(SystemExit):
        align_basemodel.main([*align[:-1], "other"])
    assert "(or FSDP's)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["shared", "mixtral", "pt"])
def test_no_exported_form_routes_by_prompt(by_prompt_dir, tmp_path, form, capsys):
    with pytest.raises(SystemExit):
        export.main(["--cross_task", str(by_prompt_dir), "--to", form, "--output", str(tmp_path / "out")])
    assert "is routed by prompt" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_routing_than_these_is_refused(by_prompt_dir, tmp_path):
    folder = shutil.copytree(by_prompt_dir, tmp_path / "odd")
    config = read_json(folder / "config.json") | {"routing": "sentence"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="routing sentence"):
        load_run(folder, dtype="float32")
