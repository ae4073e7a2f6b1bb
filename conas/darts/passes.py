"""Contexts around passes through a network that is searched."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from conas.darts.batchnorm import Statistics


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by the batch as usual but leaves its running statistics alone.

    For the architect: its passes look at weights that the search never has.
    """
    statistics = getattr(network, "statistics", Statistics())  # a network without BatchNorm has none
    statistics.frozen = True
    try:
        yield
    finally:
        statistics.frozen = False


@contextmanager
def constant_alphas(network: nn.Module) -> Iterator[None]:
    """Inside, passes know that no gradient w.r.t. the alphas is wanted, and leave out what only these need."""
    for alpha in network.alphas().values():
        alpha.requires_grad_(False)
    try:
        yield
    finally:
        for alpha in network.alphas().values():
            alpha.requires_grad_(True)


@contextmanager
def by_definition(network: nn.Module) -> Iterator[None]:
    """Inside, the network's logits are computed by its definition, without an engine."""
    fast = network.__dict__.pop("with_weights", None)
    try:
        yield
    finally:
        if fast is not None:
            network.with_weights = fast
