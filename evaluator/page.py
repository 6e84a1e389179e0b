"""The comparison as one self-contained page: what evaluator/comparison.py worked out, put into page.html.j2."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluator import figures
from evaluator.comparison import KINDS, split_seed
from evaluator.metrics import table_metrics
from evaluator.page_figures import confusion, draw_figures, expert_names
from evaluator.page_sections import Section, beside_section, section_of
from evaluator.page_table import COSTS, column_of, page_row, relative_gains
from evaluator.page_words import judges_text, made_by, missing_text, setting_text, statistics_text, verdict
from evaluator.run_scores import RunScores, scored_tasks
from workspace.files import write_text

TITLE = "H3Fusion, compared"
QUESTION = (
    "Do three aligned experts, fused and aligned together, beat each of them, their merges and ensembles, and one LoRA "
    "on the same data?"
)


def write_page(
    path: Path,
    comparison: dict,
    runs: dict[str, RunScores],
    answers: dict | None,
    duplicates: dict[str, dict] | None,
    beside: tuple[dict, dict[str, RunScores]] | None = None,
    others: tuple[Section, ...] = (),
) -> None:
    """Write the page of a comparison (comparison.compare); answers: page_answers.shown_answers, where they may be
    shown; duplicates: data.near_duplicates.near_duplicates, where they were counted; beside: a comparison of runs of
    the same names on another base, and those runs; others: more comparisons."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, reference = comparison["rows"], comparison["reference"]
    names, records = list(runs), {name: scores.record for name, scores in runs.items()}
    columns = table_metrics(scored_tasks(runs.values()))
    shown = [one for one in columns if any(one.name in row["metrics"] for row in rows)]
    own = own_run(names, reference)
    drawn, absent = draw_figures(comparison, runs, own)
    page = environment.get_template("page.html.j2").render(
        title=TITLE,
        question=QUESTION,
        answer=verdict(comparison),
        setting=setting_text(records, alone=beside is None),
        reference=reference,
        columns=[column_of(one, rows) for one in shown]
        + [{"heading": h, "arrow": "", "about": a} for _, h, a, _ in COSTS],
        rows=[
            page_row(row, rows, shown, records, names) for row in sorted(rows, key=lambda row: KINDS.index(row["kind"]))
        ],
        statistics=statistics_text(comparison, shown),
        judges=judges_text(runs),
        figures=drawn,
        confusion=confusion(runs[own].routing, expert_names(runs[own])),
        gains=relative_gains(comparison),
        sections=[*([beside_section(comparison, records, *beside)] if beside else []), *map(section_of, others)],
        answers=answers,
        colours=figures.COLOURS,
        duplicates=duplicates,
        missing=[
            f"{heading}: no runs here to draw it from."
            for heading in absent
            if heading not in {figure["heading"] for section in others for figure in section.figures}
        ]
        + missing_text(rows, columns, shown, answers is not None, duplicates),
        made_by=made_by(records),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def own_run(names: list[str], reference: str) -> str:
    """Of the reference's runs by several seeds the first."""
    return next(name for name in names if split_seed(name)[0] == reference)
