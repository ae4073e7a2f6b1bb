"""Which modules of a supernet the kernels compute, and the sizes that a kernel is told."""
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conas.darts.batchnorm import has_own_forward
from conas.darts.operations import AveragePool, DilConv, FactorizedReduce, ReLUConvBN, SepConv, Zero

DEPTHWISE, POINTWISE, HALVES = range(3)  # kinds of units, see kernels.c
LARGEST = 15  # kernel size
POOLS = "average", "maximum"


class Sizes(ctypes.Structure):
    """`struct unit` of kernels.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("N", "H", "W", "C", "ld", "OH", "OW", "K", "kind", "kernel",
                                                    "stride", "dilation")] + [("eps", ctypes.c_double)]


class Unit(NamedTuple):
    """ReLU, depthwise and pointwise convolution, BatchNorm; `weights` are named as in the operation."""

    kind: int
    C: int
    K: int
    kernel: int
    stride: int
    dilation: int
    weights: tuple[str, ...]
    norm: nn.BatchNorm2d

    def sizes(self, N: int, H: int, W: int, ld: int) -> Sizes:
        """For maps (N, H, W, C) whose pixels are `ld` apart."""
        return Sizes(N, H, W, self.C, ld, -(-H // self.stride), -(-W // self.stride), self.K, self.kind, self.kernel,
                     self.stride, self.dilation, self.norm.eps)


class Operation(NamedTuple):
    """What an operation is to the kernels: `kind` "none", "skip", "units", "average", "maximum" or "own".

    An own operation is any that they do not compute; it runs as the module that it is.
    """

    kind: str
    module: nn.Module
    units: tuple[Unit, ...] = ()
    norm: nn.BatchNorm2d | None = None


class Term(NamedTuple):
    """A summand of a node: p BatchNorm(map), with p at (edge, place) of the shares; `row` is where its map lies.

    A skip is a state, and has no row. By running statistics a pool has those of each edge, from `row_eval`.
    """

    edge: int
    place: int
    source: int
    row: int | None
    row_eval: int | None
    operation: Operation


class Seen(NamedTuple):
    """What a pass in training has seen: for each row the modules whose running statistics follow it."""

    norms: Sequence[Sequence[nn.BatchNorm2d]]
    records: Tensor  # (rows, 5, C): mean, biased variance, 1/std, weight, bias
    pixels: Sequence[int]  # by row


def check_pixels(pixels: Sequence[int]) -> None:
    """Raise ValueError, as torch does, where BatchNorm has one value only for each channel."""
    if 1 in pixels:
        raise ValueError("Expected more than 1 value per channel when training")


def new_records(rows: int, C: int) -> Tensor:
    """Records (rows, 5, C), see batchnorm.c, of BatchNorms without weights, for kernels to fill in."""
    records = torch.empty(rows, 5, C, dtype=torch.float64)
    records[:, 3], records[:, 4] = 1, 0
    return records


def running_records(norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """The same of running statistics."""
    records = new_records(len(norms), len(norms[0].running_mean))
    mean, variance = (torch.stack([getattr(norm, f"running_{name}") for norm in norms]).double()
                      for name in ("mean", "var"))
    eps = torch.tensor([norm.eps for norm in norms], dtype=torch.float64)
    records[:, 0], records[:, 1], records[:, 2] = mean, variance, (variance + eps[:, None]).rsqrt()
    return records


def pool_sizes(N: int, H: int, W: int, C: int, ld: int, stride: int, eps: float) -> Sizes:
    """Of the pools of 3x3 pixels."""
    return Sizes(N, H, W, C, ld, -(-H // stride), -(-W // stride), C, 0, 3, stride, 1, eps)


def read(module: nn.Module) -> Operation:
    """Say what an operation of a supernet is to the kernels."""
    own = Operation("own", module)
    if any(is_changed(part) for part in module.modules()):
        return own
    if type(module) is Zero:
        return Operation("none", module)
    if type(module) is nn.Identity:
        return Operation("skip", module)
    if type(module) is nn.Sequential and len(module) == 2 and _is_norm(module[1]):
        pool, norm = module
        if type(pool) is AveragePool and type(pool.pool) is nn.AvgPool2d and pool.stride in (1, 2):
            inner = pool.pool
            if (inner.kernel_size, inner.stride, inner.padding, inner.count_include_pad, inner.ceil_mode,
                    inner.divisor_override) == (3, pool.stride, 1, False, False, None):
                return Operation("average", module, norm=norm)
        if type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.padding, pool.dilation, pool.ceil_mode,
                                           pool.return_indices) == (3, 1, 1, False, False) and pool.stride in (1, 2):
            return Operation("maximum", module, norm=norm)
    units = read_units(module)
    return own if units is None else Operation("units", module, units)


def read_units(module: nn.Module, affine: bool = False) -> tuple[Unit, ...] | None:
    """The units that an operation is made of, or None if it is made of others.

    `affine` says whether their BatchNorms have weights and biases; kernels compute what comes before these.
    """
    if any(is_changed(part) for part in module.modules()):
        return None
    if type(module) is FactorizedReduce:
        return _halves(module, affine)
    if type(module) not in (SepConv, DilConv, ReLUConvBN) or type(module.op) is not nn.Sequential:
        return None
    parts, units = list(module.op), []
    size = 3 if type(module) is ReLUConvBN else 4
    if len(parts) % size:
        return None
    for first in range(0, len(parts), size):
        relu, *convolutions, norm = parts[first:first + size]
        unit = _unit(convolutions, norm, [f"op.{first + 1 + i}.weight" for i in range(size - 2)], affine)
        if type(relu) is not nn.ReLU or unit is None:
            return None
        units.append(unit)
    return tuple(units)


def is_changed(part: nn.Module) -> bool:
    """Whether it may compute something else than its class says."""
    return bool(has_own_forward(part) or has_hooks(part) or getattr(part, "parametrizations", None))


def has_hooks(part: nn.Module) -> bool:
    """Whether something else runs when it does, forwards or backwards."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def _is_norm(norm: nn.Module, affine: bool = False) -> bool:
    return (type(norm) is nn.BatchNorm2d and norm.affine == affine and norm.track_running_stats
            and norm.momentum is not None)


def _unit(convolutions: Sequence[nn.Module], norm: nn.Module, names: Sequence[str], affine: bool) -> Unit | None:
    if not _is_norm(norm, affine):
        return None
    if any(type(part) is not nn.Conv2d or part.bias is not None or part.padding_mode != "zeros"
           for part in convolutions):
        return None
    *depthwise, pointwise = convolutions
    C, K = pointwise.in_channels, pointwise.out_channels
    if _geometry(pointwise) != ((1, 1), (1, 1), (0, 0), (1, 1), 1) or norm.num_features != K:
        return None
    if not depthwise:
        return Unit(POINTWISE, C, K, 0, 1, 1, tuple(names), norm)
    kernel, stride, padding, dilation, groups = _geometry(depthwise[0])
    k, s, d = kernel[0], stride[0], dilation[0]
    wanted = (k, k), (s, s), ((k - 1) * d // 2,) * 2, (d, d), C
    if ((kernel, stride, padding, dilation, groups) != wanted or k % 2 == 0 or k > LARGEST or s not in (1, 2)
            or (depthwise[0].in_channels, depthwise[0].out_channels) != (C, C)):
        return None
    return Unit(DEPTHWISE, C, C, k, s, d, tuple(names), norm) if C == K else None


def _geometry(part: nn.Conv2d) -> tuple:
    return part.kernel_size, part.stride, part.padding, part.dilation, part.groups


def _halves(module: FactorizedReduce, affine: bool) -> tuple[Unit, ...] | None:
    first, second, norm = module.conv_1, module.conv_2, module.bn
    C, K = first.in_channels, first.out_channels + second.out_channels
    for part, channels in (first, K // 2), (second, K - K // 2):
        if (type(part) is not nn.Conv2d or part.bias is not None or (part.in_channels, part.out_channels) != (
                C, channels) or _geometry(part) != ((1, 1), (1, 1), (0, 0), (1, 1), 1)):
            return None
    if K < 2 or not _is_norm(norm, affine) or norm.num_features != K:
        return None
    return (Unit(HALVES, C, K, 0, 2, 1, ("conv_1.weight", "conv_2.weight"), norm),)
