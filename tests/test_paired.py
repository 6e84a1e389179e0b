"""Paired differences: by hand, and by how often their intervals and tests are right."""

import numpy as np
import pytest

from evaluator.paired import (
    holm,
    is_certain,
    least_detectable,
    mcnemar,
    mean_of_differences,
    paired_difference,
    sign_flip,
)
from evaluator.statistics import metric, resamples


def test_the_difference_is_a_ratio_of_sums():
    score = paired_difference([4, 6, 9], [2, 5, 9], [2, 4, 4])
    assert score["difference"] == pytest.approx(3 / 10) and score["n"] == 3 and score["test"] == "sign flips"
    # of the 8 sign patterns of (2, 1, 0), four have a sum of 3 or -3
    assert score["p"] == pytest.approx(4 / 8)


def test_the_least_detectable_difference_is_by_the_questions_residuals():
    # 2, 1 and 0 less 0.3 times their sizes: 1.4, -0.2 and -1.2; z of 97.5 % and of 80 %
    score = paired_difference([4, 6, 9], [2, 5, 9], [2, 4, 4])
    error = (1.4**2 + 0.2**2 + 1.2**2) ** 0.5 / 10
    assert score["least_detectable"] == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    grouped = paired_difference([4, 6, 9, 1], [2, 5, 9, 0], [2, 4, 4, 5], groups=list("abcb"))
    # questions: 2 of 2, 2 of 9, 0 of 4; 4 / 15 of each
    residuals = [2 - 8 / 15, 2 - 36 / 15, -16 / 15]
    error = sum(r**2 for r in residuals) ** 0.5 / 15
    assert grouped["least_detectable"] == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    assert (grouped["n"], grouped["questions"]) == (4, 3)


@pytest.mark.parametrize(
    ("interval", "p_holm", "certain"),
    [
        ([-0.02, -0.001], 0.049, True),
        ([0.001, 0.02], 0.049, True),
        ([-0.02, -0.001], 0.05, False),
        ([-0.02, 0.0002], 0.03, False),
        ([-0.0002, 0.02], 0.03, False),
        ([0.0, 0.02], 0.03, False),
    ],
)
def test_a_difference_is_certain_where_p_and_interval_agree(interval, p_holm, certain):
    assert is_certain({"difference": sum(interval) / 2, "interval": interval, "p_holm": p_holm}) == certain


def test_items_that_all_differ_alike_are_certain_to_differ():
    """Nothing varies that an interval could come from."""
    alike = paired_difference([1] * 20, [0] * 20)
    assert alike["interval"] is None and is_certain(alike | {"p_holm": alike["p"]})
    same = paired_difference([1] * 20, [1] * 20)
    assert same["interval"] is None and not is_certain(same | {"p_holm": same["p"]})


def test_the_interval_is_that_of_the_differences_as_a_metric():
    rng = np.random.default_rng(4)
    ours, theirs, sizes = rng.normal(size=30), rng.normal(size=30), rng.integers(1, 9, 30)
    groups = np.arange(30) // 2
    for seed in (0, 5):
        score = paired_difference(ours, theirs, sizes, groups=groups, seed=seed)
        expected = metric(ours - theirs, sizes, groups=groups, unit="", higher_is_better=None, seed=seed)
        assert (score["difference"], score["interval"]) == (expected["value"], expected["interval"])
        of_question = (ours - theirs).reshape(15, 2).sum(1)
        assert score["p"] == sign_flip(of_question, seed)
    for other in (theirs[:-1], np.append(theirs, 0)):
        with pytest.raises(ValueError, match="both runs' values of the same rows"):
            paired_difference(ours, other)


def test_signs_flip_as_often_as_the_seed_has_it():
    rng = np.random.default_rng(6)
    differences = rng.normal(0.3, 1, 25)
    p, again, other = sign_flip(differences), sign_flip(differences, 0), sign_flip(differences, 1)
    assert p == again != other and p == pytest.approx(other, abs=0.02)
    flips = rng.choice([-1, 1], (20000, 25)) @ differences
    assert p == pytest.approx((abs(flips) >= abs(differences.sum())).mean(), abs=0.02)
    assert round(p * 10000 / 2, 6).is_integer()  # twice a tail of 9,999 flips and the one that was seen


@pytest.mark.parametrize("seed", [0, 7])
def test_the_means_bootstrap_t_is_its_formula(seed):
    """One resample at a time: each task's ratio and variance by themselves, then their mean."""
    parts = [{**part, "groups": list(part["groups"])} for part in simulated(np.random.default_rng(5), 0.02)]
    for part in parts:  # questions enough to differ, few enough for loops
        for name in part:
            part[name] = part[name][:40]
    score = mean_of_differences(parts, seed)
    tasks = []
    for part in parts:
        questions = list(dict.fromkeys(part["groups"]))
        rows = [[i for i, group in enumerate(part["groups"]) if group == question] for question in questions]
        change = np.array([sum(part["ours"][i] - part["theirs"][i] for i in of) for of in rows])
        tasks.append((change, np.array([float(sum(part["sizes"][i] for i in of)) for of in rows])))
    values = [change.sum() / sizes.sum() for change, sizes in tasks]
    errors = [
        sum((change - value * sizes) ** 2) ** 0.5 / sizes.sum()
        for (change, sizes), value in zip(tasks, values, strict=True)
    ]
    error, studentised = sum(e**2 for e in errors) ** 0.5 / 3, []
    all_times = [np.concatenate(list(resamples(len(change), seed + i))) for i, (change, _) in enumerate(tasks)]
    for times in zip(*all_times, strict=True):
        shift = variance = 0.0
        for (change, sizes), value, count in zip(tasks, values, times, strict=True):
            total = (count * sizes).sum()
            again = (count * change).sum() / total
            shift += (again - value) / 3
            variance += (count * (change - again * sizes) ** 2).sum() / total**2 / 9
        studentised.append(shift / variance**0.5)
    low, high = np.quantile(studentised, [0.025, 0.975])
    mean = sum(values) / 3
    assert score["interval"] == pytest.approx([mean - high * error, mean - low * error], rel=1e-9)
    assert score["least_detectable"] == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    weighted = np.concatenate([change / sizes.sum() / 3 for change, sizes in tasks])
    assert score["p"] == sign_flip(weighted, seed) and score["test"] == "sign flips"
    assert (score["n"], score["questions"]) == (120, sum(len(change) for change, _ in tasks))


def test_one_question_shows_nothing():
    score = paired_difference([4], [2], [2])
    assert (score["difference"], score["p"], score["interval"]) == (1.0, 1.0, None)
    assert mean_of_differences([{"ours": [4], "theirs": [2], "sizes": [2], "groups": None}])["p"] == 1.0


def test_yes_or_no_is_mcnemars():
    ours, theirs = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    score = paired_difference(ours, theirs)
    # 2 or fewer of 10, either way: 2 (1 + 10 + 45) / 1024
    assert score["test"] == "McNemar, exact" and score["p"] == pytest.approx(112 / 1024)
    assert score["difference"] == pytest.approx(6 / 15)
    assert mcnemar(np.array([1, 0]), np.array([1, 0])) == 1
    assert mcnemar(np.array([1, 0, 0, 0]), np.array([0, 1, 1, 1])) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0])) == pytest.approx(2 / 8)
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


@pytest.mark.slow
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
