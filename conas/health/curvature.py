"""The curvature of a search: the dominant eigenvalue of the Hessian of the validation loss w.r.t. the alphas.

RobustDARTS (Zela et al., arXiv:1909.09656) found that searches whose cells generalise badly are those in which it
grows. It is found by Lanczos' iteration, which needs no Hessian but its products with vectors. These are exact, by
double backward through the definition. A difference of two gradients would not do: in float32 its step is large enough
to cross kinks of ReLU and max pooling, whose jumps it divides by the step (seen: 2 to 18 times the eigenvalue).

The batch, the first vector and the random numbers of the pass are the same in each epoch, so that values compare over
epochs. Weights are those of now, BatchNorm goes by the batch, and running statistics and random generators are left as
they were.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from conas.darts.architect import Batch, Bilevel, RandomState
from conas.darts.passes import frozen_statistics

TOLERANCE = 0.005  # of the eigenvalue, where the iteration ends
MOST_PRODUCTS = 20
MOST_PASSES = 2 + 2 * MOST_PRODUCTS  # forward and backward: of the gradient with its graph, and of each product
SHARE = 0.03       # of the passes of an epoch, that measuring may take by default
FEWEST_VALUES = 15  # of a search, below which nothing is measured by default: the rule needs three in a fifth of it


def dominant_eigenvalue(product: Callable[[Tensor], Tensor], size: int, seed: int = 0,
                        most: int = MOST_PRODUCTS) -> tuple[float, int]:
    """Of a symmetric matrix (size, size), given by its product with a vector (size,): the eigenvalue of largest
    magnitude, with its sign, and the number of products that it took.

    Lanczos' iteration with full orthogonalisation, in float64. It ends when the residual of the eigenvector is below
    TOLERANCE of the eigenvalue, which bounds the error, or after `most` products, where the value is a lower bound of
    the magnitude, and nearly always closer than that. NaN if a product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    basis, diagonal, beside, value = [v / v.norm()], [], [], math.nan
    for done in range(1, min(most, size) + 1):
        w = product(basis[-1]).detach().to("cpu", torch.float64)
        if not w.isfinite().all():
            return math.nan, done
        diagonal.append(torch.dot(w, basis[-1]).item())
        for _ in range(2):  # once leaves what rounding brings back
            for v in basis:
                w = w - torch.dot(w, v) * v
        length = w.norm().item()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        largest = values.abs().argmax()
        value = values[largest].item()
        if length * abs(vectors[-1, largest].item()) <= TOLERANCE * abs(value) or length == 0:
            break
        beside.append(length)
        basis.append(w / length)
    return value, done


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside, dtype=torch.float64)
    return matrix + off.diag(1) + off.diag(-1) if len(beside) else matrix


class Curvature:
    """The curvature of the loss of a search on one batch; of several processes each has its part of it."""

    def __init__(self, architect: Bilevel, batch: Batch, seed: int = 0):
        self.architect, self.batch, self.seed = architect, batch, seed

    def measure(self) -> float:
        """The dominant eigenvalue at the present weights and alphas, with its sign; NaN if a gradient is not finite."""
        network, training = self.architect.network, self.architect.network.training
        alphas = network.alphas().values()
        before = RandomState(self.batch[0].device)
        network.train()
        try:
            torch.manual_seed(self.seed)
            with frozen_statistics(network):
                products = self.architect.alpha_products(self.batch, self.architect.weights())
                return dominant_eigenvalue(lambda v: products(v.to(self.batch[0])), sum(a.numel() for a in alphas),
                                           self.seed)[0]
        finally:
            network.train(training)
            before.restore()


def passes_of_step(unrolled: bool) -> int:
    """Forward and backward passes of one iteration: those of the weights and, of second order, four of the alphas."""
    return 5 if unrolled else 2


def default_interval(steps: int, epochs: int, unrolled: bool) -> int:
    """The smallest K for which measuring once in K epochs of `steps` takes at most SHARE of their passes.

    0, for never, if a search of `epochs` would then have fewer than FEWEST_VALUES.
    """
    interval = max(1, math.ceil(MOST_PASSES / (SHARE * steps * passes_of_step(unrolled)) - 1e-9))
    return interval if interval * FEWEST_VALUES <= epochs else 0
