"""Diversity and uncertainty: cases by hand, and scipy's entropy."""
import itertools

import pytest
import scipy.stats
import torch

from ensemble.measure.diversity import ascending, diversity, uncertainty


def test_by_hand():
    # right: a 1 1 1 0, b 1 0 0 1, c 0 1 0 0; they say different wrong classes on the last two images
    labels = torch.zeros(4, dtype=torch.int64)
    answers = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 2, 2]])
    found = diversity(answers, labels)
    # pairs differ on: ab images 1 2 3; ac 0 2 3; bc 0 1 2 3
    assert found.disagreement == pytest.approx((3 + 3 + 4) / 12)
    # Q: ab (1 * 0 - 2 * 1) / (1 * 0 + 2 * 1) = -1; ac (1 * 1 - 2 * 0) / 1 = 1; bc (0 * 1 - 2 * 1) / 2 = -1
    assert found.q_statistic == pytest.approx(-1 / 3)
    assert found.oracle == 1


def test_agrees_with_loops_over_pairs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    answers = torch.where(torch.rand(5, 200, generator=generator) < 0.6, labels,
                          torch.randint(3, (5, 200), generator=generator))
    disagreements, qs = [], []
    for a, b in itertools.combinations(answers.tolist(), 2):
        disagreements.append(sum(x != y for x, y in zip(a, b)) / 200)
        n = {(i, j): sum((x == t) == i and (y == t) == j for x, y, t in zip(a, b, labels.tolist()))
             for i in (True, False) for j in (True, False)}
        together, apart = n[True, True] * n[False, False], n[True, False] * n[False, True]
        qs.append((together - apart) / (together + apart))
    found = diversity(answers, labels)
    assert found.disagreement == pytest.approx(sum(disagreements) / 10)
    assert found.q_statistic == pytest.approx(sum(qs) / 10)
    assert found.oracle == sum(any(a[i] == t for a in answers.tolist()) for i, t in enumerate(labels.tolist())) / 200


def test_identical_members_do_not_differ():
    answers = torch.tensor([[0, 1, 1]]).expand(3, -1)
    assert diversity(answers, torch.tensor([0, 1, 0])) == (0, 1, pytest.approx(2 / 3))


def test_q_is_none_where_it_says_nothing():
    assert diversity(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)).q_statistic is None
    assert diversity(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)).q_statistic is None


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
def test_uncertainty_agrees_with_scipy(weights):
    p = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=2)
    w = [1 / 3] * 3 if weights is None else weights
    found = uncertainty(p, None if weights is None else torch.tensor(weights))
    mean = sum(w_m * p_m.double() for w_m, p_m in zip(w, p))
    torch.testing.assert_close(found.total, torch.tensor(scipy.stats.entropy(mean, axis=1)), atol=1e-6, rtol=0)
    expected = sum(w_m * scipy.stats.entropy(p_m.double(), axis=1) for w_m, p_m in zip(w, p))
    torch.testing.assert_close(found.expected, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mutual_information, found.total - found.expected, atol=1e-6, rtol=0)


def test_certain_members_that_differ_are_all_mutual_information():
    found = uncertainty(torch.eye(2)[:, None, :])
    assert found.total.item() == found.mutual_information.item() == pytest.approx(0.693147, abs=1e-6)
    assert found.expected.item() == 0
    assert uncertainty(torch.eye(2)[:1, None, :]).total.item() == 0


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.15, 0.05]])
def test_uncertainty_is_the_same_in_any_order_of_the_members_and_nothing_between_equal_ones(weights):
    p = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(2)).double().softmax(dim=2)
    w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    first = uncertainty(p, w)
    for order in itertools.permutations(range(4)):
        other = uncertainty(p[list(order)], None if w is None else w[list(order)])
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    same = uncertainty(p[:1].expand(4, -1, -1), w)
    assert (same.mutual_information == 0).all() and torch.equal(same.total, uncertainty(p[:1]).total)


@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 9])
def test_members_in_order_are_what_sort_says(M):
    values = torch.randn(M, 50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(M))
    values[:, 7] = values[0, 7].clone()
    values[-1, 3, 2] = -torch.inf
    assert torch.equal(ascending(values), values.sort(dim=0).values)
