"""Temperatures: one number for each classifier that makes its probabilities as sure as it is right."""
import torch
from torch import Tensor

from ensemble.measure.metrics import require_finite, softmax

RANGE = 0.01, 100.0
FLAT = 1e-3  # nats: a loss that varies by less over all of RANGE says nothing about the temperature
ROUNDING = 8 * torch.finfo(torch.float32).eps  # logits of an image that differ by less, relative to them, are equal


def fit_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) float64: for each member of (M, N, K) logits, the T in RANGE where softmax(logits / T) has the lowest NLL.

    Log-probabilities do as well as logits. The NLL is convex in 1/T, so bisection on its derivative
    d NLL / d(1/T) = mean_n (sum_k p_nk z_nk - z_(n, y_n)) finds the minimum, here to eight digits. Where the NLL has
    its minimum beyond RANGE, or falls for ever as T grows, T is that end of RANGE, exactly: `bound` names it. T = 1
    where nothing is to be learned: for a member whose NLL varies by less than FLAT over RANGE, as that of equal logits
    does, and for one whose label is best, alone or tied, on every image. The NLL of the latter would fall for ever as T
    goes to 0, and one wrong answer on another image would cost more than all that. Fit on images whose labels trained
    neither network nor weights. Guo et al., 2017, section 4.2. Raises InputError for a member some of whose logits are
    not finite.
    """
    require_finite(logits)
    z = logits.double()
    largest = z.amax(dim=2, keepdim=True)
    spread, size = largest - z.amin(dim=2, keepdim=True), z.abs().amax(dim=2, keepdim=True)
    z = torch.where(spread <= ROUNDING * size, 0.0, z - largest)
    own_MN = z.gather(2, labels.expand(len(z), -1)[..., None])[..., 0]
    own = own_MN.mean(dim=1)

    def too_cold(T_M: Tensor) -> Tensor:
        """Return True if members are more confident than right at these temperatures: higher ones lower the NLL."""
        return (softmax(z / T_M[:, None, None]) * z).sum(dim=2).mean(dim=1) > own

    lowest, highest = (torch.full((len(z),), value, dtype=torch.float64, device=z.device) for value in RANGE)
    low, high = lowest.log(), highest.log()
    for _ in range(32):
        middle = (low + high) / 2
        colder = too_cold(middle.exp())
        low, high = torch.where(colder, middle, low), torch.where(colder, high, middle)
    T = torch.where(too_cold(highest), highest, torch.where(too_cold(lowest), ((low + high) / 2).exp(), lowest))
    losses = torch.stack([(z / t[:, None, None]).logsumexp(dim=2).mean(dim=1) - own / t for t in (lowest, T, highest)])
    flat = losses.amax(dim=0) - losses.amin(dim=0) < FLAT  # convex: its largest value is at an end of RANGE
    best = (own_MN > -FLAT * RANGE[0]).all(dim=1)
    return torch.where(flat | best, 1.0, T)


def bound(temperature: float) -> str | None:
    """"lower" or "upper" for an end of RANGE, where `fit_temperatures` stops for want of a minimum; else None."""
    return dict(zip(RANGE, ("lower", "upper"))).get(temperature)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature of a committee's (N, K) probabilities, whatever rule they come from."""
    return fit_temperatures(log_probabilities(probabilities)[None], labels).item()


def apply_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """(N, K) float64 probabilities to the power 1/T, scaled to a sum of 1; the very same for T = 1."""
    if temperature == 1:
        return probabilities.double()
    return softmax(log_probabilities(probabilities) / temperature)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logarithms in float64; those of 0 are as of the smallest normal number. NaN for what is not finite."""
    logs = probabilities.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    return logs.masked_fill(~probabilities.isfinite(), torch.nan)
