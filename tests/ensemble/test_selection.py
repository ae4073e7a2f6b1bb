"""Selection and weights against brute force over small pools."""
import itertools
import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.combine.selection import OBJECTIVES, beam, convex_weights, greedy


def pool(P=4, N=60, K=3, seed=0):
    """Probabilities (P, N, K) of candidates of unlike quality, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (N,), generator=generator)
    logits = 1.5 * torch.randn(P, N, K, generator=generator)
    logits[:, torch.arange(N), labels] += torch.rand(P, 1, generator=generator)
    return logits.softmax(dim=2), labels


def objective_of(members, probabilities, labels, objective):
    """What selection minimises, straight from its definition; accuracy with its tie-break."""
    mean = sum(probabilities[m].double() for m in members) / len(members)
    nll = sum(-math.log(row[y]) for row, y in zip(mean.tolist(), labels.tolist())) / len(labels)
    error = sum(max(range(len(row)), key=row.__getitem__) != y for row, y in zip(mean.tolist(), labels.tolist()))
    return nll if objective == "nll" else (error / len(labels), nll)


def first(score):
    return score[0] if isinstance(score, tuple) else score


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_every_step_of_greedy_is_the_best_step(objective, seed):
    probabilities, labels = pool(seed=seed)
    path = greedy(probabilities, labels, 5, objective).path
    members, scores = [], []
    for step in range(5):
        best = min(range(4), key=lambda p: objective_of([*members, p], probabilities, labels, objective))
        members.append(best)
        scores.append(objective_of(members, probabilities, labels, objective))
        assert path[step] == pytest.approx(first(scores[-1]), abs=1e-9)
    chosen = greedy(probabilities, labels, 5, objective).members
    shortest = min(range(5), key=lambda step: scores[step])
    assert chosen == sorted(members[:shortest + 1])


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_beam_of_full_width_finds_the_optimum(objective, seed):
    probabilities, labels = pool(seed=seed)
    every = [members for size in (1, 2, 3, 4) for members in itertools.combinations_with_replacement(range(4), size)]
    best = min(objective_of(members, probabilities, labels, objective) for members in every)
    found = beam(probabilities, labels, 4, len(every), objective).members
    ours = objective_of(found, probabilities, labels, objective)
    assert first(ours) == pytest.approx(first(best), abs=1e-9)
    if isinstance(best, tuple):
        assert ours[1] == pytest.approx(best[1], abs=1e-9)


def test_a_beam_beats_greedy_where_greed_fails():
    # Candidate 0 is the best alone; 1 and 2, each weaker, are right where the other errs and make the best pair.
    own = torch.tensor([[0.55, 0.55, 0.55, 0.55], [0.98, 0.98, 0.2, 0.2], [0.2, 0.2, 0.98, 0.98]])
    probabilities, labels = torch.stack([own, 1 - own], dim=2), torch.zeros(4, dtype=torch.int64)
    alone = [objective_of([p], probabilities, labels, "nll") for p in range(3)]
    assert min(alone) == alone[0]
    assert greedy(probabilities, labels, 2).members != [1, 2]
    assert beam(probabilities, labels, 2, 3).members == [1, 2]


def test_more_members_than_help_are_not_taken():
    own = torch.tensor([[0.9, 0.9], [0.1, 0.1]])
    selection = greedy(torch.stack([own, 1 - own], dim=2), torch.zeros(2, dtype=torch.int64), 5)
    assert selection.members == [0]
    assert selection.weights(2).tolist() == [1, 0]


def test_repeats_become_weights():
    selection = greedy(*pool(seed=3), 9)
    assert selection.weights(4).sum().item() == pytest.approx(1)
    assert selection.weights(4).tolist() == [selection.members.count(p) / len(selection.members) for p in range(4)]


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_convex_weights_are_the_optimum_that_scipy_finds(seed):
    probabilities, labels = pool(seed=seed)
    own = probabilities[:, torch.arange(60), labels].double().numpy()

    def nll(w):
        return -torch.tensor(w @ own).log().mean().item()

    found = scipy.optimize.minimize(nll, [0.25] * 4, method="SLSQP", bounds=[(0, 1)] * 4, options={"ftol": 1e-12},
                                    constraints={"type": "eq", "fun": lambda w: w.sum() - 1})
    w = convex_weights(probabilities, labels).numpy()
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    assert nll(w) == pytest.approx(found.fun, abs=2e-5)


def test_convex_weights_do_not_depend_on_the_order_of_the_pool():
    probabilities, labels = pool()
    order = torch.tensor([2, 0, 3, 1])
    expected = convex_weights(probabilities, labels)[order]
    torch.testing.assert_close(convex_weights(probabilities[order], labels), expected)
