"""runs/*.yaml: accelerate reads them and takes from them what they are for."""

import argparse
import dataclasses
import json
import os
import re
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, run_script
from scripts import FLAGS


def launch_arguments(name) -> argparse.Namespace:
    """The arguments of accelerate launch with a file of runs/."""
    path = str(ROOT / "runs" / name)
    args = launch_command_parser().parse_args(["--config_file", path, "align_basemodel.py"])
    return _validate_launch_command(args)[0]


def test_fsdp_shards_by_decoder_layer_and_saves_whole_matrices(monkeypatch):
    assert load_config_from_file(str(ROOT / "runs" / "fsdp.yaml")).mixed_precision == "bf16"
    args = launch_arguments("fsdp.yaml")
    assert args.use_fsdp and args.num_processes == 8
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
    assert plugin.transformer_cls_names_to_wrap is None  # then the model's own decoder layers
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading


def test_zero3_is_read_by_accelerate():
    settings = load_config_from_file(str(ROOT / "runs" / "zero3.yaml"))
    assert settings.mixed_precision == "bf16" and settings.deepspeed_config["zero_stage"] == 3
    args = launch_arguments("zero3.yaml")
    assert args.use_deepspeed and str(args.zero_stage) == "3"


@pytest.mark.slow
def test_zero3_is_read_by_deepspeeds_own_parser():
    """In a process of its own, which pretends to be on a GPU no more than the parser needs."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    result = run_script("-c", ZERO3, DS_ACCELERATOR="cpu", PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *sys.path]))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "stage": 3,
        "whole": True,
        "bf16": True,
        "offload": ["none", "none"],
    }


ZERO3 = """
import json, os
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from deepspeed.runtime.config import DeepSpeedConfig
from test_launch_files import launch_arguments

args = launch_arguments("zero3.yaml")
args.deepspeed_fields_from_accelerate_config = ""
os.environ.update(prepare_deepspeed_cmd_env(args)[1])
plugin = DeepSpeedPlugin()
plugin.set_mixed_precision(args.mixed_precision)
of_trainer = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}  # which fills in what says auto
settings = {name: value for name, value in plugin.deepspeed_config.items() if value != "auto"} | of_trainer
read = DeepSpeedConfig(settings)
zero = read.zero_config
offload = [zero.offload_optimizer and zero.offload_optimizer.device, zero.offload_param and zero.offload_param.device]
print(json.dumps({"stage": read.zero_optimization_stage, "whole": zero.gather_16bit_weights_on_model_save,
                  "bf16": read.bfloat16_config.enabled, "offload": offload}))
"""


def test_the_commands_of_the_scaling_page_have_flags_that_exist():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:python|torchrun|accelerate launch) .+)$", text, re.M)
    assert len(lines) >= 8
    for line in lines:
        script = re.search(r"[\w/]+\.py", line)[0]
        known = {f"--{field.name}" for arguments in FLAGS[script] for field in dataclasses.fields(arguments)}
        known.add("--gradient_checkpointing")  # transformers' older name of --activation_checkpointing
        assert set(re.findall(r" (--\w+)", line[line.index(script) :])) <= known, line
