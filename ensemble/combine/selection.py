"""Choose and weigh members by what they say of held-out images. Nothing here may see the images of the test.

Shape suffixes: P candidates in the pool, N held-out images, K classes.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble.measure.metrics import require_finite

OBJECTIVES = "nll", "accuracy"
TOLERANCE = 1e-5  # nats by which the NLL of convex weights may be above the lowest


@dataclass
class Selection:
    """The chosen candidates, by index, with repeats; and the best score of each size from 1 on, lower being better."""

    members: list[int]
    path: list[float]

    def weights(self, pool: int) -> Tensor:
        """(P,) float64: each candidate's share."""
        return torch.bincount(torch.tensor(self.members), minlength=pool).double() / len(self.members)


def greedy(probabilities_PNK: Tensor, labels: Tensor, size: int, objective: str = "nll") -> Selection:
    """Ensemble selection with replacement: Caruana et al., 2004, section 2.

    Starting from nothing, each step adds the candidate, old or new, with which the mean of probabilities scores best;
    the best of the first `size` committees wins, the smaller of equals, and of equal candidates the first. Their start
    with the best N candidates and their bags of candidates are left out: both guard against overfitting small held-out
    sets, and ours are large.
    """
    return beam(probabilities_PNK, labels, size, 1, objective)


def beam(probabilities_PNK: Tensor, labels: Tensor, size: int, width: int, objective: str = "nll") -> Selection:
    """Like `greedy`, but the `width` best committees of every size are extended. A width that holds all of them finds
    the best committee of at most `size` members, repeats allowed.

    `objective` "nll" is the mean of -log p_(n, y_n); "accuracy" is the error, and where that is equal the lower nll.
    Memory and time grow with width * P * N, for accuracy with width * P * N * K. Raises InputError for a candidate some
    of whose probabilities are not finite: no committee with it has a score.
    """
    require_finite(probabilities_PNK)
    P, N, _ = probabilities_PNK.shape
    own_PN = probabilities_PNK.gather(2, labels.expand(P, N)[..., None])[..., 0].double()
    by_class = probabilities_PNK if objective == "accuracy" else None
    committees, best, path = {(): (own_PN.new_zeros(N), None)}, None, []
    for step in range(1, size + 1):
        scored = {}
        for chosen, (own_N, sum_NK) in committees.items():
            loss_P = _mean_log(own_PN + own_N, step)
            error_P = _errors(by_class, sum_NK, labels) if by_class is not None else None
            for p in range(P):
                key = tuple(sorted((*chosen, p)))
                score = (loss_P[p],) if error_P is None else (error_P[p], loss_P[p])
                if key not in scored or score < scored[key][0]:  # the same committee, reached in another order
                    scored[key] = (score, chosen, p)
        ranked = sorted(scored.items(), key=lambda item: (item[1][0], item[0]))[:width]
        path.append(ranked[0][1][0][0])
        if best is None or ranked[0][1][0] < best[1]:
            best = ranked[0][0], ranked[0][1][0]
        committees = {key: _extend(committees[chosen], own_PN[p], by_class[p] if by_class is not None else None)
                      for key, (_, chosen, p) in ranked}
    return Selection(list(best[0]), path)


def _mean_log(sums_PN: Tensor, count: int) -> list[float]:
    tiny = torch.finfo(torch.float64).tiny
    return (-(sums_PN / count).clamp_min(tiny).log().mean(dim=1)).tolist()


def _errors(probabilities_PNK: Tensor, sum_NK: Tensor | None, labels: Tensor) -> list[float]:
    """The error of each candidate joined to a committee, candidate by candidate: the pool may be large."""
    return [1 - ((p if sum_NK is None else p + sum_NK).argmax(dim=1) == labels).double().mean().item()
            for p in probabilities_PNK]


def _extend(sums: tuple[Tensor, Tensor | None], own_N: Tensor, by_class_NK: Tensor | None
            ) -> tuple[Tensor, Tensor | None]:
    if by_class_NK is None:
        return sums[0] + own_N, None
    return sums[0] + own_N, by_class_NK.double() if sums[1] is None else sums[1] + by_class_NK


def convex_weights(probabilities_PNK: Tensor, labels: Tensor, tolerance: float = TOLERANCE, steps: int = 2000
                   ) -> Tensor:
    """(P,) float64: weights, at least 0 and with sum 1, whose mean of probabilities has the lowest NLL.

    Expectation maximisation: w_p becomes w_p g_p, with g_p = mean_n p_pn / (sum_q w_q p_qn) for the probabilities of
    the labels. The NLL is convex in w and no weights have one lower by more than log(max_p g_p) (Lindsay, 1983), so the
    steps end once that is below `tolerance` nats, or after `steps`: `weights_gap` tells. Raises InputError as `beam`
    does.
    """
    require_finite(probabilities_PNK)
    own_PN = _own(probabilities_PNK, labels)
    w = own_PN.new_full((len(own_PN),), 1 / len(own_PN))
    for _ in range(steps):
        g = _gradient(w, own_PN)
        if g.max().log() < tolerance:
            break
        w = w * g
    return w / w.sum()


def weights_gap(weights_P: Tensor, probabilities_PNK: Tensor, labels: Tensor) -> float:
    """How many nats the NLL of these weights is above the lowest at most: log(max_p g_p) of `convex_weights`."""
    return _gradient(weights_P, _own(probabilities_PNK, labels)).max().log().item()


def _own(probabilities_PNK: Tensor, labels: Tensor) -> Tensor:
    """(P, N) float64: the probabilities of the labels, none of them 0."""
    own_PN = probabilities_PNK.gather(2, labels.expand(probabilities_PNK.shape[:2])[..., None])[..., 0].double()
    return own_PN.clamp_min(torch.finfo(torch.float64).tiny)


def _gradient(weights_P: Tensor, own_PN: Tensor) -> Tensor:
    return own_PN @ (1 / (weights_P @ own_PN)) / own_PN.shape[1]
