"""Depthwise convolutions of many edges at once, channels last, with fast gradients on CPUs.

oneDNN has a fast kernel for every depthwise forward convolution of channels-last images, but takes five to twenty times
as long for some gradients. So each gradient is put as a problem that has a fast kernel; the arithmetic is the same up
to the order of the sums:

* the gradient of the input is the forward convolution of the output's gradient with the flipped kernel;
* the gradient of a kernel wider than three columns is put together from those of three columns each;
* a convolution of dilation 2 is a plain one on `phases`, since it never mixes odd and even rows or columns.
"""
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad

from conas.fused import fused
from conas.synced import Pool

SMALL = 2**19  # bytes of a group's map up to which groups are convolved side by side: larger ones leave the cache


def phases(x: Tensor) -> Tensor:
    """(S, N, 2H, 2W, C) -> (S, 4N, H, W, C): pixels of even and odd rows and columns as images of their own."""
    S, N, H, W, C = x.shape
    x = x.view(S * N, H // 2, 2, W // 2, 2, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(S, 4 * N, H // 2, W // 2, C)


def interleave(x: Tensor) -> Tensor:
    """The inverse of `phases`, for one state: (4N, H, W, C) -> (N, 2H, 2W, C)."""
    N, H, W, C = x.shape
    x = x.view(N // 4, 2, 2, H, W, C).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(N // 4, 2 * H, 2 * W, C)


def convolve(x: Tensor, weights: Sequence[Tensor], stride: int = 1, dilation: int = 1, centred: Pool | None = None
             ) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolutions with odd square kernels and "same" padding, for groups of C channels.

    Each weight (G*C, 1, k, k) serves G groups. x (S, N, H, W, C) holds the inputs of all groups of all weights if S is
    their number; else S states, each read by G/S groups of every weight.
    Returns z (all groups, N, ceil(H/stride), ceil(W/stride), C) and, if `centred`, its mean (all groups, 1, C) over the
    images of that pool, which is then subtracted from z. `centred` is for use ahead of BatchNorm only: the gradient is
    right if that of z has mean zero.
    """
    return fused(_Convolve, x, stride, dilation, centred, *weights)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stride, dilation, centred, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.settings = settings = stride, dilation, _is_small(x)
        shares = _share(x, weights)
        means = [_mean(part, weight, stride, dilation) for part, weight in shares] if centred else []
        if centred:
            means = centred.mean(torch.cat(means)).split([len(mean) for mean in means])
        z = []
        for i, (part, weight) in enumerate(shares):
            blocks = _blocks(part, weight, settings[2])
            biases = means[i].neg().view(len(blocks), -1).unbind() if centred else [None] * len(blocks)
            z += [_apart(_convolution(block, kernel, stride, dilation, bias), x.shape[-1])
                  for block, kernel, bias in zip(blocks, weight.chunk(len(blocks)), biases)]
        mean = None
        if centred:
            mean = torch.cat(means)[:, None]
            ctx.mark_non_differentiable(mean)
        return torch.cat(z) if len(z) > 1 else z[0].contiguous(), mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, *weights = ctx.saved_tensors
        grads = grad.split([len(weight) // x.shape[-1] for weight in weights])
        shares = [(*share, g, *ctx.settings) for share, g in zip(_share(x, weights), grads)]
        d_x, d_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            d_x, *others = (_input_gradient(*share) for share in shares)
            if len(d_x) < len(x):
                d_x = torch.cat([d_x, *others])
            else:
                for other in others:
                    d_x += other
        if ctx.needs_input_grad[4]:
            d_weights = [_weight_gradient(*share) for share in shares]
        return d_x, None, None, None, *d_weights


def _share(x: Tensor, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each weight's part of x, and the weight."""
    groups = [len(weight) // x.shape[-1] for weight in weights]
    parts = x.split(groups) if len(x) == sum(groups) else [x] * len(groups)
    return list(zip(parts, weights))


def _is_small(x: Tensor) -> bool:
    # an exported graph serves every batch size, and may not depend on it
    exporting = torch.compiler.is_exporting()
    return x.device.type != "cpu" or exporting or x[0].numel() * x.element_size() <= SMALL


def _blocks(x: Tensor, weight: Tensor, small: bool) -> list[Tensor]:
    """The inputs (S, N, H, W, C) of a weight's groups: each (N, C, H, W), or, if small, side by side (N, G*C, H, W)."""
    S, N, H, W, C = x.shape
    share = len(weight) // (S * C)
    if S * share == 1 or not small:
        return [m for m in x.permute(0, 1, 4, 2, 3).unbind() for _ in range(share)]
    x = x.permute(1, 2, 3, 0, 4)[:, :, :, :, None].expand(N, H, W, S, share, C)
    return [x.reshape(N, H, W, S * share * C).permute(0, 3, 1, 2)]


def _apart(block: Tensor, C: int) -> Tensor:
    """(N, groups*C, H, W) -> (groups, N, H, W, C), a view."""
    return block.unflatten(1, (-1, C)).permute(1, 0, 3, 4, 2)


def _convolution(x, weight, stride, dilation, bias=None):
    return conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] // 2), dilation, len(weight))


def _gradients(grad, x, weight, stride, dilation, padding, wanted):
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2,
                                               False, [0, 0], len(weight), [*wanted, False])


def _input_gradient(x, weight, grad, stride, dilation, small):
    grads = _blocks(grad, weight, small)
    if stride == 1:
        kernels = weight.flip(2, 3).chunk(len(grads))
        parts = [_convolution(g, kernel, 1, dilation) for g, kernel in zip(grads, kernels)]
    else:
        padding = dilation * (weight.shape[-1] // 2)
        parts = [_gradients(g, block, kernel, stride, dilation, padding, (True, False))[0]
                 for g, block, kernel in zip(grads, _blocks(x, weight, small), weight.chunk(len(grads)))]
    share = len(grad) // len(x)
    if len(parts) == 1:
        d_x = _apart(parts[0], x.shape[-1])
        return d_x.unflatten(0, (-1, share)).sum(1) if share > 1 else d_x
    for i in range(0, len(parts), share):
        for part in parts[i + 1:i + share]:
            parts[i] += part
    return torch.cat([_apart(part, x.shape[-1]) for part in parts[::share]])


def _weight_gradient(x, weight, grad, stride, dilation, small):
    k = weight.shape[-1]
    inputs, padding = [(x, weight)], dilation * (k // 2)
    if k > 3 and dilation == 1 and x.device.type == "cpu":
        # columns s to s+2 of the kernel, from an input that begins s columns later
        inputs, padding = [], 0
        for s in range(0, k - 2, 2):
            left = k // 2 - s
            right = stride * (grad.shape[3] - 1) + 3 - left - x.shape[3]
            inputs.append((pad(x, (0, 0, left, right, k // 2, k // 2)), weight[..., :3]))
    grads = _blocks(grad, weight, small)
    columns = []
    for x, weight in inputs:
        parts = [_gradients(g, block, kernel, stride, dilation, padding, (False, True))[1]
                 for g, block, kernel in zip(grads, _blocks(x, weight, small), weight.chunk(len(grads)))]
        part = torch.cat(parts) if len(parts) > 1 else parts[0]
        columns.append(part[..., 1:] if columns else part)
    return torch.cat(columns, 3) if len(columns) > 1 else columns[0]


def _mean(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The mean over images and pixels of each convolution, from the mean image: (groups, C)."""
    S, _, H, W, C = x.shape
    k = weight.shape[-1]
    rows, columns = (_taps(k, size, stride, dilation, x.dtype, x.device) for size in (H, W))
    taps = columns @ (rows @ x.mean(1).view(S, H, W * C)).view(S, k, W, C)
    return (taps.permute(0, 3, 1, 2)[:, None] * weight.view(S, -1, C, k, k)).sum((3, 4)).flatten(0, 1)


@lru_cache
def _taps(k: int, size: int, stride: int, dilation: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, size): the share of pixel i in the mean over all outputs of what tap j reads."""
    at = torch.arange(0, size, stride)[None] + dilation * (torch.arange(k)[:, None] - k // 2)
    inside = (at >= 0) & (at < size)
    taps = torch.zeros(k, size, dtype=dtype).scatter_add_(1, at.clamp(0, size - 1), inside.to(dtype))
    return (taps / at.shape[1]).to(device)


class DepthwiseConv2d(nn.Conv2d):
    """One k x k kernel for each of C channels, k odd, "same" padding: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # other devices and autocast's dtypes have kernels that are good as they are
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.stride == (1, 1) and torch.is_grad_enabled():
            z, _ = convolve(x.permute(0, 2, 3, 1)[None], [self.weight], 1, self.dilation[0])
            return z[0].permute(0, 3, 1, 2)
        return super().forward(x)
