"""Two processes by torchrun (gloo, on the CPU) against one, with the scripts as a user runs them."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import FFN, ROOT, run_script, save_adapter
from safetensors.torch import load_file

from config import TASKS
from models import llama_moe

pytestmark = pytest.mark.slow

ALIGN = ["align_basemodel.py", "--num_train_epochs", 2, "--dtype", "float32", "--disable_tqdm", 1, "--logging_steps", 1]
# Gradients themselves, not their signs, as Adam's first steps are; 36 samples: the last step of 8 has 4
ALIGN += ["--optim", "sgd", "--learning_rate", 0.5, "--max_grad_norm", 0, "--save_strategy", "epoch"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]
ONE, TWO = ["--batch_size", 4, "--gradient_accumulation_steps", 2], ["--batch_size", 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for path in (ROOT / "data" / "sample").glob("*_train.jsonl"):
        (folder / path.name).write_text("\n".join(path.read_text().splitlines()[:12]) + "\n")
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory, base_dir):
    """Experts large enough for a drift, in the same order as always."""
    folder = tmp_path_factory.mktemp("fused")
    for seed, task in enumerate(TASKS):
        save_adapter(folder / task, base_dir, seed, r=4, lora_alpha=4, target_modules=FFN)
    llama_moe.main(["--experts_dir", str(folder), "--output", str(folder / "moe")])
    return folder / "moe"


def stage_flags(stage, base_dir, source, fused):
    if stage == "expert":
        return ["--task_name", "mix", "--base_model", base_dir, "--data_source", source, "--lora_dropout", 0]
    return ["--moe_flag", 1, "--moe_dir", fused, "--data_source", source, "--gate_loss_weight", 0.5] + [
        "--helpfulness_weight", 0.1, "--safety_weight", 0.2, "--router_learning_rate", 0.05
    ]  # fmt: skip


def run(launcher, *flags, **environment):
    return run_script(*launcher, *ALIGN, *flags, OMP_NUM_THREADS="1", **environment)


def outcome(results, name):
    """(weights, log lines with a loss) of a run."""
    folder = results / "outputs" / name
    (weights,) = folder.glob("*model.safetensors")
    record = json.loads((folder / "run.json").read_text())
    return load_file(weights), [line for line in record["train"]["log"] if "loss" in line], record


def assert_alike(first, second):
    weights, lines, record = first
    other_weights, other_lines, other_record = second
    assert record["run"]["arguments"] == other_record["run"]["arguments"]
    assert len(lines) == len(other_lines) > 2
    for line, other in zip(lines, other_lines, strict=True):
        del line["epoch"], other["epoch"]  # transformers counts it by batches: 2 of 11 are one step of 6
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert set(weights) == set(other_weights)
    for key, value in weights.items():
        torch.testing.assert_close(value, other_weights[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def results(tmp_path_factory, base_dir, source, fused):
    """Each stage by one process and by two, in the runs expert_one, expert_two, fusion_one and fusion_two."""
    folder = tmp_path_factory.mktemp("results")
    for stage in ("expert", "fusion"):
        for launcher, name, batch in (([], "one", ONE), (TORCHRUN, "two", TWO)):
            flags = [*stage_flags(stage, base_dir, source, fused), *batch, "--run_name", f"{stage}_{name}"]
            result = run(launcher, *flags, "--results_dir", folder)
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("8 samples per step") == 1  # one process speaks
    return folder


def take_back_to_first_checkpoint(folder):
    """Leave of a finished fusion of two epochs what it had after the first; returns that checkpoint."""
    first, second = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(second)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "arguments.json").write_text(json.dumps({"run": record["run"]}))
    return first


@pytest.mark.parametrize("stage", ["expert", "fusion"])
def test_two_processes_learn_what_one_learns(results, stage):
    """Loss terms, drift, routing accuracy and weights of two epochs, whose last step fills one process only."""
    one, two = outcome(results, f"{stage}_one"), outcome(results, f"{stage}_two")
    assert_alike(one, two)
    assert (one[2]["meta"]["training"]["processes"], two[2]["meta"]["training"]["processes"]) == (1, 2)
    if stage == "fusion":
        assert {"sft_loss", "gate_loss", "drift_safety", "routing_accuracy"} <= set(one[1][-1])
        assert one[1][-1]["drift_safety"] > 0


def test_a_run_goes_on_with_another_number_of_processes(results, base_dir, source, fused, tmp_path):
    """Two processes until the end of the first epoch, then one."""
    folder = tmp_path / "outputs" / "fusion_two"
    shutil.copytree(results / "outputs" / "fusion_two", folder)
    first = take_back_to_first_checkpoint(folder)
    flags = [*stage_flags("fusion", base_dir, source, fused), *ONE, "--run_name", "fusion_two"]
    resumed = run([], *flags, "--results_dir", tmp_path)
    assert resumed.returncode == 0 and f"Resuming from {first}" in resumed.stdout, resumed.stderr
    assert_alike(outcome(results, "fusion_one"), outcome(tmp_path, "fusion_two"))


@pytest.fixture
def deepspeed():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: ZeRO has not been run")
    return dict(DS_ACCELERATOR="cpu", PYTHONPATH=os.pathsep.join(sys.path))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", ["expert", "fusion"])
def test_two_shards_of_zero_learn_what_one_process_learns(deepspeed, results, base_dir, source, fused, stage, zero):
    """Loss terms, drift, routing accuracy and weights; a fusion by ZeRO-3 also when it is resumed."""
    launcher, name = [*TORCHRUN, "tests/on_deepspeed.py", zero], f"{stage}_zero_{zero}"
    flags = [*stage_flags(stage, base_dir, source, fused), *TWO, "--results_dir", results, "--run_name", name]
    trained = run(launcher, *flags, **deepspeed)
    assert trained.returncode == 0, trained.stderr
    assert_alike(outcome(results, f"{stage}_one"), outcome(results, name))
    if (stage, zero) == ("fusion", 3):
        first = take_back_to_first_checkpoint(results / "outputs" / name)
        resumed = run(launcher, *flags, **deepspeed)
        assert resumed.returncode == 0 and f"Resuming from {first}" in resumed.stdout, resumed.stderr
        assert_alike(outcome(results, f"{stage}_one"), outcome(results, name))


def test_a_mistake_is_told_once_and_ends_every_process(results, base_dir, source, fused):
    flags = [*stage_flags("expert", base_dir, source, fused), *TWO, "--run_name", "expert_two"]
    other = run(TORCHRUN, *flags, "--results_dir", results, "--alpha", 2)
    assert other.returncode != 0 and other.stderr.count("error: ") == 1 and "alpha=4.0" in other.stderr
