"""The tables of docs/reproduction.md, from the files of docs/measurements.

python docs/reproduction.py       after new files: see docs/measurements/README.md
"""

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from committed import difference_text, put

from config import TASKS
from evaluator.statistics import interval_text

MEASUREMENTS, PAGE = DOCS / "measurements", DOCS / "reproduction.md"
JUDGES = ("safety", "truth", "information")


def read(name: str) -> dict:
    return json.loads((MEASUREMENTS / name).read_text(encoding="utf-8"))


def demo_scores() -> str:
    """The demo's own table."""
    return (MEASUREMENTS / "demo" / "table.md").read_text(encoding="utf-8").split("\n\n")[0].strip()


def demo_differences() -> str:
    """Mean NLL per token of the demo's rows, and the paired difference of the aligned fusion."""
    lines = ["| run | mean NLL/token ↓ | fused − run, paired |", "| --- | --- | --- |"]
    table = read("demo/table.json")
    for row in table["rows"]:
        own = row["run"] == table["reference"]
        score = f"{row['metrics']['mean_nll_per_token']['value']:.3f}"
        lines.append(f"| {row['run']} | {score} | {'' if own else difference_text(row)} |")
    return "\n".join(lines)


def routing() -> str:
    """Where the questions of the aligned fusion go, on the test half and on unseen rows of the training half."""
    scores = {
        (half, task): read(f"routing/{half}/{task}.json")["metrics"] for half in ("test", "unseen") for task in TASKS
    }
    lines = ["| rows | score | " + " | ".join(TASKS) + " |", "| --- | --- | --- | --- | --- |"]
    halves = {"test": "test half", "unseen": "training half, unseen"}
    names = {
        "routing_accuracy": "routing by the question ↑",
        "routing_accuracy_with_answer": "routing with the answer ↑",
        "nll_per_token": "NLL/token ↓",
    }
    for half, of_half in halves.items():
        for name, heading in names.items():
            values = [scores[half, task][name] for task in TASKS]
            cells = [f"{interval_text(value)} (n = {value['n']})" for value in values]
            lines.append(f"| {of_half} | {heading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judges() -> str:
    """How small judges do on labelled answers that they did not see."""
    lines = [
        "| judge | training rows | held out | AUC | accuracy | always the majority | calibration error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in JUDGES:
        judge = read(f"judges/{kind}.json")
        cells = [
            kind,
            f"{judge['samples']:,}",
            f"{judge['held_out']:,}",
            interval_text(judge["auc"]),
            interval_text(judge["accuracy"]),
            f"{judge['majority_baseline']['value']:.3f}",
            f"{judge['calibration_error']['value']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def router_rates() -> str:
    """Routing accuracy on training prompts held apart, by the routers' learning rate, of two draws of training rows."""
    lines = ["| rate | " + " | ".join(TASKS) + " | mean | mean with 28 rows |", "| --- | --- | --- | --- | --- | --- |"]
    fewer = read("router_rates_28_rows.json")["routing_accuracy"]
    for rate, accuracies in read("router_rates_32_rows.json")["routing_accuracy"].items():
        values = [accuracies[name] for name in (*TASKS, "mean")] + [fewer[rate]["mean"]]
        lines.append(f"| {rate} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def document() -> str:
    """docs/reproduction.md as it must be."""
    text = PAGE.read_text(encoding="utf-8")
    for make in (demo_scores, demo_differences, routing, judges, router_rates):
        text = put(text, make.__name__.replace("_", " "), make(), script="reproduction.py")
    return text


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
    print(PAGE.name)
