"""runs/*.sh: flags that are refused before anything is run."""

import subprocess

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("comparison", ["--quick", "10"], "--quick, --answers, --ablations and --other_merges are 0 or 1"),
        ("comparison", ["--ablations", "2"], "are 0 or 1"),
        ("comparison", ["--answers", "0", "--judge_url", "U", "--judge_model", "M"], "--answers 0 makes none"),
        ("comparison", ["--judge_url", "U"], "--judge_url and --judge_model go together"),
        ("comparison", ["--quick", "1", "--judge_url", "U", "--judge_model", "M"], "answers no prompt of helpfulness"),
        ("comparison", ["--num_train_epochs", "1.5"], "is a whole number here"),
        ("comparison", ["--data_source", "my data"], "--data_source 'my data': holds a space"),
        ("comparison", ["--seeds", "43,44"], "begin with 42"),
        ("comparison", ["--speed", "1"], "--speed: is no flag"),
        ("comparison", ["--seeds"], "--seeds: needs a value"),
        ("recipes", ["--half", "train"], "is held_apart or test"),
        ("recipes", ["--seeds", "42,43"], "on questions held apart one seed"),
        ("recipes", ["--num_train_epochs", "1"], "is a whole number of 2 or more here"),
        ("recipes", ["--rows", "mixed,fusedd"], "fusedd: is no row"),
        ("recipes", ["--rows", "fused"], "--reference mixed: is none of --rows"),
        ("elsewhere", ["--half", "test"], "--half test takes --epochs"),
        ("conflict", [], "name a folder that has safety_pairs.jsonl"),
    ],
)
def test_a_flag_that_is_wrong_is_one_line(script, flags, said):
    run = subprocess.run(["bash", ROOT / "runs" / f"{script}.sh", *flags], capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1 and not run.stdout
