"""--help: every flag of a script, on one screen or two, without a wait."""

import dataclasses
import json

import pytest
from conftest import ROOT, run_script
from scripts import FLAGS

IMPORTED = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
heavy = ("torch", "transformers", "peft", "datasets", "alpaca_eval")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


@pytest.mark.parametrize("script", [script for script in FLAGS if not script.startswith("benchmarks")])
def test_help_shows_every_flag_of_the_script_on_few_lines_and_imports_nothing_heavy(script, tmp_path):
    run = run_script("-c", IMPORTED, ROOT / script, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    *lines, imported = run.stdout.splitlines()
    assert len(lines) < 80
    assert json.loads(imported) == []
    shown = "\n".join(lines)
    for field in dataclasses.fields(FLAGS[script][0]):
        assert f"--{field.name} " in shown, field.name


@pytest.mark.slow
def test_help_all_shows_the_flags_of_training_arguments_too():
    run = run_script("align_basemodel.py", "--help_all")
    assert run.returncode == 0, run.stderr
    own, training = FLAGS["align_basemodel.py"]
    for field in (*dataclasses.fields(own), *(field for field in dataclasses.fields(training) if field.init)):
        assert f"--{field.name} " in run.stdout, field.name


def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path):
    script = IMPORTED.replace('"--help"', '"--rank", "0", "--task_name", "safety"').replace("== 0", "== 2")
    run = run_script("-c", script, ROOT / "align_basemodel.py", cwd=tmp_path)
    assert run.returncode == 0 and "--rank 0" in run.stderr
    assert json.loads(run.stdout) == []
