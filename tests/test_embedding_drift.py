"""The distance of output embeddings, against independent arithmetic."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

from config import TASKS
from data.encoding import Encoder
from data.sources import prompt_records, read_rows, spread
from evaluator import embedding_drift, sweeps
from evaluator.metrics import drift_metrics
from evaluator.run_scores import Result, RunScores
from models.loading import load_run


def test_the_distance_is_of_mean_final_states(base_dir, fused_dir, tmp_path):
    command = ["--run", str(fused_dir), "--base_model", str(base_dir), "--data_source", "sample", "--num_samples", "3"]
    command += ["--results_dir", str(tmp_path)]
    embedding_drift.main([*command, "--reference", "raw"])  # in float32, on a CPU that is fast in bfloat16 too
    models = [load_run(None, str(base_dir), "float32"), load_run(fused_dir, dtype="float32")]
    for task in TASKS:
        folder = tmp_path / "evaluation" / task / "test" / fused_dir.name / "embedding_drift"
        assert json.loads((folder / "run.json").read_text())["run"]["arguments"]["dtype"] == "float32"
        rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
        records = spread(prompt_records(task, read_rows(task, "test", "sample"), "sample"), 3)
        assert [row["id"] for row in rows] == [record.id for record in records]
        for row, record in zip(rows, records, strict=True):
            means = []
            for model, tokenizer in models:
                encoder = Encoder(tokenizer, 512)
                ids = encoder.prompt_ids(record)
                start = encoder.encode(record)["opening"]
                with torch.no_grad():
                    means.append(model.model(torch.tensor([ids])).last_hidden_state[0, start:].mean(0))
            expected = ((means[1] - means[0]).norm() / means[0].norm()).item()
            assert row["value"] == pytest.approx(expected, rel=1e-3) and row["value"] > 0.01
    embedding_drift.main([*command, "--reference", "raw"])  # done: nothing is measured again


def test_the_sweep_shows_distances_from_its_own_run_alone():
    def measured(name, reference, value):
        names = [one.name for one in drift_metrics(TASKS)]
        result = Result(["a"], [value], [1.0], ["a"], ["drift", None], {"reference": reference}, {"value": value})
        return RunScores(name, None, {}, dict.fromkeys(names, result))

    alike = sweeps.Alike({}, "own")
    assert alike.embedding_drift(measured("gamma", "own", 0.25)) == 0.25
    assert alike.embedding_drift(measured("gamma", "moe", 0.25)) is None
    assert alike.embedding_drift(measured("own", "moe", 0.25)) == 0.0


def test_runs_of_other_data_are_each_measured_on_their_own_prompts(fused_dir, tmp_path):
    """Of a prompt that both have, the distance is the same, whichever run is measured first."""
    values = {}
    for start in (0, 2):
        source = shutil.copytree(ROOT / "data" / "sample", tmp_path / f"source_{start}")
        for path in source.glob("*_test.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[start : start + 6]))
        run = shutil.copytree(fused_dir, tmp_path / f"run_{start}")
        record = json.loads((run / "run.json").read_text())
        record["run"]["arguments"]["data_source"] = str(source)
        (run / "run.json").write_text(json.dumps(record))
    runs = ",".join(str(tmp_path / f"run_{start}") for start in (0, 2))
    embedding_drift.main(["--run", runs, "--reference", "raw", "--dtype", "float32", "--results_dir", str(tmp_path)])
    for start in (0, 2):
        folder = tmp_path / "evaluation" / "helpfulness" / "test" / f"run_{start}" / "embedding_drift"
        rows = map(json.loads, (folder / "judgements.jsonl").read_text().splitlines())
        values[start] = {row["id"]: row["value"] for row in rows}
    both = set(values[0]) & set(values[2])
    assert len(both) == 4 and all(values[0][one] == pytest.approx(values[2][one], rel=1e-3) for one in both)


def test_a_run_lies_nowhere_from_itself(fused_dir, tmp_path):
    name = str(fused_dir)
    command = ["--run", name, "--reference", name, "--num_samples", "2", "--data_source", "sample"]
    embedding_drift.main([*command, "--results_dir", str(tmp_path)])
    for path in tmp_path.glob("evaluation/*/test/*/embedding_drift/metrics.json"):
        assert json.loads(path.read_text())["metrics"]["embedding_drift"]["value"] == 0
