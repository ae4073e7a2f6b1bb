"""Seeded choices that every machine makes alike: random generators by name, and splits that divide every class."""
import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose numbers are a pure function of `key`, such as (seed, stream, epoch)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: a seed is an int64


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Divide images at random into parts of the given fractions, class by class.

    `labels` (N,) are int64 and may be in any order, `fractions` sum to 1. Returns the sorted indices of each part;
    the parts are disjoint and complete. Divided in two, a part has exactly its fraction of N, rounded, and of every
    class its fraction rounded up or down.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    order = order[labels[order].argsort(stable=True)]  # by class, shuffled within each
    parts = []
    for i, fraction in enumerate(fractions[:-1]):
        share = fraction / sum(fractions[i:])
        classes = labels[order]
        ends = torch.bincount(classes).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        # Rounding where a class ends and not its size makes the roundings of all classes cancel in the sum.
        take = _round(share * ends.double()) - _round(share * starts.double())
        chosen = torch.arange(len(order)) - starts[classes] < take[classes]
        parts.append(order[chosen].sort().values)
        order = order[~chosen]
    return [*parts, order.sort().values]


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor()  # halves up: torch.round's halves to even would favour every second class
