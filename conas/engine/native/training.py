"""Derived networks in training by kernels: ReLU, convolutions and BatchNorm in one pass, once or twice, and a node in
one pass over both edges into it, each by what drop path multiplies it by.
"""
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from conas.darts.derived import Cell
from conas.darts.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.engine.native.functions import Edge, node, run_operation
from conas.engine.native.library import TYPES, Library
from conas.engine.native.parts import Operation, Seen, Unit, has_hooks, is_changed, read_units
from conas.engine.native.swap import update_running

KNOWN = SepConv, DilConv, FactorizedReduce, ReLUConvBN


def train_by_kernels(network: nn.Module, library: Library) -> int:
    """Let kernels compute the passes in training of what they know of a derived network, in place; the modules stay.

    Returns how many operations these are. Evaluation, other devices and types, autocast and compilers run the modules
    as they are, and so does training under hooks and dispatch modes, since counters of operations are such.
    """
    known = {}
    for module in network.modules():
        units = read_units(module, affine=True) if type(module) in KNOWN else None
        if units is not None:
            known[module] = _Known(module, units)
    for cell in network.modules():
        if type(cell) is Cell and not is_changed(cell):
            edges = [known.get(operation) for operation in cell._ops]
            cell._node = partial(_node, cell, edges, library, cell._node)
    for module, of in known.items():
        module.forward = partial(_forward, of, library, module.forward)
    return len(known)


class _Known:
    """An operation that kernels compute in training."""

    def __init__(self, module: nn.Module, units: Sequence[Unit]):
        self.operation = Operation("units", module, tuple(units))
        self.inside = list(module.modules())[1:]

    def weights(self) -> list[Tensor]:
        """Of its convolutions, then weight and bias of each BatchNorm."""
        units, module = self.operation.units, self.operation.module
        return ([module.get_parameter(name) for unit in units for name in unit.weights]
                + [w for unit in units for w in (unit.norm.weight, unit.norm.bias)])

    def serves(self, x: Tensor) -> bool:
        """Whether kernels compute it of x, here and now."""
        return (self.operation.module.training and x.dtype == self.weights()[0].dtype
                and not any(map(has_hooks, self.inside)))


def _may_serve(x: Tensor) -> bool:
    return (torch.is_grad_enabled() and x.device.type == "cpu" and len(x) > 0 and x.dtype in TYPES
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing() and _get_current_dispatch_mode() is None)


def _forward(known: _Known, library: Library, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not (_may_serve(x) and known.serves(x)):
        return plain(x)
    seen: list[Seen] = []
    out = run_operation(library, known.operation, x, known.weights(), True, seen)
    update_running(seen)
    return out


def _node(cell: Cell, known: Sequence[_Known | None], library: Library, plain: Callable, first: int,
          states: list[Tensor], scales: Tensor | None) -> Tensor:
    """`Cell._node`; an operation that kernels do not know runs as the module that it is."""
    if not _may_serve(states[0]):
        return plain(first, states, scales)
    edges, seen = [], []
    for i in first, first + 1:
        x, operation = states[cell.sources[i]], cell._ops[i]
        of = None if scales is None or isinstance(operation, nn.Identity) else scales[i].flatten().tolist()
        if known[i] and known[i].serves(x) and not has_hooks(operation):
            edges.append(Edge(known[i].operation, x, known[i].weights(), of))
        else:
            edges.append(Edge(None, operation(x), (), of))
    out = node(library, edges, seen)
    update_running(seen)
    return out
