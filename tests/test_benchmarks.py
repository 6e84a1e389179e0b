"""The benchmarks run, compare outputs before they time anything, and end in one line of JSON."""

import json
import re

import pytest
import torch
from conftest import run_script

from benchmarks import bench_moe, bench_serving, growth, profile_model, profile_serving, whole_model
from config import ROOT, UserError
from workspace.files import read_json


def test_the_forms_are_one_function_and_one_that_is_not_is_refused(monkeypatch):
    torch.manual_seed(0)
    layer = bench_moe.Layer(32, 48, torch.float32)
    inputs = bench_moe.inputs(9, 32, 2, torch.float32, "cpu")
    forms = bench_moe.forms(compiled=False)
    assert bench_moe.left_out(forms, layer, *inputs) == {}
    monkeypatch.setattr(bench_moe, "BATCHED_MM_LIMIT_BYTES", 1)
    assert list(bench_moe.left_out(forms, layer, *inputs)) == ["Mixtral batched_mm"]
    forms["expert loop"] = lambda *args: bench_moe.mixlora_sharing(*args) * 1.01
    with pytest.raises(UserError, match="expert loop is not the mixture"):
        bench_moe.left_out(forms, layer, *inputs)


@pytest.mark.parametrize("activation, part", [("silu", "ffn"), ("gelu_pytorch_tanh", "ffn, gelu_pytorch_tanh")])
def test_quick_ffn_ends_in_json(activation, part, capsys):
    bench_moe.main(["--quick", "1", "--activation", activation])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])[part]["results"]
    assert {row["pass"] for row in rows} == {"forward", "forward + backward"}
    assert {"dense", "ours", "expert loop", "MixLoRA", "Mixtral eager"} <= {row["form"] for row in rows}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)


def test_the_tables_of_the_documents_are_the_committed_figures():
    kept = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    rows = [device["ffn"]["results"] for device in kept if "ffn" in device]
    every = [line for result in rows for top_k in (1, 2, 3) for line in bench_moe.markdown(result, top_k)]
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    of_shape = re.compile(r"\| (SmolLM2-135M|Llama-2-7B), \d+ token")
    quoted = {line for line in text.splitlines() if of_shape.match(line)}
    assert quoted == {line for line in every if of_shape.match(line)}


def test_quick_growth_ends_in_json_and_draws_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "KEPT", tmp_path / "growth.json")
    growth.main(["--quick", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["experts"], row["rank"]) for row in rows] == growth.points()
    assert all(row[name] > 0 for row in rows for name in ("ffn_forward", "ffn_forward_backward", "step"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quick_model_ends_in_json(base_dir):
    result = run_script("benchmarks/bench_moe.py", "--model", 1, "--quick", 1, "--base_model", base_dir)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])["model"]["results"]
    assert measured["dense base"]["checkpoint_bytes"] < measured["ours"]["checkpoint_bytes"]
    assert measured["ours"]["of_which_fused_file_bytes"] > 0
    peaks = {form: measured[form]["inference_peak_bytes"] for form in ("dense base", "exported Mixtral", "ours")}
    assert len(set(peaks.values())) == 3  # each process's own, not their parent's
    assert all(value > 0 for form in measured.values() for value in form.values())


@pytest.mark.slow
def test_a_randomly_initialised_model_ends_in_json():
    result = run_script("benchmarks/bench_moe.py", "--model", 1, "--quick", 1, "--random_init", "tiny")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])["random tiny"]["results"]
    assert set(measured) == {"dense base", "exported Mixtral", "ours"}
    assert measured["ours"]["training_step_s"] > 0 and measured["exported Mixtral"]["prefill_tokens_per_s"] > 0


@pytest.mark.slow
def test_quick_serving_ends_in_json(fused_dir):
    """By this project's own inference; with vLLM in tests/test_engines.py."""
    result = run_script("benchmarks/bench_serving.py", "--cross_task", fused_dir, "--vllm", "", "--quick", 1)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["results"]
    assert [(row["engine"], row["form"]) for row in rows] == [
        ("this project", form) for form in ("dense base", "shared", "mixtral")
    ]
    assert all(row[name] > 0 for row in rows for name in ("tokens_per_s_at_1", "first_token_s_at_2", "memory_bytes"))
    assert rows[0]["weights_bytes"] < rows[1]["weights_bytes"] < rows[2]["weights_bytes"]


def test_llama_2_7b_costs_what_the_documents_say():
    counted = whole_model.counted_bytes("Llama-2-7B")
    assert counted["dense base bytes"] == 2 * 6_738_415_616
    scalings = 32 * 8 * 9  # fp64
    assert counted["fused file bytes"] == 32 * 4 * (3 * 8 * 3 * (4096 + 11008) + 3 * 4096) + scalings
    assert counted["memory, ours / dense base"] < 1.02
    assert counted["fused file / exported Mixtral"] < 0.006


@pytest.mark.slow
def test_routers_alone_end_in_json(fused_dir):
    flags = ["--data_source", "sample", "--num_samples", 4, "--num_held_apart", 3, "--rates", "1e-2"]
    result = run_script("benchmarks/routers_alone.py", "--moe_dir", fused_dir, *flags)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["samples"]["held_apart"] == 9 and 0 <= measured["routing_accuracy"]["0.01"]["mean"] <= 1


def test_the_serving_table_is_that_of_the_committed_figures():
    figures = read_json(bench_serving.KEPT)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert bench_serving.markdown(figures) in page
    speed = {(one["engine"], one["form"]): one["tokens_per_s_at_64"] for one in figures["results"]}
    dense, shared, mixtral = (speed["vLLM", form] for form in bench_serving.FORMS)
    assert f"gives {shared / dense:.2f} of" in page and f"{shared / mixtral:.2f} times those of" in page


def test_the_table_of_the_served_profile_is_that_of_the_committed_figures():
    figures = read_json(profile_serving.KEPT)["results"]
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert profile_serving.table(figures) in page
    page = page.replace("\n", " ")
    dense, shared, mixtral = (figures[form] for form in bench_serving.FORMS)
    whole = {name: sum(figures[name]["profiled_s"].values()) for name in figures}
    ffn = {name: sum(one["profiled_s"][of] for of in profile_serving.KINDS[:2]) for name, one in figures.items()}
    assert f"takes {ffn['mixtral'] / ffn['dense base']:.1f} times the dense" in page
    assert f"takes {ffn['shared'] / ffn['dense base']:.1f} times, its low-rank" in page
    by_operations, by_tokens = whole["mixtral"] / whole["shared"], shared["tokens_per_s"] / mixtral["tokens_per_s"]
    assert f"{by_operations:.1f} times as fast by operations and {by_tokens:.1f} times by" in page
    assert f"would be {whole['mixtral'] / whole['dense base']:.1f} times" in page


def test_the_table_of_the_whole_model_is_that_of_the_committed_figures():
    figures = read_json(ROOT / "benchmarks" / "results" / "intel-r-xeon-r-processor-2-cores.json")["model"]["results"]
    assert whole_model.markdown(figures) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["decoding", "training"])
def test_the_profiles_are_those_of_the_committed_figures(part):
    figures = read_json(profile_model.KEPT)[part]["float32"]["results"]
    assert profile_model.table(part, figures) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_an_operation_is_of_one_kind():
    def kind(part, name, *shapes):
        return profile_model.kind(part, name, list(shapes), {24, 48, 3}, vocabulary=600)

    assert kind("training", "aten::mm", [512, 576], [576, 1536]) == profile_model.BASE
    assert kind("training", "aten::mm", [512, 576], [576, 48]) == profile_model.LOW_RANK
    assert kind("training", "aten::mm", [512, 576], [576, 600]) == profile_model.HEAD
    assert kind("decoding", "aten::mm", [8, 576], [576, 600]) == profile_model.BASE
    assert kind("training", "aten::_log_softmax", [180, 600], []) == profile_model.HEAD
    assert kind("training", "aten::bmm", [36, 128, 64], [36, 64, 128]) == profile_model.OF_ATTENTION
    assert kind("decoding", "aten::cat", []) == profile_model.JOINING
    assert kind("training", "aten::cat", []) == kind("training", "aten::mul", [512, 24]) == profile_model.ELSE


def test_a_served_operation_counts_for_its_kind_less_what_is_within_it():
    def event(name, begins, lasts, *shapes, thread=1):
        args = {"Input Dims": [list(shape) for shape in shapes]}
        return {"ph": "X", "cat": "cpu_op", "name": name, "tid": thread, "ts": begins, "dur": lasts, "args": args}

    events = [
        event("CompiledFxGraph", 0, 9e6),
        event("_C::onednn_mm", 1e6, 2e6, (64, 3072), (64, 576)),
        event("_C::onednn_mm", 3e6, 1e6, (64, 576), (64, 576)),
        event("aten::mm", 4e6, 5e5, (64, 576), (576, 48)),
        event("_C::cpu_attention_with_kv_cache", 5e6, 3e6, (64, 9, 64)),
        event("aten::slice", 6e6, 1e6),
        event("_C::cpu_fused_moe", 2e6, 4e6, (64, 576), thread=2),
        {"ph": "X", "cat": "python_function", "name": "forward", "tid": 1, "ts": 0, "dur": 9e6},
    ]
    seconds, count = profile_serving.seconds_by_kind(events, 1536, 576)
    assert count == 7 and [seconds[name] for name in profile_serving.KINDS] == [6.0, 0.5, 1.0, 2.0, 9.0 - 6.5 + 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "sizes"), [("decoding", ("1", "2")), ("training", ("2x8", "3x4"))])
def test_a_step_is_profiled(part, sizes, base_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profile_model, "KEPT", tmp_path / "profile.json")
    given = ["--base_model", str(base_dir), "--dtype", "float32", "--part", part, "--sizes", ",".join(sizes)]
    profile_model.main([*given, "--steps", "2"])
    figures = read_json(tmp_path / "profile.json")[part]["float32"]["results"]
    for size in sizes:
        dense, ours = (figures[form][size] for form in profile_model.FORMS)
        assert dense["step_ms"] > 0 and ours["operations"] > 0
        assert part == "training" or dense["operations"] < ours["operations"]
        assert set(ours["profiled_ms"]) == set(profile_model.KINDS[part])
        assert all(ours["profiled_ms"][of] > 0 for of in (profile_model.BASE, profile_model.LOW_RANK))
    assert profile_model.table(part, figures) in capsys.readouterr().out


def test_sizes_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit):
        profile_model.main(["--part", "training", "--sizes", "8"])
    assert "--sizes 8: must be like 4x128,8x256" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profile_model.main(["--sizes", "8,24"])
    assert "must be of other tokens than 24, a low-rank size" in capsys.readouterr().err
