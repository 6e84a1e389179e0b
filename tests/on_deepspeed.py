"""A script of the project under DeepSpeed on CPUs, by runs/zero3.yaml in float32: STAGE SCRIPT FLAGS...

DeepSpeed builds its CPU communication at its first run, which takes minutes and a C++ compiler.
accelerate has no backend for DeepSpeed on a CPU; here it gets gloo. No parameter is small enough to stay whole, as it
would be with a tiny model by DeepSpeed's own threshold.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

stage, *sys.argv = sys.argv[1:]
config = str(Path(__file__).resolve().parents[1] / "runs" / "zero3.yaml")
flags = ["--config_file", config, "--zero_stage", stage, "--mixed_precision", "no", sys.argv[0]]
args = _validate_launch_command(launch_command_parser().parse_args(flags))[0]
args.deepspeed_fields_from_accelerate_config = ""
settings = prepare_deepspeed_cmd_env(args)[1]
os.environ.update({name: value for name, value in settings.items() if name.startswith("ACCELERATE_")})
as_it_is = DeepSpeedPlugin.__post_init__


def with_nothing_whole(plugin):
    as_it_is(plugin)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


DeepSpeedPlugin.__post_init__ = with_nothing_whole
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
runpy.run_path(sys.argv[0], run_name="__main__")
