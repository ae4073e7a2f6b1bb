"""How differently the members of a committee answer, and how unsure that makes it of an image.

Shape suffixes: M members, B images, C classes. Fractions, not percent; entropies in nats.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class Diversity(NamedTuple):
    """Means over all pairs of members, and what a perfect judge among the members would reach."""

    disagreement: float
    q_statistic: float | None
    oracle: float


class Uncertainty(NamedTuple):
    """Per image, (B,) float64 each: total = expected + mutual_information."""

    total: Tensor
    expected: Tensor
    mutual_information: Tensor


def diversity(answers_MB: Tensor, labels: Tensor) -> Diversity:
    """Of the members' classes (M, B) and the labels (B,).

    disagreement: the fraction of images that two members classify differently. Q-statistic of two members: (ad - bc) /
    (ad + bc), where a images both get right, d neither, b and c only one; 1 if they fail together, 0 if independently,
    -1 if never together. Pairs with 0/0 are left out of its mean, which is None if there is no other. oracle: the
    fraction of images that at least one member gets right. Kuncheva and Whitaker, 2003.
    """
    right = answers_MB == labels
    M, B = answers_MB.shape
    i, j = torch.triu_indices(M, M, offset=1)
    if len(i) == 0:
        return Diversity(0.0, None, right.any(dim=0).double().mean().item())
    disagreement = torch.stack([(answers_MB != answer).double().mean(dim=1) for answer in answers_MB])[i, j].mean()
    r = right.double()
    both = (r @ r.T)[i, j]
    alone_i, alone_j = r.sum(dim=1)[i] - both, r.sum(dim=1)[j] - both
    together, apart = both * (B - both - alone_i - alone_j), alone_i * alone_j
    defined = together + apart > 0
    q = ((together - apart) / (together + apart))[defined]
    return Diversity(disagreement.item(), q.mean().item() if len(q) else None, right.any(dim=0).double().mean().item())


def uncertainty(probabilities_MBC: Tensor, weights_M: Tensor | None = None) -> Uncertainty:
    """Entropy of the (weighted) mean of the members' probabilities, its part that every member has by itself (noise
    in the images), and its part that comes from their differing (ignorance of the networks). Depeweg et al., 2018.

    To the last bit the same in any order of the members; equal members have no mutual information at all.
    """
    p = probabilities_MBC.double()
    w = p.new_full((len(p),), 1 / len(p)) if weights_M is None else weights_M.to(p)
    total, expected = entropy(weighted_sum(p, w)), weighted_sum(entropy(p), w)
    return Uncertainty(total, expected, (total - expected).clamp_min(0))  # no less than 0 but for rounding


def weighted_sum(values: Tensor, weights_M: Tensor) -> Tensor:
    """The sum over members of `values` (M, ...) by weights that sum to 1, all float64.

    To the last bit the same in any order of the members, and the members' own value where all agree.
    """
    least = values.amin(dim=0)
    shares = weights_M.view(-1, *[1] * least.dim()) * (values - least)
    return least + ascending(shares).sum(dim=0)


def ascending(values: Tensor) -> Tensor:
    """`values` (M, ...) sorted over the members, so that their sum is the same, to the last bit, in any order of them.

    For a few members by exchanges of neighbours: torch.sort along the first of such dimensions takes ten times as long.
    A place where a member is NaN is NaN for some of the members.
    """
    if len(values) > 8:
        return values.sort(dim=0).values
    rows = list(values.unbind())
    for end in range(len(rows) - 1, 0, -1):
        for m in range(end):
            rows[m], rows[m + 1] = torch.minimum(rows[m], rows[m + 1]), torch.maximum(rows[m], rows[m + 1])
    return torch.stack(rows)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(dim=-1)
