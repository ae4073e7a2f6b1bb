"""Depthwise convolutions of many edges at once, channels last, with fast gradients on CPUs.

oneDNN has a fast kernel for every depthwise forward convolution of channels-last images, but takes five to twenty times
as long for some gradients. So each gradient is put as a problem that has a fast kernel; the arithmetic is the same up
to the order of the sums:

* the gradient of the input is the forward convolution of the output's gradient with the flipped kernel;
* the gradient of a kernel wider than three columns is put together from those of three columns each;
* a convolution of dilation 2 is a plain one on `phases`, since it never mixes odd and even rows or columns.
"""
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad

from conas.fused import Again, fused
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


def convolve(x: Tensor, weights: Sequence[Tensor], stride: int = 1, dilation: int = 1, centred: Pool | None = None,
             again: Again | None = None) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolutions with odd square kernels and "same" padding, for groups of C channels.

    Each weight (G*C, 1, k, k) serves G groups. x (S, N, H, W, C) holds the inputs of all groups of all weights if S is
    their number; else S states, each read by G/S groups of every weight. If `again` is given, x is not kept for the
    backward pass, but computed by it once more.
    Returns z (all groups, N, ceil(H/stride), ceil(W/stride), C) and, if `centred`, what was added to it, less its mean
    (all groups, 1, C) over the images of that pool. `centred` is for use ahead of BatchNorm only: the gradient is right
    if that of z has mean zero.
    """
    return fused(_Convolve, x, stride, dilation, centred, again, *weights)


def blockwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Iterator[Tensor]:
    """`convolve` with one weight, in blocks (B, N, H', W', C) of as many groups as are convolved at once."""
    C = x.shape[-1]
    blocks = _blocks(x, len(weight) // C, _is_small(x))
    for block, kernel in zip(blocks, weight.chunk(len(blocks))):
        z = _convolution(block, kernel, stride, dilation)
        yield z.permute(0, 2, 3, 1).unflatten(3, (-1, C)).permute(3, 0, 1, 2, 4)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stride, dilation, centred, again, *weights):
        kept = again.take() if again else (x,)
        ctx.save_for_backward(*kept, *weights)
        ctx.again, ctx.kept, ctx.shape, ctx.settings = again, len(kept), x.shape, (stride, dilation)
        ctx.small = small = _is_small(x)
        ctx.set_materialize_grads(False)
        shifts = _shifts(x, weights, stride, dilation) if centred else [None] * len(weights)
        if centred and centred.shared:
            shifts = centred.mean(torch.cat(shifts)).split(_groups(x.shape, weights))
        outs = []
        for blocks, weight, shift in zip(_inputs(x, _groups(x.shape, weights), small), weights, shifts):
            biases = [None] * len(blocks) if shift is None else shift.view(len(blocks), -1).unbind()
            outs += [_convolution(block, kernel, stride, dilation, bias)
                     for block, kernel, bias in zip(blocks, weight.chunk(len(blocks)), biases)]
        added = None
        if centred:
            added = torch.cat(shifts)[:, None]
            ctx.mark_non_differentiable(added)
        return _pack(outs, x.shape[-1]), added

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        saved = ctx.saved_tensors
        kept, weights = saved[:ctx.kept], saved[ctx.kept:]
        groups = _groups(ctx.shape, weights)
        grads = [_blocks(g, len(g), ctx.small) for g in grad.split(groups)]
        d_x, d_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            d_x = _input_gradient(ctx.shape, weights, grads, *ctx.settings)
        if ctx.needs_input_grad[5]:
            x = ctx.again.compute(*kept) if ctx.again else kept[0]
            d_weights = [_weight_gradient(*share, *ctx.settings)
                         for share in zip(_inputs(x, groups, ctx.small), weights, grads)]
        return d_x, None, None, None, None, *d_weights


def _groups(shape: Sequence[int], weights: Sequence[Tensor]) -> list[int]:
    return [len(weight) // shape[-1] for weight in weights]


def _is_small(x: Tensor) -> bool:
    # an exported graph serves every batch size, and may not depend on it
    exporting = torch.compiler.is_exporting()
    return x.device.type != "cpu" or exporting or x[0].numel() * x.element_size() <= SMALL


def _inputs(x: Tensor, groups: list[int], small: bool) -> list[list[Tensor]]:
    """The `_blocks` that each weight reads."""
    if len(x) == sum(groups):
        return [_blocks(part, G, small) for part, G in zip(x.split(groups), groups)]
    blocks = {G: _blocks(x, G, small) for G in set(groups)}  # kernels of several sizes read the same
    return [blocks[G] for G in groups]


def _blocks(x: Tensor, groups: int, small: bool) -> list[Tensor]:
    """The inputs (S, N, H, W, C) of a weight's groups: each (N, C, H, W), or, if small, side by side (N, G*C, H, W)."""
    S, N, H, W, C = x.shape
    x = x.permute(0, 1, 4, 2, 3)
    if groups == 1 or not small:
        return [m for m in x.unbind() for _ in range(groups // S)]
    x = x.permute(1, 3, 4, 0, 2)[:, :, :, :, None].expand(N, H, W, S, groups // S, C)
    return [x.reshape(N, H, W, groups * C).permute(0, 3, 1, 2)]


def _pack(blocks: list[Tensor], C: int) -> Tensor:
    """The inverse of `_blocks`: (all groups, N, H, W, C)."""
    N, channels, H, W = blocks[0].shape
    if channels == C:
        return torch.cat(blocks).permute(0, 2, 3, 1).view(-1, N, H, W, C)
    parts = [block.permute(0, 2, 3, 1).view(N, H, W, -1, C).permute(3, 0, 1, 2, 4) for block in blocks]
    return _join(parts).contiguous()


def _convolution(x, weight, stride, dilation, bias=None):
    return conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] // 2), dilation, len(weight))


def _gradients(grad, x, weight, stride, dilation, padding, wanted):
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2,
                                               False, [0, 0], len(weight), [*wanted, False])


def _input_gradient(shape, weights, grads, stride, dilation):
    (S, N, H, W, C), sums = shape, []
    separate = sum(_groups(shape, weights)) == S
    for weight, blocks in zip(weights, grads):
        E = 1 if separate else len(blocks) // S or 1  # of the blocks that read the same state
        kernels = (weight.flip(2, 3) if stride == 1 else weight).chunk(len(blocks))
        for i, (g, kernel) in enumerate(zip(blocks, kernels)):
            if stride == 1:
                part = _convolution(g, kernel, 1, dilation)
            else:
                x = g.new_empty(N, H, W, g.shape[1]).permute(0, 3, 1, 2)  # of which only the shape is read
                part = _gradients(g, x, kernel, stride, dilation, dilation * (kernel.shape[-1] // 2), (True, False))[0]
            if separate or i // E == len(sums):
                sums.append(part)
            else:
                sums[i // E] += part
    if separate or sums[0].shape[1] == C:
        return _pack(sums, C)
    return sums[0].permute(0, 2, 3, 1).view(N, H, W, S, -1, C).sum(4).permute(3, 0, 1, 2, 4)


def _weight_gradient(blocks, weight, grads, stride, dilation):
    k, kernels = weight.shape[-1], weight.chunk(len(grads))
    if k <= 3 or dilation > 1 or weight.device.type != "cpu":
        padding = dilation * (k // 2)
        return _join([_gradients(g, block, kernel, stride, dilation, padding, (False, True))[1]
                      for g, block, kernel in zip(grads, blocks, kernels)])
    # columns s to s+2 of the kernel, from an input that begins s columns later
    columns = []
    for s in range(0, k - 2, 2):
        left = k // 2 - s
        right = stride * (grads[0].shape[3] - 1) + 3 - left - blocks[0].shape[3]
        parts, padded, inside = [], None, None
        for g, block, kernel in zip(grads, blocks, kernels):
            if block is not inside:
                padded, inside = _padded(block, left, right, k // 2, padded), block
            parts.append(_gradients(g, padded, kernel[..., :3], stride, dilation, 0, (False, True))[1])
        columns.append(_join(parts)[..., 1 if s else 0:])
    return torch.cat(columns, 3)


def _padded(x: Tensor, left: int, right: int, rows: int, last: Tensor | None) -> Tensor:
    """x (N, C, H, W) with zeros around it, in the memory of the `last` one, which has them already."""
    if last is None:
        return pad(x, (left, right, rows, rows))
    x = x[..., max(0, -left):x.shape[3] + min(0, right)]  # as `pad` cuts off what is less than nothing
    last[:, :, rows:-rows, max(0, left):max(0, left) + x.shape[3]] = x
    return last


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _shifts(x: Tensor, weights: Sequence[Tensor], stride: int, dilation: int) -> list[Tensor]:
    """Less the mean over images and pixels of each weight's convolutions, from the mean image: (groups, C)."""
    S, _, H, W, C = x.shape
    widest = max(weight.shape[-1] for weight in weights)
    taps = _taps(widest, H, W, stride, dilation, x.dtype, x.device)
    taps = torch.bmm(taps.expand(S, -1, -1), x.mean(1).view(S, H * W, C)).view(S, widest, widest, 1, C)
    groups, shifts = _groups(x.shape, weights), []
    parts = taps.split(groups) if sum(groups) == S else [taps] * len(groups)
    for part, weight, G in zip(parts, weights, groups):
        k = weight.shape[-1]
        at = slice((widest - k) // 2, (widest + k) // 2)
        kernels = weight.view(len(part), G // len(part), C, k, k).permute(0, 3, 4, 1, 2)
        shifts.append((part[:, at, at] * kernels).sum((1, 2)).view(G, C))
    return shifts


@lru_cache
def _taps(k: int, H: int, W: int, stride: int, dilation: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k*k, H*W): less the share of each pixel in the mean over all outputs of what each tap reads."""
    def along(size):
        at = torch.arange(0, size, stride)[None] + dilation * (torch.arange(k)[:, None] - k // 2)
        inside = (at >= 0) & (at < size)
        taps = torch.zeros(k, size, dtype=dtype).scatter_add_(1, at.clamp(0, size - 1), inside.to(dtype))
        return taps / at.shape[1]

    return torch.kron(along(H), along(W)).neg_().to(device)


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
