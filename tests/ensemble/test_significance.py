"""Intervals and tests against scipy and by simulation."""
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from ensemble.measure.significance import bootstrap, compare, jackknife, mcnemar, student_quantile


@pytest.mark.parametrize("counts", [(12, 7), (7, 12), (5, 5), (0, 0), (0, 1), (40, 4), (3000, 2500)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    ours, theirs = counts
    a = torch.tensor([True] * ours + [False] * theirs + [True] * 10 + [False] * 3)
    b = torch.tensor([False] * ours + [True] * theirs + [True] * 10 + [False] * 3)
    found = mcnemar(a, b)
    assert (found.only_ours, found.only_theirs) == counts
    expected = scipy.stats.binomtest(ours, ours + theirs).pvalue if sum(counts) else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def make_values(kind, n, random):
    """Per-image gains of mean 0.1 (discrete) or 1 (continuous)."""
    if kind == "discrete":
        return torch.tensor(random.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.7, 0.2])), 0.1
    return torch.tensor(random.exponential(size=n)), 1.0


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind):
    random, hits, trials = np.random.default_rng(1), 0, 400
    for trial in range(trials):
        values, truth = make_values(kind, 200, random)
        interval = bootstrap(values, samples=500, level=0.9, seed=trial)
        hits += interval.low <= truth <= interval.high
    # 90 % of 400, within four standard deviations of a binomial and the bootstrap's own small-sample error
    assert abs(hits / trials - 0.9) < 0.06


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_interval_is_that_of_resampling_image_by_image(kind):
    values, _ = make_values(kind, 150, np.random.default_rng(2))
    expected = scipy.stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile",
                                     rng=np.random.default_rng(3)).confidence_interval
    found = bootstrap(values, samples=20_000)
    assert found.mean == pytest.approx(values.mean().item())
    near = 0.03 * (expected.high - expected.low) if kind == "continuous" else 1.01 / 150  # means are on a lattice
    assert found.low == pytest.approx(expected.low, abs=near)
    assert found.high == pytest.approx(expected.high, abs=near)


def test_the_interval_is_the_same_each_time():
    values = torch.randn(300)
    assert bootstrap(values, 1000, seed=5) == bootstrap(values, 1000, seed=5) != bootstrap(values, 1000, seed=6)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_interval_is_the_same_for_any_order_of_the_images(kind):
    values, _ = make_values(kind, 300, np.random.default_rng(4))
    orders = [torch.arange(300).flip(0), values.argsort(), *(torch.from_numpy(np.random.default_rng(i).permutation(300))
                                                           for i in range(5))]
    assert {bootstrap(values[order], 500) for order in orders} == {bootstrap(values, 500)}


def test_no_gain_has_no_width():
    assert bootstrap(torch.zeros(50)) == (0, 0, 0)


def test_compare_by_hand():
    ours = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    theirs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.3, 0.7]])
    found = compare(ours, theirs, torch.tensor([0, 0, 0, 0]))
    assert found["mcnemar"] == {"only_ours": 1, "only_theirs": 1, "p": 1}
    assert found["top1"]["gain"] == 0
    assert found["top1"]["low"] <= -50 and found["top1"]["high"] >= 50
    assert found["loss"]["gain"] == pytest.approx((math.log(0.8 / 0.4) + math.log(0.4 / 0.6)) / 4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 30, 200])
@pytest.mark.parametrize("probability", [0.75, 0.95, 0.975, 0.995])
def test_student_quantile_agrees_with_scipy(df, probability):
    assert student_quantile(probability, df) == pytest.approx(scipy.stats.t.ppf(probability, df), rel=1e-5)


def test_jackknife_of_a_mean_is_students_interval():
    values = np.array([3.0, 1.0, 4.0, 1.5, 5.0])
    (found,) = jackknife(lambda units: np.array([values[list(units)].mean()]), range(5))
    expected = scipy.stats.t.interval(0.95, 4, values.mean(), scipy.stats.sem(values))
    assert found == pytest.approx((values.mean(), *expected))


def test_jackknife_covers_the_mean_over_all_pairs():
    """Of E|a - b| for normal numbers, 2 / sqrt(pi), with overlapping pairs of 8 units."""
    random, hits = np.random.default_rng(4), 0
    for _ in range(500):
        x = random.normal(size=8)
        (interval,) = jackknife(lambda units, x=x: np.array(
            [np.mean([abs(x[i] - x[j]) for i, j in itertools.combinations(units, 2)])]), range(8))
        hits += interval.low <= 2 / math.sqrt(math.pi) <= interval.high
    assert 0.9 <= hits / 500 <= 0.99


def test_jackknife_has_no_interval_where_too_few_are_left():
    def pairs(units):
        return np.array([1.0]) if len(units) > 1 else None
    assert jackknife(pairs, [1, 2]) == [(1.0, None, None)]
