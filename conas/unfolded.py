"""Pointwise convolution, BatchNorm and the sum of equation 2 where no gradient by weights is wanted: equation 8.

Then nothing needs z but y = W z, which is kept in its place. With y, BatchNorm's sums are over elements, and its
gradient takes one matrix product in place of three; the covariances and products of `conas/folded.py` would serve the
gradient by W. The functions stand in for those there.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.depthwise import join
from conas.folded import EPS, in_rows
from conas.fused import Tape
from conas.synced import Pool, dots


def halfway(tape: Tape, z: Tensor, weight: Tensor, pool: Pool):
    """As `folded.halfway`; the result is not computed again, and there is no gradient by the weight."""
    y, shape = torch.bmm(in_rows(z), weight.transpose(1, 2)), z.shape
    pixels = pool.count(y.shape[1])
    variance = _over_pixels(y, y, pool, pixels)
    rstd = (variance + EPS).rsqrt_()
    y.mul_(rstd)
    kept, scaled = tape.keep(y), weight * rstd.transpose(1, 2)

    def back(grad, out):
        y = kept()
        grad = in_rows(grad)
        grad = torch.ops.aten.threshold_backward(grad, y, 0, grad_input=grad)
        mean = pool.mean(grad.mean(1, keepdim=True))
        grad.addcmul_(y, _over_pixels(grad, y, pool, pixels), value=-1).sub_(mean)
        return torch.bmm(grad, scaled, out=y).view(shape), None

    return y.relu().view(shape), variance, lambda: None, back


def mix(tape: Tape, sums: list[Tensor | None], maps: Sequence[tuple[int, Tensor]], weight: Tensor, p: Tensor, E: int,
        pool: Pool):
    """As `folded.mix`, with no gradient by the weight."""
    sizes = [len(z) for _, z in maps]
    ys = [torch.bmm(in_rows(z), by.transpose(1, 2)) for (_, z), by in zip(maps, weight.split(sizes))]
    pixels = pool.count(ys[0].shape[1])
    variance = join([_over_pixels(y, y, pool, pixels) for y in ys])
    rstd = (variance + EPS).rsqrt_()
    scale = rstd * p[:, None, None]
    for (at, z), y, by in zip(maps, ys, scale.split(sizes)):
        parts = zip(y.split(E), by.split(E))
        if sums[at] is None:
            first, factor = next(parts)
            sums[at] = (first * factor).view(E, *z.shape[1:])
        for part, factor in parts:
            in_rows(sums[at]).addcmul_(part, factor)
    kept, shapes = [(at, tape.keep(y)) for (at, _), y in zip(maps, ys)], [z.shape for _, z in maps]

    def back(grads, z_wanted):
        maps = [(in_rows(grads[at]), y().unflatten(0, (-1, E))) for at, y in kept]
        # of this process, for p; of all, for z
        products = join([(y * grad).sum(2, keepdim=True).flatten(0, 1) for grad, y in maps])
        share = products * rstd
        d_p, d_maps = share.sum((1, 2)), []
        if z_wanted:
            slopes = pool.sum(share).mul_(rstd).div_(-pixels).split(sizes)
            scaled = (weight * scale.transpose(1, 2)).split(sizes)
            for (grad, y), slope, by, shape in zip(maps, slopes, scaled, shapes):
                d_y = torch.addcmul(grad, y, slope.unflatten(0, (-1, E)), out=y)
                d_maps.append(torch.bmm(d_y.flatten(0, 1), by).view(shape))
        return d_maps, None, d_p

    return variance, back


def _over_pixels(a: Tensor, b: Tensor, pool: Pool, pixels: int) -> Tensor:
    """The mean of a b over the pixels of all processes: (K, P, C) to (K, 1, C)."""
    return pool.sum(dots(a, b)).div_(pixels)
