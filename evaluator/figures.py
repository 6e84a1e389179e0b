"""The figures of the comparison's page, as SVG text that stands in an HTML page, light or dark, without a network."""

import io
import re

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by colour-blind readers; one per kind of run, or per expert
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888", "#8a6d00")
INK = "#123456"  # stands for the page's own text colour, and is put in its place in the SVG
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "comparison",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}


def to_svg(figure: Figure, text: str) -> str:
    """A figure as an <svg> element as wide as its column, with `text` as its alternative text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)[1]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {width}pt"', svg)
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def colour(number: int) -> str:
    """The colour of a figure's n-th line; after the last one the first one again."""
    return COLOURS[number % len(COLOURS)]


def short(name: str) -> str:
    """A run's name for a label beside a point."""
    return name if len(name) <= 26 else f"{name[:12]}…{name[-12:]}"


def quality_against_cost(rows: list[dict], reference: str, kinds: tuple[str, ...]) -> str | None:
    """Each row's mean NLL per token over its trained parameters; None without two rows that have both. Named are the
    reference, and the rows whose names have room, the better ones first."""
    points = [
        (row["cost"]["trained_parameters"] or 0, row["metrics"]["mean_nll_per_token"]["value"], row["kind"], row["run"])
        for row in rows
        if "mean_nll_per_token" in row["metrics"]
    ]
    if len(points) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for number, kind in enumerate(kinds):
            of_kind = [point for point in points if point[2] == kind]
            if of_kind:
                x, y, *_ = zip(*of_kind, strict=True)
                axes.scatter([value / 1e6 for value in x], y, s=36, color=colour(number), label=kind)
        values = [y for _, y, *_ in points]
        line, width = 0.035 * (max(values) - min(values)), 0.3 * max(x for x, *_ in points)  # of a name
        named = []
        for x, y, _, name in sorted(points, key=lambda point: (point[3] != reference, point[1])):
            if all(abs(x - other_x) > width or abs(y - other_y) > line for other_x, other_y in named):
                axes.annotate(short(name), (x / 1e6, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
                named.append((x, y))
        axes.set_xlabel("parameters trained for the run itself, millions (0: made of the experts without training)")
        axes.set_ylabel("mean NLL per token, nats (lower is better)")
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.12)
        axes.legend(fontsize=8)
        return to_svg(figure, f"Mean NLL per token against trained parameters of {len(points)} runs")


def differences(rows: list[dict], reference: str, kinds: tuple[str, ...]) -> str | None:
    """The reference's mean NLL per token less each row's, paired, with 95 % intervals; None without two such rows."""
    compared = [row for row in rows if row["paired"].get("mean_nll_per_token", {}).get("interval")]
    if len(compared) < 2:
        return None
    compared.sort(key=lambda row: row["paired"]["mean_nll_per_token"]["difference"], reverse=True)
    kind_of = {row["run"]: row["kind"] for row in rows}
    own = "fused" if kind_of[reference] == "fused" else short(reference)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 0.6 + 0.24 * len(compared)), layout="constrained")
        for kind in [kind for kind in kinds if kind in {row["kind"] for row in compared}]:
            of_kind = [(place, row["paired"]["mean_nll_per_token"]) for place, row in enumerate(compared)
                       if row["kind"] == kind]  # fmt: skip
            places, values = [place for place, _ in of_kind], [paired["difference"] for _, paired in of_kind]
            ends = [[abs(p["interval"][end] - p["difference"]) for _, p in of_kind] for end in (0, 1)]
            colour = COLOURS[kinds.index(kind)]
            axes.errorbar(values, places, xerr=ends, fmt="o", markersize=4, color=colour, label=kind)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(compared)), [short(row["run"]) for row in compared], fontsize=8)
        axes.set_xlabel(f"{own} − run: mean NLL per token in nats\n(left of 0: {own} is better)", fontsize=9)
        axes.legend(fontsize=8, loc="best")
        return to_svg(figure, f"Paired differences in mean NLL per token between {reference} and {len(compared)} runs")


def training_curves(log: list[dict]) -> str | None:
    """The loss terms, the drift and the routing accuracy of one fusion's alignment over its steps."""
    steps = [entry for entry in log if "sft_loss" in entry]
    if len(steps) < 2:
        return None
    drifts = sorted(key for key in steps[0] if key.startswith("drift_"))
    panels = [("loss on the answers", ["sft_loss"]), ("gating loss", ["gate_loss"]), ("drift", drifts),
              ("routing accuracy", ["routing_accuracy"])]  # fmt: skip
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7, 4.6), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, panels, strict=True):
            for number, key in enumerate(keys):
                pairs = [(entry["step"], float(entry[key])) for entry in steps if key in entry]
                if pairs:
                    axis.plot(*zip(*pairs, strict=True), color=colour(number), label=key.removeprefix("drift_"))
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            if len(keys) > 1:
                axis.legend(fontsize=7)
        return to_svg(
            figure, "Loss on the answers, gating loss, drift and routing accuracy over the steps of the fusion"
        )


def routing_heat(usage_of_task: dict[str, dict]) -> str | None:
    """Layer x expert mean routing weights, one panel per task."""
    if not usage_of_task:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(usage_of_task), figsize=(3.2 * len(usage_of_task), 4.6), layout="constrained"
        )
        for axis, (task, usage) in zip([axes] if len(usage_of_task) == 1 else axes, usage_of_task.items(), strict=True):
            image = axis.imshow(usage["weight"], aspect="auto", vmin=0, vmax=1, cmap="cividis")
            axis.set_xticks(range(len(usage["experts"])), usage["experts"], rotation=25, fontsize=8)
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(f"prompts of {task}", fontsize=9)
            axis.set_ylabel("layer", fontsize=8)
        figure.colorbar(image, ax=axes, shrink=0.7, label="mean routing weight")
        return to_svg(figure, f"Mean routing weight of each expert in each layer, for {', '.join(usage_of_task)}")


def sweep(points: list[tuple[float, float, str]], heading: str, measure: str) -> str | None:
    """One measure over one setting; points: (setting, value, run). None without two."""
    if len(points) < 2:
        return None
    points = sorted(points)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 2.6), layout="constrained")
        axes.plot([str(f"{x:g}") for x, *_ in points], [y for _, y, _ in points], "o-", color=COLOURS[1])
        axes.set_xlabel(heading)
        axes.set_ylabel(measure)
        return to_svg(figure, f"{measure} over {heading}")


def curves(lines: dict[str, list[tuple[float, float]]], levels: dict[str, float], heading: str, measure: str) -> str:
    """A measure over a setting, a line for each of several methods; levels: methods that the setting does not change,
    each a dashed line."""
    places = {x: place for place, x in enumerate(sorted({x for points in lines.values() for x, _ in points}))}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
        for number, (label, points) in enumerate(lines.items()):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot([places[x] for x in xs], ys, "os^Dv"[number % 5] + "-", color=colour(number), label=label)
        for number, (label, y) in enumerate(levels.items(), len(lines)):
            axes.axhline(y, linestyle="--", linewidth=1, color=colour(number), label=label)
        axes.set_xticks(range(len(places)), [f"{x:g}" for x in places])
        axes.set_xlabel(heading)
        axes.set_ylabel(measure)
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
        return to_svg(figure, f"{measure} over {heading}, for {len(lines) + len(levels)} methods")


def trade_off(points: dict[str, dict[str, float]], across: str, paths: dict[str, dict[str, str]]) -> str:
    """Each run's other measures over one of them (`across`), a panel each. points: {run: {measure: value}}. paths:
    {line: {run: label}}, runs whose points are joined in this order and labelled; the others stand alone."""
    measures = [measure for measure in next(iter(points.values())) if measure != across]
    alone = [run for run in points if not any(run in of_path for of_path in paths.values())]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(measures), figsize=(4.5 * len(measures), 4.2), layout="constrained", sharex=True, squeeze=False
        )
        for axes, measure in zip(panels[0], measures, strict=True):
            for number, (line, labels) in enumerate({**paths, **{run: {run: ""} for run in alone}}.items()):
                x, y = ([points[run][one] for run in labels] for one in (across, measure))
                axes.plot(x, y, "os^Dv*X"[number % 7] + "-", color=colour(number), label=line)
                for place, label in zip(zip(x, y, strict=True), labels.values(), strict=True):
                    axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
            axes.set_xlabel(across)
            axes.set_ylabel(measure)
            axes.margins(0.1)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=3)
        return to_svg(figure, f"{' and '.join(measures)} over {across}, of {len(points)} runs, {len(paths)} paths")


def weight_histograms(probs_of_run: dict[str, list[list[float]]], experts: list[str]) -> str | None:
    """Histograms over prompts of each expert's mean routing weight, one panel per run, three in a line: the paper's
    figure."""
    if not probs_of_run:
        return None
    columns = min(len(probs_of_run), 3)
    lines = -(-len(probs_of_run) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines, columns, figsize=(3.2 * columns, 2.6 * lines), layout="constrained", sharey=True, squeeze=False
        )
        for axis in axes.flat[len(probs_of_run) :]:
            axis.remove()
        for axis, (run, probs) in zip(axes.flat, probs_of_run.items(), strict=False):
            for number, (expert, values) in enumerate(zip(experts, zip(*probs, strict=True), strict=True)):
                axis.hist(values, bins=20, range=(0, 1), alpha=0.6, color=colour(number), label=expert)
            axis.set_title(run, fontsize=8)
            axis.set_xlabel("mean routing weight", fontsize=8)
        axes[0][0].set_ylabel("prompts")
        axes[0][0].legend(fontsize=7)
        return to_svg(
            figure, f"Histograms of each expert's mean routing weight over prompts, for {len(probs_of_run)} runs"
        )
