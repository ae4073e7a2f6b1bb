"""Metrics against scikit-learn, torchmetrics and cases worked out by hand."""
import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from ensemble.combine import committee
from ensemble.measure import metrics


@pytest.fixture(params=[(2, 1), (4, 0.3), (10, 3), (100, 2)], ids=lambda p: f"K={p[0]}")
def case(request):
    """Probabilities (1000, K), between unsure and very sure, and labels that they favour."""
    K, scale = request.param
    generator = torch.Generator().manual_seed(K)
    labels = torch.randint(K, (1000,), generator=generator)
    logits = scale * torch.randn(1000, K, generator=generator, dtype=torch.float64)
    logits[torch.arange(1000), labels] += scale
    return logits.softmax(dim=1), labels


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_accuracy_agrees_with_scikit_learn(case, k):
    probabilities, labels = case
    K = probabilities.shape[1]
    if k < K:
        scores = probabilities[:, 1] if K == 2 else probabilities
        expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(K))
        assert metrics.topk_accuracy(probabilities, labels, k) == expected
    else:
        assert metrics.topk_accuracy(probabilities, labels, k) == 1


def test_topk_accuracy_of_equal_probabilities_prefers_the_first_class():
    flat = torch.full((4, 4), 0.25)
    assert [metrics.topk_accuracy(flat, torch.arange(4), k) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1, 1]


def test_nll_agrees_with_scikit_learn(case):
    probabilities, labels = case
    expected = sklearn.metrics.log_loss(labels, probabilities, labels=range(probabilities.shape[1]))
    assert metrics.nll(probabilities, labels) == pytest.approx(expected, rel=1e-12)


def test_nll_of_an_impossible_label_is_finite():
    assert metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(708.4, abs=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_softmax_of_a_row_that_is_not_finite_is_nan(value):
    """Of minus infinity it would be a 0 that looks like an answer; so no rule of a committee answers there."""
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    logits[1, 2, 3] = value
    assert metrics.softmax(logits).isnan().all(dim=2).nonzero().tolist() == [[1, 2]]
    for rule in committee.COMBINATIONS.values():
        assert rule(logits).isnan().all(dim=1).tolist() == [False, False, True, False]


def test_brier_agrees_with_scikit_learn_summed_over_classes(case):
    probabilities, labels = case
    expected = sum(sklearn.metrics.brier_score_loss(labels == k, p) for k, p in enumerate(probabilities.T))
    assert metrics.brier(probabilities, labels) == pytest.approx(expected, rel=1e-12)


def test_ece_agrees_with_torchmetrics(case):
    probabilities, labels = case
    expected = multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=15, norm="l1")
    assert metrics.ece(probabilities, labels) == pytest.approx(expected.item(), abs=1e-6)


def test_ece_by_hand():
    # confidences 0.8, 0.8 (one right), 0.5 (right) with 2 bins: (1/2, 1] holds two, (0, 1/2] holds one
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0])
    assert metrics.ece(probabilities, labels, bins=2) == pytest.approx((2 * abs(0.8 - 0.5) + abs(0.5 - 1)) / 3)
    assert metrics.ece(probabilities, labels, bins=1) == pytest.approx(abs(2.1 / 3 - 2 / 3))


def test_ece_of_certain_and_right_is_zero():
    assert metrics.ece(torch.eye(3), torch.arange(3)) == metrics.adaptive_ece(torch.eye(3), torch.arange(3)) == 0


def test_adaptive_ece_agrees_with_a_loop(case):
    probabilities, labels = (x.numpy() for x in case)
    order = np.argsort(probabilities.max(axis=1))
    expected = 0.0
    for part in np.array_split(order, 15):
        accuracy = np.mean(probabilities[part].argmax(axis=1) == labels[part])
        expected += len(part) / len(labels) * abs(accuracy - probabilities[part].max(axis=1).mean())
    assert metrics.adaptive_ece(*case) == pytest.approx(expected, rel=1e-9)


def test_adaptive_ece_with_fewer_images_than_bins_is_the_mean_gap():
    probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3]], dtype=torch.float64)
    assert metrics.adaptive_ece(probabilities, torch.tensor([0, 1])) == pytest.approx((0.1 + 0.7) / 2)


def test_confusion_matrix_agrees_with_scikit_learn(case):
    probabilities, labels = case
    expected = sklearn.metrics.confusion_matrix(labels, probabilities.argmax(1), labels=range(probabilities.shape[1]))
    assert metrics.confusion_matrix(probabilities, labels).tolist() == expected.tolist()


def test_confusion_matrix_rows_are_true_classes():
    said_two = torch.tensor([[0.1, 0.2, 0.7]])
    assert metrics.confusion_matrix(said_two, torch.tensor([0])).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_per_class_accuracy_agrees_with_torchmetrics(case):
    probabilities, labels = case
    expected = multiclass_accuracy(probabilities, labels, probabilities.shape[1], average="none")
    torch.testing.assert_close(metrics.per_class_accuracy(probabilities, labels), expected.double(), atol=1e-6, rtol=0)


def test_per_class_accuracy_of_an_absent_class_is_nan():
    first, second = metrics.per_class_accuracy(torch.tensor([[0.9, 0.1]]), torch.tensor([0])).tolist()
    assert first == 1
    assert math.isnan(second)


def tied(N=450, levels=5, seed=0):
    """Probabilities (N, 3) of few distinct confidences, and labels that they miss often, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    sure = 0.4 + 0.1 * torch.randint(levels, (N,), generator=generator).double()
    rest = (1 - sure) / 2
    labels = torch.randint(3, (N,), generator=generator).sort().values
    said = torch.where(torch.rand(N, generator=generator) < 0.6, labels, (labels + 1) % 3)
    return rest[:, None].expand(-1, 3).scatter(1, said[:, None], sure[:, None]), labels


def orders(N, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.arange(N), torch.arange(N).flip(0), *(torch.randperm(N, generator=generator) for _ in range(count))]


@pytest.mark.parametrize("measure", [metrics.adaptive_ece, metrics.ece, lambda p, y: metrics.ece(p, y, 10)])
@pytest.mark.parametrize("probabilities, labels", [
    tied(), tied(levels=1), tied(N=20, levels=2), (torch.full((60, 4), 0.25), torch.arange(60) % 4),
    (torch.randn(300, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=1), torch.arange(300) % 10)])
def test_calibration_errors_are_equal_for_all_orders_of_the_images(measure, probabilities, labels):
    assert len({measure(probabilities[order], labels[order]) for order in orders(len(labels), 50)}) == 1


def test_adaptive_ece_of_ties_is_that_of_bins_averaged_over_all_orders():
    """By brute force: 7 images of 3 confidences in 3 bins, every order, the bins cut anew each time."""
    sure = np.array([0.9, 0.6, 0.6, 0.6, 0.6, 0.7, 0.6])
    right = np.array([True, True, False, True, True, False, False])
    sums = []
    for order in itertools.permutations(range(7)):
        ranked = sorted(order, key=lambda i: sure[i])
        sums.append([sum(sure[i] - right[i] for i in part) for part in np.array_split(ranked, 3)])
    expected = np.abs(np.mean(sums, axis=0)).sum() / 7
    assert len({np.abs(row).sum().round(9) for row in sums}) > 1  # the order of ties mattered
    probabilities = torch.tensor(np.stack([sure, 1 - sure], axis=1))
    found = metrics.adaptive_ece(probabilities, torch.tensor(~right).long(), bins=3)
    assert found == pytest.approx(expected, rel=1e-12)


def test_confidences_that_differ_by_rounding_are_equal():
    """Softmax sums in the order of the classes, so that equal logits in another order may differ in the last bit."""
    rows = torch.tensor(list(itertools.permutations([2.0, 0.3, -1.0, 0.7])), dtype=torch.float64)
    probabilities = metrics.softmax(rows.repeat(20, 1))
    labels = torch.where(torch.arange(480) % 3 == 0, probabilities.argmax(dim=1), (probabilities.argmax(dim=1) + 1) % 4)
    sure = probabilities.amax(dim=1)
    assert len(set(sure.tolist())) > 1 and sure.std() < 1e-15
    expected = abs(sure.mean().item() - 1 / 3)  # one group: all bins alike
    assert metrics.adaptive_ece(probabilities, labels) == pytest.approx(expected, rel=1e-9)
    assert metrics.ece(probabilities, labels) == pytest.approx(expected, rel=1e-9)


def test_a_confidence_at_an_edge_is_in_the_lower_bin_however_it_was_rounded():
    for edge in torch.arange(1, 15, dtype=torch.float64) / 15:
        around = torch.stack([edge, edge.nextafter(edge + 1), edge.nextafter(edge - 1)])
        assert len(set(metrics.bin_numbers(around, 15).tolist())) == 1
        assert metrics.bin_numbers(edge[None], 15).item() == round(15 * edge.item()) - 1
        assert metrics.bin_numbers(edge[None] + 1e-9, 15).item() == round(15 * edge.item())
