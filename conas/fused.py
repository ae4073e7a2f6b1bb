"""How the supernet calls its fused operations: with gradients by hand, or differentiable as often as one likes."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_by_hand = True  # not of a thread: checkpointed cells are computed again in autograd's


def fused(function: type[torch.autograd.Function], *arguments):
    """function.apply(*arguments); inside `twice_differentiable`, its forward as autograd itself records it.

    The gradients by hand save memory and passes, but they are no graph, so nothing can be differentiated through them.
    The forwards are made of differentiable operations of torch, and so need no second formula.
    """
    return function.apply(*arguments) if _by_hand else function.forward(_NoContext(), *arguments)


def is_twice_differentiable() -> bool:
    """Whether the present pass is inside `twice_differentiable`."""
    return not _by_hand


class _NoContext:
    """Takes what a forward leaves for its gradient by hand."""

    def save_for_backward(self, *_: torch.Tensor | None) -> None:
        pass

    mark_non_differentiable = save_for_backward


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, forward passes of supernets have derivatives of every order. Their backward passes belong inside too."""
    global _by_hand
    before, _by_hand = _by_hand, False
    try:
        yield
    finally:
        _by_hand = before
