"""Temperatures: one number for each classifier that makes its probabilities as sure as it is right."""
import torch
from torch import Tensor

from ensemble.metrics import softmax

RANGE = 0.01, 100.0


def fit_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) float64: for each member of (M, N, K) logits, the T at which softmax(logits / T) has the lowest NLL.

    Log-probabilities do as well as logits. The NLL is convex in 1/T, so bisection on its derivative
    d NLL / d(1/T) = mean_n (sum_k p_nk z_nk - z_(n, y_n)) finds the minimum, here to eight digits; it ends at a bound
    of RANGE where there is none. A member that is right on every image keeps T = 1: its NLL would fall for ever as T
    goes to 0, and one wrong answer on another image would cost more than all that. Fit on images whose labels trained
    neither network nor weights. Guo et al., 2017, section 4.2.
    """
    z = logits.double()
    own = z.gather(2, labels.expand(len(z), -1)[..., None])[..., 0].mean(dim=1)
    low, high = (torch.full((len(z),), value, dtype=torch.float64, device=z.device).log() for value in RANGE)
    for _ in range(32):
        middle = (low + high) / 2
        p = softmax(z / middle.exp()[:, None, None])
        too_cold = (p * z).sum(dim=2).mean(dim=1) > own  # still surer than right: a higher T lowers the NLL
        low, high = torch.where(too_cold, middle, low), torch.where(too_cold, high, middle)
    faultless = (z.argmax(dim=2) == labels).all(dim=1)
    return torch.where(faultless, 1.0, ((low + high) / 2).exp())


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature of a committee's (N, K) probabilities, whatever rule they come from."""
    return fit_temperatures(log_probabilities(probabilities)[None], labels).item()


def apply_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """(N, K) float64 probabilities to the power 1/T, scaled to a sum of 1; the very same for T = 1."""
    if temperature == 1:
        return probabilities.double()
    return softmax(log_probabilities(probabilities) / temperature)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logarithms in float64; those of 0 are as of the smallest normal number, and finite."""
    return probabilities.double().clamp_min(torch.finfo(torch.float64).tiny).log()
