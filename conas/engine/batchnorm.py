"""BatchNorm with exact sums, by the images of this process or of all: as if one process had the whole batch.

For the maps x of one channel on all processes, P pixels in all, with the gradient g of y = (x - mean) / std,

    d_x = (g - mean(g) - y mean(g y)) / std,    the means over all P

so a pass sums two numbers for each channel over the processes on its way forward, and two on its way back. Gradients of
the weights need no such sum: each process has its own part, and the step adds these up.
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from conas import distributed
from conas.engine.manual_grad import Tape, with_manual_grad


@dataclass
class BatchScope:
    """The images that the statistics of a pass are over: `total`, of which this process has `images`."""

    images: int = 1
    total: int = 1

    @classmethod
    def of_all(cls, images: int) -> "BatchScope":
        """Those of all processes. A process alone has all."""
        return cls(images, distributed.total(images))

    @property
    def shared(self) -> bool:
        """Whether other processes have some of the images."""
        return self.images != self.total

    def all_reduce_sum(self, local: Tensor) -> Tensor:
        """The sum over the processes that share the images."""
        return distributed.sum_over_ranks(local) if self.shared else local

    def all_reduce_mean(self, local: Tensor) -> Tensor:
        """The mean over all images, from that over this process's."""
        return self.all_reduce_sum(local * (self.images / self.total)) if self.shared else local

    def count(self, pixels: int) -> int:
        """The pixels of all images, from those of this process's."""
        return pixels * self.total // self.images


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scope: BatchScope
               ) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of x (N, C, H, W), and the mean and 1/std (C,) that it is by, without gradients."""
    seen = []

    def run(tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None):
        rows = x.permute(0, 2, 3, 1).reshape(1, -1, x.shape[1])
        y, mean, rstd = normalise(rows, eps, scope, False)
        seen.extend((mean, rstd))
        kept, kept_weight, size = tape.keep(y), tape.keep(weight), (len(x), *x.shape[2:], x.shape[1])

        def back(grad):
            y, weight = kept(), kept_weight()
            grad = grad.permute(0, 2, 3, 1).reshape(y.shape)
            d_x, d_weight, d_bias = normalise_back(grad, y, rstd if weight is None else rstd * weight, scope)
            d_weight, d_bias = (None, None) if weight is None else (d_weight.view(-1), d_bias.view(-1))
            return d_x.view(size).permute(0, 3, 1, 2), d_weight, d_bias

        y = y if weight is None else torch.addcmul(bias, y, weight)
        return y.view(size).permute(0, 3, 1, 2), back

    y = with_manual_grad(run, x, weight, bias)
    return y, *(statistic.detach().view(-1) for statistic in seen)


def normalise(rows: Tensor, eps: float, scope: BatchScope, own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of rows (K, P, C), each of K maps by itself; in place if they are the caller's `own`.

    And the mean and 1/std that it is by, (K, 1, C) and not in bfloat16.
    """
    exact = rows if rows.dtype == torch.float64 else rows.float()
    mean = scope.all_reduce_mean(exact.mean(1, keepdim=True))
    centred = torch.sub(exact, mean, out=exact if own else None)
    rstd = inverse_std(centred, eps, scope)
    y = torch.mul(centred, rstd, out=centred if own else None).to(rows.dtype)
    return rows.copy_(y) if own and y.dtype != exact.dtype else y, mean, rstd


def inverse_std(centred: Tensor, eps: float, scope: BatchScope) -> Tensor:
    """1/std (K, 1, C) of rows (K, P, C) of mean zero over all images, with BatchNorm's `eps`."""
    squares = torch.addcmul(constant(eps, centred.dtype, centred.device), centred, centred)
    return scope.all_reduce_mean(squares.mean(1, keepdim=True)).rsqrt_()


def unbiased_variance(rstd: Tensor, pixels: int, eps: float) -> Tensor:
    """What a running variance follows, from `inverse_std`."""
    return (rstd.square().reciprocal_() - eps).clamp_min_(0) * (pixels / (pixels - 1))


@lru_cache
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this value, made once: for calls that take tensors only."""
    return torch.full((), value, dtype=dtype, device=device)


def centred_back(grad: Tensor, y: Tensor, rstd: Tensor, scope: BatchScope) -> Tensor:
    """In place, from the gradient by y = `normalise(x)` to that by x, for a gradient of mean zero over all images."""
    slope = scope.all_reduce_sum(dots(grad, y)).to(grad.dtype)
    return grad.addcmul_(y, slope, value=-1 / scope.count(y.shape[1])).mul_(rstd.to(grad.dtype))


def normalise_back(grad: Tensor, y: Tensor, scale: Tensor, scope: BatchScope) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient by a y + b, for y = `normalise(x)`, to those by x, a and b; `scale` is a/std."""
    of_b, of_a = grad.sum(1, keepdim=True, dtype=scale.dtype), dots(grad, y).to(scale.dtype)
    sums = scope.all_reduce_sum(torch.stack([of_b, of_a])) if scope.shared else (of_b, of_a)
    of_g, of_gy, scale = (t.to(grad.dtype) for t in (*sums, scale))
    through = torch.addcmul(of_g, y, of_gy)
    return (grad * scale).addcmul_(through, scale, value=-1 / scope.count(grad.shape[1])), of_a, of_b


def dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum over P pixels of a b, (K, P, C) to (K, 1, C): not by a matrix product, which may add them one by one."""
    return (a * b).sum(1, keepdim=True)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d by the images of all processes in training; see `convert`."""

    scopes: list[BatchScope]  # of the present pass; shared by a network's modules

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, rstd = batch_norm(x, self.weight, self.bias, self.eps, self.scopes[0])
        with torch.no_grad():
            pixels = self.scopes[0].count(x.numel() // x.shape[1])
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased_variance(rstd, pixels, self.eps), self.momentum)
            self.num_batches_tracked += 1
        return y


def convert(network: nn.Module) -> None:
    """Let every nn.BatchNorm2d in a network be by the images of all processes. Parameters and names stay as they are.

    torch.nn.SyncBatchNorm does the same on GPUs only. For a process alone there is nothing to convert.
    """
    if distributed.size() == 1:
        return
    scopes = [BatchScope()]

    def begin(module: nn.Module, inputs: tuple) -> None:
        if module.training:
            scopes[0] = BatchScope.of_all(len(inputs[0]))

    network.register_forward_pre_hook(begin)
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                ours = SyncedBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine)
                ours.weight, ours.bias, ours.scopes = norm.weight, norm.bias, scopes
                ours._buffers.update(norm._buffers)
                setattr(parent, name, ours)
