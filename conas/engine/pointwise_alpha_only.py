"""Pointwise convolution, BatchNorm and the sum of equation 2 where no gradient by weights is wanted: equation 8.

Then nothing needs z but y = W z, which is kept in its place. With y, BatchNorm's sums are over elements, and its
gradient takes one matrix product in place of three; the covariances and products of
`conas/engine/pointwise.py` would serve the gradient by W. The functions stand in for those there.
"""
import torch
from torch import Tensor

from conas.engine.batchnorm import BatchScope, dots, inverse_std
from conas.engine.depthwise import rectify, rectify_back
from conas.engine.manual_grad import Tape
from conas.engine.pointwise import EPS, in_rows


def halfway(tape: Tape, z: Tensor, weight: Tensor, size: int, memory: list[Tensor] | None, scope: BatchScope):
    """As `folded.halfway`; the result is not computed again, and there is no gradient by the weight."""
    y, pixels, rstd = _product(z, weight, scope)
    kept, scaled, shape = tape.keep(y.mul_(rstd)), weight * rstd.transpose(1, 2), z.shape

    def back(grads, _parts, memory):
        y = kept()
        grad = in_rows(rectify_back(grads, y.view(shape).split(size), memory))
        mean = scope.all_reduce_mean(grad.mean(1, keepdim=True))
        grad.addcmul_(y, scope.all_reduce_sum(dots(grad, y)), value=-1 / pixels).sub_(mean)
        return torch.bmm(grad, scaled, out=y).view(shape), None

    return rectify(y.view(shape), size, memory, True), rstd, lambda _memory: None, back


def mix(tape: Tape, total: Tensor | None, z: Tensor, weight: Tensor, p: Tensor, E: int, scope: BatchScope):
    """As `folded.mix`, with no gradient by the weight."""
    y, pixels, rstd = _product(z, weight, scope)
    scale, kept, shape = rstd * p[:, None, None], tape.keep(y), z.shape
    parts = zip(y.split(E), scale.split(E))
    if total is None:
        first, by = next(parts)
        total = (first * by).view(E, *shape[1:])
    for part, by in parts:
        in_rows(total).addcmul_(part, by)

    def back(grad, wanted):
        grad, y = in_rows(grad), kept().unflatten(0, (-1, E))
        share = (y * grad).sum(2, keepdim=True).flatten(0, 1) * rstd
        d_z = None
        if wanted.x:
            slope = (scope.all_reduce_sum(share) * rstd).unflatten(0, (-1, E))
            d_y = torch.addcmul(grad, y, slope, value=-1 / pixels, out=y)
            d_z = torch.bmm(d_y.flatten(0, 1), weight * scale.transpose(1, 2)).view(shape)
        return d_z, None, share.squeeze(1)  # of this process; what goes to z is of all

    return total, rstd, back


def _product(z: Tensor, weight: Tensor, scope: BatchScope):
    """y = W z in rows, ahead of BatchNorm, the number of pixels, and 1/std (K, 1, C)."""
    y = torch.bmm(in_rows(z), weight.transpose(1, 2))
    return y, scope.count(y.shape[1]), inverse_std(y, EPS, scope)
