"""Measures of probabilities against labels, all computed in float64.

Everywhere: `probabilities` (N, K) with rows that sum to 1, `labels` (N,) int64 in [0, K); p_nk is the probability of
class k for image n, y_n its label. Accuracies and errors are fractions, not percent. An image for which a probability
is NaN or infinite is wrong, has no place in a confusion matrix, and makes every mean of losses NaN.
"""
import math

import torch
from torch import Tensor

from conas.errors import InputError
from conas.runs.scores import finite_rows, is_right, remark, topk_accuracy

__all__ = ["adaptive_ece", "bin_numbers", "brier", "confusion_matrix", "ece", "nll", "per_class_accuracy",
           "require_finite", "softmax", "topk_accuracy"]


ROUNDING = 2.0**-40  # confidences that differ by less are equal


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in float64, NaN for rows that are not finite, also where only a -inf is in them.

    torch's own takes several times as long for rows of a few classes.
    """
    logits = logits.double()
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=-1, keepdim=True)).masked_fill_(~finite_rows(logits)[..., None], math.nan)


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood in nats: the mean of -log p_(n, y_n).

    A probability below the smallest normal float64 counts as that: ruling a label out costs 708 nats, not infinity.
    """
    own = probabilities.double().gather(1, labels[:, None])[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
    return -_or_nan(own.log(), probabilities).mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: the mean over images of sum_k (p_nk - [k = y_n])^2, from 0 to 2. Brier, 1950."""
    errors = probabilities.double() - torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return _or_nan(errors.square().sum(dim=1), probabilities).mean().item()


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: sum_b (n_b / N) |accuracy_b - confidence_b| over bins of equal width.

    Confidence is the largest p_nk; bin b of B holds those in ((b-1)/B, b/B]. Guo et al., 2017, equation 3.
    """
    gap, confidence = _by_confidence(*_overconfidence(probabilities, labels))
    sums = gap.new_zeros(bins).index_add(0, bin_numbers(confidence, bins), gap)
    return (sums.abs().sum() / len(gap)).item()


def bin_numbers(confidence: Tensor, bins: int) -> Tensor:
    """(N,) int64: of B bins of equal width, the one that each confidence (N,) is in, from 0; edges are of the lower."""
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    return torch.bucketize(confidence.double(), edges + ROUNDING)


def adaptive_ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The sum of `ece` over bins of equal size: images by confidence, cut into `bins` parts that differ by at most one.

    Images of equal confidence share their gap evenly, wherever a cut divides them. So each part holds what it would
    hold on average over all their orders, and the order of the images does not matter. Nguyen and O'Connor, 2015;
    Mukhoti et al., 2020.
    """
    gap, _ = _by_confidence(*_overconfidence(probabilities, labels))
    return (torch.stack([part.sum() for part in gap.tensor_split(bins)]).abs().sum() / len(gap)).item()


def _by_confidence(gap: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Both (N,) by ascending confidence; the gaps of equal confidences are replaced by their mean.

    The result is the same, to the last bit, for any order of the images.
    """
    order = gap.argsort()
    order = order[confidence[order].argsort(stable=True)]
    gap, confidence = gap[order], confidence[order]
    group = torch.cat([order.new_zeros(1), (confidence.diff() > ROUNDING).cumsum(0)])
    sums = gap.new_zeros(len(gap)).index_add(0, group, gap)
    return (sums / torch.bincount(group, minlength=len(gap)))[group], confidence


def _overconfidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) confidence minus correctness, and (N,) confidence."""
    confidence = _or_nan(probabilities.double().amax(dim=1), probabilities)
    return confidence - is_right(probabilities, labels).double(), confidence


def require_finite(predictions_MNK: Tensor) -> None:
    """Raise InputError naming, by its place, a member some of whose predictions are not finite."""
    for m, count in enumerate((~finite_rows(predictions_MNK)).sum(dim=1).tolist()):
        if count:
            raise InputError(f"member {m + 1} of {len(predictions_MNK)}: {remark(count, predictions_MNK.shape[1])}, "
                             "and nothing can be fitted to them or tested; leave it out")


def _or_nan(values: Tensor, probabilities: Tensor) -> Tensor:
    """`values` (N,) of images, NaN for those whose probabilities (N, K) are not all finite."""
    return values.masked_fill(~finite_rows(probabilities), math.nan)


def confusion_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(K, K) int64: how many images of class i (rows) have their most probable class j (columns)."""
    K, answered = probabilities.shape[1], finite_rows(probabilities)
    fields = labels[answered] * K + probabilities[answered].argmax(dim=1)
    return torch.bincount(fields, minlength=K * K).view(K, K)


def per_class_accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(K,) float64: the fraction of each class's images that are recognised (its recall); NaN for a class without."""
    counts = torch.bincount(labels, minlength=probabilities.shape[1]).double()
    return confusion_matrix(probabilities, labels).diagonal() / counts
