"""Memory for the large tensors of a pass over a sequence, handed on from each pass to the next.

A CPU's C library gives large tensors back to the system when they are freed, which clears and maps every page of the
next ones again: a sixth of the time of a search step at DARTS' size. `conas.memory` tells the library not to, but it
follows only up to some size. Here a pass borrows memory and gives it back at the end of its backward pass. A process
stays as large as it was at its peak.
"""
from math import prod

import torch
from torch import Tensor


class Workspace:
    """What was given back, by name. Copies of a network have their own."""

    def __init__(self):
        self._free: dict[str, list[Tensor]] = {}

    def loan(self, like: Tensor) -> "Loan":
        """To borrow tensors of the precision and on the device of `like`."""
        return Loan(self._free, like)

    def __reduce__(self):
        return Workspace, ()


class Loan:
    """Tensors of one pass. If they are never given back, they are freed like any other."""

    def __init__(self, free: dict[str, list[Tensor]], like: Tensor):
        self._free, self._kind, self._lent = free, {"dtype": like.dtype, "device": like.device}, []

    def empty(self, name: str, *shape: int) -> Tensor:
        """A tensor with any content. The memory of `name` grows to the largest that was asked for."""
        size, free = prod(shape), self._free.setdefault(name, [])
        memory = free.pop() if free else torch.empty(0, **self._kind)
        if memory.numel() < size or (memory.dtype, memory.device) != tuple(self._kind.values()):
            memory = torch.empty(size, **self._kind)
        self._lent.append((name, memory))
        return memory[:size].view(shape)

    def give_back(self) -> None:
        """The tensors must not be used any more."""
        for name, memory in self._lent:
            self._free[name].append(memory)
        self._lent = []
