"""Gradients that are written down, not recorded: they save memory and passes, and can be differentiated no further.

Where a second derivative is needed the definition in conas/darts/supernet.py serves.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tape:
    """What a forward pass keeps for its backward; `wanted` says of each input whether its gradient is needed."""

    def __init__(self, wanted: Sequence[bool]):
        self.wanted, self.kept = wanted, []

    def keep(self, tensor: Tensor | None) -> Callable[[], Tensor | None]:
        """What gives the tensor in the backward pass. Autograd holds it till then, or computes it again."""
        self.kept.append(tensor)
        at = len(self.kept) - 1
        return lambda: self.kept[at]


def with_manual_grad(run: Callable, *inputs: Tensor | None) -> Tensor:
    """The output of `run(tape, *inputs)`, which returns `(output, back)`.

    `back(grad)` takes the gradient w.r.t. the output and returns those w.r.t. all inputs; it is called at most once.
    """
    return _ManualGrad.apply(run, *inputs)


class _ManualGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.tape = tape = Tape(ctx.needs_input_grad[1:])
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
