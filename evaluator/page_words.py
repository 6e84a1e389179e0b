"""What the comparison's page says in words: its answer, its setting, how it tests, and what is missing."""

from pathlib import Path

from evaluator.comparison import KINDS
from evaluator.metrics import JUDGED
from evaluator.paired import CERTAIN, is_certain
from evaluator.results import INTERVALS
from evaluator.run_scores import RunScores

MANY = 12  # rows: more are counted, not named


def reference_kind(comparison: dict) -> str:
    return next(row["kind"] for row in comparison["rows"] if row["run"] == comparison["reference"])


def verdict(comparison: dict) -> str:
    """The answer in a sentence or two: which rows the reference beats on the mean likelihood, and which not; its rivals
    first, then the other runs of its kind."""
    kind = reference_kind(comparison)
    compared = [row for row in comparison["rows"] if "mean_nll_per_token" in row["paired"]]
    rivals, variants = ([row for row in compared if (row["kind"] == kind) == own] for own in (False, True))
    if not compared:
        scored = [row for row in comparison["rows"] if row["metrics"].get("mean_nll_per_token") is not None]
        alone = "no two rows of one seed" if len(scored) > 1 else "no likelihoods of all three tasks"
        return f"This page has {alone} to tell by."
    reference = f"the fused model ({comparison['reference']})" if kind == "fused" else comparison["reference"]
    families = (rivals, "rivals"), (variants, "other fusions" if kind == "fused" else f"other {kind} runs")
    parts = [outcomes(family, what) for family, what in families if family]
    left = [row["run"] for row in comparison["rows"] if uncompared(row, comparison)]
    text = f"By the likelihood of held-out answers {reference} is {'; and '.join(parts)} (paired, {CERTAIN})."
    return text + (f" Not compared, having no seed in common with it: {', '.join(left)}." if left else "")


def uncompared(row: dict, comparison: dict) -> bool:
    """Whether a row has a mean likelihood that could not be paired with the reference's."""
    scored = row["metrics"].get("mean_nll_per_token") is not None
    return scored and "mean_nll_per_token" not in row["paired"] and row["run"] != comparison["reference"]


def outcomes(rows: list[dict], what: str) -> str:
    """How many of these rows the reference beats, and by name, unless they are many, those that it does not certainly
    beat."""
    better, undecided, worse = [], [], []
    for row in rows:
        difference = row["paired"]["mean_nll_per_token"]
        side = better if difference["difference"] < 0 else worse
        (side if is_certain(difference) else undecided).append(row["run"])
    parts = [f"better than {len(better)} of {len(rows)} {what}"] if better or not undecided + worse else []
    named = ", ".join(undecided) if len(undecided) <= MANY else f"{len(undecided)} of them"
    parts += [f"not certainly better or worse than {named}"] * bool(undecided)
    parts += [f"worse than {', '.join(worse)}"] * bool(worse)
    return ", and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def base_name(records: dict[str, dict | None]) -> str:
    """The base that the runs were made on, by its last name."""
    arguments = [record["run"]["arguments"] for record in records.values() if record]  # selected answers name no base
    return next(Path(made["base_model"]).name for made in arguments if made.get("base_model"))


def data_name(arguments: dict) -> str:
    """The data that a run records, for a sentence: a folder by its last name."""
    name = Path(arguments.get("data_source") or "unrecorded").name
    return name if name in ("hub", "sample", "unrecorded") else f"of the folder “{name}”"


def setting_text(records: dict[str, dict | None], alone: bool) -> str:
    """Base, data and device in words. alone: no other base stands on the page."""
    made = [record for record in records.values() if record]
    if not made:
        return "Nothing is recorded of how the runs were made."
    base = base_name(records)
    questions: dict[str, set[str]] = {}  # data: how many of its questions were trained on
    for arguments in (one["run"]["arguments"] for one in made if one["run"]["script"] == "align_basemodel.py"):
        number = "all" if arguments["num_samples"] == -1 else str(arguments["num_samples"])
        questions.setdefault(data_name(arguments), set()).add(number)
    questions = questions or {data_name(made[0]["run"]["arguments"]): {"an unrecorded number of"}}
    data = ", and ".join(
        f"{name}, {', '.join(sorted(numbers))} training questions per task" for name, numbers in questions.items()
    )
    devices = sorted({record["meta"].get("device", "an unrecorded device") for record in made})
    text = f"Base model {base}; data {data}; made on {' and on '.join(devices)}."
    if len(devices) > 1:
        text += " Seconds and tokens per second are of different devices."
    if base == "smollm2":
        text += " SmolLM2-135M-Instruct is the embedded Q4_1 file, dequantised"
        text += "; all rests on this one small model." if alone else "."
    if base == "gemma3":
        text += " Gemma 3 270M is a Q4_K_M file, dequantised."
    return text


def statistics_text(comparison: dict, columns: list) -> str:
    """How the tests are made, and what the numbers of items can show."""
    kind = reference_kind(comparison)
    text = (
        f"{INTERVALS}. Differences: bootstrap over questions; p by McNemar's exact test for yes-or-no scores of "
        "different questions, else by flipping the signs of the questions' differences; Holm's correction, column by "
        f"column, over the rows of kind “{kind}” and, apart from them, over all others. Scores of several seeds are "
        "averaged item by item first; two rows are compared over the seeds that both have. Intervals and p are of the "
        "questions: how much another seed would change stands beside the rows that have several (seeds … to …). "
        "Corrected: for the errors that a judge made on labelled answers."
    )
    if least := least_detectable_text(comparison, columns):
        text += f" True differences that would be found four times in five (at p < 0.05, uncorrected): {least}."
    return text


def least_detectable_text(comparison: dict, columns: list) -> str:
    """Of each score that was tested, the least difference that its items can show, over the rows."""
    parts = []
    for one in columns:
        tested = [row["paired"][one.name] for row in comparison["rows"] if one.name in row["paired"]]
        least = [difference["least_detectable"] for difference in tested if difference["least_detectable"]]
        if least:
            parts.append(f"{one.heading} {min(least):.3f} to {max(least):.3f} ({one.unit})")
    return ", ".join(parts)


def judges_text(runs: dict[str, RunScores]) -> str:
    """Who judged the answers, and how often those that were trained on labelled answers are right; "" without any."""
    said: dict[str, list[str]] = {}
    for one in JUDGED:
        for run in runs.values():
            if (result := run.metrics.get(one.name)) is None:
                continue
            text = result.judge[0]
            if corrected := result.score.get("corrected"):
                text += (
                    f" (right on {corrected['sensitivity']:.2f} of the labelled yes and "
                    f"{corrected['specificity']:.2f} of the labelled no, {corrected['n_labelled']} answers)"
                )
            said.setdefault(text, [])
            if one.heading not in said[text]:
                said[text].append(one.heading)
    parts = [f"{', '.join(headings)}: by {judge}" for judge, headings in said.items()]
    return f"Judges: {'; '.join(parts)}." if parts else ""


def made_by(records: dict[str, dict | None]) -> str:
    """Versions, commit and checksums."""
    metas = [record["meta"] for record in records.values() if record and "packages" in record["meta"]]
    if not metas:
        return ""
    packages = " or ".join(
        sorted({", ".join(f"{name} {version}" for name, version in meta["packages"].items()) for meta in metas})
    )
    commits = sorted({str(meta.get("commit"))[:12] for meta in metas})
    sums = {}
    for record in records.values():
        sums |= (record or {"run": {"arguments": {}}})["run"]["arguments"].get("data_sha256") or {}
    data = ", ".join(f"{name} {value[:12]}" for name, value in sorted(sums.items()))
    pythons = " or ".join(sorted({meta["python"] for meta in metas}))
    versions = f"Python {pythons}, {packages}; commits {', '.join(commits)}"
    return f"{versions}. Data (sha256): {data or 'not recorded'}."


def missing_text(rows: list[dict], columns: tuple, shown: list, with_texts: bool, duplicates: dict | None) -> list[str]:
    """What the page does not show, said."""
    kinds = {row["kind"] for row in rows}
    lines = [f"No row of kind {kind}." for kind in KINDS if kind not in kinds]
    scored = {one.name for one in shown}
    lines += [f"No run has {one.heading}." for one in columns if one.name not in scored]
    if not with_texts:
        lines.append("The answers themselves: their data may not be handed on, so that no text of it stands here.")
    if duplicates is None:
        lines.append("How many held-out questions the training rows nearly have: not counted.")
    single = [row["run"] for row in rows if len(row["seeds"]) == 1]
    if single:
        lines.append(f"More than one seed of {', '.join(single)}.")
    judged = {one.name for one in JUDGED}
    fewer = [row["run"] for row in rows if any(len(m["seeds"]) < len(row["seeds"]) for n, m in row["metrics"].items()
                                               if n in judged)]  # fmt: skip
    if fewer:
        lines.append(f"Answers by all seeds of {', '.join(fewer)}: their judged scores are of fewer.")
    return lines
