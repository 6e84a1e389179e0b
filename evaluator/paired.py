"""Whether one run is better than another: differences on the same questions, their tests, and Holm's correction.

Rows of one question go together, as in evaluator/statistics.py. Unpaired intervals of two runs overlap long after their
difference is certain: most of a score's spread is how hard the questions are, which is the same for both.
"""

import numpy as np
from scipy.stats import binomtest, norm, permutation_test, t

from evaluator.statistics import CONFIDENCE_TAILS, FLAT, NUM_RESAMPLES, metric, number_questions, resamples

NUM_PERMUTATIONS = 9999
POWER = 0.8  # with which the least detectable difference would be found
SIGNIFICANT = 0.05
CERTAIN = f"p < {SIGNIFICANT} after Holm's correction and an interval without 0"  # `is_certain` in words


def paired_difference(ours, theirs, sizes=None, *, groups=None, seed: int = 0) -> dict:
    """The difference sum(ours - theirs) / sum(sizes) of two runs on the same n rows.

    ours, theirs: (n,) values of a row, as log-likelihoods or 0 and 1; sizes: (n,) what they are over, as tokens.
    Returns difference, n (and questions), interval (95 %, bootstrap over questions), p and test, and least_detectable,
    the smallest true difference that so many questions show with a power of 0.8 at p < 0.05. The test is McNemar's
    exact one (1947, Psychometrika 12:153) for yes-or-no values of different questions, else a sign-flip permutation of
    the questions' differences. ValueError for lengths that differ.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if len(ours) != len(theirs):
        raise ValueError("a paired difference needs both runs' values of the same rows")
    sizes = np.ones_like(ours) if sizes is None else np.asarray(sizes, dtype=float)
    codes, counts = number_questions(groups, len(ours))
    score = metric(ours - theirs, sizes, groups=groups, unit="", higher_is_better=None, seed=seed)
    of_question = np.bincount(codes, ours - theirs)
    residuals = of_question - score["value"] * np.bincount(codes, sizes)
    result = {"difference": score["value"], **counts, "interval": score["interval"]}
    if "questions" not in counts and np.isin((ours, theirs), (0, 1)).all():
        result |= {"p": mcnemar(ours, theirs), "test": "McNemar, exact"}
    else:
        result |= {"p": sign_flip(of_question, seed), "test": "sign flips"}
    return result | {"least_detectable": least_detectable(np.sqrt((residuals**2).sum()) / sizes.sum())}


def mean_of_differences(parts: list[dict], seed: int = 0) -> dict:
    """The mean over tasks of `paired_difference`, each task's questions resampled by themselves.

    parts: of each task {"ours", "theirs", "sizes", "groups"} as paired_difference takes them. Bootstrap-t interval, or
    Student's where too few values differ; the permutation flips the weighted differences of all questions.
    """
    tasks = []
    for part in parts:
        ours, theirs = np.asarray(part["ours"], dtype=float), np.asarray(part["theirs"], dtype=float)
        codes, _ = number_questions(part["groups"], len(ours))
        tasks.append((np.bincount(codes, ours - theirs), np.bincount(codes, np.asarray(part["sizes"], dtype=float))))
    totals = [sizes.sum() for _, sizes in tasks]
    values = [change.sum() / total for (change, _), total in zip(tasks, totals, strict=True)]
    value, error = float(np.mean(values)), np.sqrt(sum(map(squared_error, tasks))) / len(tasks)
    weighted = np.concatenate([change / total / len(tasks) for (change, _), total in zip(tasks, totals, strict=True)])
    result = {"difference": value, "n": sum(len(part["ours"]) for part in parts), "questions": len(weighted)}
    result |= {"p": sign_flip(weighted, seed), "test": "sign flips", "least_detectable": least_detectable(error)}
    if not error:
        return result | {"interval": None}
    changes, variances = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for number, (change, sizes) in enumerate(tasks):
        moments = np.stack((change, sizes, change**2, change * sizes, sizes**2), axis=-1)
        sums = np.concatenate([times @ moments for times in resamples(len(change), seed + number)]).T
        ratio = sums[0] / sums[1]
        changes += (ratio - values[number]) / len(tasks)
        variances += (sums[2] - 2 * ratio * sums[3] + ratio**2 * sums[4]) / sums[1] ** 2 / len(tasks) ** 2
    if (variances > FLAT * error**2).all():
        low, high = np.quantile(changes / np.sqrt(variances), CONFIDENCE_TAILS)
    else:  # too few values differ for a bootstrap
        low, high = t.ppf(CONFIDENCE_TAILS, len(weighted) - len(tasks))
    return result | {"interval": [float(value - high * error), float(value - low * error)]}


def squared_error(task: tuple[np.ndarray, np.ndarray]) -> float:
    """The variance of a ratio of sums, by its linearisation."""
    change, sizes = task
    return float(((change - change.sum() / sizes.sum() * sizes) ** 2).sum() / sizes.sum() ** 2)


def sign_flip(differences, seed: int = 0) -> float:
    """Two-sided p of the sum of the questions' differences (Q,), were each as likely with the other sign."""
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2 or not differences.any():
        return 1.0  # of one question both signs are as far from 0
    return float(
        permutation_test(
            (differences, np.zeros_like(differences)),
            lambda x, y, axis: (x - y).sum(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=NUM_PERMUTATIONS,
            batch=500,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def mcnemar(ours, theirs) -> float:
    """Exact two-sided p of yes-or-no values (n,): of the rows in which the runs differ, half would go either way."""
    only_ours, only_theirs = int((ours > theirs).sum()), int((theirs > ours).sum())
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue) if only_ours + only_theirs else 1.0


def least_detectable(standard_error: float) -> float:
    """The true difference that a two-sided test at 5 % finds with POWER, at this standard error."""
    return float((norm.ppf(CONFIDENCE_TAILS[1]) + norm.ppf(POWER)) * standard_error)


def holm(p_values: list[float]) -> list[float]:
    """p corrected for that many tests (Holm 1979, Scand J Stat 6:65), in their order."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def is_certain(difference: dict) -> bool:
    """Whether one run may be called better or worse by a paired difference with its p_holm: its test and its interval
    say so. One without an interval is of items that all differ alike."""
    low, high = difference["interval"] or [difference["difference"]] * 2
    return difference["p_holm"] < SIGNIFICANT and not low <= 0 <= high
