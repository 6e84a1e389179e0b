"""The scripts as a user runs them: real processes, folders, exit codes, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, other_base, run_script
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import align_basemodel
import cli
from config import TASKS, UserError
from data.encoding import Collator
from evaluator import report
from evaluator.results_folder import read_run_scores
from models import alignment, llama_moe, loading, training_arguments
from models.loading import load_run
from models.trainer import AlignmentTrainer
from workspace.files import sha256

FAST = ["--num_train_epochs", "1", "--batch_size", "4", "--disable_tqdm", "1", "--dtype", "float32", "--use_cpu", "1"]


def align(results, base_dir, source, *more):
    align_basemodel.main(
        [
            "--results_dir",
            str(results),
            "--base_model",
            str(base_dir),
            "--data_source",
            str(source),
            *FAST,
            *map(str, more),
        ]
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory, base_dir):
    """Three experts and a fused model by the scripts' own main, on a small cut of data/sample."""
    folder = tmp_path_factory.mktemp("results")
    source = folder / "source"
    source.mkdir()
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        (source / path.name).write_text("\n".join(path.read_text().splitlines()[:12]) + "\n")
    for task in TASKS:
        align(folder, base_dir, source, "--task_name", task, "--moe_flag", 0)
    llama_moe.main(["--results_dir", str(folder)])
    return folder


def fused(results, *more):
    align_basemodel.main(["--moe_flag", "1", "--results_dir", str(results), *FAST, *map(str, more)])


def test_an_expert_is_a_standard_peft_adapter_of_the_ffn(results, base_dir):
    folder = results / "outputs" / "safety"
    names = {p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-")}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), folder)
    lora = model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 4, 0.1)
    assert set(lora.target_modules) == {"gate_proj", "up_proj", "down_proj"}
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weights[key].abs().max() > 0 for key in weights if "lora_B" in key)  # trained: B starts at zero
    run = json.loads((folder / "run.json").read_text())
    assert run["run"]["arguments"]["learning_rate"] == 5e-4
    assert run["train"]["samples"] > 0 and run["train"]["seconds"] > 0 and run["train"]["peak_memory_bytes"] > 0
    assert set(run["run"]["arguments"]["data_sha256"]) == {"safety_train.jsonl"}


def test_experts_of_the_scripts_fuse_and_differ(results):
    model, _ = load_run(results / "outputs" / "moe", dtype="float32")
    a, b = model.blocks[0].experts.matrices("up_proj")
    deltas = b @ a
    assert min((deltas[i] - deltas[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0


def test_the_fusion_is_aligned_under_the_papers_name_and_not_twice(results, capsys):
    fused(results, "--expert_topk", 2, "--gate_loss_weight", 0.01)
    folder = results / "outputs" / "mix_moe_reg_00000_00000_00000_gate_00100"
    names = {p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-")}
    assert names == {"config.json", "model.safetensors", "run.json"}
    log = json.loads((folder / "run.json").read_text())["train"]["log"]
    assert {"sft_loss", "gate_loss", "drift_helpfulness", "routing_accuracy"} <= set(log[0])
    before = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    fused(results, "--expert_topk", 2, "--gate_loss_weight", 0.01)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        fused(results, "--expert_topk", 2, "--gate_loss_weight", 0.01, "--learning_rate", 1e-3)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "learning_rate=0.0005" in error and "--run_name" in error
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_report_says_what_aligning_took(results):
    table = report.cost_table({run: read_run_scores(results, run, "test") for run in TASKS})
    record = json.loads((results / "outputs" / "safety" / "run.json").read_text())
    (row,) = [line for line in table.splitlines() if line.startswith("| safety ")]
    assert f"| {record['train']['samples']} x 1 | {record['train']['seconds']:.0f} |" in row
    # 3 layers x 3 projections x rank 8 x (32 + 48)
    assert record["train"]["trainable_parameters"] == 3 * 3 * 8 * 80


def test_the_raw_base_and_its_data_are_the_experts(results, base_dir, tmp_path):
    source = str(results / "source")
    assert loading.run_sources(None, None, None, str(results)) == (str(base_dir), source)
    assert loading.run_sources(None, str(base_dir), None, str(results)) == (str(base_dir), source)
    other = str(other_base(base_dir, tmp_path / "other"))
    assert loading.run_sources(None, other, None, str(results)) == (other, "hub")
    assert loading.run_sources(results / "outputs" / "moe", None, None, str(results)) == (str(base_dir), source)
    with pytest.raises(UserError, match="--base_model .*other: is not the base of"):
        loading.run_sources(results / "outputs" / "moe", other, None, str(results))


def test_method_flags_off_their_default_get_folders_of_their_own(results):
    fused(results, "--expert_topk", 1, "--train_router", 0, "--max_steps", 2)
    name = "mix_moe_reg_00000_00000_00000_gate_00000_topk_1_router_frozen"
    model, _ = load_run(results / "outputs" / name, dtype="float32")
    start, _ = load_run(results / "outputs" / "moe", dtype="float32")
    assert model.mixture.num_experts_per_tok == 1 and model.blocks[0].router.top_k == 1
    assert torch.equal(model.blocks[0].router.weight, start.blocks[0].router.weight)
    trained, before = (m.blocks[0].experts.up_proj_B for m in (model, start))
    assert (trained - before).abs().max() > 0


def test_experts_can_be_frozen_and_the_router_trained(results):
    fused(results, "--train_experts", 0, "--gate_loss_weight", 1, "--max_steps", 2)
    name = "mix_moe_reg_00000_00000_00000_gate_10000_experts_frozen"
    model, _ = load_run(results / "outputs" / name, dtype="float32")
    start, _ = load_run(results / "outputs" / "moe", dtype="float32")
    assert not torch.equal(model.blocks[0].router.weight, start.blocks[0].router.weight)
    assert torch.equal(model.blocks[0].experts.up_proj_B, start.blocks[0].experts.up_proj_B)


def test_an_expert_can_go_on_from_another_adapter(results, base_dir, capsys):
    go_on = ["--task_name", "truthfulness", "--base_model", base_dir, "--data_source", results / "source"]
    go_on += ["--results_dir", results, "--num_samples", 8, "--batch_size", 4, "--dtype", "float32"]
    go_on += ["--init_adapter", "safety", "--run_name", "gone_on", "--max_steps", 1, "--learning_rate", 1e-9]
    align_basemodel.main(list(map(str, go_on)))
    files = [results / "outputs" / run / "adapter_model.safetensors" for run in ("safety", "gone_on")]
    before, after = map(load_file, files)
    assert all(torch.allclose(after[key], before[key], atol=1e-7) for key in before) and set(after) == set(before)
    recorded = json.loads((results / "outputs" / "gone_on" / "run.json").read_text())["run"]["arguments"]
    assert recorded["init_adapter"] == "safety"
    assert recorded["init_sha256"] == sha256(files[0])
    for more, said in (
        (["--rank", 4], "has --rank 8 --alpha 4; give the same here"),
        (["--init_adapter", "nowhere"], "no run 'nowhere'"),
        (["--init_adapter", "raw"], "--init_adapter raw: is no adapter (raw)"),
        (["--init_adapter", "moe"], "--init_adapter moe: is no adapter (fused)"),
        (["--moe_flag", 1, "--task_name", "mix"], "is for one expert; a fusion starts from --moe_dir"),
    ):
        with pytest.raises(SystemExit):
            align_basemodel.main(list(map(str, [*go_on, "--run_name", "refused", *more])))
        assert said in capsys.readouterr().err


def test_a_fusion_can_answer_with_other_experts_per_token_than_it_was_trained_with(results, capsys):
    more = ["--expert_dropout", 0.2, "--gate_schedule", "linear", "--gate_loss_weight", 1, "--max_steps", 2]
    fused(results, "--expert_topk", 3, "--answer_topk", 1, *more, "--run_name", "top_3_then_1")
    folder = results / "outputs" / "top_3_then_1"
    model, _ = load_run(folder, dtype="float32")
    assert model.mixture.num_experts_per_tok == 1 and model.blocks[0].router.top_k == 1
    assert model.blocks[0].experts.dropout == 0
    recorded = json.loads((folder / "run.json").read_text())["run"]["arguments"]
    assert (recorded["expert_topk"], recorded["answer_topk"]) == (3, 1)
    assert (recorded["expert_dropout"], recorded["gate_schedule"]) == (0.2, "linear")
    plain = align_basemodel.asked(["--moe_flag", "1", "--data_source", str(results / "source")])
    assert not set(align_basemodel.LEFT_OUT_AT) & set(plain)
    with pytest.raises(SystemExit):
        fused(results, "--answer_topk", 4, "--max_steps", 2)
    assert "--answer_topk 4: must be 1 to 3" in capsys.readouterr().err


def test_a_fusion_begins_with_a_run_not_with_its_checkpoint(results, capsys):
    (results / "outputs" / "moe" / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit):
        fused(results, "--moe_dir", results / "outputs" / "moe" / "checkpoint-3", "--run_name", "refused")
    (results / "outputs" / "moe" / "checkpoint-3").rmdir()
    assert f"is a checkpoint; name its run, {results / 'outputs' / 'moe'}" in capsys.readouterr().err


def test_gradient_checkpointing_trains_the_router_too(results, capsys):
    fused(
        results, "--gate_loss_weight", 1, "--max_steps", 3, "--gradient_checkpointing", 1, "--run_name", "checkpointed"
    )
    fused(results, "--gate_loss_weight", 1, "--max_steps", 3, "--run_name", "plain")
    checkpointed, plain = (load_file(results / "outputs" / n / "model.safetensors") for n in ("checkpointed", "plain"))
    assert all(torch.allclose(checkpointed[key], plain[key], atol=1e-5) for key in plain)
    start = load_file(results / "outputs" / "moe" / "model.safetensors")
    assert all((checkpointed[key] - start[key]).abs().max() > 0 for key in plain if ".router." in key)
    with pytest.raises(SystemExit):
        fused(results, "--gradient_checkpointing", 1, "--gradient_checkpointing_kwargs", '{"use_reentrant": true}')
    assert "must be false" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_training_is_the_same_training(results):
    """--torch_compile with accelerate's regional compilation: each decoder layer once, for all lengths. What Inductor
    makes of a layer, test_expert_ffn.py tests."""
    names, compiled = ("compiled", "as_it_is"), ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    for name, more in zip(names, (compiled, []), strict=True):
        result = run_script(
            "align_basemodel.py",
            "--moe_flag",
            1,
            "--gate_loss_weight",
            1,
            "--run_name",
            name,
            "--moe_dir",
            results / "outputs" / "moe",
            "--results_dir",
            results,
            *FAST,
            *more,
            ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="true",
            ACCELERATE_DYNAMO_USE_DYNAMIC="true",
        )
        assert result.returncode == 0, result.stderr
    compiled, plain = (load_file(results / "outputs" / name / "model.safetensors") for name in names)
    assert set(compiled) == set(plain)
    assert all(torch.allclose(compiled[key], plain[key], atol=1e-4) for key in plain)
    load_run(results / "outputs" / "compiled", dtype="float32")


def test_a_token_is_never_taken_where_a_checkpoint_would_keep_it(results, capsys):
    with pytest.raises(SystemExit) as exit_:
        fused(results, "--hub_token", "hf_secret")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "HF_TOKEN" in error and "hf_secret" not in error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_out_of_memory_is_one_line_and_the_folder_may_be_tried_again(
    base_dir, tiny_source, tmp_path, monkeypatch, capsys, error
):
    def training_step(*_, **__):
        raise error

    safety = ["--task_name", "safety", "--max_steps", 1]
    with monkeypatch.context() as patched:
        patched.setattr(AlignmentTrainer, "training_step", training_step)
        with pytest.raises(SystemExit) as exit_:
            align(tmp_path, base_dir, tiny_source, *safety)
    told = capsys.readouterr().err
    assert exit_.value.code == 2 and told.count("error: ") == 1
    assert "out of memory at 4 samples per device" in told and "--batch_size" in told and "--gradient_acc" in told
    align(tmp_path, base_dir, tiny_source, *safety, "--batch_size", 2)
    assert (tmp_path / "outputs" / "safety" / "adapter_model.safetensors").exists()


def test_without_weights_on_gate_and_drift_no_expert_needs_a_task(
    adapter_dirs, base_dir, tiny_source, tmp_path, capsys
):
    """An adapter whose task no one knows: it fuses and is aligned, and each loss that needs its task names it."""
    shutil.copytree(adapter_dirs[0], tmp_path / "mine")
    experts = ["--experts_dir", tmp_path, "--experts", f"mine,{adapter_dirs[1]}", "--output", tmp_path / "moe"]
    llama_moe.main(list(map(str, experts)))
    given = ["--moe_dir", tmp_path / "moe", "--data_source", tiny_source, "--max_steps", 2, "--logging_steps", 1]
    fused(tmp_path, *given, "--run_name", "plain")
    log = json.loads((tmp_path / "outputs" / "plain" / "run.json").read_text())["train"]["log"]
    assert "sft_loss" in log[0] and log[1]["drift_mine"] > 0
    for flag in ("gate_loss_weight", "helpfulness_weight"):
        with pytest.raises(SystemExit):
            fused(tmp_path, *given, f"--{flag}", 0.5, "--run_name", "weighed")
        assert f"--{flag} 0.5: needs an expert for helpfulness" in capsys.readouterr().err


def test_attention_lora_is_saved_and_loaded(results):
    fused(results, "--tune_attention", 1, "--max_steps", 3, "--attention_dropout", 0)
    name = "mix_moe_reg_00000_00000_00000_gate_00000_attention_tuned"
    saved = load_file(results / "outputs" / name / "model.safetensors")
    lora = {key for key in saved if ".lora_" in key}
    assert len(lora) == 3 * 4 * 2 and all(saved[key].abs().max() > 0 for key in lora)
    model, _ = load_run(results / "outputs" / name, dtype="float32")
    state = model.state_dict()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    assert not any("base_layer" in key or "embed" in key for key in saved)


def test_a_fusion_with_tuned_attention_is_aligned_again_with_its_attention_as_it_is(results, capsys, tmp_path):
    tuned, again = "mix_moe_reg_00000_00000_00000_gate_00000_attention_tuned", results / "outputs" / "again"
    if not (results / "outputs" / tuned / "run.json").exists():
        fused(results, "--tune_attention", 1, "--max_steps", 3, "--attention_dropout", 0)
    begin = ["--moe_dir", results / "outputs" / tuned, "--max_steps", 3]
    with pytest.raises(SystemExit):
        fused(results, *begin, "--tune_attention", 1, "--run_name", "refused")
    assert "has LoRA on its attention, which would begin anew" in capsys.readouterr().err
    with_dropout = shutil.copytree(results / "outputs" / tuned, tmp_path / "with-dropout")
    settings = json.loads((with_dropout / "config.json").read_text())
    settings["attention_lora"]["dropout"] = 0.5
    (with_dropout / "config.json").write_text(json.dumps(settings))
    flags = ["--moe_flag", "1", "--moe_dir", str(with_dropout), "--gate_loss_weight", "0"]
    args, training = training_arguments.parse([*flags, "--dtype", "float32"], align_basemodel.AlignArguments)
    align_basemodel.resolve_sources(args)
    model = alignment.mixture_model(args, training)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(isinstance(layer.lora_dropout["default"], torch.nn.Identity) for layer in layers)
    fused(results, *begin, "--run_name", "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (results / "outputs" / tuned, again))
    assert set(before) == set(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any(".lora_" in key for key in changed)


def test_labels_of_the_mixed_data_are_right(results, tokenizer):
    """Every sample of the mixed training data carries its own task, and its expert is the one of that task."""
    args = cli.parse(["--moe_flag", "1", "--data_source", str(results / "source")], align_basemodel.AlignArguments)
    samples = alignment.training_samples(args, 42, tokenizer)
    batch = Collator(routing=True)(samples)
    texts = tokenizer.batch_decode(batch["input_ids"])
    for task, prompt in zip(TASKS, ("instruction", "prompt", "question"), strict=True):
        rows = [json.loads(line) for line in (results / "source" / f"{task}_train.jsonl").read_text().splitlines()]
        of_task = [i for i, text in enumerate(texts) if any(row[prompt] in text for row in rows)]
        assert len(of_task) >= 6
        assert batch["task_ids"][of_task].tolist() == [TASKS.index(task)] * len(of_task)


def wait_for(path: Path, process, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["expert", "fusion"])
def test_a_killed_training_goes_on_and_ends_as_an_undisturbed_one(results, base_dir, tmp_path, stage):
    """SIGKILL after the first checkpoint; the same command resumes; weights equal those of a run left alone."""
    common = ["align_basemodel.py", "--max_steps", "24", "--save_strategy", "steps", "--save_steps", "6", *FAST]
    if stage == "expert":
        common += ["--task_name", "safety", "--base_model", base_dir, "--data_source", results / "source"]
    else:
        common += ["--moe_flag", "1", "--moe_dir", results / "outputs" / "moe"]
        common += ["--gate_loss_weight", "0.1", "--safety_weight", "0.01"]
    name = "run"
    common += ["--run_name", name]
    alone = run_script(*common, "--results_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, common), "--results_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "killed" / "outputs" / name
    wait_for(folder / "checkpoint-6" / "files.json", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (folder / "run.json").exists():
        pytest.fail("the run was over before it was killed: make it longer")
    other = run_script(*common, "--results_dir", tmp_path / "killed", "--learning_rate", "0.1")
    assert other.returncode == 2 and "learning_rate" in other.stderr
    torn = folder / "checkpoint-99"  # as a kill in the middle of writing a checkpoint leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": ')
    resumed = run_script(*common, "--results_dir", tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from" in resumed.stdout and "checkpoint-99" not in resumed.stdout
    trained = json.loads((folder / "run.json").read_text())["train"]
    kept = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert trained["seconds"] > kept["TrainingCost"]["attributes"]["seconds"] > 0
    weights = "adapter_model.safetensors" if stage == "expert" else "model.safetensors"
    expected = load_file(tmp_path / "alone" / "outputs" / name / weights)
    actual = load_file(folder / weights)
    assert set(actual) == set(expected)
    assert max((actual[key] - expected[key]).abs().max().item() for key in actual) < 1e-6
    assert not (folder / "arguments.json").exists()


@pytest.mark.slow
def test_scripts_run_from_their_own_folders_as_the_papers_readme_calls_them(results, base_dir, tmp_path):
    fuse = run_script("llama_moe.py", "--results_dir", results, "--output", tmp_path / "moe", cwd=ROOT / "models")
    assert fuse.returncode == 0 and "MB" in fuse.stdout, fuse.stderr
    score = run_script(
        "evaluate_likelihood.py",
        "--run",
        "safety",
        "--results_dir",
        results,
        "--task_name",
        "safety",
        cwd=ROOT / "evaluator",
    )
    assert score.returncode == 0 and "safe_preferred" in score.stdout, score.stderr


USER_ERRORS = {
    "no task": (["align_basemodel.py"], "--task_name"),
    "unknown flag": (["align_basemodel.py", "--task_name", "safety", "--lambda", "1"], "--lambda"),
    "unknown task": (["inference.py", "--task_name", "honesty"], "honesty"),
    "no such run": (["inference.py", "--task_name", "safety", "--cross_task", "nothing"], "no run 'nothing'"),
    "no fused model": (["align_basemodel.py", "--moe_flag", "1", "--moe_dir", "nowhere"], "fuse the experts first"),
    "no experts": (["models/llama_moe.py", "--experts_dir", "nowhere"], "no run 'helpfulness'"),
    "no data": (["align_basemodel.py", "--task_name", "safety", "--data_source", "nowhere"], "--data_source nowhere"),
    "no scores": (["evaluator/report.py", "--runs", "nothing"], "evaluate_likelihood.py --run nothing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_one_line_and_exit_code_2(case, tmp_path):
    command, named = USER_ERRORS[case]
    result = run_script(*command, "--results_dir", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert named in result.stderr


@pytest.mark.slow
def test_without_llama_2_the_first_command_names_both_ways_on(tmp_path):
    command = ["align_basemodel.py", "--moe_flag", "0", "--task_name", "helpfulness", "--results_dir", tmp_path]
    result = run_script(*command, HF_HOME=str(tmp_path / "hf"), HF_TOKEN="hf_not_a_real_token")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "HF_TOKEN" in result.stderr and "--base_model smollm2 --data_source sample" in result.stderr
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert "hf_not_a_real_token" not in result.stdout + result.stderr
    assert not any(b"hf_not_a_real_token" in content for content in written)
