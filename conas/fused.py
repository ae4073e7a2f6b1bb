"""How the supernet calls its fused operations: with gradients by hand, or differentiable as often as one likes."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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

    def save_for_backward(self, *_: Tensor | None) -> None:
        pass

    mark_non_differentiable = set_materialize_grads = save_for_backward


class Again:
    """A map between two fused operations that neither keeps for its backward pass, since it can be computed again.

    The first operation leaves what it is `function` of, and the second one keeps that instead. In the backward pass
    the second comes first; what it has computed serves the `last` one too.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.made, self.sources = function, None, ()

    def leave(self, *sources: Tensor) -> None:
        self.sources = tuple(source.detach() for source in sources)

    def take(self) -> tuple[Tensor, ...]:
        sources, self.sources = self.sources, ()
        return sources

    def compute(self, *sources: Tensor, last: bool = False) -> Tensor:
        made = self.function(*sources) if self.made is None else self.made
        self.made = None if last else made
        return made


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, forward passes of supernets have derivatives of every order. Their backward passes belong inside too."""
    global _by_hand
    before, _by_hand = _by_hand, False
    try:
        yield
    finally:
        _by_hand = before
