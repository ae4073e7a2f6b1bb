"""When a search collapses: skip connections take over its normal cell, and networks of that cell train to little.

The rule projects how many skip connections the normal cell will end with, and calls a search collapsing as soon as that
number rounds to 4 of its 8 edges. After epoch t of T, with

    s      skip connections in the derived normal cell, mean of the last 6 % of the epochs
    s_min  the lowest such mean so far
    r      growth of the curvature: the dominant eigenvalue of the Hessian of the validation loss w.r.t. the alphas
           (arXiv:1909.09656), geometric mean of the last fifth of the epochs over that of the first fifth; at least 1
    f      (T - 1 - t) / T, the part of the search that is to come

it is collapsing from the first epoch in which t >= T / 5 and

    s + 0.6 f (s - s_min + s ln r) > 3.5

Windows are parts of the search, skips are compared with skips and eigenvalues with eigenvalues: neither the number of
epochs nor the scale of the loss matters. Only the gain, 0.6, was fitted: docs/health.md has the table, beside two other
rules.
"""
import math
from collections.abc import Mapping, Sequence
from statistics import mean

GAIN = 0.6
LIMIT = 3.5             # projected skip connections: rounds to 4
MOST_SKIPS = 3          # that a normal cell has which is called sound
SHORT, LONG = 0.06, 0.2  # windows of skips and of eigenvalues, as parts of the search
FEWEST_VALUES = 3       # of eigenvalues in a window, below which their growth is unknown
FEWEST_EPOCHS = 10      # of a search that can be judged
SETTLED = 2             # epochs from 0 whose skips say nothing: the alphas are as good as equal


def projected_skips(skips: Sequence[float], curvature: Mapping[int, float], epochs: int, gain: float = GAIN
                    ) -> list[float]:
    """The left side of the rule after each epoch of a search of `epochs`; NaN in the first fifth of them.

    `skips` are by epoch from 0; `curvature` has eigenvalues of whichever sign by epoch, of which those that are 0, NaN
    or infinite are left out.
    """
    logs = {epoch: math.log(abs(value)) for epoch, value in curvature.items() if usable(value)}
    width, lowest, projected = max(1, round(SHORT * epochs)), math.inf, []
    for epoch in range(len(skips)):
        recent = skips[max(0, epoch + 1 - width):epoch + 1]
        level = sum(recent) / len(recent)
        if epoch + 1 - width >= SETTLED:
            lowest = min(lowest, level)
        to_come = max(0, epochs - 1 - epoch) / epochs
        rise = max(0, level - lowest) + level * max(0, _log_growth(logs, epoch, epochs))
        projected.append(level + gain * to_come * rise if epoch >= LONG * epochs else math.nan)
    return projected


def usable(eigenvalue: float) -> bool:
    """Whether an eigenvalue has a logarithm."""
    return math.isfinite(eigenvalue) and eigenvalue != 0


def _log_growth(logs: Mapping[int, float], epoch: int, epochs: int) -> float:
    """ln r; 0 where too few eigenvalues are known."""
    first = [value for at, value in logs.items() if at < LONG * epochs and at <= epoch]
    last = [value for at, value in logs.items() if epoch - LONG * epochs < at <= epoch]
    if min(len(first), len(last)) < FEWEST_VALUES:
        return 0.0
    return sum(last) / len(last) - sum(first) / len(first)


def collapsing_from(skips: Sequence[float], curvature: Mapping[int, float], epochs: int, gain: float = GAIN
                    ) -> int | None:
    """The first epoch in which the rule calls a search of `epochs` collapsing; None if it calls it sound.

    Arguments are as of `projected_skips`. A search of fewer than FEWEST_EPOCHS is never called collapsing.
    """
    if epochs < FEWEST_EPOCHS:
        return None
    projected = projected_skips(skips, curvature, epochs, gain)
    return next((epoch for epoch, value in enumerate(projected) if value > LIMIT), None)


def sound_epoch(skips: Sequence[float], collapsing: int) -> int | None:
    """The epoch whose cell to take instead: the last up to `collapsing` with at most MOST_SKIPS; None without one."""
    return next((epoch for epoch in range(collapsing, -1, -1) if skips[epoch] <= MOST_SKIPS), None)


def published_stop(curvature: Mapping[int, float]) -> tuple[int, int] | None:
    """The early stopping of RobustDARTS (arXiv:1909.09656, section 5.1): the epoch in which it stops a search, and the
    one whose cell it takes. None if it does not stop.

    It stops from epoch 10 on when the mean of 5 eigenvalues exceeds 1.3 times that of the 5 up to four values before,
    and takes the cell of that value. It was published for eigenvalues of every second epoch.
    """
    epochs, values = list(curvature), [abs(value) for value in curvature.values()]
    for index in range(4, len(values)):
        earlier = values[max(0, index - 8):index - 3]
        if epochs[index] >= 10 and mean(values[index - 4:index + 1]) > 1.3 * mean(earlier):
            return epochs[index], epochs[index - 4]
    return None
