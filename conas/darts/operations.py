"""The candidate operations of DARTS by name, and the two preprocessing blocks of a cell.

Every operation maps (N, C, H, W) to (N, C, ceil(H/stride), ceil(W/stride)). Submodule names are those of the
published DARTS code, so that its `state_dict` files load. `affine` is False throughout a supernet.
"""
import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from conas.darts.genotype import NAME
from conas.darts.primitives import Primitives
from conas.errors import InputError

RIGHT_GRADIENT = ("cpu",)  # devices on which torch's gradient of average pooling is right

class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _separable(C: int, kernel_size: int, stride: int, padding: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise convolution, pointwise convolution, BatchNorm."""
    return [
        nn.ReLU(),
        nn.Conv2d(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ]


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the first application carries the stride."""

    def __init__(self, C: int, kernel_size: int, stride: int, affine: bool = True):
        super().__init__()
        padding = kernel_size // 2
        self.op = nn.Sequential(*_separable(C, kernel_size, stride, padding, 1, affine),
                                *_separable(C, kernel_size, 1, padding, 1, affine))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DilConv(nn.Module):
    """Depthwise-separable convolution with dilation 2: a 3x3 kernel sees 5x5 pixels, a 5x5 kernel 9x9."""

    def __init__(self, C: int, kernel_size: int, stride: int, affine: bool = True):
        super().__init__()
        self.op = nn.Sequential(*_separable(C, kernel_size, stride, kernel_size - 1, 2, affine))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halve height and width without losing pixels: two 1x1 convolutions of every second pixel, from the first and from
    the second on.

    Odd sizes are padded at the lower right, so that both halves have ceil(size/2) pixels. The convolutions themselves
    have no stride: oneDNN's weight gradient of one with a stride writes past its memory for few channels, and the
    process crashes or computes other numbers (uxlfoundation/oneDNN#6035).
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        second = nn.functional.pad(x[:, :, 1::2, 1::2], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.bn(torch.cat([self.conv_1(x[:, :, ::2, ::2]), self.conv_2(second)], dim=1))


class Zero(nn.Module):
    """The operation `none`: zeros of the output's shape."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])


class AveragePool(nn.Module):
    """`average_pool` as a module. Torch's own does it where that is right, so that tools that count modules see it."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride, self.pool = stride, nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if _is_right(x) else average_pool(x, self.stride)


def _is_right(x: Tensor) -> bool:
    return x.device.type in RIGHT_GRADIENT or not (x.requires_grad and torch.is_grad_enabled())


def average_pool(x: Tensor, stride: int) -> Tensor:
    """The mean of the 3x3 pixels around each that lie inside the image: (N, C, H, W) to (N, C, ceil(H/stride), ...).

    On GPUs without torch's gradient: that of avg_pool2d is wrong on CUDA for padded images in channels last, seen with
    version 2.11 (pytorch/pytorch#188344), and nothing says so. The mean of those n pixels of a window that lie inside
    is the mean of the zero-padded window times 9 / n, so pooling without padding does.
    """
    if _is_right(x):
        return avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    means = avg_pool2d(pad(x, (1, 1, 1, 1)), 3, stride)
    return torch.addcmul(means, means, missing_pixels(*x.shape[2:], stride, x.dtype, x.device))


@lru_cache
def missing_pixels(H: int, W: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H', W'): 9 / n - 1 for 3x3 windows that have n pixels inside an image (H, W)."""
    share = avg_pool2d(torch.ones(1, H, W, dtype=torch.float64, device="cpu"), 3, stride, 1)  # n / 9
    return (1 / share[0] - 1).to(device, dtype)


def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


OPERATIONS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: AveragePool(stride),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, 5, stride, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, 7, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, 5, stride, affine),
    "conv_7x1_1x7": _conv_7x1_1x7,
}


def with_own(own: object) -> dict[str, Callable]:
    """The operations by name, with those of a space's own, which win. Raises InputError for what is no such table."""
    if not isinstance(own, Mapping) or not all(isinstance(name, str) and re.fullmatch(NAME, name) and callable(make)
                                               for name, make in own.items()):
        raise InputError("OPERATIONS of genotypes.py: must be a dict of functions (C, stride, affine) by name, of at "
                         "most 64 letters, digits and _.+-")
    return OPERATIONS | dict(own)


def check_own(own: Mapping[str, Callable], C: int, affine: bool) -> None:
    """Raise InputError unless each operation of a space's own maps states as a cell needs it, for both strides.

    It must leave its input as it is, since other edges read it. The random generators stay where they are.
    """
    for name, make in own.items():
        where = f"OPERATIONS of genotypes.py: {name}"
        for stride in (1, 2):
            x = torch.zeros(2, C, 8, 8)
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    y = make(C, stride, affine)(x)
            except Exception as error:  # whatever the code of somebody else raises
                raise InputError(f"{where} fails with C={C}, stride={stride}, affine={affine}: "
                                 f"{type(error).__name__}: {error}") from error
            wanted = (2, C, 8 // stride, 8 // stride)
            if not isinstance(y, Tensor) or y.shape != wanted:
                found = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise InputError(f"{where} makes {found} of {tuple(x.shape)} with stride {stride}; it must make "
                                 f"{wanted}")
            if x._version:
                raise InputError(f"{where} changes its input, which other edges read; give its first layer "
                                 "inplace=False")


def choose_operations(given: object, own: object, C: int) -> tuple[Primitives, dict[str, Callable]]:
    """The primitives of a supernet of C channels, from PRIMITIVES, and all operations by name.

    Raises InputError for what cannot be used.
    """
    primitives, operations = Primitives(given), with_own(own)
    check_primitives(primitives, operations)
    check_own({name: make for name, make in own.items() if name in primitives}, C, affine=False)
    return primitives, operations


def check_primitives(primitives: Primitives, operations: Collection[str]) -> None:
    """Raise InputError unless a space can search over these: known, and on every edge distinct and not `none` alone."""
    for name in primitives:
        if name not in operations:
            near = get_close_matches(str(name), operations, 3, 0.4) or sorted(operations)
            raise InputError(f"PRIMITIVES: {name!r} is no operation; did you mean {' or '.join(near)}? An operation of "
                             "your own goes into OPERATIONS of genotypes.py")
    for where, names in primitives.places():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{where}: {', '.join(twice)} is there twice; take one away, since each has an alpha")
        if not set(names) - {"none"}:
            raise InputError(f"{where}: {', '.join(names) or 'empty'}; an edge needs an operation other than none")
