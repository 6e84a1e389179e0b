"""Checkpoints: sealed when whole, passed over when damaged; and training that stops where it must."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import align_basemodel
from models.trainer import AlignmentTrainer
from workspace import checkpoints

SHORT = ["--batch_size", "2", "--num_samples", "12", "--disable_tqdm", "1", "--dtype", "float32"]
EACH_SECOND = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]


def align(base_dir, results, *more):
    place = ["--base_model", base_dir, "--data_source", "sample", "--results_dir", results]
    align_basemodel.main([str(one) for one in ("--task_name", "safety", *place, *SHORT, *more)])


def unfinish(folder):
    """Make a finished run one that was killed before it wrote its run.json."""
    run = json.loads((folder / "run.json").read_text())["run"]
    (folder / "arguments.json").write_text(json.dumps({"run": run}))
    (folder / "run.json").unlink()


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_dir):
    results = tmp_path_factory.mktemp("run")
    align(base_dir, results, *EACH_SECOND)
    return results


def test_a_checkpoint_holds_no_pickle_that_nothing_reads_and_is_sealed(run):
    folder = run / "outputs" / "safety" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "files.json", "optimizer.pt", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    assert set(json.loads((folder / "files.json").read_text())["sha256"]) == names - {"files.json"}
    assert checkpoints.damage(folder) is None


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "files.json"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(run, base_dir, tmp_path, file, capsys):
    results = shutil.copytree(run, tmp_path / "results")
    folder = results / "outputs" / "safety"
    expected = load_file(folder / "adapter_model.safetensors")
    unfinish(folder)
    last = folder / "checkpoint-6" / file
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    align(base_dir, results, *EACH_SECOND)
    said = capsys.readouterr()
    assert "checkpoint-6" in said.err and file in said.err and "checkpoint-4" in said.out
    actual = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_a_run_that_was_stopped_after_its_last_step_makes_no_other(base_dir, tmp_path, scheduler):
    more = [*EACH_SECOND, "--lr_scheduler_type", scheduler, "--max_steps", "4"]  # of 6 in an epoch
    align(base_dir, tmp_path, *more)
    folder = tmp_path / "outputs" / "safety"
    expected, before = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "run.json").read_text())
    unfinish(folder)
    align(base_dir, tmp_path, *more)
    after = json.loads((folder / "run.json").read_text())
    assert after["train"]["steps"] == 4 and after["train"]["log"] == before["train"]["log"]
    actual = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_last_checkpoints_are_kept_by_their_step_whatever_the_clock_said(base_dir, tmp_path, monkeypatch):
    """A clock that jumps back: to transformers the oldest is the one with the earliest time."""
    real, years = checkpoints.seal, iter(range(40, 0, -1))

    def into_the_past(checkpoint):
        real(checkpoint)
        then = next(years) * 365 * 86400
        os.utime(checkpoint, (then, then))

    monkeypatch.setattr(checkpoints, "seal", into_the_past)
    align(base_dir, tmp_path, *EACH_SECOND, "--save_total_limit", "2")
    kept = {path.name for path in (tmp_path / "outputs" / "safety").glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-6"}


def test_no_limit_on_checkpoints_keeps_all(base_dir, tmp_path):
    align(base_dir, tmp_path, *EACH_SECOND, "--save_total_limit", "-1")
    kept = {path.name for path in (tmp_path / "outputs" / "safety").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("what, said", [("loss", "the loss is nan"), ("gradient", "the gradient's norm is nan")])
def test_training_stops_at_what_is_not_finite_and_names_step_and_samples(
    base_dir, tmp_path, monkeypatch, capsys, run, what, said
):
    """At the third step; the checkpoint of the second stays, and the same command goes on from it."""
    real = AlignmentTrainer.compute_loss

    def strange(self, model, inputs, **more):
        loss = real(self, model, inputs, **more)
        if self.state.global_step != 2:
            return loss
        if what == "loss":
            return loss * float("nan")
        trained = next(p for p in model.parameters() if p.requires_grad)
        return loss + (trained.sum() * 0).sqrt()  # 0, with a derivative of 0 times infinity

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", strange)
    with pytest.raises(SystemExit) as stopped:
        align(base_dir, tmp_path, *EACH_SECOND)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and f"{said} at step 3, of the samples sample-safe-" in line, line
    assert len(re.findall("sample-safe-", line)) == 2
    monkeypatch.undo()
    align(base_dir, tmp_path, *EACH_SECOND)
    assert "checkpoint-2" in capsys.readouterr().out
    expected, actual = (load_file(one / "outputs" / "safety" / "adapter_model.safetensors") for one in (run, tmp_path))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_vanishes_is_made_again_and_loses_nothing(run, base_dir, tmp_path, monkeypatch, killed):
    """Killed after the next checkpoint, the run goes on from that."""
    folder, real = tmp_path / "outputs" / "safety", AlignmentTrainer.training_step

    def strange(trainer, *more):
        if trainer.state.global_step == 2:
            shutil.rmtree(folder, ignore_errors=True)
        if trainer.state.global_step == 4 and killed:
            raise KeyboardInterrupt
        return real(trainer, *more)

    monkeypatch.setattr(AlignmentTrainer, "training_step", strange)
    if killed:
        with pytest.raises(SystemExit):
            align(base_dir, tmp_path, *EACH_SECOND)
        assert {path.name for path in folder.iterdir()} == {"arguments.json", "checkpoint-4"}
        monkeypatch.undo()
    align(base_dir, tmp_path, *EACH_SECOND)
    expected, actual = (load_file(one / "outputs" / "safety" / "adapter_model.safetensors") for one in (run, tmp_path))
    assert (folder / "run.json").exists() and all(torch.equal(actual[name], expected[name]) for name in expected)
