"""The scripts of this repository by their file names: path, main, and the dataclasses of their flags."""

from pathlib import Path

from conftest import ROOT

import align_basemodel
import inference
from benchmarks import bench_moe
from evaluator import (
    embedding_drift,
    evaluate_helpfulness,
    evaluate_likelihood,
    evaluate_safety,
    evaluate_truth_and_info,
    report,
    reuse,
    select_answers,
    train_judge,
)  # fmt: skip
from models import ensemble, export, llama_moe, merging
from models.training_arguments import TrainArguments

FLAGS = {
    "align_basemodel.py": (align_basemodel.AlignArguments, TrainArguments),
    "inference.py": (inference.InferArguments,),
    "models/llama_moe.py": (llama_moe.FuseArguments,),
    "models/ensemble.py": (ensemble.EnsembleArguments,),
    "models/export.py": (export.ExportArguments,),
    "models/merging.py": (merging.MergeArguments,),
    "evaluator/evaluate_likelihood.py": (evaluate_likelihood.LikelihoodArguments,),
    "evaluator/evaluate_helpfulness.py": (evaluate_helpfulness.HelpfulnessArguments,),
    "evaluator/evaluate_safety.py": (evaluate_safety.SafetyArguments,),
    "evaluator/evaluate_truth_and_info.py": (evaluate_truth_and_info.TruthArguments,),
    "evaluator/embedding_drift.py": (embedding_drift.DriftArguments,),
    "evaluator/reuse.py": (reuse.ReuseArguments,),
    "evaluator/select_answers.py": (select_answers.SelectArguments,),
    "evaluator/train_judge.py": (train_judge.JudgeArguments, train_judge.JudgeTrainArguments),
    "evaluator/report.py": (report.ReportArguments,),
    "benchmarks/bench_moe.py": (bench_moe.BenchmarkArguments,),
}
MAINS = {
    "align_basemodel.py": align_basemodel.main,
    "inference.py": inference.main,
    "models/llama_moe.py": llama_moe.main,
    "models/ensemble.py": ensemble.main,
    "models/export.py": export.main,
    "models/merging.py": merging.main,
    "evaluator/evaluate_likelihood.py": evaluate_likelihood.main,
    "evaluator/evaluate_helpfulness.py": evaluate_helpfulness.main,
    "evaluator/evaluate_safety.py": evaluate_safety.main,
    "evaluator/evaluate_truth_and_info.py": evaluate_truth_and_info.main,
    "evaluator/embedding_drift.py": embedding_drift.main,
    "evaluator/reuse.py": reuse.main,
    "evaluator/select_answers.py": select_answers.main,
    "evaluator/train_judge.py": train_judge.main,
    "evaluator/report.py": report.main,
}


def script_of(command: list[str], folder: str) -> str:
    """The key of FLAGS of a command, ["python", "llama_moe.py", ...], that is run in `folder` ("" or its name)."""
    return str(Path(folder) / command[1])


def exists(script: str) -> bool:
    return (ROOT / script).is_file()
