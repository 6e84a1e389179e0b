"""Scores and their intervals: worked by hand, against other implementations, and how often intervals hold the truth."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from evaluator.statistics import (
    BATCH,
    NUM_RESAMPLES,
    area_under_curve,
    bca_interval,
    calibration_error,
    corrected_share,
    interval_text,
    metric,
    resamples,
    share,
    statistic_metric,
)

UNITS = {"unit": "nats", "higher_is_better": False}


def mean_metric(values, **more):
    return metric(values, **UNITS, **more)


def yes_share(values, **more):
    return share(values, higher_is_better=True, **more)


def coverage(draw_interval, truth: float, num_draws: int) -> float:
    """The part of `num_draws` intervals that hold the truth."""
    intervals = np.array([draw_interval() for _ in range(num_draws)])
    return ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_metric_is_a_ratio_of_sums():
    score = metric([1.0, 2.0, 9.0], [1, 1, 4], **UNITS)
    assert score["value"] == 2.0 and score["n"] == 3  # 12 / 6, not the mean of 1, 2 and 9 / 4
    assert score["interval"][0] < 2 < score["interval"][1]
    assert (score["unit"], score["higher_is_better"]) == ("nats", False) and "questions" not in score


def test_a_metric_without_differences_has_no_interval():
    assert mean_metric([1.0])["interval"] is None
    assert mean_metric([0.1] * 7)["interval"] is None
    assert metric([0.3, 0.6, 0.9], [1, 2, 3], **UNITS)["interval"] is None
    assert mean_metric([1.0, 2.0], groups=["q", "q"])["interval"] is None


def test_two_questions_have_an_interval():
    # 1 and 3: residuals -1 and 1, t of one degree of freedom at 97.5 %: 12.7062; sqrt(2) * sqrt(2) / 2
    assert mean_metric([1.0, 3.0])["interval"] == pytest.approx([2 - 12.7062, 2 + 12.7062], abs=1e-4)
    assert mean_metric([1.0, 1.0 + 1e-14])["interval"] is None  # alike, but for rounding


def test_few_differences_take_students_t():
    # one 5 among five: mean 1, standard deviation sqrt(5), its error 1; t of 4 degrees of freedom at 97.5 %: 2.7764
    assert mean_metric([5.0, 0, 0, 0, 0])["interval"] == pytest.approx([1 - 2.7764, 1 + 2.7764], abs=1e-4)


def test_a_share_stays_one():
    """Of probability, as MC2's, or of preference, as a win rate's: an interval does not leave what can be."""
    for values in ([0.0, 0.0, 0.9], [0.02, 0.0, 0.0, 0.3], [1.0, 0.98, 0.7]):
        low, high = mean_metric(values)["interval"]
        assert low < 0 or high > 1
        assert metric(values, unit="share", higher_is_better=True)["interval"] == [max(low, 0), min(high, 1)]


def test_bad_rows_are_errors():
    for wrong in (lambda: mean_metric([]), lambda: yes_share([]), lambda: metric([1.0, 2.0], [0, 0], **UNITS)):
        with pytest.raises(ValueError):
            wrong()
    for values in ([0, 1, 0.5], [1, 2], [math.nan, 1]):
        with pytest.raises(ValueError, match="yes-or-no"):
            yes_share(values)
    for groups in (["q"], ["q"] * 3):
        with pytest.raises(ValueError, match=f"{len(groups)} rows; there are 2"):
            mean_metric([1.0, 2.0], groups=groups)
    for denominators in ([1], [1, 1, 1]):
        with pytest.raises(ValueError, match="as many denominators"):
            metric([1.0, 2.0], denominators, **UNITS)


def test_interval_text():
    assert interval_text({"value": 0.1234, "interval": [0.1, 0.15]}) == "0.123 [0.100, 0.150]"
    assert interval_text({"value": 2.0, "interval": None}) == interval_text({"value": 2.0}) == "2.000"
    assert interval_text(None) == interval_text({"value": None, "interval": None}) == "–"


def test_area_under_curve_equals_a_count_of_pairs():
    # pairs of a positive and a negative: 0.9 > 0.8, 0.9 > 0.3, 0.3 < 0.8, 0.3 = 0.3
    assert area_under_curve([1, 0, 1, 0], [0.9, 0.8, 0.3, 0.3]) == 2.5 / 4
    assert math.isnan(area_under_curve([1, 1], [0.1, 0.2]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rng.random(25) < 0.4, rng.integers(0, 8, 25)
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
        assert area_under_curve(labels, scores) == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_error_by_hand():
    # bin of 0.1: mean probability 0.1, share 1/2, two items; bin of 0.9: 0.9, share 1, one item
    assert calibration_error([0, 1, 1], [0.1, 0.1, 0.9]) == pytest.approx((2 * 0.4 + 1 * 0.1) / 3)
    assert calibration_error([1, 0], [1.0, 0.0]) == 0
    # 1 belongs to the last bin: |0 - 1 + 1 - 0.95| of two items
    assert calibration_error([0, 1], [1.0, 0.95]) == pytest.approx(0.95 / 2)
    # four bins: 0.3 and 0.45 are of one, 0.5 of the next
    assert calibration_error([1, 0, 1], [0.3, 0.45, 0.5], 4) == pytest.approx((0.7 - 0.45 + 0.5) / 3)


def test_corrected_share_by_hand():
    labels = [1] * 10 + [0] * 10
    predictions = [1] * 8 + [0] * 2 + [1] * 1 + [0] * 9  # sensitivity 0.8, specificity 0.9
    judged = [1] * 30 + [0] * 70
    score = corrected_share(judged, labels, predictions)
    assert score["value"] == pytest.approx((0.3 + 0.9 - 1) / (0.8 + 0.9 - 1))
    assert (score["sensitivity"], score["specificity"]) == (pytest.approx(0.8), pytest.approx(0.9))
    assert (score["n"], score["n_labelled"]) == (100, 20)
    assert corrected_share([1] + [0] * 19, labels, predictions)["value"] == 0  # -0.05 / 0.7, clipped
    assert corrected_share([1] * 17 + [0] * 3, labels, predictions)["value"] == 1
    # 20 of the 100 are certain, 10 of them a yes: the other 80 have p = 20 / 80
    mixed = corrected_share(judged, labels, predictions, known=[1] * 10 + [0] * 80 + [1] * 10)
    assert mixed["value"] == pytest.approx(0.8 * (20 / 80 + 0.9 - 1) / 0.7 + 0.1)
    coin = corrected_share(judged, labels, [1, 0] * 10)
    assert coin["value"] is None and coin["interval"] is None
    assert coin["reason"] == "sensitivity + specificity - 1 = 0.000: this judge cannot be corrected"
    worse = corrected_share(judged, [1] * 10 + [0] * 10, [1] * 2 + [0] * 8 + [1] * 5 + [0] * 5)["reason"]
    assert worse == "sensitivity + specificity - 1 = -0.300: this judge cannot be corrected"


def test_a_judge_that_says_yes_more_or_less_often_than_it_can_corrects_nothing():
    labels, predictions = [1] * 100 + [0] * 100, [1] * 80 + [0] * 20 + [1] * 10 + [0] * 90
    for yes, said in ((200, "more often"), (0, "less often")):  # of 200, by sensitivity 0.8 and false alarms 0.1
        score = corrected_share([1] * yes + [0] * (200 - yes), labels, predictions)
        assert score["value"] is None and score["interval"] is None
        assert score["reason"] == f"the judge says yes {said} than its errors on labelled answers can explain"
    for yes, end in ((165, 1), (18, 0)):  # a little beyond either end: by chance
        score = corrected_share([1] * yes + [0] * (200 - yes), labels, predictions)
        assert score["value"] == end and score["interval"][0] < score["interval"][1]
    # what is certain is no verdict of the judge's
    assert corrected_share([1] * 40, labels, predictions, known=[0] * 5 + [1] * 35)["value"] == 1


@pytest.mark.parametrize(("prevalence", "most"), [(0.0, 0.08), (0.3, 0.0), (1.0, 0.08)])
def test_a_sound_judge_is_seldom_called_beyond_its_errors(prevalence, most):
    rng = np.random.default_rng(3)

    def judge(truth):
        return rng.random(len(truth)) < np.where(truth, 0.8, 0.2)

    refused = 0
    for _ in range(300):
        labels, items = rng.random(100) < 0.5, rng.random(200) < prevalence
        refused += corrected_share(judge(items), labels, judge(labels))["value"] is None
    assert refused <= most * 300


def test_the_corrected_interval_holds_every_uncertainty():
    def width(judged, num_labelled, **more):
        labels = np.repeat([1, 0], num_labelled // 2)
        low, high = corrected_share(judged, labels, np.arange(num_labelled) % 10 < 7 * labels + 1, **more)["interval"]
        return high - low

    judged = [1] * 60 + [0] * 140
    certain = width(judged, 10**6)
    # the judge's errors known: Wilson's width of the share judged, over informedness 0.7, give or take the prior
    wilson = yes_share(judged)["interval"]
    assert certain == pytest.approx((wilson[1] - wilson[0]) / 0.7, rel=0.05)
    assert width(judged, 20) > 1.5 * certain
    # ten rows of each question, of one label: as uncertain as a tenth of the rows, or more where rows agree
    assert width(judged, 400, groups=np.arange(400) // 10) == pytest.approx(width(judged, 400), rel=0.25)
    labels, alike = np.repeat([1, 0], 200), np.arange(400) // 10 % 10 < 7 * np.repeat([1, 0], 200) + 1
    rows, questions = (
        np.ptp(corrected_share(judged, labels, alike, groups=groups)["interval"])
        for groups in (None, np.arange(400) // 10)
    )
    assert questions > 1.4 * rows
    # a judge that never erred on 20 rows and flags none of 70: not certainly 0
    assert corrected_share([0] * 70, [1, 0] * 10, [1, 0] * 10)["interval"][1] > 0.01
    # an item that no judge was asked about gives no room for the judge's errors
    sure = corrected_share([1, 0] * 50, [1, 0] * 10, [1, 0] * 10, known=[1] * 100)
    assert sure["value"] == 0.5 and 0.4 < sure["interval"][0] < 0.5 < sure["interval"][1] < 0.6


# ---- Wilson's interval -----------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    # z² = 3.8415. 0 of 70: [0, z² / (70 + z²)]. 5 of 10: 0.5 ± z sqrt(0.25 / 10 + z² / 400) / (1 + z² / 10)
    assert yes_share([0] * 70)["interval"] == pytest.approx([0, 0.0520], abs=1e-4)
    assert yes_share([True, False] * 5)["interval"] == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert yes_share([1])["interval"] == pytest.approx([1 / 4.8415, 1], abs=1e-4)  # n / (n + z²) with n = 1
    score = share([0, 1], higher_is_better=None, unit="share", empty=3)
    assert score.items() >= {"value": 0.5, "n": 2, "unit": "share", "higher_is_better": None, "empty": 3}.items()


def test_wilson_equals_scipys():
    for n in (1, 2, 9, 40):
        for k in range(n + 1):
            expected = binomtest(k, n).proportion_ci(method="wilson")
            assert yes_share([1] * k + [0] * (n - k))["interval"] == pytest.approx(list(expected), abs=1e-12)


@pytest.mark.parametrize("n", [16, 60, 100, 400])
def test_wilson_covers(n):
    """Exact coverage: the probabilities of the counts whose interval holds p, averaged over p from 0.02 to 0.98."""
    intervals = np.array([yes_share([1] * k + [0] * (n - k))["interval"] for k in range(n + 1)])
    p = np.linspace(0.02, 0.98, 193)[:, None]
    covered = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
    assert 0.94 < (binom.pmf(np.arange(n + 1), n, p) * covered).sum(1).mean() < 0.96


# ---- questions -------------------------------------------------------------------------------------------------------


def test_repeated_rows_tell_nothing_new():
    """With groups, k copies of each row leave the interval as it was; without, it shrinks by sqrt(k)."""
    rng = np.random.default_rng(2)
    tops, bottoms, questions = rng.gamma(2, 1, 80), rng.integers(1, 9, 80), [f"q{i}" for i in range(80)]
    yes = rng.random(80) < 0.4

    def auc(rows, scores, **more):
        return statistic_metric(area_under_curve, (rows, scores), **UNITS, **more)

    def ratio(tops, bottoms, **more):
        return metric(tops, bottoms, **UNITS, **more)

    for score, arrays in ((ratio, (tops, bottoms)), (yes_share, (yes,)), (auc, (yes, tops))):
        once = score(*arrays)
        fourfold = [np.tile(array, 4) for array in arrays]
        grouped = score(*fourfold, groups=questions * 4)
        assert grouped["interval"] == pytest.approx(once["interval"], rel=1e-9)
        assert (once["n"], grouped["n"], grouped["questions"]) == (80, 320, 80)
        assert np.ptp(score(*fourfold)["interval"]) == pytest.approx(np.ptp(once["interval"]) / 2, rel=0.12)


def test_the_seed_is_0_unless_another_is_given():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    assert mean_metric(values) == mean_metric(values, seed=0) != mean_metric(values, seed=1)
    judged = ([1, 0] * 9, [1, 0] * 9, [1, 0] * 8 + [0, 1])
    assert corrected_share(*judged) == corrected_share(*judged, seed=0) != corrected_share(*judged, seed=1)


def test_groups_of_one_row_change_nothing():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    assert mean_metric(values, groups=list("abcdefgh")) == mean_metric(values)
    assert yes_share([1, 0, 0], groups=[("a", 1), ("a", 2), None]) == yes_share([1, 0, 0])


def test_a_grouped_share_where_all_agree_counts_questions():
    assert yes_share([0] * 140, groups=list(range(70)) * 2)["interval"] == yes_share([0] * 70)["interval"]
    assert yes_share([1, 0] * 30, groups=np.repeat(np.arange(30), 2))["interval"] == yes_share([1, 0] * 30)["interval"]


def test_rows_that_vary_together_count_as_fewer():
    """Mean 0.5; the questions' sums of differences from it are 1, -1 and 0: 6 * 0.25 * 6 / 2 = 4.5 rows."""
    z2, size = norm.ppf(0.975) ** 2, 4.5
    half = np.sqrt(z2 * (0.25 / size + z2 / size**2 / 4)) / (1 + z2 / size)
    interval = yes_share([1, 1, 0, 0, 1, 0], groups=list("aabbcc"))["interval"]
    assert interval == pytest.approx([0.5 - half, 0.5 + half])
    one = np.sqrt(z2 * (0.25 + z2 / 4)) / (1 + z2)  # two rows of one question: one row
    assert yes_share([1, 0], groups=["a", "a"])["interval"] == pytest.approx([0.5 - one, 0.5 + one])
    apart = yes_share([1, 0, 1, 0, 1, 0], groups=list("aabbcc"))[
        "interval"
    ]  # evened out within questions: no more than n
    assert apart == yes_share([1, 0, 1, 0, 1, 0])["interval"]


# ---- the bootstraps by their formulas, one resample at a time --------------------------------------------------------


def test_resamples_count_draws_with_replacement():
    rng = np.random.default_rng(5)
    for batch in list(resamples(7, 5)):
        drawn = rng.integers(0, 7, (BATCH, 7))
        assert batch.tolist() == [[row.tolist().count(i) for i in range(7)] for row in drawn]
    assert sum(map(len, resamples(7, 5))) == NUM_RESAMPLES == 2000


@pytest.mark.parametrize("seed", [0, 3])
def test_the_bootstrap_t_interval_is_its_formula(seed):
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(12), rng.integers(1, 4, 12))
    sizes = rng.integers(1, 9, len(groups)).astype(float)
    values = rng.gamma(2, 1, len(groups)) * sizes
    score = metric(values, sizes, groups=groups, seed=seed, **UNITS)
    tops, bottoms = (np.array([array[groups == i].sum() for i in range(12)]) for array in (values, sizes))
    ratio, studentised = values.sum() / sizes.sum(), []
    for times in np.concatenate(list(resamples(12, seed))):
        again = (times * tops).sum() / (times * bottoms).sum()
        error = math.sqrt(sum(times * (tops - again * bottoms) ** 2)) / (times * bottoms).sum()
        studentised.append((again - ratio) / error)
    low, high = np.quantile(studentised, [0.025, 0.975])
    error = math.sqrt(sum((tops - ratio * bottoms) ** 2)) / sizes.sum()
    assert score["interval"] == pytest.approx([ratio - high * error, ratio - low * error], rel=1e-9)
    assert (score["n"], score["questions"], score["value"]) == (len(groups), 12, pytest.approx(ratio))


def test_students_t_of_few_differences_with_sizes():
    """Of a ratio: residuals of the questions about it, sqrt(Q / (Q - 1)) for the mean's own degree of freedom."""
    tops, bottoms = np.array([6.0, 2, 2, 2, 2]), np.array([2.0, 2, 2, 2, 2])
    residuals = tops - 1.4 * bottoms
    half = 2.776445 * math.sqrt(5 / 4) * math.sqrt((residuals**2).sum()) / 10
    assert metric(tops, bottoms, **UNITS)["interval"] == pytest.approx([1.4 - half, 1.4 + half], rel=1e-6)


def efrons_bca(value, resampled, left_out):
    """One number at a time."""
    resampled = [x for x in resampled if not math.isnan(x)]
    left_out = [x for x in left_out if not math.isnan(x)]
    mean = sum(left_out) / len(left_out)
    cubes, squares = sum((mean - x) ** 3 for x in left_out), sum((mean - x) ** 2 for x in left_out)
    a = cubes / (6 * squares**1.5)
    below = sum(1.0 if x < value else 0.5 if x == value else 0.0 for x in resampled) / len(resampled)
    z0 = norm.ppf(min(max(below, 1 / NUM_RESAMPLES), 1 - 1 / NUM_RESAMPLES))
    ends = [norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (norm.ppf(0.025), norm.ppf(0.975))]
    return np.quantile(resampled, ends).tolist()


def test_bca_is_its_formula():
    rng = np.random.default_rng(8)
    values = rng.exponential(size=15)
    resampled = rng.choice(values, (500, 15)).mean(1)
    resampled[7], resampled[20:60] = math.nan, values.mean()  # one not defined, many ties
    left_out = (values.sum() - values) / 14
    left_out[3] = math.nan
    for value in (values.mean(), values.mean() * 1.1, 99.0, -99.0):  # beyond all resamples, either way
        assert bca_interval(value, resampled, left_out) == pytest.approx(efrons_bca(value, resampled, left_out))
    assert bca_interval(1.0, np.array([math.nan]), left_out) is None
    assert bca_interval(1.0, resampled, np.array([])) is None
    assert bca_interval(1.0, resampled, np.array([2.0, 2.0])) is None


def test_a_statistics_interval_is_the_bca_of_its_resampled_rows():
    rng = np.random.default_rng(9)
    groups = np.repeat(np.arange(9), 2)
    labels, scores = rng.random(18) < 0.5, rng.normal(size=18)
    score = statistic_metric(area_under_curve, (labels, scores), groups=groups, seed=4, **UNITS)

    def area(questions):
        rows = [row for question in questions for row in np.flatnonzero(groups == question)]
        return area_under_curve(labels[rows], scores[rows])

    resampled = [area(np.repeat(np.arange(9), times)) for times in np.concatenate(list(resamples(9, 4)))]
    left_out = [area([other for other in range(9) if other != question]) for question in range(9)]
    assert score["value"] == area_under_curve(labels, scores)
    assert score["interval"] == pytest.approx(efrons_bca(score["value"], resampled, left_out))
    alone = statistic_metric(area_under_curve, ([1, 0], [0.4, 0.2]), groups=["q", "q"], **UNITS)
    assert (alone["value"], alone["interval"], alone["questions"]) == (1.0, None, 1)


def test_the_corrected_interval_is_its_formula():
    """Draws of the counts' shares and of the two rates, each put into the correction by itself."""
    labels = np.array([1] * 12 + [0] * 10)
    predictions = np.array([1] * 9 + [0] * 3 + [1] * 2 + [0] * 8)
    judged, known = np.array([1] * 14 + [0] * 16), np.array([1] * 4 + [0] * 20 + [1] * 6)
    for certain, groups in ((known, None), (known, np.arange(22) // 2), (np.zeros(30), None)):
        score = corrected_share(judged, labels, predictions, certain, groups=groups, seed=6)
        counts = [((judged == j) & (certain == c)).sum() for c, j in ((0, 1), (0, 0), (1, 1), (1, 0))]
        prior = [0.5, 0.5, 0.5 * any(certain), 0.5 * any(certain)]
        rng, draws, rates = np.random.default_rng(6), [], []
        shares = rng.dirichlet(np.add(counts, prior), NUM_RESAMPLES)
        for label in (1, 0):
            said, questions = predictions[labels == label], (np.arange(22) // 2)[labels == label]
            size, n, mean = len(said), len(said), said.mean()
            if groups is not None:  # two rows each
                sums = [(said - mean)[questions == q].sum() for q in set(questions)]
                size = n * min(1, mean * (1 - mean) * n / sum(np.square(sums)))
            rates.append(rng.beta(mean * size + 0.5, (1 - mean) * size + 0.5, NUM_RESAMPLES))
        for (yes, no, sure, _), sensitivity, false_alarms in zip(shares, *rates, strict=True):
            positives = (yes - false_alarms * (yes + no)) / max(sensitivity - false_alarms, 0.05)
            draws.append(min(max(positives, 0), yes + no) + sure)
        assert score["interval"] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())


@pytest.mark.parametrize("hits, corrected", [(21, True), (19, False)])
def test_a_judge_that_knows_next_to_nothing_corrects_nothing(hits, corrected):
    """Sensitivity + specificity - 1 of 0.21 - 0.15, and of 0.19 - 0.15: the latter is not above 0.05."""
    labels = [1] * 100 + [0] * 100
    predictions = [1] * hits + [0] * (100 - hits) + [1] * 15 + [0] * 85
    score = corrected_share([1, 0, 0, 0, 0], labels, predictions)
    assert (score["value"] is not None) == corrected and ("reason" in score) != corrected


# ---- coverage of the bootstraps --------------------------------------------------------------------------------------


def skewed(rng, n):
    return mean_metric(rng.gamma(2, 0.5, n))["interval"]


def paired_differences(rng, n):
    """Of yes-or-no values: 1 with probability 0.2, -1 with 0.1, else 0."""
    return mean_metric(rng.choice([1, -1, 0], n, p=[0.2, 0.1, 0.7]))["interval"]


def clustered_ratio(rng, n):
    """1 to 4 answers of each question; nats per token, of a mean that the question has in common."""
    groups = np.repeat(np.arange(n), rng.integers(1, 5, n))
    tokens, nats = rng.geometric(1 / 20, len(groups)), rng.gamma(4, 0.25, n)[groups] * rng.gamma(4, 0.25, len(groups))
    return metric(nats * tokens, tokens, groups=groups, **UNITS)["interval"]


def clustered_share(rng, n):
    """1 to 4 rows of each question, whose share of yes is Beta(0.4, 0.6) distributed: a correlation of 0.5."""
    groups = np.repeat(np.arange(n), rng.integers(1, 5, n))
    return yes_share(rng.random(len(groups)) < rng.beta(0.4, 0.6, n)[groups], groups=groups)["interval"]


@pytest.mark.parametrize(
    ("draw", "truth", "n", "num_draws"),
    [
        (skewed, 1.0, 30, 1000),
        (paired_differences, 0.1, 60, 600),
        (clustered_ratio, 1.0, 60, 600),
        (clustered_share, 0.4, 60, 2000),
        pytest.param(skewed, 1.0, 100, 2000, marks=pytest.mark.slow),
        pytest.param(skewed, 1.0, 400, 1500, marks=pytest.mark.slow),
        pytest.param(paired_differences, 0.1, 400, 1500, marks=pytest.mark.slow),
        pytest.param(clustered_ratio, 1.0, 100, 2000, marks=pytest.mark.slow),
        pytest.param(clustered_ratio, 1.0, 400, 1500, marks=pytest.mark.slow),
    ],
)
def test_coverage(draw, truth, n, num_draws):
    rng = np.random.default_rng(n)
    assert 0.93 < coverage(lambda: draw(rng, n), truth, num_draws) < 0.97


def test_rows_that_repeat_questions_undercover_without_groups():
    """Why groups are needed: 4 equal rows of each of 60 questions, taken as 240 rows."""
    rng = np.random.default_rng(3)
    assert coverage(lambda: mean_metric(np.repeat(rng.gamma(2, 0.5, 60), 4))["interval"], 1.0, 200) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("num_questions", [30, 100])
def test_coverage_of_an_area_under_the_curve(num_questions):
    """Normal scores of two classes with an area of 0.8; two rows of each question, one of each class."""
    rng = np.random.default_rng(4)
    shift = np.sqrt(2) * norm.ppf(0.8)
    labels, groups = np.repeat([1, 0], num_questions), list(range(num_questions)) * 2

    def draw():
        shared = np.tile(rng.normal(size=num_questions), 2)
        scores = np.sqrt(0.5) * (shared + rng.normal(size=2 * num_questions)) + shift * labels
        return statistic_metric(area_under_curve, (labels, scores), groups=groups, **UNITS)["interval"]

    def truth():  # of rows from different questions, which are all but 1 / num_questions of the pairs
        return 0.8 * (1 - 1 / num_questions) + norm.cdf(shift) / num_questions

    assert 0.93 < coverage(draw, truth(), 500) < 0.97


def test_bca_of_a_mean_is_second_order_correct():
    """For exponential values the ends lie further right than the percentiles, as the exact gamma interval's do."""
    rng = np.random.default_rng(6)
    values = rng.exponential(size=40)
    resampled = rng.choice(values, (4000, 40)).mean(1)
    left_out = (values.sum() - values) / 39
    low, high = bca_interval(values.mean(), resampled, left_out)
    assert np.quantile(resampled, 0.025) < low and np.quantile(resampled, 0.975) < high
    assert bca_interval(1.0, np.array([np.nan, 1.0, 1.0]), np.array([1.0, 1.0])) is None


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.8, 0.9), (0.9, 0.8)])
@pytest.mark.parametrize("prevalence", [0.0, 0.1, 0.25, 0.5])
def test_coverage_of_the_corrected_share(sensitivity, specificity, prevalence):
    """100 scored items and 200 labelled rows. At 0 and 1 the clipped end makes it cover more often."""
    rng = np.random.default_rng(7)

    def judge(truth):
        return rng.random(len(truth)) < np.where(truth, sensitivity, 1 - specificity)

    def draw():
        labels, items = rng.random(200) < 0.5, rng.random(100) < prevalence
        return corrected_share(judge(items), labels, judge(labels))["interval"] or draw()  # beyond its errors: again

    assert 0.93 <= coverage(draw, prevalence, 1000) <= 0.98
