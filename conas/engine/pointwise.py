"""Pointwise convolution, BatchNorm and the sum of equation 2, folded into one matrix product.

Maps z are (K, N, H, W, C): K groups of C channels, each with a weight W (C, C) and a probability p. For z of mean zero
and covariance S of its channels over all pixels,

    p BatchNorm(W z) = (p/std W) z,    var = diag(W S W^T)

so neither W z nor its normalised form is ever stored, and weighing by p costs nothing. With running statistics the
same holds with their variance, and a constant for their mean.

The ways back by hand give the gradients by W and z, always; where none by W is wanted,
`conas/engine/pointwise_alpha_only.py` stands in.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conas.engine.batch_statistics import Statistics
from conas.engine.batchnorm import BatchScope, constant
from conas.engine.depthwise import join, rectify, rectify_back, row_dots
from conas.engine.manual_grad import Tape

EPS = 1e-5  # of nn.BatchNorm2d
PIECES, GPU_PIECES = {"cpu": (4096, 1)}, (512, 32)  # pixels and, at the least, channels at once: see `_products`


class Folded:
    """`scaled` (K, C out, C in) with p BatchNorm(W z) = scaled z, from the batch; weight W (K, C, C), p (K,) or None.

    `z` are the maps in rows (K, pixels, C) of this process, `rstd` (K, C, 1) is 1/std by those of all processes. What
    goes back to z is of all; the gradients by weight and p are this process's part: their sum is taken with that of all
    weights.
    """

    def __init__(self, z: Tensor, weight: Tensor, p: Tensor | None, scope: BatchScope):
        self.weight, self.pixels, self.scope = weight, scope.count(z.shape[1]), scope
        covariance = scope.all_reduce_sum(_products([(z, z)]))
        self.spread = _scaled_product(weight, covariance, 1 / self.pixels)  # W covariance
        self.variance = row_dots(self.spread, weight, constant(EPS, z.dtype, z.device))
        self.rstd = self.variance.rsqrt()
        self.scale = self.rstd if p is None else self.rstd * p[:, None, None]
        self.scaled = self.scale * weight

    def back(self, d_scaled: Tensor, wanted_p: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradient by `scaled`: that by the weight, the matrix (K, C, C) for which z matrix is the gradient by
        z that comes through its covariance, and, if wanted, (K, C), whose sum over channels is the gradient by p."""
        by_scale = row_dots(d_scaled, self.weight)
        d_p = (by_scale * self.rstd).squeeze(2) if wanted_p else None
        through = by_scale.div_(self.variance)  # times the scale: -2 d_variance
        d_weight = torch.addcmul(d_scaled, self.spread, through, value=-1).mul_(self.scale)
        half = self.scope.all_reduce_sum(through) * self.scaled
        return d_weight, _scaled_product(half.transpose(1, 2), self.weight, -1 / self.pixels), d_p


def halfway(tape: Tape, z: Tensor, weight: Tensor, size: int, memory: list[Tensor] | None, scope: BatchScope):
    """relu(BatchNorm(W z)) of z (K, N, H, W, C) of mean zero with weight (K, C, C), by `rectify` in parts of `size`.

    Also 1/std of W z, (K, C, 1); what computes the result again into such `memory`, so that it need not be kept; and
    `back`, which takes the gradients by the parts, these, and memory for maps like z, and returns the gradients by z
    and weight.
    """
    folded, kept, shape = Folded(in_rows(z), weight, None, scope), tape.keep(z), z.shape

    def result(z, memory):
        y = torch.bmm(in_rows(z), folded.scaled.transpose(1, 2)).view(shape)
        return rectify(y, size, memory, False)

    def back(grads, parts, memory):
        z, grad = in_rows(kept()), in_rows(rectify_back(grads, parts, memory))
        grad -= scope.all_reduce_mean(grad.mean(1, keepdim=True))  # z is centred, so its gradient is
        d_weight, matrix, _ = folded.back(_products([(grad, z)]))
        return torch.bmm(z, matrix).baddbmm_(grad, folded.scaled).view(shape), d_weight

    return result(z, memory), folded.rstd, lambda memory: result(kept(), memory), back


def mix(tape: Tape, total: Tensor | None, z: Tensor, weight: Tensor, p: Tensor, E: int, scope: BatchScope):
    """`total` (E, N, H, W, C), or nothing to begin with, and for each of E edges the sum of p BatchNorm(W z) over its
    groups; group k is of edge k % E.

    z (K, N, H, W, C) have mean zero; weight (K, C, C), p (K,). By hand the sum stays in its memory. Returns it, 1/std
    of W z (K, C, 1), and `back`: from the gradient by the sum, which must have mean zero, and what is `Wanted`, to the
    gradients by z and weight, and (K, C), whose sum over channels is that by p.
    """
    folded, kept, shape = Folded(in_rows(z), weight, p, scope), tape.keep(z), z.shape
    total = None if total is None else in_rows(total)
    for part, by in zip(in_rows(z).split(E), folded.scaled.transpose(1, 2).split(E)):
        total = torch.bmm(part, by) if total is None else total.baddbmm_(part, by)

    def back(grad, wanted):
        grad, z = in_rows(grad), in_rows(kept())
        d_weight, matrix, d_p = folded.back(_products([(grad, part) for part in z.split(E)]), wanted.alphas)
        d_z = torch.bmm(z, matrix)
        for part, by in zip(d_z.split(E), folded.scaled.split(E)):
            part.baddbmm_(grad, by)
        return d_z.view(shape), d_weight, d_p

    return total.view(E, *shape[1:]), folded.rstd, back


def running_scale(weight: Tensor, p: Tensor | None, norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """`scaled` (K, C in, C out) and `shift` (K, 1, C), by running statistics: p BatchNorm(W z) = z scaled + shift."""
    scale, shift = Statistics.running_scale(norms, p)
    return (scale * weight.transpose(1, 2)).to(weight.dtype), shift.to(weight.dtype)


def in_rows(z: Tensor) -> Tensor:
    """(K, N, H, W, C) -> (K, pixels, C)."""
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _scaled_product(a: Tensor, b: Tensor, by: float) -> Tensor:
    """by a b, of matrices (K, C, C): in one call, which with beta = 0 does not read what it adds to."""
    return torch.baddbmm(b, a, b, beta=0, alpha=by)


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sums over pixels of the products of channels, for pairs of rows (K, P, C): (all K, C, C).

    In pieces of some pixels: a library's product may add all of them one after another, and small terms would be lost;
    and a GPU wants many products to do at once. Its smallest product is of 32 channels: as many pixels are taken as
    that many, of whose product only the blocks of equal pixels are wanted.
    """
    P, C = pairs[0][0].shape[1:]
    chunk, width = PIECES.get(pairs[0][0].device.type, GPU_PIECES)
    chunk = P if P % chunk else chunk
    fold = max(width // C, 1)
    fold = 1 if chunk % fold else fold
    pairs = [[rows.reshape(-1, chunk // fold, fold * C) for rows in pair] for pair in pairs]
    products = join([torch.bmm(a.transpose(1, 2), b) for a, b in pairs])
    if fold > 1:
        return products.view(-1, P // chunk, fold, C, fold, C).diagonal(dim1=2, dim2=4).sum((1, 4))
    return products.view(-1, P // chunk, C, C).sum(1) if chunk < P else products
