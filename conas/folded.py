"""Pointwise convolution, BatchNorm and the sum of equation 2, folded into one matrix product.

Maps z are (K, N, H, W, C): K groups of C channels, each with a weight W (C, C) and a probability p. For z of mean zero
and covariance S of its channels over all pixels,

    p BatchNorm(W z) = (p/std W) z,    var = diag(W S W^T)

so neither W z nor its normalised form is ever stored, and weighing by p costs nothing. With running statistics the
same holds with their variance, and a constant for their mean.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conas.fused import Again, fused
from conas.statistics import Statistics
from conas.synced import Pool

EPS = 1e-5  # of nn.BatchNorm2d


def halfway(z: Tensor, shift: Tensor, weight: Tensor, norms: Sequence[nn.BatchNorm2d], statistics: Statistics
            ) -> tuple[Tensor, Again | None]:
    """relu(BatchNorm(W z)), of the shape of z; weight (K, C, C). And, if it is cheap, what computes it again.

    `shift` (K, 1, C) is what has been added to z: less its mean.
    """
    again = None if torch.compiler.is_compiling() else Again(_halfway)  # a compiler decides for itself what to keep
    out, variance = fused(_Halfway, z, weight, statistics.pool, again)
    statistics.add_folded(norms, [shift], weight, variance, z[0].numel() // z.shape[-1])
    return out, again


def mix(z: Tensor | None, inner: Tensor | None, shifts: Sequence[Tensor], weight: Tensor, p: Tensor,
        plain: Tensor | None, q: Tensor, norms: Sequence[nn.BatchNorm2d], statistics: Statistics
        ) -> tuple[Tensor | None, Tensor | None]:
    """For each of E edges the sum of p BatchNorm(W z) over its groups; group k is of edge k % E.

    z and inner have groups of their own, in this order in weight (K, C, C), p (K,) and shifts (K, 1, C), and a sum of
    their own, (E, N, H, W, C). The sum of z includes sum_m q[:, m] plain[m], with plain (M, N, H, W, C) and q (E, M).
    """
    out, inner, variance = fused(_Mix, z, inner, weight, p, plain, q, statistics.pool)
    pixels = (out if inner is None else inner)[0].numel() // weight.shape[-1]
    statistics.add_folded(norms, shifts, weight, variance, pixels)
    return out, inner


def running_scale(weight: Tensor, p: Tensor | None, norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """`scaled` (K, C in, C out) and `shift` (K, 1, C), by running statistics: p BatchNorm(W z) = z scaled + shift."""
    scale, shift = Statistics.running_scale(norms, p)
    return (scale * weight.transpose(1, 2)).to(weight.dtype), shift.to(weight.dtype)


def in_rows(z: Tensor) -> Tensor:
    """(K, N, H, W, C) -> (K, pixels, C)."""
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sums over pixels of the products of channels, (K, C, C)."""
    return torch.bmm(a.transpose(1, 2), b)


def _mean(g: Tensor) -> Tensor:
    """The mean over pixels of g (K, pixels, C), (K, 1, C)."""
    return g.mean(1, keepdim=True)


class _Folded:
    """`scaled` (K, C in, C out) with p BatchNorm(W z) = z scaled, from the batch.

    `products` and `pixels` are this process's part of the pool's. So are `d_scaled` and the gradients by weight and p
    that come of it: their sum over processes is taken with that of all weights. What goes back to z is of the whole.
    """

    def __init__(self, weight: Tensor, p: Tensor | None, products: Tensor, pixels: int, pool: Pool):
        self.weight, self.p, self.pixels, self.pool = weight.transpose(1, 2), p, pool.count(pixels), pool
        self.covariance = pool.sum(products).div_(self.pixels)
        self.variance = (torch.bmm(self.covariance, self.weight) * self.weight).sum(1, keepdim=True)
        self.rstd = (self.variance + EPS).rsqrt_()
        self.scale = self.rstd if p is None else self.rstd * p[:, None, None]
        self.scaled = self.scale * self.weight

    def backward(self, d_scaled: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """From the gradient by `scaled`: those by weight and p, and the matrix (K, C, C) for which z matrix is the
        gradient by z that comes through its covariance."""
        d_scale = (d_scaled * self.weight).sum(1, keepdim=True)
        d_p = None if self.p is None else (self.rstd * d_scale).sum((1, 2))
        through = self.scale * self.rstd * self.rstd * d_scale  # -2 d_variance
        half = through * self.weight
        d_weight = (self.scale * d_scaled).baddbmm_(self.covariance, half, alpha=-1)
        if self.pool.shared:
            half = self.pool.sum(through) * self.weight
        matrix = torch.bmm(half, self.weight.transpose(1, 2)).div_(-self.pixels)
        return d_weight.transpose(1, 2), d_p, matrix


def _halfway(z: Tensor, scaled: Tensor) -> Tensor:
    return torch.bmm(in_rows(z), scaled).relu_().view(z.shape)


class _Halfway(torch.autograd.Function):
    """With `again`, its output is not kept: one product more in the backward pass saves a quarter of the maps."""

    @staticmethod
    def forward(ctx, z, weight, pool, again):
        rows = in_rows(z)
        ctx.folded = folded = _Folded(weight, None, _products(rows, rows), rows.shape[1], pool)
        out, ctx.again = _halfway(z, folded.scaled), again
        if again is not None:
            again.leave(z, folded.scaled)
        ctx.save_for_backward(z, out if again is None else None)
        ctx.mark_non_differentiable(folded.variance)
        ctx.set_materialize_grads(False)
        return out, folded.variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (z, out), folded = ctx.saved_tensors, ctx.folded
        rows, out = in_rows(z), ctx.again.compute(z, folded.scaled, last=True) if out is None else out
        # into memory that has just been used: the convolution behind keeps no gradient, and `out` will have served
        own = {} if ctx.again is None else {"grad_input": grad}
        grad = in_rows(torch.ops.aten.threshold_backward(grad, out, 0, **own))
        grad -= folded.pool.mean(_mean(grad))  # z is centred, so its gradient is
        d_weight, _, matrix = folded.backward(_products(rows, grad))
        made = None if ctx.again is None else in_rows(out)
        d_z = torch.bmm(rows, matrix, out=made).baddbmm_(grad, folded.scaled.transpose(1, 2))
        return d_z.view(z.shape), d_weight, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, inner, weight, p, plain, q, pool):
        rows = [in_rows(m) for m in (z, inner) if m is not None]
        products = torch.cat([_products(m, m) for m in rows])
        ctx.folded = folded = _Folded(weight, p, products, rows[0].shape[1], pool)
        sums = _sums(z, inner, folded.scaled, plain, q)
        ctx.save_for_backward(z, inner, plain, q)
        ctx.mark_non_differentiable(folded.variance)
        ctx.set_materialize_grads(False)
        return *sums, folded.variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_inner, _):
        z, inner, plain, q = ctx.saved_tensors
        folded, E = ctx.folded, len(q)
        d_plain = d_q = None
        if plain is not None:
            flat, maps = grad.view(E, -1), plain.view(len(plain), -1)
            d_plain, d_q = (q.t() @ flat).view(plain.shape), flat @ maps.t()
        # maps z are centred, so their gradient is
        pairs = [(m, in_rows(g) - folded.pool.mean(_mean(in_rows(g)))) for m, g in ((z, grad), (inner, grad_inner))
                 if m is not None]
        products = [_products(part, g) for m, g in pairs for part in in_rows(m).split(E)]
        d_weight, d_p, matrix = folded.backward(torch.cat(products))
        back, d_maps = iter(folded.scaled.transpose(1, 2).split(E)), []
        for (m, g), through in zip(pairs, matrix.split([len(m) for m, _ in pairs])):
            d = torch.bmm(in_rows(m), through)
            for part in d.split(E):
                part.baddbmm_(g, next(back))
            d_maps.append(d.view(m.shape))
        d_inner = None if inner is None else d_maps.pop()
        return d_maps.pop() if d_maps else None, d_inner, d_weight, d_p, d_plain, d_q, None


def _sums(z, inner, scaled, plain, q):
    scaled, out, sums = iter(scaled.split(len(q))), None, []
    if plain is not None:
        out = (q @ plain.view(len(plain), -1)).view(len(q), -1, plain.shape[-1])
    for m in (z, inner):
        for part in () if m is None else in_rows(m).split(len(q)):
            out = torch.bmm(part, next(scaled)) if out is None else out.baddbmm_(part, next(scaled))
        like = plain if m is None else m
        sums.append(None if out is None else out.view(len(q), *like.shape[1:]))
        out = None
    return sums
