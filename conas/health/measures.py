"""What of a collapse can be seen in the alphas and the cell of one epoch."""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from conas.darts.genotype import SKIP, Edge, Genotype
from conas.darts.supernet import Supernet


def count_skips(genotype: Genotype) -> int:
    """The skip connections of the normal cell, whose edges are 8."""
    return sum(operation == SKIP for operation, _ in genotype.normal)


class CellSize:
    """The parameters of the operations in a derived normal cell with C channels and affine BatchNorm, as it is trained.

    These are what the cell can learn by; the 1x1 convolutions before it, which every cell has, do not count.
    """

    def __init__(self, operations: Mapping[str, Callable], C: int):
        self.operations, self.C = operations, C
        self._sizes: dict[str, int] = {}

    def __call__(self, edges: list[Edge]) -> int:
        return sum(self._of(operation) for operation, _ in edges)

    def _of(self, operation: str) -> int:
        if operation not in self._sizes:
            with torch.random.fork_rng(devices=[]):  # building draws initial weights
                module = self.operations[operation](self.C, 1, True)
            self._sizes[operation] = sum(p.numel() for p in module.parameters())
        return self._sizes[operation]


def shares(network: Supernet, kind: str) -> Tensor | None:
    """What the mixed edges of a kind of cell weigh their operations by, (E, P) in float64; None for other shapes."""
    values = network.shares(kind).detach().double().cpu()
    return values if values.dim() == 2 and values.shape[1] == len(network.primitives) else None


def entropy(shares: Tensor) -> float:
    """The mean entropy in nats of the edges' shares (E, P): ln P where the alphas are equal, 0 where one has all."""
    return torch.special.entr(shares).sum(dim=1).mean().item()


def margins(shares: Tensor, primitives: tuple[str, ...]) -> list[float]:
    """Of each edge, by how much its strongest operation other than `none` is ahead of the next one; shares (E, P).

    An edge without a second operation has its share itself.
    """
    kept = shares[:, [index for index, name in enumerate(primitives) if name != "none"]]
    ordered = kept.sort(dim=1, descending=True).values
    ahead = ordered[:, 0] - ordered[:, 1] if ordered.shape[1] > 1 else ordered[:, 0]
    return ahead.tolist()
