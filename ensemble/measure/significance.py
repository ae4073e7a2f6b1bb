"""Whether a gain is more than luck: paired bootstrap over images, exact McNemar test, and intervals over seeds."""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble.measure.metrics import require_finite

SAMPLES = 10_000


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval; ends that cannot be had are None."""

    mean: float
    low: float | None
    high: float | None


class McNemar(NamedTuple):
    """How many images only one of two classifiers gets right, and how often chance divides them as unevenly."""

    only_ours: int
    only_theirs: int
    p: float


def bootstrap(values: Tensor, samples: int = SAMPLES, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of per-image `values` (N,) and its percentile bootstrap interval. Efron and Tibshirani, 1993.

    Pairing two classifiers means giving their differences image by image. A resample of N images is a multinomial
    count of the values that occur: differences of right and wrong have three, and need no list of images. Values are
    sorted first, so that the interval is the same for any order of the images.
    """
    values = np.sort(values.double().cpu().numpy())
    N, random = len(values), np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 64:
        means = random.multinomial(N, counts / N, size=samples) @ distinct / N
    else:
        narrow, chunk = np.min_scalar_type(N), max(1, 2_000_000 // N)  # small integers and blocks stay in the cache
        means = np.concatenate([
            values[random.integers(N, size=(min(chunk, samples - start), N), dtype=narrow)].mean(axis=1)
            for start in range(0, samples, chunk)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(values.mean().item(), low.item(), high.item())


def mcnemar(ours_right: Tensor, theirs_right: Tensor) -> McNemar:
    """The exact two-sided test of two classifiers on the same images; (N,) bool, which images each gets right.

    Images that both or neither get right say nothing; of the n others, the k that the weaker one gets right are
    binomial with probability 1/2 if there is no difference: p = 2 P(X <= k), at most 1. McNemar, 1947.
    """
    only_ours = (ours_right & ~theirs_right).sum().item()
    only_theirs = (theirs_right & ~ours_right).sum().item()
    n, term, total = only_ours + only_theirs, 1, 0
    for i in range(min(only_ours, only_theirs) + 1):
        total += term                      # integers: sum_(i <= k) n over i is exact
        term = term * (n - i) // (i + 1)
    return McNemar(only_ours, only_theirs, min(1.0, 2 * total / 2**n))


def compare(ours: Tensor, theirs: Tensor, labels: Tensor, samples: int = SAMPLES, seed: int = 0) -> dict:
    """What `ours` (N, K) gains over `theirs` (N, K), two sets of probabilities of the same images.

    Returns {top1, loss: {gain, low, high}, mcnemar: {only_ours, only_theirs, p}}: 95 % intervals, top1 in percentage
    points, loss in nats; gains are positive where ours is better. Raises InputError for probabilities
    that are not finite.
    """
    require_finite(torch.stack([ours, theirs]))
    ours_right, theirs_right = (p.argmax(dim=1) == labels for p in (ours, theirs))
    losses = [-p.double().gather(1, labels[:, None])[:, 0].clamp_min(torch.finfo(torch.float64).tiny).log()
              for p in (ours, theirs)]
    gains = {"top1": 100 * (ours_right.double() - theirs_right.double()), "loss": losses[1] - losses[0]}
    intervals = {name: bootstrap(values, samples, seed=seed) for name, values in gains.items()}
    return {name: {"gain": i.mean, "low": i.low, "high": i.high} for name, i in intervals.items()} | {
        "mcnemar": mcnemar(ours_right, theirs_right)._asdict()}


def jackknife(statistic: Callable[[Sequence], np.ndarray | None], units: Sequence, level: float = 0.95
              ) -> list[Interval]:
    """Intervals of each number in `statistic(units)` over the random choice of `units`, such as seeds.

    Every unit is left out once. The pseudo-values n s(all) - (n - 1) s(all but one) count as independent, which holds
    for means over all subsets of the units (U-statistics), however much the subsets overlap: Arvesen, 1969. Student's
    t with n - 1 degrees of freedom gives the ends, None where fewer units than `statistic` has use for are left.
    """
    whole, n = np.asarray(statistic(units), dtype=float), len(units)
    without = [statistic([*units[:i], *units[i + 1:]]) for i in range(n)]
    if n < 2 or any(part is None for part in without):
        return [Interval(value, None, None) for value in whole.tolist()]
    pseudo = n * whole - (n - 1) * np.asarray(without, dtype=float)
    reach = student_quantile((1 + level) / 2, n - 1) * pseudo.std(axis=0, ddof=1) / math.sqrt(n)
    return [Interval(*ends) for ends in zip(whole.tolist(), (whole - reach).tolist(), (whole + reach).tolist())]


def student_quantile(probability: float, df: int) -> float:
    """The quantile of Student's t, for probabilities from 0.5 to 1.

    With t = sqrt(df) tan(u), the density is proportional to cos(u)^(df - 1) on [0, pi / 2], and smooth.
    """
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        u = np.linspace(0, middle, 2001)
        mass = scale * np.trapezoid(np.cos(u) ** (df - 1), u)
        low, high = (middle, high) if 0.5 + mass < probability else (low, middle)
    return math.sqrt(df) * math.tan(low)
