"""Measures of probabilities against labels, all computed in float64.

Everywhere: `probabilities` (N, K) with rows that sum to 1, `labels` (N,) int64 in [0, K); p_nk is the probability of
class k for image n, y_n its label. Accuracies and errors are fractions, not percent.
"""
import torch
from torch import Tensor

from conas.scores import topk_accuracy

__all__ = ["adaptive_ece", "brier", "confusion_matrix", "ece", "nll", "per_class_accuracy", "softmax",
           "topk_accuracy"]


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in float64. torch's own takes several times as long for rows of a few classes."""
    logits = logits.double()
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=-1, keepdim=True))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood in nats: the mean of -log p_(n, y_n).

    A probability below the smallest normal float64 counts as that: ruling a label out costs 708 nats, not infinity.
    """
    own = probabilities.double().gather(1, labels[:, None])
    return -own.clamp_min(torch.finfo(torch.float64).tiny).log().mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: the mean over images of sum_k (p_nk - [k = y_n])^2, from 0 to 2. Brier, 1950."""
    errors = probabilities.double() - torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return errors.square().sum(dim=1).mean().item()


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: sum_b (n_b / N) |accuracy_b - confidence_b| over bins of equal width.

    Confidence is the largest p_nk; bin b of B holds those in ((b-1)/B, b/B]. Guo et al., 2017, equation 3.
    """
    gap, confidence = _overconfidence(probabilities, labels)
    edges = torch.arange(1, bins, dtype=torch.float64, device=gap.device) / bins
    sums = gap.new_zeros(bins).index_add(0, torch.bucketize(confidence, edges), gap)
    return (sums.abs().sum() / len(gap)).item()


def adaptive_ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The sum of `ece` over bins of equal size: images by confidence, cut into `bins` parts that differ by at most one.

    Equal confidences keep the order of their images. Nguyen and O'Connor, 2015; Mukhoti et al., 2020.
    """
    gap, confidence = _overconfidence(probabilities, labels)
    parts = gap[confidence.argsort(stable=True)].tensor_split(bins)
    return (torch.stack([part.sum() for part in parts]).abs().sum() / len(gap)).item()


def _overconfidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) confidence minus correctness, and (N,) confidence."""
    confidence = probabilities.double().amax(dim=1)
    return confidence - (probabilities.argmax(dim=1) == labels).double(), confidence


def confusion_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(K, K) int64: how many images of class i (rows) have their most probable class j (columns)."""
    K = probabilities.shape[1]
    return torch.bincount(labels * K + probabilities.argmax(dim=1), minlength=K * K).view(K, K)


def per_class_accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(K,) float64: the fraction of each class's images that are recognised (its recall); NaN for a class without."""
    matrix = confusion_matrix(probabilities, labels).double()
    return matrix.diagonal() / matrix.sum(dim=1)
