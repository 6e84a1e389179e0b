"""A results folder that was copied to another machine goes on there: same commands, the base and the data elsewhere."""

import shutil

import pytest
from conftest import ROOT

import align_basemodel
import inference
from config import TASKS
from evaluator import evaluate_likelihood, evaluate_truth_and_info, report, train_judge
from models import export, llama_moe

SHORT = ["--max_steps", "2", "--batch_size", "4", "--num_samples", "8", "--disable_tqdm", "1", "--dtype", "float32"]
RUN = "mix_moe_reg_00000_00000_00000_gate_00100"


def train(results, base_dir, source):
    place = ["--base_model", base_dir, "--results_dir", results]
    for task in TASKS:
        call(align_basemodel, "--moe_flag", 0, "--task_name", task, "--data_source", source, *SHORT, *place)
    call(llama_moe, *place)
    fusion = ["--moe_flag", 1, "--gate_loss_weight", 0.01, "--data_source", source, *SHORT]
    call(align_basemodel, *fusion, *place)


def use(results, base_dir, source):
    place = ["--base_model", base_dir, "--data_source", source, "--results_dir", results, "--dtype", "float32"]
    answer = ["--num_samples", 2, "--max_new_tokens", 4, *place]
    call(inference, "--task_name", "truthfulness", "--cross_task", RUN, *answer)
    call(evaluate_likelihood, "--run", f"raw,safety,moe,{RUN}", "--num_samples", 2, *place)


def judge(results, judge_base):
    place = ["--results_dir", results, "--base_model", judge_base]
    folder = results / "judges" / "truth"
    call(evaluate_truth_and_info, "--task_name", f"cross_{RUN}", "--mode", 0, "--judge", folder, *place)


def call(script, *arguments):
    script.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sent(tmp_path_factory, base_dir, judge_base_dir):
    """A folder with all that two bases and a data folder gave on a first machine, where nothing is any more."""
    first = tmp_path_factory.mktemp("machines") / "first"
    results, base, judge_base, source = (first / name for name in ("results", "base", "judge_base", "data"))
    shutil.copytree(base_dir, base)
    shutil.copytree(judge_base_dir, judge_base)
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        source.mkdir(exist_ok=True)
        (source / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    train(results, base, source)
    use(results, base, source)
    trained = ["--kind", "truth", "--num_held_out", 8, "--data_source", source, *SHORT]
    call(train_judge, *trained, "--base_model", judge_base, "--results_dir", results)
    judge(results, judge_base)
    return first.rename(first.with_name("sent"))


@pytest.fixture
def moved(tmp_path, sent):
    """Where the results, both bases and the data lie on the second machine."""
    folder = shutil.copytree(sent, tmp_path / "second")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
def test_every_command_goes_on_there(moved, capsys):
    results, base_dir, source = (moved[name] for name in ("results", "base", "data"))
    capsys.readouterr()
    train(results, base_dir, source)
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 5 and "Aligned" not in out and "Fused" not in out
    use(results, base_dir, source)
    judge(results, moved["judge_base"])
    out = capsys.readouterr().out
    assert out.count("scored already") == 5 and out.count("nothing to do") == 1

    answer = ["--num_samples", 2, "--max_new_tokens", 4, "--dtype", "float32", "--results_dir", results]
    call(inference, "--task_name", "safety", "--data_source", source, "--base_model", base_dir, *answer)
    place = ["--base_model", base_dir, "--results_dir", results]
    call(export, "--cross_task", RUN, "--to", "mixtral", "--output", results / "mixtral", *place)
    call(report, "--runs", f"raw,safety,{RUN}", "--results_dir", results)
    assert (results / "inference" / "safety" / "test" / "aligned" / "run.json").exists()
    assert (results / "mixtral" / "config.json").exists()


@pytest.mark.slow
def test_without_its_place_the_base_is_asked_for(moved, capsys):
    results = moved["results"]
    commands = [
        (align_basemodel, "--moe_flag", 1, "--run_name", "other", "--data_source", moved["data"]),
        (inference, "--prompt", "Hello", "--cross_task", RUN),
        (evaluate_likelihood, "--run", RUN),
        (export, "--cross_task", RUN, "--to", "mixtral", "--output", results / "mixtral"),
    ]
    for script, *arguments in commands:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            call(script, *arguments, "--results_dir", results)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and "give its new place with --base_model" in error, script
    assert not (results / "outputs" / "other").exists()


def test_a_judges_base_has_a_new_place_too(moved, capsys):
    results = moved["results"]
    shutil.rmtree(results / "evaluation")  # with the judgements that are kept
    judged = ["--task_name", f"cross_{RUN}", "--mode", 0, "--results_dir", results]
    judged += ["--judge", results / "judges" / "truth"]
    for more, said in (
        ((), "its base model is no longer at"),
        (("--base_model", moved["base"]), "is not the base of"),
        (("--base_model", moved["judge_base"], "--judge_url", "http://localhost:1/v1"), "runs on this machine"),
    ):
        with pytest.raises(SystemExit) as exit_:
            call(evaluate_truth_and_info, *judged, *more)
        assert exit_.value.code == 2 and said in capsys.readouterr().err
    call(evaluate_truth_and_info, *judged, "--base_model", moved["judge_base"])
    assert "truth 0" in capsys.readouterr().out
