"""Metrics against scikit-learn, torchmetrics and cases worked out by hand."""
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from ensemble import metrics


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
