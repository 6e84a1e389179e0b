"""A share or a mean with its 95 % bootstrap interval; how good a judge is, and its score corrected by that."""

import numpy as np
from scipy.stats import bootstrap, rankdata

NUM_RESAMPLES = 2000
LEAST_INFORMEDNESS = 0.05  # sensitivity + specificity - 1 below which a judge's error is not corrected


def metric(numerators, denominators=None, *, unit: str, higher_is_better: bool | None, seed: int = 0) -> dict:
    """sum(numerators) / sum(denominators) over items (denominators default to 1 each: a plain mean).

    Returns value, n (items), interval (95 %, percentile bootstrap over items; None below 2 items), unit,
    higher_is_better (None: neither is better). Raises ValueError without items.
    """
    numerators = np.asarray(numerators, dtype=float)
    if not len(numerators):
        raise ValueError("a metric needs at least one item")
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=float)

    def ratio(top, bottom, axis=-1):
        return top.sum(axis=axis) / bottom.sum(axis=axis)

    interval = None
    if len(numerators) > 1:
        found = bootstrap(
            (numerators, denominators),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=NUM_RESAMPLES,
            method="percentile",
            batch=200,
            rng=np.random.default_rng(seed),
        )
        interval = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return {
        "value": float(ratio(numerators, denominators)),
        "n": len(numerators),
        "interval": interval,
        "unit": unit,
        "higher_is_better": higher_is_better,
    }


def share(values, *, higher_is_better: bool | None, unit: str = "share", **more) -> dict:
    """`metric` of yes-or-no values, and what else belongs beside it (counts of what was left out, and such)."""
    return {**metric([float(value) for value in values], unit=unit, higher_is_better=higher_is_better), **more}


def statistic_metric(statistic, arrays, *, unit: str, higher_is_better: bool, seed: int = 0) -> dict:
    """Like `metric`, for any statistic(*arrays) of items: value, n, 95 % percentile bootstrap interval over items.

    Resamples in which the statistic is not defined (NaN) are left out.
    """
    arrays = [np.asarray(array, dtype=float) for array in arrays]
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    resampled = [statistic(*(array[chosen] for array in arrays)) for chosen in rng.integers(0, n, (NUM_RESAMPLES, n))]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {
        "value": float(statistic(*arrays)),
        "n": n,
        "interval": [float(low), float(high)],
        "unit": unit,
        "higher_is_better": higher_is_better,
    }


def area_under_curve(labels, scores) -> float:
    """Probability that a positive item scores above a negative one, ties by half; NaN with one class only."""
    positive = np.asarray(labels, dtype=bool)
    num_positive, num_negative = positive.sum(), (~positive).sum()
    if not num_positive or not num_negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def calibration_error(labels, probabilities, num_bins: int = 10) -> float:
    """Expected calibration error: over bins of equal width, the mean gap between probability and share, by items."""
    labels, probabilities = np.asarray(labels, dtype=float), np.asarray(probabilities, dtype=float)
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, labels - probabilities, num_bins)  # per bin: the sum of the differences
    return float(np.abs(gaps).sum() / len(labels))


def corrected_share(judged, labels, predictions, known=None, seed: int = 0) -> dict:
    """The share of positives that a judge's errors leave likely (Rogan and Gladen 1978, Am J Epidemiol 107:71).

    judged: the judge's verdicts (0, 1) on the scored items; labels, predictions: truth and verdict on labelled rows.
    known: which items' verdicts are not the judge's but certain (an empty answer's); they stay as they are.
    For the others, value = (p + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1]; its 95 %
    interval by bootstrap over the scored items and, apart, the positive and the negative labelled rows. A judge with
    sensitivity + specificity - 1 <= 0.05 tells next to nothing: value and interval are None, and `reason` says so.
    """
    judged, labels, predictions = (np.asarray(array, dtype=float) for array in (judged, labels, predictions))
    hits, alarms = predictions[labels == 1], predictions[labels == 0]
    found = {
        "unit": "share",
        "n": len(judged),
        "n_labelled": len(labels),
        "sensitivity": float(hits.mean()),
        "specificity": float(1 - alarms.mean()),
    }
    informedness = hits.mean() - alarms.mean()
    if informedness <= LEAST_INFORMEDNESS:
        reason = f"sensitivity + specificity - 1 = {informedness:.3f}: this judge cannot be corrected"
        return {**found, "value": None, "interval": None, "reason": reason}
    certain = np.zeros(len(judged)) if known is None else np.asarray(known, dtype=float)
    # per item: verdict where judged, being judged, verdict where certain; the estimate is linear in their means
    parts = np.stack((judged * (1 - certain), 1 - certain, judged * certain), axis=-1)

    def estimate(means, sensitivity, false_alarms):  # means (..., 3)
        corrected = (means[..., 0] - false_alarms * means[..., 1]) / (sensitivity - false_alarms).clip(
            LEAST_INFORMEDNESS
        )
        return np.clip(corrected, 0, means[..., 1]) + means[..., 2]

    rng = np.random.default_rng(seed)

    def resampled_means(values):
        return rng.choice(values, (NUM_RESAMPLES, len(values))).mean(1)

    resampled = estimate(resampled_means(parts), resampled_means(hits), resampled_means(alarms))
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = estimate(parts.mean(0), hits.mean(), alarms.mean())
    return {**found, "value": float(value), "interval": [float(low), float(high)]}
