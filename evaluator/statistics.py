"""A share or a mean with its 95 % bootstrap interval."""

import numpy as np
from scipy.stats import bootstrap


def metric(numerators, denominators=None, *, unit: str, higher_is_better: bool, seed: int = 0) -> dict:
    """sum(numerators) / sum(denominators) over items (denominators default to 1 each: a plain mean).

    Returns value, n (items), interval (95 %, percentile bootstrap over items; None below 2 items), unit,
    higher_is_better. Raises ValueError without items.
    """
    numerators = np.asarray(numerators, dtype=float)
    if not len(numerators):
        raise ValueError("a metric needs at least one item")
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=float)

    def ratio(top, bottom, axis=-1):
        return top.sum(axis=axis) / bottom.sum(axis=axis)

    interval = None
    if len(numerators) > 1:
        found = bootstrap((numerators, denominators), ratio, paired=True, vectorized=True, n_resamples=2000,
                          method="percentile", batch=200, rng=np.random.default_rng(seed))  # fmt: skip
        interval = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return {"value": float(ratio(numerators, denominators)), "n": len(numerators), "interval": interval,
            "unit": unit, "higher_is_better": higher_is_better}  # fmt: skip
