"""README and docs say what is true: their commands run on a base like Llama-2's, their tables are the measured ones."""

import builtins
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED_DATA
from fake_server import FakeServer
from faults.stages import make_bases
from scripts import FLAGS, MAINS, exists, script_of

from config import TASKS

COMMAND = re.compile(r"^ {0,4}\(?(?:cd (\w+) && )?(python [\w/]+\.py\b.*?)\)?$", re.M)
RUN = "mix_moe_reg_00000_00000_00000_gate_00100"
DOCUMENTS = ("README.md", "docs/usage.md", "docs/comparison.md", "docs/serving.md")  # a reader's order


def commands(path) -> list[tuple[str, list[str]]]:
    """(script, its flags) of every command of a README or shell file, in order; $NAME=... lines are filled in."""
    text = path.read_text(encoding="utf-8")
    for name, value in re.findall(r'^ {0,4}(\w+)="?([^"\n]+?)"?$', text, re.M):
        text = text.replace(f"${name}", value)
    parsed = [(folder, shlex.split(command, comments=True)) for folder, command in COMMAND.findall(text)]
    return [(script_of(words, folder), words[2:]) for folder, words in parsed]


@pytest.mark.parametrize("path", [*DOCUMENTS, "runs/demo.sh", "runs/paper.sh"])
def test_every_script_and_flag_that_is_shown_exists(path):
    shown = commands(ROOT / path)
    assert len(shown) >= 4
    for script, argv in shown:
        assert exists(script), script
        flags = {word.removeprefix("--") for word in argv if word.startswith("--")}
        assert flags <= {
            field.name for arguments in FLAGS.get(script, ()) for field in dataclasses.fields(arguments)
        }, argv


@pytest.mark.slow
def test_the_demo_ends_in_its_report(tmp_path):
    """runs/demo.sh as it is, on a tiny base."""
    base_dir, _ = make_bases(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", ROOT / "runs" / "demo.sh", base_dir, tmp_path / "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((tmp_path / "demo" / "report" / "table.json").read_text())
    runs = ["raw", *TASKS, "mixed", "merge_ties", "ensemble_probabilities", "mix_moe_reg_00010_00010_00010_gate_03000"]
    assert [row["run"] for row in table["rows"]] == runs
    assert all(row["metrics"]["mean_nll_per_token"] for row in table["rows"])
    assert table["rows"][-1]["metrics"]["flagged"]["n"] == 8 and (tmp_path / "demo/report/index.html").is_file()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900 and "No number of the paper is reproduced" in text[:200]


def test_no_text_is_left_to_be_written():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"^(TEXT|TODO|TBD|XXX)\b", path.read_text(encoding="utf-8"), re.M), path


def test_every_file_that_is_named_exists():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"\b(?:models|evaluator|data|runs|benchmarks|workspace|tests|docs)/[\w/]+\.\w+", text)
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing + [link for link in links if not (path.parent / link).exists()], path.name


def loaded(name):
    """A script of docs, by its path."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_the_committed_measurements():
    page = loaded("reproduction")
    assert page.document() == page.PAGE.read_text(encoding="utf-8"), "run python docs/reproduction.py"
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@", path.read_text()), f"{path}: a figure is still to be filled in"


def test_the_table_of_faults_is_the_committed_campaign():
    from faults.campaign import table
    from faults.kills import Tally

    kept = json.loads((ROOT / "docs" / "measurements" / "faults.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert table({name: Tally(**one) for name, one in kept.items()}) in page
    assert not any(one["lost"] or one["wrong"] or one["left"] for one in kept.values())


def test_the_table_of_changes_is_the_committed_run():
    import mutants

    kept = json.loads((ROOT / "docs" / "measurements" / "mutants.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    tried, survived = (sum(len(one[name]) for one in kept.values()) for name in ("tried", "survived"))
    assert mutants.table(kept) in page and f"{tried - survived} of {tried} were noticed" in page
    assert set(kept) == set(mutants.TESTS) and (tried - survived) / tried >= 0.9


@pytest.fixture(scope="module")
def committed():
    """docs/comparison.py."""
    return loaded("comparison")


def same_drawing(path: Path, text: str) -> str:
    """A document; of a picture without the last digits of its places, which are the processor's."""
    return re.sub(r"\d+\.\d+", lambda x: f"{float(x[0]):.0f}", text) if path.suffix == ".svg" else text


def test_the_documents_say_what_the_committed_comparison_says(committed):
    comparison = json.loads(committed.TABLE.read_text())
    beside = json.loads(committed.TABLE.with_name("gemma3.json").read_text())
    for path, text in committed.documents(comparison, beside).items():
        written = path.read_text(encoding="utf-8")
        assert same_drawing(path, written) == same_drawing(path, text), f"{path}: run python docs/comparison.py"
    page = committed.TABLE.with_name("index.html").read_text()
    for row in comparison["rows"]:
        assert row["run"] in page and all(f"{one['value']:.3f}" in page for one in row["metrics"].values() if one)


def test_the_headline_calls_a_difference_better_where_its_interval_leaves_0_out(committed):
    comparison = json.loads(committed.TABLE.read_text())
    of_mean = committed.row_of(comparison, "ensemble_probabilities")["paired"]["mean_nll_per_token"]
    for interval, said in (
        ([-0.022, -0.001], "0.013 [0.001, 0.022] better than the ensemble"),
        ([-0.022, 0.002], "not certainly different from the ensemble (−0.013)"),
    ):
        of_mean |= {"difference": -0.013, "interval": interval, "p_holm": 0.03}
        assert said in committed.headline(comparison) and "worse than one LoRA" in committed.headline(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table.json", "gemma3.json"])
def test_the_committed_comparisons_are_those_of_the_kept_rows(committed, name):
    written = json.loads(committed.TABLE.with_name(name).read_text())["rows"]
    folder = committed.RESULTS if name == "table.json" else committed.BESIDE
    computed = committed.compare(committed.kept_runs(folder), committed.REFERENCE)["rows"]
    assert [(row["run"], row["seeds"]) for row in computed] == [(row["run"], row["seeds"]) for row in written]
    for ours, theirs in zip(computed, written, strict=True):
        for name, one in ours["metrics"].items():
            assert one["value"] == pytest.approx(theirs["metrics"][name]["value"])
            assert one["interval"] == pytest.approx(theirs["metrics"][name]["interval"])
        for name, one in ours["paired"].items():
            assert (one["difference"], one["p_holm"]) == pytest.approx(
                (theirs["paired"][name]["difference"], theirs["paired"][name]["p_holm"])
            )


@pytest.mark.slow
def test_when_to_fuse_says_what_the_kept_rows_say():
    page = loaded("when_to_fuse")
    for path, text in page.documents().items():
        written = path.read_text(encoding="utf-8")
        assert same_drawing(path, written) == same_drawing(path, text), f"{path}: run python docs/when_to_fuse.py"


@pytest.mark.slow
def test_nothing_of_the_slices_texts_is_committed():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no slices of the public data sets in {SHARED_DATA}")
    committed = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.*") if path.suffix in (".json", ".html"))
    texts = {
        text
        for path in SHARED_DATA.glob("*_t*.jsonl")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        for text in (row.get(column) for column in ("instruction", "prompt", "question", "output", "response"))
        if text and len(text) > 40
    }
    assert len(texts) > 5000 and not [text for text in texts if text in committed]


TRAINING = ["--max_steps", "2", "--batch_size", "4", "--disable_tqdm", "1", "--use_cpu", "1", "--dtype", "float32"]
SHORT = {
    "align_basemodel.py": TRAINING,
    "inference.py": ["--num_samples", "4", "--max_new_tokens", "5", "--dtype", "float32"],
    "evaluator/evaluate_likelihood.py": ["--num_samples", "4", "--dtype", "float32"],
    "evaluator/embedding_drift.py": ["--num_samples", "4", "--dtype", "float32"],
    "evaluator/train_judge.py": [*TRAINING, "--num_samples", "12", "--num_held_out", "12"],
}
SERVED = ["--num_samples", "4", "--max_new_tokens", "5"]  # a server has its own dtype


JUDGES = {"evaluator/evaluate_safety.py": ("safety",), "evaluator/evaluate_truth_and_info.py": ("truth", "information")}


def with_flags(argv: list[str], **values) -> list[str]:
    """The flags with these set to these values."""
    for name, value in values.items():
        flag = f"--{name}"
        if flag in argv:
            argv = [*argv[: argv.index(flag)], *argv[argv.index(flag) + 2 :]]
        argv = [*argv, flag, str(value)]
    return argv


def end_of_input(prompt):
    raise EOFError


@pytest.mark.slow
def test_the_whole_chain_of_commands_runs_on_a_base_without_a_pad_token(
    base_dir, judge_base_dir, adapter_dirs, four_tasks, tmp_path, monkeypatch, capsys
):
    """Every command of the documents, in their order, with a tiny base, few rows and steps, and judges trained here."""
    assert json.loads((base_dir / "tokenizer_config.json").read_text()).get("pad_token") is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "input", end_of_input)
    results = tmp_path / "results"
    every = [command for name in DOCUMENTS for command in commands(ROOT / name)]
    shown = [(script, argv) for script, argv in every if script in MAINS]
    assert {script for script, _ in shown} == set(MAINS)
    for kind in ("truth", "information"):  # docs/usage.md shows how safety's is trained
        MAINS["evaluator/train_judge.py"](
            [*SHORT["evaluator/train_judge.py"], "--kind", kind, "--base_model", str(judge_base_dir), "--data_source",
             "sample", "--results_dir", str(results)]
        )  # fmt: skip
    train_safety = next((script, argv) for script, argv in shown if script == "evaluator/train_judge.py")
    for number, (script, argv) in enumerate([train_safety, *shown]):
        of_four_tasks = "DIR" in argv and any("politeness" in word for word in argv)
        in_terminal = {"--chat", "--prompt"} & set(argv)  # where there are no samples to be few
        short = ["--max_new_tokens", "5"] if in_terminal else SHORT.get(script, ())
        short = SERVED if "--server_url" in argv and script == "inference.py" else short
        argv = with_flags([*argv, *short], results_dir=results)
        if "--moe_flag" in argv and argv[argv.index("--moe_flag") + 1] == "0":
            argv = with_flags(argv, base_model=base_dir, data_source="sample")
        if script == "evaluator/train_judge.py":
            argv = with_flags(argv, base_model=judge_base_dir, data_source="sample")
        if script in JUDGES:
            kind = JUDGES[script][int(argv[argv.index("--mode") + 1]) if "--mode" in argv else 0]
            argv = with_flags(argv, judge=results / "judges" / kind)
        if script == "align_basemodel.py":
            argv = with_flags(argv, num_samples=12)
        if "--num_held_apart" in argv:
            argv = with_flags(argv, num_held_apart=4)
        for flag in ("output", "moe_dir"):
            if f"--{flag}" in argv:
                shown_path = argv[argv.index(f"--{flag}") + 1]
                within = shown_path.startswith("results/")
                argv = with_flags(argv, **{flag: tmp_path / (shown_path if within else f"output-{number}")})
        if of_four_tasks:
            argv = with_flags(argv, data_source=four_tasks)
        for flag in ("save", "saved"):
            if f"--{flag}" in argv:
                argv = with_flags(argv, **{flag: tmp_path / "kept"})
        if script == "evaluator/reuse.py":  # of other numbers of rows than were scored here: says so
            argv = with_flags(argv, base_model=base_dir, data_source="sample")
            with pytest.raises(SystemExit) as end:
                MAINS[script](argv[: argv.index("--results_dir")] + argv[argv.index("--results_dir") + 2 :])
            assert end.value.code == 3
            continue
        if "--fresh_rank" in argv:
            argv = with_flags(argv, base_model=base_dir)
        if "by-name" in argv:  # a folder has no name on the hub
            argv = with_flags(argv, base_id="somebody/tiny-llama")
        if "--experts" in argv:
            argv = with_flags(argv, experts=",".join(f"{folder.name}={folder}" for folder in adapter_dirs))
        if "--server_url" not in argv:
            MAINS[script](argv)
            continue
        with FakeServer(lambda request: {"text": " An answer."}) as server:
            MAINS[script](
                with_flags(argv, server_url=server.url, data_source="sample", results_dir=tmp_path / "answered")
            )
    table = (results / "report" / "table.md").read_text()
    assert all(f"| {run} |" in table for run in ("raw", "safety", "moe", RUN, f"cross_{RUN}"))
    assert (results / "observation" / "safety" / "test" / f"cross_{RUN}" / "routing.png").exists()
    capsys.readouterr()
