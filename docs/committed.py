"""The committed rows, docs/results, and how the documents quote them."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from config import TASKS
from evaluator.comparison import split_seed
from evaluator.kept_runs import DUPLICATES, read_kept
from evaluator.metrics import MEAN_NLL, nll_metrics
from evaluator.page_answers import SHOWN
from evaluator.paired import is_certain
from evaluator.run_scores import RunScores
from evaluator.sweeps import mean_nll

RESULTS = DOCS / "results"
TABLE = DOCS / "report" / "table.json"  # the comparison in numbers, beside the page
REFERENCE = "mix_moe_reg_00000_00000_00000_gate_03000"
EQUAL = "mixed_rank_24"  # one LoRA with the fused model's trained parameters and steps
TWICE = "mixed_rank_24_twice"  # with the steps of experts and fusion together
MAIN = (
    "raw",
    "raw_chat",
    "helpfulness",
    "safety",
    "truthfulness",
    "merge_linear",
    "merge_ties",
    "ensemble_probabilities",
    EQUAL,
    TWICE,
    "moe",
    REFERENCE,
)
NLL = nll_metrics(TASKS)
BEGIN, END = "<!-- made by docs/{}: {} -->", "<!-- to here -->"


def kept_runs(folder: Path) -> dict[str, RunScores]:
    """A folder's kept runs: the main ones first, in this order, each with its seeds, then the others by name."""
    names = [path.stem for path in folder.glob("*.json") if path.name not in (DUPLICATES, SHOWN)]

    def place(name: str) -> tuple:
        run, seed = split_seed(name)
        return (MAIN.index(run) if run in MAIN else len(MAIN), run, seed)

    return {name: read_kept(folder, name) for name in sorted(names, key=place)}


def row_of(comparison: dict, run: str) -> dict:
    return next(row for row in comparison["rows"] if row["run"] == run)


def mean_of(row: dict) -> float:
    return row["metrics"][MEAN_NLL.name]["value"]


def difference_text(row: dict, metric: str = MEAN_NLL.name) -> str:
    """A row's paired difference from the reference, reference - row, its interval and p."""
    paired = row["paired"].get(metric)
    if paired is None:
        return "–"
    interval = " [{:+.3f}, {:+.3f}]".format(*paired["interval"]) if paired["interval"] else ""
    return f"{paired['difference']:+.3f}{interval}, p = {paired['p_holm']:.2g}".replace("-", "−")


def by_seed(runs: dict[str, RunScores], own: str, other: str) -> str:
    """The difference of mean loss, own - other, of each seed that both have; nothing where that is one."""
    seeds = [
        {split_seed(name)[1]: run for name, run in runs.items() if split_seed(name)[0] == one} for one in (own, other)
    ]
    both = sorted(seeds[0].keys() & seeds[1].keys())
    parts = [minus(mean_nll(seeds[0][seed], TASKS) - mean_nll(seeds[1][seed], TASKS)) for seed in both]
    return f" (by seed {', '.join(parts)})" if len(parts) > 1 else ""


def task_by_task(row: dict) -> str:
    """On which tasks the fused model is better or worse than a row."""
    tasks = []
    for one in NLL:
        paired = row["paired"][one.name]
        word = "better" if paired["difference"] < 0 else "worse"
        said = word if is_certain(paired) else "not certainly different"
        tasks.append(f"{said} on {one.task} ({minus(paired['difference'])})")
    return ", ".join(tasks)


def minus(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")  # + 0.0: no zero has a sign


def put(document: str, name: str, text: str, script: str = "comparison.py") -> str:
    """A document with `text` between the marks of that name and script."""
    begin = BEGIN.format(script, name)
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"error: a document has no {begin} … {END}")
    return f"{before}{begin}\n\n{text}\n\n{END}{after}"


def as_image(svg: str) -> str:
    """A page's figure as an image of its own, which brings its ink and its paper."""
    return svg.replace("<svg", '<svg color="#1b1f24"', 1).replace('style="', 'style="background: #ffffff; ', 1)
