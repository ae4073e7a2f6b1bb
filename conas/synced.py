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
    return _BatchNorm.apply(x, weight, bias, eps, pool)


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    """The mean over images and pixels of a b for each channel, (C,): by a matrix product, where that is cheap."""
    if a.shape[1] > 64:
        return (a * b).mean((0, 2, 3))
    a, b = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (a, b))
    return (a.t() @ b).diagonal() / len(a)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, pool):
        exact = x if x.dtype == torch.float64 else x.float()
        mean = pool.mean(exact.mean((0, 2, 3)))
        centred = exact - mean[:, None, None]
        variance = pool.mean(_mean_product(centred, centred))
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.pool = eps, pool
        ctx.mark_non_differentiable(mean, variance)
        y = nn.functional.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), weight, bias, False, 0.0, eps)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _variance):
        x, weight, mean, variance = ctx.saved_tensors
        y = nn.functional.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), None, None, False, 0.0, ctx.eps)
        pixels = grad.numel() // grad.shape[1]
        d_bias, d_weight = grad.sum((0, 2, 3), dtype=mean.dtype), pixels * _mean_product(grad, y).to(mean.dtype)
        of_g, of_gy = ctx.pool.sum(torch.stack([d_bias, d_weight])).div(ctx.pool.count(pixels))
        scale = (variance + ctx.eps).rsqrt() if weight is None else (variance + ctx.eps).rsqrt() * weight
        scale, shift, slope = (t.to(grad.dtype)[:, None, None] for t in (scale, -scale * of_g, -scale * of_gy))
        d_x = torch.addcmul(shift, y, slope).addcmul_(grad, scale)
        affine = weight is not None
        return d_x, d_weight if affine else None, d_bias if affine else None, None, None


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
