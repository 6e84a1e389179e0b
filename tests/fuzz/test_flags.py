"""Flags of every script, alone and together, with values of any kind."""

import dataclasses
import os
import shutil
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import FLAGS, MAINS

from fuzz.harness import FUZZ, NUMBERS, TEXTS, WORDS, outcome

pytestmark = pytest.mark.slow

# Flags that say where a command works, or make it do much more than a case should: servers, processes, compilers
FIXED = {"results_dir", "judge_url", "server_url", "base_model", "data_source", "output", "chat", "num_samples"}
FIXED |= {"torch_compile", "torch_compile_backend", "torch_compile_mode", "dataloader_num_workers", "max_new_tokens"}
FIXED |= {"dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"}
FIXED |= {
    "report_to",
    "hub_token",
    "num_train_epochs",
    "max_steps",
    "use_cpu",
    "debug",
    "log_level",
    "log_level_replica",
}
SCRIPTS = [name for name in FLAGS if name in MAINS]


@pytest.fixture(scope="module")
def results(tmp_path_factory, adapter_dirs):
    """Three adapters, where the scripts look for experts, and their fusion."""
    from models import llama_moe

    folder = tmp_path_factory.mktemp("flags")
    shutil.copytree(adapter_dirs[0].parent, folder / "outputs")
    llama_moe.main(["--results_dir", str(folder)])
    return folder


def valid(script: str, results, base_dir) -> list:
    """A command line that works, to which the flags of a case are added."""
    source = ["--base_model", base_dir, "--data_source", "sample", "--dtype", "float32"]
    two = ["--num_samples", 2]
    return {
        "align_basemodel.py": ["--task_name", "safety", *source, "--num_samples", 4, "--max_steps", 1],
        "inference.py": ["--task_name", "safety", "--cross_task", "moe", *source, *two, "--max_new_tokens", 2],
        "models/llama_moe.py": ["--output", results / "made"],
        "models/ensemble.py": ["--output", results / "made"],
        "models/merging.py": ["--method", "tsv_m", "--output", results / "made"],
        "models/export.py": ["--cross_task", "moe", "--output", results / "made", "--verify", 0],
        "evaluator/evaluate_likelihood.py": ["--run", "moe", *source, "--num_samples", 2],
        "evaluator/embedding_drift.py": ["--run", "safety", "--reference", "moe", *source, "--num_samples", 2],
        "evaluator/train_judge.py": ["--kind", "safety", *source, "--num_samples", 12, "--max_steps", 1],
        "evaluator/report.py": ["--runs", "raw"],
        "evaluator/select_answers.py": ["--task_name", "safety", "--answers", "a,b"],
        "evaluator/reuse.py": ["--run", "raw", "--saved", results],
    }.get(script, [])  # fmt: skip


def value_of(kind: type, choices) -> st.SearchStrategy:
    """Values that a flag of a kind might be given."""
    of_kind = {int: NUMBERS, float: NUMBERS, bool: st.sampled_from(["0", "1", "true", "maybe"])}.get(kind, WORDS)
    anything = st.one_of(of_kind, WORDS, TEXTS.filter(lambda text: "\x00" not in text))
    return st.one_of(st.sampled_from(choices), anything) if choices else anything


def all_flags(script: str) -> dict[str, st.SearchStrategy]:
    flags = {}
    for dataclass in FLAGS[script]:
        hints = typing.get_type_hints(dataclass)
        for item in dataclasses.fields(dataclass):
            kinds = set(typing.get_args(hints[item.name]) or (hints[item.name],)) - {type(None)}
            if item.name not in FIXED and item.init:
                flags[item.name] = value_of(sorted(kinds, key=str)[0], item.metadata.get("choices"))
    return flags


@pytest.mark.parametrize("script", SCRIPTS)
@FUZZ
@given(data=st.data())
def test_flags(script, data, results, base_dir, tmp_path_factory, working_folder):
    flags = all_flags(script)
    names = data.draw(st.lists(st.sampled_from(sorted(flags)), min_size=1, max_size=3, unique=True))
    argv = [*valid(script, results, base_dir)]
    for name in names:
        argv += [f"--{name}", data.draw(flags[name])]
    outside = {path for path in results.parent.iterdir()}
    said = outcome(MAINS[script], *argv, "--results_dir", results)
    assert "\n" not in said
    assert {path for path in results.parent.iterdir()} == outside
    clear(results)


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory):
    """A folder of its own to work in: what is written by a relative path is seen there."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("cwd")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert not list(folder.iterdir()), list(folder.iterdir())


def clear(results) -> None:
    """Take away what a case made."""
    for path in results.iterdir():
        if path.name != "outputs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (results / "outputs").iterdir():
        if path.name not in ("helpfulness", "safety", "truthfulness", "moe"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
