"""Gradients that are written by hand: they save memory and passes, and can be differentiated no further.

Where a second derivative is needed the definition in conas/darts/supernet.py serves.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tape:
    """What a forward pass leaves for its backward pass by hand.

    `wanted` says of each input whether its gradient is wanted. If not `by_hand`, autograd records the forward pass:
    nothing is kept, and nothing may be written in place.
    """

    def __init__(self, by_hand: bool, wanted: Sequence[bool]):
        self.by_hand, self.wanted, self.kept = by_hand, wanted, []

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives the tensor in the backward pass. Autograd holds it till then, or computes it again."""
        self.kept.append(tensor if self.by_hand else None)
        at = len(self.kept) - 1
        return lambda: self.kept[at]


def by_hand(run: Callable, *inputs: Tensor | None) -> Tensor:
    """The output of `run(tape, *inputs)`.

    `run` returns it with `back`, which makes the gradients by all inputs of that by the output, at most once. What
    `run` does must be differentiable by itself too.
    """
    return recorded(run, *inputs) if torch.compiler.is_compiling() else _ByHand.apply(run, *inputs)


def recorded(run: Callable, *inputs: Tensor | None) -> Tensor:
    """The same as autograd records it."""
    return run(Tape(False, [False] * len(inputs)), *inputs)[0]


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.tape = tape = Tape(True, ctx.needs_input_grad[1:])
        out, ctx.back = run(tape, *inputs)
        ctx.save_for_backward(*tape.kept)
        tape.kept = ()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.tape.kept = ctx.saved_tensors
        gradients = ctx.back(grad)
        ctx.tape.kept = ()
        return None, *gradients
