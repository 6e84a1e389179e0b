"""Paired differences: by hand, and by how often their intervals and tests are right."""

import numpy as np
import pytest

from evaluator.paired import holm, least_detectable, mcnemar, mean_of_differences, paired_difference, sign_flip


def test_the_difference_is_a_ratio_of_sums():
    score = paired_difference([4, 6, 9], [2, 5, 9], [2, 4, 4])
    assert score["difference"] == pytest.approx(3 / 10) and score["n"] == 3 and score["test"] == "sign flips"
    # of the 8 sign patterns of (2, 1, 0), four have a sum of 3 or -3
    assert score["p"] == pytest.approx(4 / 8)


def test_yes_or_no_is_mcnemars():
    ours, theirs = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    score = paired_difference(ours, theirs)
    # 2 or fewer of 10, either way: 2 (1 + 10 + 45) / 1024
    assert score["test"] == "McNemar, exact" and score["p"] == pytest.approx(112 / 1024)
    assert score["difference"] == pytest.approx(6 / 15)
    assert mcnemar(np.array([1, 0]), np.array([1, 0])) == 1
    assert paired_difference([1, 0, 1, 1], [0, 0, 1, 0], groups=["a", "a", "b", "b"])["test"] == "sign flips"


def test_equal_runs_do_not_differ():
    score = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (score["difference"], score["p"], score["interval"], score["least_detectable"]) == (0, 1, None, 0)
    part = {"ours": [1.0, 2.0], "theirs": [1.0, 2.0], "sizes": [1, 1], "groups": None}
    assert mean_of_differences([part, part])["p"] == 1


def test_rows_of_one_question_go_together():
    """Twice the rows of the same questions tell no more."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=40), rng.normal(0.3, size=40)
    once = paired_difference(ours, theirs)
    twice = paired_difference(np.repeat(ours, 2), np.repeat(theirs, 2), groups=np.repeat(np.arange(40), 2))
    assert twice["p"] == once["p"] and twice["interval"] == pytest.approx(once["interval"])
    assert twice["n"] == 80 and twice["questions"] == 40


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.5 * 1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_the_least_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(1)
    n, spread, hits = 60, 1.0, 0
    true = least_detectable(spread / n**0.5)
    for _ in range(100):
        hits += sign_flip(rng.normal(true, spread, n)) < 0.05
    assert 0.70 < hits / 100 < 0.90


def simulated(rng, shift=0.0):
    """Three tasks' paired rows: hard and easy questions of several answers, log-likelihoods over tokens."""
    parts = []
    for num_questions in (40, 60, 30):
        groups = np.repeat(np.arange(num_questions), rng.integers(1, 4, num_questions))
        sizes = rng.integers(5, 80, len(groups))
        hardness = rng.gamma(4, 0.6, num_questions)[groups]
        change = rng.normal(shift, 0.15, num_questions)[groups] + rng.normal(0, 0.1, len(groups))
        theirs = hardness * sizes
        parts.append({"ours": theirs + change * sizes, "theirs": theirs, "sizes": sizes, "groups": groups})
    return parts


@pytest.mark.slow
def test_intervals_cover_and_tests_reject_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered, rejected, num = np.zeros(2), np.zeros(2), 300  # of one task, of the mean
    for seed in range(num):
        parts = simulated(rng)
        for which, score in enumerate((paired_difference(**parts[0], seed=seed), mean_of_differences(parts, seed))):
            covered[which] += score["interval"][0] <= 0 <= score["interval"][1]
            rejected[which] += score["p"] < 0.05
    assert (covered / num > 0.92).all() and (covered / num < 0.98).all(), covered
    assert (rejected / num < 0.08).all(), rejected  # 0.05 and 2.5 standard errors of 300 draws


def test_the_mean_is_over_tasks_alike_and_finds_a_shift():
    parts = simulated(np.random.default_rng(3), shift=-0.2)
    score = mean_of_differences(parts)
    singles = [paired_difference(**part)["difference"] for part in parts]
    assert score["difference"] == pytest.approx(np.mean(singles))
    assert score["p"] < 0.001 and score["interval"][1] < 0 < score["least_detectable"] < 0.2
    assert score["questions"] == 130


def test_few_differences_of_the_mean_take_students_t():
    """One question of six differs: some resamples have none, and a bootstrap-t nothing to divide by."""
    part = {"ours": [1.0] + [0.0] * 5, "theirs": [0.0] * 6, "sizes": [1] * 6, "groups": None}
    score = mean_of_differences([part, {**part, "ours": [0.0] * 6}])
    # difference 1/6 / 2; error sqrt((5/6)^2 + 5 (1/6)^2) / 6 / 2; 12 questions less 2 tasks
    error = (25 / 36 + 5 / 36) ** 0.5 / 6 / 2
    assert score["interval"] == pytest.approx([1 / 12 - 2.228139 * error, 1 / 12 + 2.228139 * error])
