"""Depthwise convolutions of many edges at once, channels last, with fast gradients on CPUs.

oneDNN has a fast kernel for every depthwise forward convolution of channels-last images, but takes five to fifty times
as long for some gradients. So each gradient is put as a problem that has a fast kernel; the arithmetic is the same up
to the order of the sums:

* the gradient of the input is the forward convolution of the output's gradient with the flipped kernel;
* the gradient of a kernel wider than three columns is put together from those of three columns each;
* the gradient of a kernel of dilation 2 is that of a plain one `in_phases`, since such a convolution never mixes odd
  and even rows or columns.

On GPUs the libraries are fast for plain kernels only, so there all that has dilation 2 goes by phases.

Maps of G groups of C channels are (G, N, H, W, C). Small ones are convolved side by side, as channels of one image
(N, H, W, G*C); what was convolved is then a view of that, and whoever reads it writes its own in the order it likes.
"""
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d

FAST_DILATED = ("cpu",)  # devices whose library has a fast kernel for dilated convolutions; not for their gradients
# bytes of a group's map, or of those of all groups, up to which groups are convolved side by side: more leave the cache
SMALL, FEW = 2**21, 12 * 2**20


def side_by_side(x: Tensor, times: int = 1) -> list[Tensor]:
    """What `convolve` reads of S states x (S, N, H, W, C), each for as many groups as `times`.

    One by one, (N, C, H, W), or if they are small in one block (N, S*times*C, H, W); channels last.
    """
    return _blocks(x, times, _is_small(x, x.shape[1:], len(x) * times))


def convolve(blocks: Sequence[Sequence[Tensor]], kernels: Sequence[Tensor], shifts: Sequence[Tensor | None], C: int,
             stride: int = 1, dilation: int = 1) -> list[list[Tensor]]:
    """Depthwise convolutions with odd square kernels and "same" padding.

    Each kernel (G*C, 1, k, k) serves G groups, and reads `blocks` as `side_by_side` makes them. Returns for every one
    z + shift, of shift (G*C,), in parts (groups, N, ceil(H / stride), ceil(W / stride), C); see `apart`.
    """
    outs = []
    for inputs, kernel, shift in zip(blocks, kernels, shifts):
        by = [None] * len(inputs) if shift is None else shift.chunk(len(inputs))
        outs.append([groups_of(_convolution(block, own, stride, dilation, of), C)
                     for block, own, of in zip(inputs, kernel.chunk(len(inputs)), by)])
    return outs


def convolve_back(grad: Tensor, shape: Sequence[int], x: Tensor | Sequence[Tensor] | None, kernels: Sequence[Tensor],
                  flipped: Sequence[Tensor], stride: int = 1, dilation: int = 1, x_wanted: bool = True,
                  own: bool = False, total: Tensor | None = None) -> tuple[Tensor | list[Tensor] | None, list[Tensor]]:
    """The gradients of `convolve` by x, of this shape, and by the kernels: by none if x is not given.

    With a `total`, the gradient by x is added to that, in place.

    `grad` is that by all parts joined, `flipped` are the kernels with rows and columns reversed. x may come by kernel,
    `bordered` for kernels that want that. If groups have maps of their `own`, which only plain ones do, x must come so,
    `shape` is that of all joined, and the gradient by x is a list by kernel.
    """
    S, N, H, W, C = shape
    if goes_by_phases(grad, stride, dilation, x is not None):
        phases, into = (None if maps is None else in_phases(maps) for maps in (x, total))
        d_x, d_kernels = convolve_back(in_phases(grad), (S, 4 * N, H // 2, W // 2, C), phases, kernels, flipped,
                                       x_wanted=x_wanted, total=into)
        return out_of_phases(d_x) if x_wanted and total is None else total, d_kernels
    groups, small = [len(kernel) // C for kernel in kernels], _is_small(grad, shape[1:], len(kernels[0]) // C)
    grads, d_x, d_kernels = [_blocks(part, 1, small) for part in grad.split(groups)], None, []
    if x_wanted:
        parts = [_input_gradients(*of, shape, stride, dilation) for of in zip(grads, kernels, flipped)]
        d_x = ([join([groups_of(part(), C) for part in of]) for of in parts] if own else
               _sum(parts, shape, small, total))
    if x is not None:
        if isinstance(x, Tensor):
            x = [into_border(x, kernel) if dilation == 1 else x for kernel in kernels]
        d_kernels = [_weight_gradient(*of, stride, dilation, small) for of in zip(grads, x, kernels)]
    return d_x, d_kernels


def apart(maps: Sequence[Sequence[Tensor]]) -> Tensor:
    """All groups of all kernels of what `convolve` returns, (G, N, H, W, C), one after another in memory."""
    return join(list(chain(*maps))).contiguous()


def rectify(y: Tensor, size: int, memory: Sequence[Tensor | None] | None, kept: bool) -> list[Tensor]:
    """relu(y) of maps y (G, N, H, W, C): parts of `size` groups each, in memory as `convolve` reads them.

    `memory` is overwritten where there is some: parts that `convolve` has returned, or the `inside` of
    `bordered` ones. So is y, unless it is to be `kept`.
    """
    parts, rectified = y.split(size), []
    for part, out in zip(parts, memory or [None] * len(parts)):
        if out is None and _is_small(y, y.shape[1:], size):
            out = y.new_empty(*y.shape[1:4], size, y.shape[4]).permute(3, 0, 1, 2, 4)
        if out is None:
            rectified.append(part.relu() if kept else part.relu_())
        else:
            rectified.append(torch.clamp_min(part, 0, out=out))
    return rectified


def bordered(like: Tensor, size: int, kernel: Tensor, small: bool | None = None) -> Tensor | None:
    """Memory for `size` groups of maps like these (..., N, H, W, C), as the gradient of a wide kernel reads them: with
    a border of zeros, see `inside`. Others need none.

    It is (size, N, H + 2 border, W + border, C). What is right of a row's pixels is what is left of those of the next;
    so all is still as it should be where every row begins some pixels later: in a `_window`.
    """
    if not (border := _border(kernel)):
        return None
    *images, H, W, C = like.shape[1:]
    small = _is_small(like, like.shape[1:], size) if small is None else small
    images = *images, H + 2 * border, W + border
    count, end = prod(images) * size * C, (kernel.shape[-1] - 3) * C * (size if small else 1)  # behind the last row
    flat = like.new_zeros(count + end)[:count]
    return flat.view(*images, size, C).movedim(-2, 0) if small else flat.view(size, *images, C)


def into_border(x: Tensor, kernel: Tensor, memory: Tensor | None = None) -> Tensor:
    """The states x (S, ..., H, W, C) for the gradient of this kernel, in `bordered` memory if it wants that.

    The `memory`, if there is some, is of as many groups as the kernel is for.
    """
    if not _border(kernel):
        return x
    groups = len(kernel) // x.shape[-1]
    small = _is_small(x, x.shape[1:], groups)
    groups = groups if small else len(x)  # one by one, all groups of a state read the same map
    memory = bordered(x, groups, kernel, small) if memory is None else memory[:groups]
    inside(memory, kernel).unflatten(0, (len(x), -1)).copy_(x[:, None])
    return memory


def _window(maps: Tensor, column: int) -> Tensor:
    """Of `bordered` maps: the same with every row begun at this column."""
    return maps.as_strided(maps.shape, maps.stride(), maps.storage_offset() + column * maps.stride(-2))


def inside(maps: Tensor | None, kernel: Tensor) -> Tensor | None:
    """The view of `bordered` maps without their border."""
    border = _border(kernel)
    return None if maps is None else maps[..., border:-border, border:, :]


def rectify_back(grads: Sequence[Tensor], parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Into `out` (G, N, H, W, C), from the gradients by the parts of relu(y) to that by y; parts of y serve as well."""
    for grad, part, of in zip(grads, parts, out.split([len(grad) for grad in grads])):
        torch.ops.aten.threshold_backward.grad_input(grad, part, 0, grad_input=of)
    return out


def blockwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Iterator[Tensor]:
    """`convolve` with one kernel, in blocks (B, N, H', W', C) of as many groups as are convolved at once."""
    C, phased = x.shape[-1], goes_by_phases(x, stride, dilation)
    blocks = side_by_side(in_phases(x) if phased else x, len(weight) // C // len(x))
    for block, kernel in zip(blocks, weight.chunk(len(blocks))):
        z = groups_of(_convolution(block, kernel, stride, 1 if phased else dilation), C)
        yield out_of_phases(z) if phased else z


def goes_by_phases(maps: Tensor, stride: int, dilation: int, weights_wanted: bool = False) -> bool:
    """Whether a convolution of such maps (..., H, W, C), or its gradients, are faster `in_phases`."""
    H, W = maps.shape[-3:-1]
    wanted = weights_wanted or maps.device.type not in FAST_DILATED
    return wanted and stride == 1 and dilation == 2 and H % 2 == W % 2 == 0


def in_phases(x: Tensor) -> Tensor:
    """(S, N, 2H, 2W, C) -> (S, N, 2, 2, H, W, C), a view: pixels of even and odd rows and columns as images."""
    H, W = x.shape[2:4]
    return x.unflatten(3, (W // 2, 2)).unflatten(2, (H // 2, 2)).permute(0, 1, 3, 5, 2, 4, 6)


def out_of_phases(x: Tensor) -> Tensor:
    """The inverse of `in_phases`, of its images one after another: (S, N*2*2, H, W, C) -> (S, N, 2H, 2W, C)."""
    return x.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3, 6).flatten(4, 5).flatten(2, 3)


def _is_small(like: Tensor, shape: Sequence[int], groups: int) -> bool:
    # an exported graph serves every batch size, and may not depend on it
    if like.device.type != "cpu" or torch.compiler.is_exporting():
        return True
    size = prod(shape) * like.element_size()
    return size <= SMALL or size * groups <= FEW


def _blocks(x: Tensor, times: int, small: bool) -> list[Tensor]:
    """As `side_by_side`, also of states in phases."""
    S, *images, H, W, C = x.shape
    N = prod(images)
    if not small:
        maps = x.reshape(S, N, H, W, C).contiguous().permute(0, 1, 4, 2, 3).unbind()
        return [m for m in maps for _ in range(times)]
    x = x.movedim(0, -2)
    if times > 1:
        x = x.unsqueeze(-2).expand(*images, H, W, S, times, C)
    return [x.reshape(N, H, W, S * times * C).permute(0, 3, 1, 2)]


def _convolution(x, weight, stride, dilation, bias=None):
    return conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] // 2), dilation, len(weight))


def _gradients(grad, x, weight, stride, dilation, padding, wanted):
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2,
                                               False, [0, 0], len(weight), [*wanted, False])


def _input_gradients(grads, kernel, flipped, shape, stride, dilation):
    """What makes the gradient by what each of one kernel's blocks has read, a function for each."""
    _, N, H, W, _ = shape
    # of which only the shape is read
    x = None if stride == 1 else grads[0].new_empty(N, H, W, grads[0].shape[1]).permute(0, 3, 1, 2)

    def one(grad, own, turned):
        if stride == 1:
            return _convolution(grad, turned, 1, dilation)
        return _gradients(grad, x, own, stride, dilation, dilation * (own.shape[-1] // 2), (True, False))[0]

    return [partial(one, *of) for of in zip(grads, kernel.chunk(len(grads)), flipped.chunk(len(grads)))]


def _sum(gradients, shape, small, total):
    """Of all gradients by kernel, over those that have read the same of S states: added to `total`, if there is one."""
    S, C, sums = shape[0], shape[-1], None if total is None or small else total.unbind()
    for of in gradients:
        readers = len(of) // S or 1  # of one state
        for turn in range(readers):
            parts = [gradient().permute(0, 2, 3, 1) for gradient in of[turn::readers]]  # one of each state, or of all
            if sums is None:
                sums = parts
            else:
                torch._foreach_add_(sums, [part.unflatten(0, sums[0].shape[:-3]) for part in parts])
    if small:
        d_x = sums[0].unflatten(3, (S, -1, C))
        d_x = (d_x.sum(4) if d_x.shape[4] > 1 else d_x.squeeze(4)).permute(3, 0, 1, 2, 4)
        return d_x if total is None else total.add_(d_x.unflatten(1, total.shape[1:-3]))
    return join([part[None] for part in sums]) if total is None else total


def _border(kernel: Tensor) -> int:
    """How wide a border its gradient needs, since it is put together from those of three columns each."""
    return kernel.shape[-1] // 2 if kernel.shape[-1] > 3 and kernel.device.type == "cpu" else 0


def _weight_gradient(grads, x, kernel, stride, dilation, small):
    k, kernels, times = kernel.shape[-1], kernel.chunk(len(grads)), len(kernel) // x.shape[-1] // len(x)
    if dilation > 1 or not _border(kernel):
        return join([_gradients(grad, block, by, stride, dilation, dilation * (k // 2), (False, True))[1]
                     for grad, block, by in zip(grads, _blocks(x, times, small), kernels)])
    # three columns at a time, of what those of the kernel read; from s on they begin s pixels later
    width, starts = stride * (grads[0].shape[3] - 1) + 3, range(0, k - 2, 2)
    windows = [_window(x, s)[..., :width if k > 5 else None, :] for s in starts]
    parts = [_gradients(grad, block, by[..., :3], stride, dilation, 0, (False, True))[1]
             for window in windows for grad, block, by in zip(grads, _blocks(window, times, small), kernels)]
    columns = parts if len(grads) == 1 else torch.cat(parts).chunk(len(starts))
    return torch.cat([part[..., 1 if s else 0:] for s, part in zip(starts, columns)], 3)


def groups_of(block: Tensor, C: int) -> Tensor:
    """(N, G*C, H, W) -> (G, N, H, W, C), a view."""
    return block.permute(0, 2, 3, 1).unflatten(3, (-1, C)).permute(3, 0, 1, 2, 4)


def join(parts: Sequence[Tensor]) -> Tensor:
    """One after another, without a copy if there is one only."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def row_dots(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """The sum of a b over the last dimension, kept as one of size 1, and of `plus`: in one call, for short rows."""
    rows, columns = a.reshape(-1, 1, a.shape[-1]), b.reshape(-1, b.shape[-1], 1)
    dots = torch.bmm(rows, columns) if plus is None else torch.baddbmm(plus, rows, columns)
    return dots.view(*a.shape[:-1], 1)
