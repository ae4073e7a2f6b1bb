"""Pointwise convolution, BatchNorm and the sum of equation 2, folded into one matrix product.

Maps z are (K, N, H, W, C): K groups of C channels, each with a weight W (C, C) and a probability p. For z of mean zero
and covariance S of its channels over all pixels,

    p BatchNorm(W z) = (p/std W) z,    var = diag(W S W^T)

so neither W z nor its normalised form is ever stored, and weighing by p costs nothing. With running statistics the
same holds with their variance, and a constant for their mean.

The ways back by hand give the gradients by W and z, always; where none by W is wanted, `conas/unfolded.py` stands in.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conas.depthwise import join
from conas.fused import Tape
from conas.statistics import Statistics
from conas.synced import Pool

EPS = 1e-5  # of nn.BatchNorm2d
CHUNK = 1024  # pixels


class Folded:
    """`scaled` (K, C out, C in) with p BatchNorm(W z) = scaled z, from the batch; weight W (K, C, C), p (K,) or None.

    `parts` are the maps z, in rows (groups, pixels, C) of this process. What goes back to z is of all processes; the
    gradients by weight and p are this process's part: their sum is taken with that of all weights.
    """

    def __init__(self, parts: Sequence[Tensor], weight: Tensor, p: Tensor | None, pool: Pool):
        self.weight, self.pixels, self.pool = weight, pool.count(parts[0].shape[1]), pool
        covariance = pool.sum(join([_product(z, z) for z in parts]).div_(self.pixels))
        self.spread = torch.bmm(weight, covariance)
        self.variance = (self.spread * weight).sum(2, keepdim=True)
        self.rstd = (self.variance + EPS).rsqrt_()
        self.scale = self.rstd if p is None else self.rstd * p[:, None, None]
        self.scaled = self.scale * weight

    def back(self, d_scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient by `scaled`: those by p and weight, and the matrix (K, C, C) for which z matrix is the
        gradient by z that comes through its covariance."""
        share = (d_scaled * self.weight).sum(2, keepdim=True).mul_(self.rstd)
        d_p = share.sum((1, 2))
        through = share.mul_(self.scale).mul_(self.rstd)  # -2 d_variance
        d_weight = (d_scaled * self.scale).addcmul_(self.spread, through, value=-1)
        half = self.pool.sum(through) * self.weight
        return d_p, d_weight, torch.bmm(half.transpose(1, 2), self.weight).div_(-self.pixels)


def halfway(tape: Tape, z: Tensor, weight: Tensor, pool: Pool):
    """relu(BatchNorm(W z)), of the shape of z (K, N, H, W, C) of mean zero; weight (K, C, C).

    Also the variance of W z (K, C, 1); what computes the result again, so that it need not be kept; and `back`, which
    takes the gradient and the result, writes into both, and returns the gradients by z and weight.
    """
    folded, kept, shape = Folded([in_rows(z)], weight, None, pool), tape.keep(z), z.shape

    def result(z):
        return torch.bmm(in_rows(z), folded.scaled.transpose(1, 2)).relu_().view(shape)

    def back(grad, out):
        z = in_rows(kept())
        grad = in_rows(torch.ops.aten.threshold_backward(grad, out, 0, grad_input=grad))
        grad -= pool.mean(grad.mean(1, keepdim=True))  # z is centred, so its gradient is
        _, d_weight, matrix = folded.back(_product(grad, z))
        # into memory that has just been used: `out` has served
        d_z = torch.bmm(z, matrix, out=in_rows(out)).baddbmm_(grad, folded.scaled)
        return d_z.view(shape), d_weight

    return result(z), folded.variance, lambda: result(kept()), back


def mix(tape: Tape, sums: list[Tensor | None], maps: Sequence[tuple[int, Tensor]], weight: Tensor, p: Tensor, E: int,
        pool: Pool):
    """Add to each of E edges the sum of p BatchNorm(W z) over its groups; group k is of edge k % E.

    `maps` are the z (K, N, H, W, C), of mean zero, each with the place in `sums` of what it is added to: (E, N, H, W,
    C), or None to begin with. Their groups are, in this order, those of weight (K, C, C) and p (K,). By hand the sums
    stay in their memory. Returns the variance of W z (K, C, 1) and `back`: from the gradients by `sums`, which must
    have mean zero, and whether those by the maps are wanted, to these, and those by weight and p.
    """
    folded, kept = Folded([in_rows(z) for _, z in maps], weight, p, pool), [(at, tape.keep(z)) for at, z in maps]
    scaled = iter(folded.scaled.transpose(1, 2).split(E))
    for at, z in maps:
        total = None if sums[at] is None else in_rows(sums[at])
        for part in in_rows(z).split(E):
            by = next(scaled)
            total = (torch.bmm(part, by) if total is None else total.baddbmm_(part, by) if tape.by_hand else
                     torch.baddbmm(total, part, by))
        sums[at] = total.view(E, *z.shape[1:])

    def back(grads, _z_wanted):
        maps, d_maps = [(in_rows(grads[at]), z()) for at, z in kept], []
        products = [_product(grad, part) for grad, z in maps for part in in_rows(z).split(E)]
        d_p, d_weight, matrix = folded.back(join(products))
        scaled = iter(folded.scaled.split(E))
        for (grad, z), through in zip(maps, matrix.split([len(z) for _, z in maps])):
            d_z = torch.bmm(in_rows(z), through)
            for part in d_z.split(E):
                part.baddbmm_(grad, next(scaled))
            d_maps.append(d_z.view(z.shape))
        return d_maps, d_weight, d_p

    return folded.variance, back


def running_scale(weight: Tensor, p: Tensor | None, norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """`scaled` (K, C in, C out) and `shift` (K, 1, C), by running statistics: p BatchNorm(W z) = z scaled + shift."""
    scale, shift = Statistics.running_scale(norms, p)
    return (scale * weight.transpose(1, 2)).to(weight.dtype), shift.to(weight.dtype)


def in_rows(z: Tensor) -> Tensor:
    """(K, N, H, W, C) -> (K, pixels, C)."""
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Sums over pixels of the products of channels, (K, C, C).

    By CHUNK pixels: a library's product may add all of them one after another, and small terms would be lost.
    """
    K, P, C = a.shape
    if P <= CHUNK or P % CHUNK:
        return torch.bmm(a.transpose(1, 2), b)
    a, b = (rows.reshape(-1, CHUNK, C) for rows in (a, b))
    return torch.bmm(a.transpose(1, 2), b).view(K, -1, C, C).sum(1)
