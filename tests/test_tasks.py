"""Tasks beside the paper's three, and other numbers of experts: data and flags, no code."""

import json
import shutil

import pytest
import torch
from conftest import save_adapter, write_jsonl

import align_basemodel
import inference
from config import TASKS, UserError
from data.split import main as split
from evaluator import embedding_drift, evaluate_likelihood, report, select_answers
from models import ensemble, llama_moe, merging
from models.loading import load_run, run_sources
from models.mixture import read_mixture

FOUR = ",".join((*TASKS, "politeness"))
FUSED = "mix_moe_reg_00000_00000_00000_politeness_00010_gate_01000"


def error_of(capsys, call, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        call([str(argument) for argument in arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and error.startswith("error: ")
    return error


@pytest.mark.slow
def test_a_fourth_task_goes_the_whole_way(four_tasks, base_dir, tmp_path):
    results = ["--results_dir", str(tmp_path)]
    training = [*results, "--num_samples", "6", "--max_steps", "2", "--batch_size", "4", "--logging_steps", "1"]
    training += ["--dtype", "float32"]
    for task in FOUR.split(","):
        align_basemodel.main(
            ["--task_name", task, "--base_model", str(base_dir), "--data_source", str(four_tasks), *training]
        )
    llama_moe.main(["--tasks", FOUR, "--router_init", "prototype", "--num_prompts", "4", *results])
    align_basemodel.main(
        ["--moe_flag", "1", "--gate_loss_weight", "0.1", "--drift_weights", "politeness=0.001", *training]
    )
    run = json.loads((tmp_path / "outputs" / FUSED / "run.json").read_text())
    assert run["run"]["arguments"]["tasks"] == FOUR and run["run"]["arguments"]["drift_weights"] == "politeness=0.001"
    assert (
        run["train"]["samples"] == 6 * 4 + len([]) or run["train"]["samples"] > 24
    )  # truthfulness has several answers
    assert any("drift_politeness" in line for line in run["train"]["log"])
    assert read_mixture(tmp_path / "outputs" / FUSED).expert_of_task["politeness"] == 3
    align_basemodel.main(
        [
            "--task_name",
            "mix",
            "--tasks",
            FOUR,
            "--base_model",
            str(base_dir),
            "--data_source",
            str(four_tasks),
            *training,
        ]
    )
    assert (tmp_path / "outputs" / "mix_politeness" / "run.json").exists()
    merging.main(["--method", "tsv_m", "--tasks", FOUR, "--num_held_apart", "2", *results])
    ensemble.main(["--tasks", FOUR, *results])
    runs = f"raw,politeness,{FUSED},mix_politeness,merge_tsv_m_tuned,ensemble_probabilities"
    scoring = [*results, "--num_samples", "4", "--dtype", "float32", "--base_model", str(base_dir)]
    evaluate_likelihood.main(["--run", runs, "--tasks", FOUR, *scoring, "--data_source", str(four_tasks)])
    embedding_drift.main(["--run", FUSED, "--reference", "moe", "--tasks", FOUR, *scoring])
    inference.main(
        ["--task_name", "politeness", "--cross_task", FUSED, "--num_samples", "2", "--max_new_tokens", "3", *results]
    )
    report.main(["--runs", runs, "--save", str(tmp_path / "kept"), *results])
    table = json.loads((tmp_path / "report" / "table.json").read_text())
    (row,) = [row for row in table["rows"] if row["run"] == FUSED]
    values = [row["metrics"][f"{task}_nll_per_token"]["value"] for task in FOUR.split(",")]
    assert row["metrics"]["mean_nll_per_token"]["value"] == pytest.approx(sum(values) / 4)
    assert "politeness_routing_accuracy" in row["metrics"]
    assert "politeness NLL/token" in (tmp_path / "report" / "table.md").read_text()
    assert "politeness" in (tmp_path / "report" / "index.html").read_text()
    report.main(["--runs", runs, "--saved", str(tmp_path / "kept"), "--results_dir", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "report" / "table.json").read_text())
    assert again["rows"][0]["metrics"] == table["rows"][0]["metrics"]


def test_runs_of_three_and_of_four_tasks_are_compared_on_three(base_dir, adapter_dirs, four_tasks, tmp_path, capsys):
    results = ["--results_dir", str(tmp_path)]
    scoring = ["--data_source", str(four_tasks), "--num_samples", "2", "--base_model", str(base_dir), *results]
    evaluate_likelihood.main(["--run", "raw", *scoring])
    evaluate_likelihood.main(["--run", str(adapter_dirs[1]), "--tasks", FOUR, *scoring])
    capsys.readouterr()
    name = adapter_dirs[1].name
    (tmp_path / "outputs").mkdir(exist_ok=True)
    shutil.copytree(adapter_dirs[1], tmp_path / "outputs" / name)
    report.main(["--runs", f"raw,{name}", *results])
    out = capsys.readouterr().out
    assert "Not all runs are scored on politeness: left out" in out and "politeness NLL/token" not in out


def test_the_raw_base_is_that_of_experts_of_any_task(base_dir, four_tasks, tmp_path, capsys):
    folder = tmp_path / "outputs" / "politeness"
    training = ["--num_samples", "2", "--max_steps", "1", "--batch_size", "2", "--dtype", "float32"]
    align_basemodel.main(
        ["--task_name", "politeness", "--base_model", str(base_dir), "--data_source", str(four_tasks), *training,
         "--results_dir", str(tmp_path)]
    )  # fmt: skip
    assert run_sources(None, None, None, str(tmp_path)) == (str(base_dir), str(four_tasks))
    other = shutil.copytree(folder, tmp_path / "outputs" / "rudeness")
    record = json.loads((other / "run.json").read_text())
    record["run"]["arguments"]["base_sha256"] = "another"
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="stand on different bases; say which raw base with --base_model"):
        run_sources(None, None, None, str(tmp_path))
    assert run_sources(None, str(base_dir), None, str(tmp_path))[0] == str(base_dir)


def test_spelling_does_not_make_another_run():
    asked = align_basemodel.AlignArguments(
        task_name="mix", moe_flag=1, tasks="safety, politeness", drift_weights=" politeness=0.10,rudeness=-0.0"
    )
    assert (asked.tasks, asked.drift_weights) == ("safety,politeness", "politeness=0.1")


@pytest.mark.parametrize("number", [2, 8])
def test_two_and_eight_experts_work_alike(number, base_dir, four_tasks, tmp_path):
    names = list("abcdefgh")[:number]
    for i, name in enumerate(names):
        save_adapter(tmp_path / "outputs" / name, base_dir, seed=i)
        for half in ("train", "test"):
            (tmp_path / "data").mkdir(exist_ok=True)
            shutil.copyfile(four_tasks / f"politeness_{half}.jsonl", tmp_path / "data" / f"{name}_{half}.jsonl")
    tasks, results = ",".join(names), ["--results_dir", str(tmp_path)]
    llama_moe.main(["--tasks", tasks, "--expert_topk", str(min(number, 3)), *results])
    align_basemodel.main(
        ["--moe_flag", "1", "--gate_loss_weight", "0.5", "--data_source", str(tmp_path / "data"), "--num_samples", "3",
         "--max_steps", "2", "--batch_size", "4", "--dtype", "float32", "--logging_steps", "1", "--run_name", "fused",
         *results]
    )  # fmt: skip
    evaluate_likelihood.main(
        ["--run", "fused", "--tasks", tasks, "--num_samples", "2", "--data_source", str(tmp_path / "data"), *results]
    )
    model, _ = load_run(tmp_path / "outputs" / "fused", dtype="float32")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert model.mixture.num_experts == number
    log = json.loads((tmp_path / "outputs" / "fused" / "run.json").read_text())["train"]["log"]
    assert {key for line in log for key in line if key.startswith("drift_")} == {f"drift_{name}" for name in names}


def test_a_run_on_fewer_tasks_is_named_after_what_is_missing(base_dir, tmp_path):
    training = ["--num_samples", "2", "--max_steps", "1", "--batch_size", "2", "--dtype", "float32"]
    align_basemodel.main(
        ["--task_name", "mix", "--tasks", "helpfulness,safety", "--base_model", str(base_dir), "--data_source",
         "sample", "--results_dir", str(tmp_path), *training]
    )  # fmt: skip
    assert (tmp_path / "outputs" / "mix_without_truthfulness" / "run.json").exists()


def test_a_fusion_is_aligned_on_the_tasks_of_its_experts(base_dir, tmp_path, capsys):
    """Not on the paper's three where it has two of them. Fused again by other tasks, it is another fusion."""
    for number, name in enumerate(("helpfulness", "safety", "polite", "rude")):
        save_adapter(tmp_path / "outputs" / name, base_dir, seed=number)
    results = ["--results_dir", str(tmp_path)]
    short = ["--num_samples", "2", "--max_steps", "1", "--batch_size", "2", "--dtype", "float32"]
    align = ["--moe_flag", "1", "--data_source", "sample", *short, *results]
    llama_moe.main(["--experts", "helpfulness,safety", *results])
    align_basemodel.main(align)
    run = tmp_path / "outputs" / "mix_moe_reg_00000_00000_00000_gate_00000_without_truthfulness" / "run.json"
    assert json.loads(run.read_text())["run"]["arguments"]["tasks"] == "helpfulness,safety"
    place = [f"polite={tmp_path}/outputs/polite,rude={tmp_path}/outputs/rude", "--output", str(tmp_path / "of_two")]
    llama_moe.main(["--experts", *place, *results])
    with pytest.raises(SystemExit):
        llama_moe.main(["--experts", *place, "--tasks", "polite,rude", *results])
    assert "and --tasks says polite, rude" in capsys.readouterr().err


def test_the_training_questions_of_a_fourth_task_are_dealt_out_too(four_tasks, tmp_path):
    split(["--data_source", str(four_tasks), "--output", str(tmp_path / "out"), "--mixed", "5", "--num_held_apart", "4",
           "--tasks", FOUR])  # fmt: skip
    parts = [len((tmp_path / "out" / part / "politeness_train.jsonl").read_text().splitlines())
             for part in ("experts", "mixed_5")]  # fmt: skip
    assert parts == [21, 5]


def test_a_classifier_picks_among_four_experts(four_tasks, tmp_path):
    folder = tmp_path / "inference" / "politeness" / "test"
    rows = [
        {
            "id": str(i),
            "instruction": f"Ask a neighbour for {i} eggs.",
            "input": "",
            "generator": "x",
            "reference": "",
            "task": "politeness",
        }
        for i in range(3)
    ]
    for task in FOUR.split(","):
        write_jsonl(folder / f"cross_{task}" / "outputs.jsonl", [{**row, "output": task} for row in rows])
        (folder / f"cross_{task}" / "run.json").write_text(
            '{"run": {"script": "inference.py", "arguments": {}}, "meta": {}, "train": {}}'
        )
    answers = ",".join(f"cross_{task}" for task in FOUR.split(","))
    select_answers.main(
        ["--task_name", "politeness", "--answers", answers, "--by", "classifier", "--tasks", FOUR, "--data_source",
         str(four_tasks), "--results_dir", str(tmp_path)]
    )  # fmt: skip
    chosen = [json.loads(line)["output"] for line in (folder / "classifier" / "outputs.jsonl").read_text().splitlines()]
    assert chosen == ["politeness"] * 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--task_name", "kindness", "--data_source", "sample"], "has no kindness_train.jsonl"),
        (["--task_name", "kindness", "--data_source", "hub"], "the hub has helpfulness, safety, truthfulness"),
        (["--task_name", "Kind ness"], "must be small letters"),
        (["--task_name", "mix", "--tasks", "safety,safety"], "name each task once"),
        (["--task_name", "mix", "--tasks", "general"], "must be small letters"),
        (["--task_name", "safety", "--tasks", "safety,helpfulness"], "leave it out"),
        (["--moe_flag", "1", "--drift_weights", "safety=1"], "give it as --safety_weight"),
        (["--moe_flag", "1", "--drift_weights", "politeness"], "write TASK=VALUE"),
        (["--moe_flag", "1", "--drift_weights", "politeness=-1"], "politeness=-1: must be 0 or more"),
        (["--moe_flag", "1", "--drift_weights", ""], "an empty part: write TASK=VALUE"),
        (["--task_name", "mean"], "must be small letters"),
        (["--task_name", "safety", "--drift_weights", "politeness=1"], "has an effect with --moe_flag 1 only"),
    ],
)
def test_what_is_no_task_is_refused(arguments, said, base_dir, tmp_path, capsys):
    arguments = [*arguments, "--results_dir", tmp_path]
    if "--moe_flag" not in arguments:
        arguments += ["--base_model", base_dir]
    assert said in error_of(capsys, align_basemodel.main, *arguments)


def test_a_drift_weight_of_a_task_without_an_expert_is_refused(fused_dir, tmp_path, capsys):
    said = error_of(
        capsys, align_basemodel.main, "--moe_flag", 1, "--moe_dir", fused_dir, "--drift_weights", "politeness=1",
        "--data_source", "sample", "--results_dir", tmp_path,
    )  # fmt: skip
    assert "--drift_weights 1.0: needs an expert for politeness" in said


def test_rows_of_a_fourth_task_are_checked(four_tasks, tmp_path):
    from data.sources import read_rows

    folder = shutil.copytree(four_tasks, tmp_path / "data")
    write_jsonl(folder / "politeness_train.jsonl", [{"id": "1", "instruction": "Say hello.", "output": "Hello."}])
    with pytest.raises(UserError, match=r"politeness_train.jsonl:1: field 'input' is missing"):
        read_rows("politeness", "train", str(folder))
