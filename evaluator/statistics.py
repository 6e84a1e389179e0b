"""A share, a mean or any other statistic with its 95 % interval, and a share corrected for its judge's errors.

`groups` names the question of each row, by any hashable values, where rows repeat a question. Rows of one question
are alike, so an interval then comes from the questions; without `groups` each row is a question of its own.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

Numbers = NDArray[np.float64]
Groups = Sequence[Hashable] | None

CONFIDENCE_TAILS = (0.025, 0.975)
NUM_RESAMPLES, BATCH = 2000, 200  # of resamples, BATCH are in memory at once
FLAT = 1e-9  # a resample's variance, as a part of the items' own, below which it shows no spread
LIKELY_BEYOND = 0.95  # of draws beyond a share's end above which a judge's error is not corrected
LEAST_INFORMEDNESS = 0.05  # sensitivity + specificity - 1 below which a judge's error is not corrected


def metric(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    *,
    groups: Groups = None,
    unit: str,
    higher_is_better: bool | None,
    seed: int = 0,
) -> dict[str, Any]:
    """sum(numerators) / sum(denominators) over rows (denominators default to 1 each: a plain mean).

    numerators, denominators, groups: n values each. Take `share` for yes-or-no values.
    Returns value, n (rows), interval (95 %), unit, higher_is_better (None: neither is better), and questions (their
    number) where it is not n. The interval is a studentised bootstrap over questions (Efron and Tibshirani 1993, An
    Introduction to the Bootstrap, section 12.5), or Student's t where too few values differ for one; that of a share
    ends at 0 and 1. It is None where fewer than 2 questions or no differences between them leave nothing to judge by.
    Raises ValueError without rows, for lengths that differ, or where the denominators sum to 0.
    """
    numerators = np.asarray(numerators, dtype=float)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=float)
    codes, counts = number_questions(groups, len(numerators))
    if len(denominators) != len(numerators) or not denominators.sum():
        raise ValueError("a metric needs as many denominators as numerators, and not all of them 0")
    value = numerators.sum() / denominators.sum()
    residuals = np.bincount(codes, numerators - value * denominators).astype(float)
    interval = studentised_interval(value, residuals, np.bincount(codes, denominators).astype(float), seed)
    if interval is not None and unit == "share":
        interval = np.clip(interval, 0, 1).tolist()
    return {"value": float(value), **counts, "interval": interval, "unit": unit, "higher_is_better": higher_is_better}


def share(
    values: ArrayLike, *, groups: Groups = None, higher_is_better: bool | None, unit: str = "share", **more: Any
) -> dict[str, Any]:
    """Like `metric`, for yes-or-no values (0, 1 or bool); `more` goes into the result (counts of what was left out).

    The interval is Wilson's (1927, JASA 22:209), so 1 row or 70 rows of "no" have one too. With groups it is that of
    as many independent rows as vary like these do (`effective_size`). Raises ValueError without rows or for other
    values.
    """
    values = np.asarray(values, dtype=float)
    codes, counts = number_questions(groups, len(values))
    if not np.isin(values, (0, 1)).all():
        raise ValueError("a share is of yes-or-no values, 0 or 1; take metric() for others")
    interval = wilson_interval(values.mean(), effective_size(values, codes))
    result = {"value": float(values.mean()), **counts, "interval": interval, "unit": unit}
    return {**result, "higher_is_better": higher_is_better, **more}


def statistic_metric(
    statistic: Callable[..., float],
    arrays: Sequence[ArrayLike],
    *,
    groups: Groups = None,
    unit: str,
    higher_is_better: bool | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Like `metric`, for any statistic(*arrays) of rows; arrays: n values each.

    The interval is a BCa bootstrap over questions (Efron 1987, JASA 82:171), which leaves out resamples for which the
    statistic is not defined (NaN).
    """
    columns = [np.asarray(array, dtype=float) for array in arrays]
    codes, counts = number_questions(groups, len(columns[0]))
    num_questions = codes.max() + 1

    def at(times: NDArray[np.int64]) -> float:  # times (num_questions,): how often each question is in the sample
        rows = np.repeat(np.arange(len(codes)), times[codes])
        return statistic(*(column[rows] for column in columns))

    value, interval = float(statistic(*columns)), None
    if num_questions > 1:
        resampled = np.array([at(times) for batch in resamples(num_questions, seed) for times in batch])
        left_out = np.array([at(times) for times in 1 - np.eye(num_questions, dtype=int)])
        interval = bca_interval(value, resampled, left_out)
    return {"value": value, **counts, "interval": interval, "unit": unit, "higher_is_better": higher_is_better}


def interval_text(score: dict[str, Any] | None) -> str:
    """A metric as "0.123 [0.100, 0.150]", without brackets where it has no interval; "–" where it has no value."""
    if score is None or score["value"] is None:
        return "–"
    interval = "" if score.get("interval") is None else " [{:.3f}, {:.3f}]".format(*score["interval"])
    return f"{score['value']:.3f}{interval}"


def area_under_curve(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive item scores above a negative one, ties by half; NaN with one class only."""
    positive, scores = np.asarray(labels, dtype=bool), np.asarray(scores)
    negatives = np.sort(scores[~positive])
    if not positive.any() or not len(negatives):
        return float("nan")
    ranks = sum(np.searchsorted(negatives, scores[positive], side) for side in ("left", "right")) / 2
    return float(ranks.mean() / len(negatives))


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 10) -> float:
    """Expected calibration error: over bins of equal width, the mean gap between probability and share, by items.

    Chance gaps add up as true ones do, so it is too high by construction, most with few items: a perfectly calibrated
    judge has one above 0. No interval around it claims to cover the true error.
    """
    labels, probabilities = np.asarray(labels, dtype=float), np.asarray(probabilities, dtype=float)
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, labels - probabilities, num_bins)  # per bin: the sum of the differences
    return float(np.abs(gaps).sum() / len(labels))


def corrected_share(
    judged: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    known: ArrayLike | None = None,
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The share of positives that a judge's errors leave likely (Rogan and Gladen 1978, Am J Epidemiol 107:71).

    judged: the judge's verdicts (0, 1) on the n scored items; labels, predictions, groups: truth, verdict and question
    of the labelled rows. known: which items' verdicts are not the judge's but certain (an empty answer's); they stay
    as they are. For the others, value = (p + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1].
    The 95 % interval comes from draws of p, sensitivity and specificity from their posteriors under Jeffreys' prior.
    Value and interval are None, and `reason` says why, with sensitivity + specificity - 1 <= 0.05, and where more than
    95 % of the draws lie beyond the same end of what a share can be: the answers are not like the labelled ones.
    """
    judged, labels, predictions = (np.asarray(array, dtype=float) for array in (judged, labels, predictions))
    codes, _ = number_questions(groups, len(labels))
    sensitivity, false_alarms = predictions[labels == 1].mean(), predictions[labels == 0].mean()
    rates = {"sensitivity": float(sensitivity), "specificity": float(1 - false_alarms)}
    result = {"unit": "share", "n": len(judged), "n_labelled": len(labels), **rates}
    if not sensitivity - false_alarms > LEAST_INFORMEDNESS:
        reason = f"sensitivity + specificity - 1 = {sensitivity - false_alarms:.3f}: this judge cannot be corrected"
        return {**result, "value": None, "interval": None, "reason": reason}
    certain = np.zeros(len(judged)) if known is None else np.asarray(known, dtype=float)
    # how many items have the judge's yes, the judge's no, a certain yes, a certain no
    counts = np.array([(x * y).sum() for y in (1 - certain, certain) for x in (judged, 1 - judged)])

    def by_judge(shares: Numbers, sensitivity: Any, false_alarms: Any) -> tuple[Numbers, Numbers]:
        """Of shares (..., 4), counts / n: the true yes among what the judge was asked, and the share that it was."""
        asked, informedness = shares[..., 0] + shares[..., 1], sensitivity - false_alarms
        return (shares[..., 0] - false_alarms * asked) / np.maximum(informedness, LEAST_INFORMEDNESS), asked

    rng = np.random.default_rng(seed)

    def draw_rate(label: int) -> Numbers:
        verdicts = predictions[labels == label]
        size, mean = effective_size(verdicts, codes[labels == label]), verdicts.mean()
        return rng.beta(mean * size + 0.5, (1 - mean) * size + 0.5, NUM_RESAMPLES)

    prior = np.repeat([0.5 * (1 - certain).any(), 0.5 * certain.any()], 2)
    shares = rng.dirichlet(counts + prior, NUM_RESAMPLES)
    draws, asked = by_judge(shares, draw_rate(1), draw_rate(0))
    for beyond, often in ((draws > asked, "more often"), (draws < 0, "less often")):
        if asked.any() and beyond.mean() > LIKELY_BEYOND:
            reason = f"the judge says yes {often} than its errors on labelled answers can explain"
            return {**result, "value": None, "interval": None, "reason": reason}
    interval = np.quantile(np.clip(draws, 0, asked) + shares[..., 2], CONFIDENCE_TAILS)
    value, asked = by_judge(counts / len(judged), sensitivity, false_alarms)
    return {**result, "value": float(np.clip(value, 0, asked) + counts[2] / len(judged)), "interval": interval.tolist()}


def number_questions(groups: Groups, num_rows: int) -> tuple[NDArray[np.int64], dict[str, int]]:
    """(question of each row from 0 (n,), {n} and where it differs {questions}). ValueError without rows."""
    if not num_rows:
        raise ValueError("a metric needs at least one item")
    if groups is None:
        return np.arange(num_rows), {"n": num_rows}
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    if len(codes) != num_rows:
        raise ValueError(f"groups names the question of {len(codes)} rows; there are {num_rows}")
    return codes, {"n": num_rows} | ({"questions": len(numbers)} if len(numbers) != num_rows else {})


def effective_size(values: Numbers, codes: NDArray[np.int64]) -> float:
    """How many independent yes-or-no rows vary as much as these (n,) of questions `codes` (n,) do: n at most, and the
    number of questions where all values agree (Dean and Pagano 2015, J Surv Stat Methodol 3:484)."""
    codes = np.unique(codes, return_inverse=True)[1]
    n, num_questions, mean = len(values), codes.max() + 1, values.mean()
    if num_questions in (1, n) or mean in (0, 1):
        return num_questions
    squares = (np.bincount(codes, values - mean) ** 2).sum()
    return n * min(1, mean * (1 - mean) * n / max(squares, FLAT))


def wilson_interval(value: float, size: float) -> list[float]:
    """Wilson's 95 % score interval of a share among `size` independent rows, which need not be a whole number."""
    z = norm.ppf(CONFIDENCE_TAILS[1])
    half_width = z * np.sqrt(value * (1 - value) / size + (z / size) ** 2 / 4)
    ends = (value + z**2 / size / 2 + np.array([-half_width, half_width])) / (1 + z**2 / size)
    return np.clip(ends, 0, 1).tolist()


def resamples(num_questions: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """NUM_RESAMPLES bootstrap samples of questions, as batches (BATCH, num_questions) of how often each is in it."""
    rng = np.random.default_rng(seed)
    offsets = num_questions * np.arange(BATCH)[:, None]
    for _ in range(NUM_RESAMPLES // BATCH):
        chosen = rng.integers(0, num_questions, (BATCH, num_questions)) + offsets
        yield np.bincount(chosen.ravel(), minlength=BATCH * num_questions).reshape(BATCH, num_questions)


def studentised_interval(value: float, residuals: Numbers, sizes: Numbers, seed: int) -> list[float] | None:
    """Bootstrap-t interval of a ratio of sums; residuals (Q,): numerator - value · denominator of each question, sizes
    (Q,): its denominator. The ratio's variance is that of its linearisation."""
    num_questions, squares = len(residuals), (residuals**2).sum()
    if num_questions < 2 or np.abs(residuals).max() <= 1e-12 * np.abs(value * sizes).max():
        return None  # all alike, but for rounding
    moments = np.stack((residuals, sizes, residuals**2, residuals * sizes, sizes**2), axis=-1)  # (Q, 5)
    sums = np.concatenate([times @ moments for times in resamples(num_questions, seed)]).T  # (5, NUM_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold denominators of 0 alone
        change = sums[0] / sums[1]
    variance = sums[2] - 2 * change * sums[3] + change**2 * sums[4]  # times Q / (Q - 1) / sums[1]²
    if (variance > FLAT * squares).all():
        low, high = np.quantile(sums[0] / np.sqrt(variance), CONFIDENCE_TAILS)
    else:
        low, high = t.ppf(CONFIDENCE_TAILS, num_questions - 1) * np.sqrt(num_questions / (num_questions - 1))
    error = np.sqrt(squares) / sizes.sum()
    return [float(value - high * error), float(value - low * error)]


def bca_interval(value: float, resampled: Numbers, left_out: Numbers) -> list[float] | None:
    """Efron's BCa interval from the statistic of resamples and with each question left out; None if all are alike."""
    resampled, left_out = resampled[~np.isnan(resampled)], left_out[~np.isnan(left_out)]
    influence = left_out.mean() - left_out if len(left_out) else left_out
    if not len(resampled) or not np.ptp(resampled) or not influence.any():
        return None
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    below = ((resampled < value).mean() + (resampled <= value).mean()) / 2
    bias = norm.ppf(np.clip(below, 1 / NUM_RESAMPLES, 1 - 1 / NUM_RESAMPLES))
    shifted = bias + norm.ppf(CONFIDENCE_TAILS)
    return np.quantile(resampled, norm.cdf(bias + shifted / (1 - acceleration * shifted))).tolist()
