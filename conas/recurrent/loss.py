"""The last layer of a language model with its loss, as one autograd function.

Logits of all words at all time steps would be by far the largest tensor of a language model. They are never there all
at once: a piece of some hundred rows is computed, its loss and its part of the gradients are taken, and the next piece
overwrites it, in memory that mostly stays in a cache. With e = exp(logits - their maximum) and z = sum(e), row by row,
the gradient w.r.t. the logits is e / z minus the one-hot target; 1 / z and the target are applied where that costs
least: to what is multiplied with e, and to the products.
"""
import torch
from torch import Tensor

from conas.recurrent.found_cell import once

ROWS = 256  # of a piece, at the least: enough for a product to be fast
ELEMENTS = {"cpu": 2 ** 19, "cuda": 2 ** 26}  # of a piece, if that is more rows


def decoded_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of x W^T + b, for x (T, B, H), W (V, H), b (V,) and targets (T, B) int64."""
    return _DecodedLoss.apply(x.flatten(0, 1), weight, bias, targets.flatten(), torch.is_grad_enabled())


class _DecodedLoss(torch.autograd.Function):
    """The forward pass makes the gradients that are wanted; the backward pass scales them, in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, learning):
        wants_x, wants_weight, wants_bias = (wanted and learning for wanted in ctx.needs_input_grad[:3])
        N, V = len(x), len(weight)
        rows = max(ROWS, ELEMENTS.get(x.device.type, ROWS) // V)
        rows = -(-N // -(-N // rows))  # pieces of about the same size
        d_x = torch.empty_like(x) if wants_x else None
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        losses, memory = x.new_empty(N, 1), x.new_empty(rows, V)
        for i in range(0, N, rows):
            heard, right = x[i:i + rows], targets[i:i + rows, None]
            logits = torch.mm(heard, weight.t(), out=memory[:len(heard)]).add_(bias)
            answer, top = logits.gather(1, right), logits.amax(dim=1, keepdim=True)
            e = logits.sub_(top).exp_()
            z = e.sum(dim=1, keepdim=True)
            torch.add(z.log(), top - answer, out=losses[i:i + rows])
            if wants_x:
                torch.mm(e, weight, out=d_x[i:i + rows]).div_(z)
            if wants_weight:
                d_weight.addmm_(e.t(), heard / z, beta=min(i, 1))  # with 0, what was there is not read
            if wants_bias:
                d_bias.addmv_(e.t(), z.reciprocal().squeeze(1))
        if wants_x:
            d_x.sub_(weight[targets])
        if wants_weight:
            d_weight.index_add_(0, targets, x, alpha=-1)
        if wants_bias:
            d_bias.sub_(targets.bincount(minlength=V))
        ctx.gradients, ctx.rows, ctx.used = (d_x, d_weight, d_bias), N, False
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        once(ctx)
        scale, gradients, ctx.gradients = d_loss / ctx.rows, ctx.gradients, None
        return *(None if d is None else d.mul_(scale) for d in gradients), None, None
