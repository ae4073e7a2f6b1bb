"""Derived networks in training by kernels: ReLU, convolutions and BatchNorm in one pass, once or twice.

What BatchNorm multiplies and adds comes after it, by torch's operators. A step took 1/1.24 of its time before; by
torch.compile, which first compiled for 37 s, 1/1.16, of another network (one thread, n = 7 each, torch 2.14.1).
"""
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from conas.darts.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.engine.native.functions import run_operation
from conas.engine.native.library import TYPES, Library
from conas.engine.native.parts import Operation, Seen, Unit, has_hooks, read_units
from conas.engine.native.swap import update_running

KNOWN = SepConv, DilConv, FactorizedReduce, ReLUConvBN


def train_by_kernels(network: nn.Module, library: Library) -> int:
    """Let kernels compute the passes in training of what they know of a derived network, in place; the modules stay.

    Returns how many operations these are. Evaluation, other devices and types, autocast and compilers run the modules
    as they are, and so does training under hooks and dispatch modes, since counters of operations are such.
    """
    count = 0
    for module in network.modules():
        units = read_units(module, affine=True) if type(module) in KNOWN else None
        if units is not None:
            module.forward = partial(_forward, module, list(module.modules())[1:], units, library, module.forward)
            count += 1
    return count


def _forward(module: nn.Module, parts: Sequence[nn.Module], units: Sequence[Unit], library: Library,
             plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    weights = [[module.get_parameter(name) for name in unit.weights] for unit in units]
    if not (module.training and torch.is_grad_enabled() and x.device.type == "cpu" and len(x) > 0
            and x.dtype == weights[0][0].dtype in TYPES and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and _get_current_dispatch_mode() is None and not any(map(has_hooks, parts))):
        return plain(x)
    seen: list[Seen] = []
    for unit, of_unit in zip(units, weights):
        x = run_operation(library, Operation("units", module, (unit,)), x, of_unit, True, seen)
        x = _Affine.apply(x, unit.norm.weight, unit.norm.bias)
    update_running(seen)
    return x


class _Affine(torch.autograd.Function):
    """weight x + bias for maps x (N, C, H, W), channels last; `weight` and `bias` are (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.addcmul(bias[:, None, None], x, weight[:, None, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, of_x = (maps.permute(0, 2, 3, 1).reshape(-1, len(weight)) for maps in (grad, x))
        return grad * weight[:, None, None], (rows * of_x).sum(0), rows.sum(0)
