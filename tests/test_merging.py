"""Merges: mergekit's against its formulas by hand, those of the core space against their dense definitions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_adapter, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import align_basemodel
import inference
from config import TASKS
from evaluator import evaluate_likelihood
from models import core_space, merging
from models.core_space import CoreSpace, iso_c, knots_ties, mean_cosine, tsv_m
from models.loading import load_run

RANKS, OUT, IN = (3, 2, 4), 20, 14


def random_deltas(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(r, IN, generator=generator, dtype=torch.float64),
            torch.randn(OUT, r, generator=generator, dtype=torch.float64),
            0.5 + i,
        )
        for i, r in enumerate(RANKS)
    ]


def dense(deltas):
    return [scaling * b @ a for a, b, scaling in deltas]


def test_the_core_space_is_exact():
    deltas = random_deltas(0)
    space = CoreSpace.of(deltas)
    for core, full in zip(space.cores, dense(deltas), strict=True):
        assert torch.allclose(space.q_b @ core @ space.q_a.T, full, atol=1e-12)


def test_tsv_m_is_its_dense_definition():
    deltas = random_deltas(1)
    parts = [torch.linalg.svd(full, full_matrices=False) for full in dense(deltas)]
    u = torch.cat([u[:, :r] for (u, _, _), r in zip(parts, RANKS, strict=True)], dim=1)
    s = torch.cat([s[:r] for (_, s, _), r in zip(parts, RANKS, strict=True)])
    v = torch.cat([vh[:r].T for (_, _, vh), r in zip(parts, RANKS, strict=True)], dim=1)

    def whitened(x):  # x (x^T x)^(-1/2): the Procrustes solution by another way than an SVD of x
        values, vectors = torch.linalg.eigh(x.T @ x)
        return x @ vectors @ torch.diag(values.rsqrt()) @ vectors.T

    expected = 0.7 * whitened(u) @ torch.diag(s) @ whitened(v).T
    a, b = tsv_m(CoreSpace.of(deltas), 0.7)
    assert a.shape == (sum(RANKS), IN) and torch.allclose(b @ a, expected, atol=1e-10)


def test_iso_c_is_its_dense_definition():
    deltas = random_deltas(2)
    u, s, vh = torch.linalg.svd(sum(dense(deltas)), full_matrices=False)
    rank = sum(RANKS)
    a, b = iso_c(CoreSpace.of(deltas), 1.3)
    assert torch.allclose(b @ a, 1.3 * s[:rank].mean() * u[:, :rank] @ vh[:rank], atol=1e-10)
    assert torch.linalg.svdvals(b @ a)[:rank] == pytest.approx([1.3 * s[:rank].mean().item()] * rank)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_ties_is_its_dense_definition(density):
    modules = [random_deltas(3), random_deltas(4)]
    bases, vectors = [], [[], [], []]
    for deltas in modules:
        u, s, vh = torch.linalg.svd(torch.cat(dense(deltas), dim=1), full_matrices=False)
        rank = int((s > 1e-5).sum())
        bases.append(u[:, :rank])
        for i, part in enumerate((s[:rank, None] * vh[:rank]).split(IN, dim=1)):
            vectors[i].append(part)
    flat = [torch.cat([part.flatten() for part in parts]) for parts in vectors]
    trimmed = []
    for vector in flat:
        order = vector.abs().argsort(descending=True)
        kept = torch.zeros_like(vector)
        kept[order[: int(density * len(vector))]] = vector[order[: int(density * len(vector))]]
        trimmed.append(kept)
    merged = torch.zeros_like(flat[0])
    for n, values in enumerate(zip(*(vector.tolist() for vector in trimmed), strict=True)):
        sign = 1 if sum(values) > 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        merged[n] = sum(agreeing) / max(len(agreeing), 1)
    results = knots_ties([CoreSpace.of(deltas) for deltas in modules], density, 0.6)
    start = 0
    for basis, (a, b) in zip(bases, results, strict=True):
        size = basis.shape[1] * IN
        expected = 0.6 * basis @ merged[start : start + size].view(-1, IN)
        assert torch.allclose(b @ a, expected, atol=1e-9)
        start += size


def test_the_mean_cosine_is_that_of_the_dense_changes():
    modules = [random_deltas(5), random_deltas(6)]
    flat = [torch.cat([dense(deltas)[i].flatten() for deltas in modules]) for i in range(3)]
    cosines = [torch.cosine_similarity(flat[i], flat[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_cosine([CoreSpace.of(deltas) for deltas in modules]) == pytest.approx(sum(cosines).item() / 3)


def test_equal_experts_merge_to_themselves():
    (delta,) = random_deltas(7)[:1]
    same = [delta] * 3
    a, b = knots_ties([CoreSpace.of(same)], 1.0, 1.0)[0]
    assert torch.allclose(b @ a, dense(same)[0], atol=1e-9)
    assert torch.allclose(core_space.ties(torch.ones(3, 5).double(), 1.0), torch.ones(5).double())


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory, base_dir):
    folder = tmp_path_factory.mktemp("merges")
    for seed, task in enumerate(TASKS):
        save_adapter(folder / "outputs" / task, base_dir, seed, r=4 + seed, lora_alpha=6)
    return folder


def merge(results, *more):
    merging.main(["--results_dir", str(results), *map(str, more)])


def expert_weights(results, base_dir, key):
    for task in TASKS:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), results / "outputs" / task)
        yield model.merge_and_unload().state_dict()[key].double()


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "method, more",
    [
        ("linear", ()),
        ("task_arithmetic", ("--scale", 0.6)),
        ("ties", ("--density", 0.5, "--scale", 1.5)),
        ("model_stock", ()),
    ],
)
def test_mergekits_merge_is_the_formula(results, base_dir, method, more, tmp_path, capsys):
    merge(results, "--method", method, "--output", tmp_path / "merged", *more)
    actual = load_file(tmp_path / "merged" / "model.safetensors")[KEY].double()
    base = LlamaForCausalLM.from_pretrained(base_dir).state_dict()[KEY].double()
    changes = [weight - base for weight in expert_weights(results, base_dir, KEY)]
    if method == "linear":
        expected = sum(changes) / 3
    elif method == "task_arithmetic":
        expected = 0.6 * sum(changes)
    elif method == "ties":
        flat = torch.stack([change.flatten() for change in changes])
        expected = 1.5 * core_space.ties(flat, 0.5).view_as(base)
    else:
        pairs = [
            torch.cosine_similarity(changes[i].flatten(), changes[j].flatten(), 0) for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        cosine = sum(pairs) / 3
        expected = 3 * cosine / (1 + 2 * cosine) * sum(changes) / 3
    assert torch.allclose(actual - base, expected, atol=2e-6)
    run = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert run["train"]["mean_cosine_of_experts"] == pytest.approx(0, abs=0.2)
    settings = yaml.safe_load((tmp_path / "merged" / "mergekit.yaml").read_text())
    assert settings["merge_method"] == method and len(settings["models"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "merged.lock"]  # no dense expert stays


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "tsv_m"])
def test_some_experts_may_count_more(results, base_dir, method, tmp_path):
    merge(results, "--method", method, "--weights", "safety=3,truthfulness=0.5", "--output", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "run.json").read_text())["run"]["arguments"]["weights"]
    base = LlamaForCausalLM.from_pretrained(base_dir).state_dict()[KEY].double()
    weights = (1.0, 3.0, 0.5)
    changes = [w * (full - base) for w, full in zip(weights, expert_weights(results, base_dir, KEY), strict=True)]
    if method == "tsv_m":
        model, _ = load_run(tmp_path / "merged", str(base_dir), "float32")
        actual = model.merge_and_unload().state_dict()[KEY].double()
        parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
        ranks = (4, 5, 6)
        u = core_space.polar(torch.cat([u[:, :r] for (u, _, _), r in zip(parts, ranks, strict=True)], dim=1))
        v = core_space.polar(torch.cat([vh[:r] for (_, _, vh), r in zip(parts, ranks, strict=True)]))
        expected = u @ torch.diag(torch.cat([s[:r] for (_, s, _), r in zip(parts, ranks, strict=True)])) @ v
    else:
        actual = load_file(tmp_path / "merged" / "model.safetensors")[KEY].double()
        expected = sum(changes) * (1 / sum(weights) if method == "linear" else 0.4)
    assert torch.allclose(actual - base, expected, atol=5e-6)


@pytest.mark.parametrize("method", ["dare_ties", "della", "sce", "tsv_m", "iso_c", "knots_ties"])
def test_every_method_gives_a_run_that_answers_and_scores(results, base_dir, method, tiny_source, capsys):
    merge(results, "--method", method)
    name = f"merge_{method}"
    common = ["--results_dir", str(results), "--data_source", str(tiny_source), "--num_samples", "2"]
    prompt = ["--task_name", "safety", "--cross_task", name, "--max_new_tokens", "4"]
    inference.main([*prompt, *common])
    evaluate_likelihood.main(["--run", name, *common, "--base_model", str(base_dir)])
    raw, _ = load_run(None, str(base_dir))
    merged, _ = load_run(results / "outputs" / name, str(base_dir))
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(merged(ids).logits, raw(ids).logits, atol=1e-3)
    capsys.readouterr()
    merge(results, "--method", method)
    assert "nothing to do" in capsys.readouterr().out


def test_dropping_at_random_is_by_the_seed(results, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge(results, "--method", "dare_ties", "--seed", seed, "--output", tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "model.safetensors")[KEY] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.slow
def test_coefficients_are_chosen_on_training_rows_held_apart(tmp_path, base_dir, tiny_source, capsys):
    """The test half is not even there; of the twelve training rows, four were aligned on."""
    for path in tiny_source.glob("*_test.jsonl"):
        path.unlink()
    short = ["--num_samples", "4", "--max_steps", "2", "--batch_size", "2", "--disable_tqdm", "1"]
    place = ["--results_dir", str(tmp_path), "--base_model", str(base_dir)]
    for task in TASKS:
        align_basemodel.main(["--task_name", task, "--data_source", str(tiny_source), *short, *place])
    merge(tmp_path, "--method", "task_arithmetic", "--num_held_apart", 2)
    run = json.loads((tmp_path / "outputs" / "merge_task_arithmetic_tuned" / "run.json").read_text())
    tried = run["train"]["tried"]
    assert [one["coefficients"]["scale"] for one in tried] == [0.2, 0.4, 0.6, 0.8, 1.0]
    best = min(tried, key=lambda one: one["mean_nll_per_token"])
    assert run["train"]["coefficients"] == best["coefficients"]
    assert best["mean_nll_per_token"] == pytest.approx(sum(best[task] for task in TASKS) / 3)
    assert set(run["run"]["arguments"]["data_sha256"]) == {f"{task}_train.jsonl" for task in TASKS}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        merge(tmp_path, "--method", "ties", "--num_held_apart", 50)
    assert "training prompts of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        merge(tmp_path, "--method", "ties", "--num_held_apart", -1, "--data_source", tiny_source)
    assert "takes all training rows" in capsys.readouterr().err
    few = tmp_path / "few"
    for path in tiny_source.glob("*_train.jsonl"):
        write_jsonl(few / path.name, [json.loads(line) for line in path.read_text().splitlines()[:2]])
    with pytest.raises(SystemExit):
        merge(tmp_path, "--method", "task_arithmetic", "--num_held_apart", -1)
    assert "or -1 with a --data_source" in capsys.readouterr().err
    all_of_few = ["--num_held_apart", -1, "--data_source", few, "--output", tmp_path / "of_few"]
    merge(tmp_path, "--method", "task_arithmetic", *all_of_few)
    of_few = json.loads((tmp_path / "of_few" / "run.json").read_text())["train"]["tried"]
    assert [one["mean_nll_per_token"] for one in of_few] != [one["mean_nll_per_token"] for one in tried]
    with open(tiny_source / "safety_train.jsonl", "a") as file:
        file.write("\n")
    for method, said in (
        ("task_arithmetic", "the data file safety_train.jsonl is not the one"),
        ("ties", "safety was aligned on another safety_train.jsonl"),
    ):
        with pytest.raises(SystemExit):
            merge(tmp_path, "--method", method, "--num_held_apart", 2)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--method"),
        (("--method", "ties", "--seed", 1), "--method ties drops nothing at random"),
        (("--method", "ties", "--dtype", "float32"), "--dtype float32: is for choosing coefficients"),
        (("--method", "ties", "--batch_size", 4), "--batch_size 4: is for choosing coefficients"),
        (("--method", "linear", "--scale", 2), "--method linear has no scale"),
        (("--method", "sce", "--weights", "safety=2"), "--method sce has no weights"),
        (("--method", "linear", "--weights", "kindness=2"), "--weights kindness=2: kindness: needs one of"),
        (("--method", "linear", "--weights", "safety=0"), "--weights safety=0: safety: needs one of"),
        (("--method", "linear", "--weights", "safety"), "write EXPERT=WEIGHT"),
        (("--method", "tsv_m", "--density", 0.5), "--method tsv_m has no density"),
        (("--method", "ties", "--density", 1.5), "at most 1"),
        (("--method", "della", "--density", 0.9), "between 0.15 and 0.85, or 1"),
        (("--method", "model_stock", "--num_held_apart", 4), "nothing to choose"),
        (("--method", "ties", "--num_held_apart", 4, "--scale", 1), "--num_held_apart chooses it"),
        (("--method", "ties", "--num_held_apart", 4), "which rows they were aligned on"),
        (("--method", "ties", "--experts", "safety"), "two or more"),
    ],
)
def test_mistakes_are_one_line(results, flags, said, capsys, tiny_source):
    more = ("--data_source", tiny_source) if "which rows" in said else ()
    with pytest.raises(SystemExit) as exit_:
        merge(results, *flags, *more)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_what_vanishes_under_mergekit_is_one_line(results, tmp_path, monkeypatch, capsys):
    """It takes a folder that is gone for a hub id."""
    import mergekit.merge

    def vanish(settings, folder, options):
        shutil.rmtree(Path(options.lora_merge_cache).parent)
        raise ValueError("Repo id must be in the form 'repo_name'")

    monkeypatch.setattr(mergekit.merge, "run_merge", vanish)
    with pytest.raises(SystemExit) as end:
        merge(results, "--method", "ties", "--output", tmp_path / "gone")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "gone.partial: is gone" in said and said.count("\n") == 1
    monkeypatch.undo()
    merge(results, "--method", "ties", "--output", tmp_path / "gone")
    assert (tmp_path / "gone" / "run.json").exists()


def test_a_merge_is_no_run_of_another_base(results, tmp_path, base_dir, capsys):
    from conftest import other_base

    merge(results, "--method", "linear")
    folder = results / "outputs" / "merge_linear"
    other = other_base(base_dir, tmp_path / "other")
    with pytest.raises(SystemExit):
        inference.main(["--prompt", "Hi", "--cross_task", str(folder), "--base_model", str(other)])
    assert "is not the base of" in capsys.readouterr().err
    model, _ = load_run(folder, str(base_dir), "float32")
    assert torch.equal(model.state_dict()[KEY], load_file(folder / "model.safetensors")[KEY])
