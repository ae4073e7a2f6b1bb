"""BatchNorm with exact sums, by the images of this process or of all: as if one process had the whole batch.

For the maps x of one channel on all processes, P pixels in all, with the gradient g of y = (x - mean) / std,

    d_x = (g - mean(g) - y mean(g y)) / std,    the means over all P

so a pass sums two numbers for each channel over the processes on its way forward, and two on its way back. Gradients of
the weights need no such sum: each process has its own part, and the step adds these up.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conas import distributed
from conas.fused import fused, is_twice_differentiable


@dataclass
class Pool:
    """The images that the statistics of a pass are over: `total`, of which this process has `images`."""

    images: int = 1
    total: int = 1

    @classmethod
    def of_all(cls, images: int) -> "Pool":
        """Those of all processes. A process alone has all."""
        return cls(images, distributed.total(images))

    @property
    def shared(self) -> bool:
        """Whether other processes have some of the images."""
        return self.images != self.total

    def sum(self, local: Tensor) -> Tensor:
        """The sum over the processes that share the images."""
        return distributed.sum_over_ranks(local) if self.shared else local

    def mean(self, local: Tensor) -> Tensor:
        """The mean over all images, from that over this process's."""
        return self.sum(local * (self.images / self.total)) if self.shared else local

    def count(self, pixels: int) -> int:
        """The pixels of all images, from those of this process's."""
        return pixels * self.total // self.images


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pool: Pool
               ) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of x (N, C, H, W), and the mean and the biased variance (C,) that it is by, without gradients."""
    y, mean, variance = fused(_BatchNorm, x.permute(0, 2, 3, 1)[None], weight, bias, eps, pool, None)
    return y[0].permute(0, 3, 1, 2), mean.view(-1), variance.view(-1)


def batch_norm_(x: Tensor, eps: float, pool: Pool, maps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of each of the first `maps` (default: all) of x (K, N, H, W, C), in x itself, which is returned.

    And the means and biased variances (maps, 1, C), without gradients. Nothing else may need the x that was, nor, if
    there are more maps, the gradient of what is returned.
    """
    return fused(_BatchNorm, x, None, None, eps, pool, maps or len(x))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The sum over P pixels of a b, (K, P, C) to (K, 1, C): by a matrix product, where that is cheap."""
    if a.shape[-1] > 64:
        return (a * b).sum(1, keepdim=True)
    return torch.bmm(a.transpose(1, 2), b).diagonal(dim1=1, dim2=2)[:, None]


class _BatchNorm(torch.autograd.Function):
    """Of x (K, N, H, W, C), each of K maps by itself; if `maps` is given, of the first ones, in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, pool, maps):
        part = x if maps is None else x[:maps]
        rows = (part.reshape if maps is None else part.view)(len(part), -1, x.shape[-1])  # a copy would not be in place
        exact = rows if x.dtype == torch.float64 else rows.float()
        # derivatives of second order need every step of the way
        own = maps is not None and not is_twice_differentiable() and not torch.compiler.is_compiling()
        mean = pool.mean(exact.mean(1, keepdim=True))
        centred = torch.sub(exact, mean, out=exact if own else None)
        variance = pool.mean(_product(centred, centred) / rows.shape[1])
        rstd = (variance + eps).rsqrt()
        y = torch.mul(centred, rstd, out=centred if own else None).to(x.dtype)
        ctx.save_for_backward(x if own else y, weight, rstd)
        ctx.pool, ctx.maps = pool, maps
        ctx.mark_non_differentiable(mean, variance)
        if own:
            ctx.mark_dirty(x)
            if y.dtype != exact.dtype:
                rows.copy_(y)
            return x, mean, variance
        y = y if weight is None else torch.addcmul(bias, y, weight)
        y = y.view(part.shape)
        return y if len(part) == len(x) else torch.cat([y, x[maps:]]), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _variance):
        y, weight, rstd = ctx.saved_tensors
        alone = ctx.maps is None or ctx.maps == len(grad)
        part = (grad if alone else grad[:ctx.maps]).reshape(len(rstd), -1, grad.shape[-1])
        y = y[:len(rstd)].view(part.shape)
        d_bias = part.sum(1, keepdim=True, dtype=rstd.dtype)
        d_weight = _product(part, y).to(rstd.dtype)
        of_g, of_gy = ctx.pool.sum(torch.stack([d_bias, d_weight])) if ctx.pool.shared else (d_bias, d_weight)
        scale = rstd if weight is None else rstd * weight
        share = scale / -ctx.pool.count(part.shape[1])
        shift, slope, scale = (t.to(grad.dtype) for t in (share * of_g, share * of_gy, scale))
        d_x = torch.addcmul(shift, y, slope)
        d_x = torch.addcmul(d_x, part, scale, out=d_x if alone else part).view(-1, *grad.shape[1:])
        affine = weight is not None
        return (d_x if alone else grad, d_weight.view(-1) if affine else None, d_bias.view(-1) if affine else None,
                None, None, None)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d by the images of all processes in training; see `convert`."""

    pools: list[Pool]  # of the present pass; shared by a network's modules

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance = batch_norm(x, self.weight, self.bias, self.eps, self.pools[0])
        with torch.no_grad():
            pixels = self.pools[0].count(x.numel() // x.shape[1])
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (pixels / (pixels - 1)), self.momentum)
            self.num_batches_tracked += 1
        return y


def convert(network: nn.Module) -> None:
    """Let every nn.BatchNorm2d in a network be by the images of all processes. Parameters and names stay as they are.

    torch.nn.SyncBatchNorm does the same on GPUs only. For a process alone there is nothing to convert.
    """
    if distributed.size() == 1:
        return
    pools = [Pool()]

    def begin(module: nn.Module, inputs: tuple) -> None:
        if module.training:
            pools[0] = Pool.of_all(len(inputs[0]))

    network.register_forward_pre_hook(begin)
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                ours = SyncedBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine)
                ours.weight, ours.bias, ours.pools = norm.weight, norm.bias, pools
                ours._buffers.update(norm._buffers)
                setattr(parent, name, ours)
