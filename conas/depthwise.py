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
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from conas.fused import Tape, by_hand

SMALL = 2**20  # bytes of a group's map up to which groups are convolved side by side: larger ones leave the cache


def in_phases(x: Tensor) -> Tensor:
    """(..., N, 2H, 2W, C) -> (..., N, 2, 2, H, W, C): a view, by even and odd rows and columns."""
    H, W = x.shape[-3:-1]
    x = x.unflatten(-2, (W // 2, 2)).unflatten(-4, (H // 2, 2))
    return x.movedim((-4, -2), (-5, -4))


def phases(x: Tensor) -> Tensor:
    """(S, N, 2H, 2W, C) -> (S, 4N, H, W, C): pixels of even and odd rows and columns as images of their own."""
    return in_phases(x).flatten(1, 3)


def interleave(x: Tensor) -> Tensor:
    """The inverse of `phases`, for one state: (4N, H, W, C) -> (N, 2H, 2W, C)."""
    N, H, W, C = x.shape
    x = x.view(N // 4, 2, 2, H, W, C).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(N // 4, 2 * H, 2 * W, C)


def add_interleaved(total: Tensor, part: Tensor) -> None:
    """Add to total (S, N, 2H, 2W, C), in place, what has part (S, 4N, H, W, C) as its phases."""
    in_phases(total).add_(part.unflatten(1, (-1, 2, 2)))


def convolve(x: Tensor, kernels: Sequence[Tensor], stride: int = 1, dilation: int = 1, shift: Tensor | None = None
             ) -> Tensor:
    """Depthwise convolutions with odd square kernels and "same" padding, for groups of C channels.

    Each kernel (G*C, 1, k, k) serves G groups. x (S, N, H, W, C) holds the inputs of all groups of all kernels if S is
    their number; else S states, each read by G/S groups of every kernel. Returns z + shift, (all groups, N, ceil(H /
    stride), ceil(W / stride), C), for `shift` (all groups, C).
    """
    groups, small, outs = _groups(x.shape[-1], kernels), _is_small(x, x.shape), []
    shifts = [None] * len(kernels) if shift is None else shift.split(groups)
    for blocks, kernel, part in zip(_inputs(x, groups, small), kernels, shifts):
        parts = [None] * len(blocks) if part is None else part.view(len(blocks), -1).unbind()
        outs += [_convolution(block, own, stride, dilation, by)
                 for block, own, by in zip(blocks, kernel.chunk(len(blocks)), parts)]
    return _apart(outs, x.shape[-1])


def convolve_back(grad: Tensor, shape: Sequence[int], x: Tensor | None, kernels: Sequence[Tensor],
                  flipped: Sequence[Tensor], stride: int = 1, dilation: int = 1, x_wanted: bool = True
                  ) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of `convolve` by x, of this shape, and by the kernels: by none if x is not given.

    `flipped` are the kernels with rows and columns reversed.
    """
    groups, small = _groups(shape[-1], kernels), _is_small(grad, shape)
    grads = [_blocks(part, 1, small) for part in grad.split(groups)]
    d_x, d_kernels = None, []
    if x_wanted:
        d_x = _input_gradient(grads, shape, kernels, flipped, stride, dilation)
    if x is not None:
        d_kernels = [_weight_gradient(own, blocks, kernel, stride, dilation)
                     for own, blocks, kernel in zip(grads, _inputs(x, groups, small), kernels)]
    return d_x, d_kernels


def blockwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Iterator[Tensor]:
    """`convolve` with one kernel, in blocks (B, N, H', W', C) of as many groups as are convolved at once."""
    C = x.shape[-1]
    blocks = _blocks(x, len(weight) // C // len(x), _is_small(x, x.shape))
    for block, kernel in zip(blocks, weight.chunk(len(blocks))):
        yield _groups_of(_convolution(block, kernel, stride, dilation), C)


def _is_small(like: Tensor, shape: Sequence[int]) -> bool:
    # an exported graph serves every batch size, and may not depend on it
    exporting = torch.compiler.is_exporting()
    return like.device.type != "cpu" or exporting or prod(shape[1:]) * like.element_size() <= SMALL


def _groups(C: int, kernels: Sequence[Tensor]) -> list[int]:
    return [len(kernel) // C for kernel in kernels]


def _inputs(x: Tensor, groups: list[int], small: bool) -> list[list[Tensor]]:
    """The `_blocks` that each kernel reads."""
    if len(x) == sum(groups):
        return [_blocks(part, 1, small) for part in x.split(groups)]
    blocks = {G: _blocks(x, G // len(x), small) for G in set(groups)}  # kernels of several sizes read the same
    return [blocks[G] for G in groups]


def _blocks(x: Tensor, times: int, small: bool) -> list[Tensor]:
    """States (S, N, H, W, C), each as often as `times`: one by one, (N, C, H, W), or if they are small side by side in
    one block (N, S*times*C, H, W); channels last."""
    S, N, H, W, C = x.shape
    if not small:
        return [m for m in x.permute(0, 1, 4, 2, 3).unbind() for _ in range(times)]
    x = x.permute(1, 2, 3, 0, 4)[:, :, :, :, None].expand(N, H, W, S, times, C)
    return [x.reshape(N, H, W, S * times * C).permute(0, 3, 1, 2)]


def _groups_of(block: Tensor, C: int) -> Tensor:
    """(N, G*C, H, W) -> (G, N, H, W, C), a view."""
    return block.permute(0, 2, 3, 1).unflatten(3, (-1, C)).permute(3, 0, 1, 2, 4)


def _apart(blocks: list[Tensor], C: int) -> Tensor:
    """All groups of all blocks: (all groups, N, H, W, C), contiguous."""
    return join([_groups_of(block, C) for block in blocks]).contiguous()


def _convolution(x, weight, stride, dilation, bias=None):
    return conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] // 2), dilation, len(weight))


def _gradients(grad, x, weight, stride, dilation, padding, wanted):
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2,
                                               False, [0, 0], len(weight), [*wanted, False])


def _input_gradient(grads, shape, kernels, flipped, stride, dilation):
    (S, N, H, W, C), sums = shape, []
    separate = sum(_groups(C, kernels)) == S
    for blocks, kernel, turned in zip(grads, kernels, flipped):
        E = 1 if separate else len(blocks) // S or 1  # of the blocks that read the same state
        for i, (grad, own, by) in enumerate(zip(blocks, kernel.chunk(len(blocks)), turned.chunk(len(blocks)))):
            if stride == 1:
                part = _convolution(grad, by, 1, dilation)
            else:
                x = grad.new_empty(N, H, W, grad.shape[1]).permute(0, 3, 1, 2)  # of which only the shape is read
                part = _gradients(grad, x, own, stride, dilation, dilation * (own.shape[-1] // 2), (True, False))[0]
            if separate or i // E == len(sums):
                sums.append(part)
            else:
                sums[i // E] += part
    if separate or sums[0].shape[1] == C:
        return _apart(sums, C)
    d_x = sums[0].permute(0, 2, 3, 1).unflatten(3, (S, -1, C))
    return (d_x.sum(4) if d_x.shape[4] > 1 else d_x.squeeze(4)).permute(3, 0, 1, 2, 4)


def _weight_gradient(grads, blocks, kernel, stride, dilation):
    k, kernels = kernel.shape[-1], kernel.chunk(len(grads))
    if k <= 3 or dilation > 1 or kernel.device.type != "cpu":
        return join([_gradients(grad, block, own, stride, dilation, dilation * (k // 2), (False, True))[1]
                      for grad, block, own in zip(grads, blocks, kernels)])
    columns = []
    for s in range(0, k - 2, 2):  # columns s to s+2 of the kernel, from an input that begins s columns later
        left = k // 2 - s
        right = stride * (grads[0].shape[3] - 1) + 3 - left - blocks[0].shape[3]
        parts, padded, inside = [], None, None
        for grad, block, own in zip(grads, blocks, kernels):
            if block is not inside:
                padded, inside = _padded(block, left, right, k // 2, padded), block
            parts.append(_gradients(grad, padded, own[..., :3], stride, dilation, 0, (False, True))[1])
        columns.append(join(parts)[..., 1 if s else 0:])
    return torch.cat(columns, 3)


def _padded(x: Tensor, left: int, right: int, rows: int, last: Tensor | None) -> Tensor:
    """x (N, C, H, W) with zeros around it, in the memory of the `last` one, which has them already."""
    if last is None:
        return pad(x, (left, right, rows, rows))
    x = x[..., max(0, -left):x.shape[3] + min(0, right)]  # as `pad` cuts off what is less than nothing
    last[:, :, rows:-rows, max(0, left):max(0, left) + x.shape[3]] = x
    return last


def join(parts: Sequence[Tensor]) -> Tensor:
    """One after another, without a copy if there is one only."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def shifts(x: Tensor, kernels: Tensor, stride: int, dilations: Sequence[int]) -> Tensor:
    """Less the mean over images and pixels of convolutions of the states x (S, N, H, W, C), from the mean image.

    `kernels` (F, k*k, K, S, E, C) are of K convolutions of each of F `dilations`, to E nodes, of size k or with a
    border of zeros. Returns (F, K, S, E, C).
    """
    S, _, H, W, C = x.shape
    F, area = kernels.shape[:2]
    taps = _taps(round(area ** 0.5), H, W, stride, tuple(dilations), x.dtype, x.device)
    taps = torch.bmm(taps.expand(S, -1, -1), x.mean(1).view(S, H * W, C))
    return (taps.view(S, F, area, C).permute(1, 2, 0, 3)[:, :, None, :, None] * kernels).sum(1)


@lru_cache
def _taps(k: int, H: int, W: int, stride: int, dilations: tuple[int, ...], dtype: torch.dtype, device: torch.device
          ) -> Tensor:
    """(F*k*k, H*W): less the share of each pixel in the mean over all outputs of what each tap reads."""
    def along(size, dilation):
        at = torch.arange(0, size, stride)[None] + dilation * (torch.arange(k)[:, None] - k // 2)
        inside = (at >= 0) & (at < size)
        taps = torch.zeros(k, size, dtype=dtype).scatter_add_(1, at.clamp(0, size - 1), inside.to(dtype))
        return taps / at.shape[1]

    return torch.cat([torch.kron(along(H, d), along(W, d)) for d in dilations]).neg_().to(device)


class DepthwiseConv2d(nn.Conv2d):
    """One k x k kernel for each of C channels, k odd, "same" padding: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # other devices and autocast's dtypes have kernels that are good as they are
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.stride == (1, 1) and torch.is_grad_enabled():
            return by_hand(self._run, x, self.weight)
        return super().forward(x)

    def _run(self, tape: Tape, x: Tensor, weight: Tensor):
        x_wanted, weight_wanted = tape.wanted
        out, shape = super().forward(x), x.permute(0, 2, 3, 1)[None].shape
        kept, kept_weight, dilation = tape.keep(x if weight_wanted else None), tape.keep(weight), self.dilation[0]

        def back(grad):
            states = kept().permute(0, 2, 3, 1)[None] if weight_wanted else None
            weight = kept_weight()
            d_x, d_weight = convolve_back(grad.permute(0, 2, 3, 1)[None], shape, states, [weight], [weight.flip(2, 3)],
                                          1, dilation, x_wanted)
            return d_x[0].permute(0, 3, 1, 2) if x_wanted else None, d_weight[0] if weight_wanted else None

        return out, back
