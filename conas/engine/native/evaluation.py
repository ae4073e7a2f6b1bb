"""A supernet in evaluation by kernels: weights, BatchNorm and alphas are folded once, then all edges out of a state
are one call, see evaluate.c.

The definition of the network stays as it is; here are copies of what it has.
"""
from collections.abc import Sequence
from copy import deepcopy
from ctypes import byref

import numpy as np
import torch
from torch import Tensor, nn

from conas.darts.genotype import NODES
from conas.darts.stems import stem_outputs
from conas.darts.supernet import MixedOp, SearchCell, Supernet
from conas.engine.native.library import TYPES, Library, threads
from conas.engine.native.parts import (
    DEPTHWISE,
    HALVES,
    POOLS,
    Operation,
    Sizes,
    Unit,
    has_hooks,
    read,
    read_units,
)

SEPARABLE, PLAIN = 3, 4  # kinds of steps, see evaluate.c
BLOCK = 8  # images for each thread that go through all cells together: they and all states stay in the last cache
ALIGNED = 16  # numbers, where a piece of the weights begins


class _Weights:
    """What all steps of a cell read, as one vector."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []
        self.count = 0

    def put(self, piece: np.ndarray) -> int:
        """Where a piece (channels,) or (rows, channels) comes to lie, its channels padded as by UP of kernels.c."""
        at, rows, (channels, *_) = self.count, piece.size // piece.shape[-1], piece.shape[::-1]
        padded = -(-channels // 8) * 8
        room = np.zeros(-(-rows * padded // ALIGNED) * ALIGNED)
        room[:rows * padded].reshape(rows, padded)[:, :channels] = piece
        self.pieces.append(room)
        self.count += len(room)
        return at


class _Steps:
    """Steps of evaluate.c out of one state; their weights are among those of the cell."""

    def __init__(self, weights: _Weights, C: int):
        self.rows: list[list[int]] = []
        self.put, self.C = weights.put, C

    def tensor(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.int64).view(-1, 9)

    def _add(self, kind: int, to: int, places: Sequence[int], kernel: int = 1, dilation: int = 1) -> None:
        self.rows.append([kind, kernel, dilation, to, *places, *[-1] * (5 - len(places))])

    def operation(self, operation: Operation, p: float, to: int) -> np.ndarray | float:
        """Add a known operation times p. Returns its shift (C,), which is not among the steps."""
        if operation.kind == "none":
            return 0.0
        if operation.kind == "units":
            return self.convolutions(operation.module, operation.units, p, to)
        if operation.kind == "skip":
            place, scale, shift = 0, np.full(self.C, p), 0.0
        else:
            place, (scale, shift) = 1 + POOLS.index(operation.kind), _folded(operation.norm, p)
        for row in self.rows:  # one step takes one of each
            if row[0] == PLAIN and row[3] == to and row[4 + place] < 0:
                row[4 + place] = self.put(scale)
                return shift
        self._add(PLAIN, to, [-1] * place + [self.put(scale)])
        return shift

    def convolutions(self, module: nn.Module, units: Sequence[Unit], p: float, to: int) -> np.ndarray:
        """`operation` of units."""
        places = []
        for i, unit in enumerate(units):
            last = i == len(units) - 1
            scale, shift = _folded(unit.norm, p if last else 1.0)
            own = [_array(module.get_parameter(name)).reshape(-1, unit.C if name == unit.weights[-1]
                                                              or unit.kind == HALVES else unit.kernel ** 2)
                   for name in unit.weights]
            places.append(self.put(own[0].T) if unit.kind == DEPTHWISE else -1)
            pointwise = own[-1].T
            if unit.kind == HALVES:  # each of both meets inner channels of its own
                pointwise = np.zeros((2 * unit.C, unit.K))
                pointwise[:unit.C, :len(own[0])], pointwise[unit.C:, len(own[0]):] = own[0].T, own[1].T
            places.append(self.put(pointwise * scale))
            if not last:
                places.append(self.put(shift))
        self._add(SEPARABLE if len(units) > 1 else units[0].kind, to, places, units[0].kernel or 1, units[0].dilation)
        return shift


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _folded(norm: nn.BatchNorm2d, p: float) -> tuple[np.ndarray, np.ndarray]:
    """p BatchNorm(x) = scale x + shift, (C,), by running statistics."""
    scale = p / np.sqrt(_array(norm.running_var) + norm.eps)
    return scale, -scale * _array(norm.running_mean)


def _is_known(operation: Operation, C: int, stride: int) -> bool:
    """Whether evaluate.c has a step for an operation on an edge of this stride."""
    units = operation.units
    if operation.kind in POOLS:
        return operation.module[0].stride == stride
    if operation.kind != "units":
        return operation.kind == "none" or (operation.kind == "skip" and stride == 1)
    if units[0].stride != stride or any((unit.C, unit.K) != (C, C) for unit in units):
        return False
    return len(units) == 1 or (len(units) == 2 and all(unit.kind == DEPTHWISE for unit in units)
                               and units[1].stride == 1 and units[0][3:6:2] == units[1][3:6:2])


class EvaluatedCell(nn.Module):
    """A search cell in evaluation, with the `shares` (EDGES, P) that it weighs by, and its weights of now.

    An operation that evaluate.c does not know runs as the module that it is. Raises LookupError for a cell whose
    inputs it cannot preprocess.
    """

    def __init__(self, library: Library, cell: SearchCell, shares: Tensor):
        super().__init__()
        self.library, weights, p = library, _Weights(), shares.tolist()
        inputs, self.strides = [cell.preprocess0, cell.preprocess1], []
        units = [read_units(module) for module in inputs]
        if any(of is None or len(of) != 1 for of in units):
            raise LookupError("its inputs go through other modules")
        self.C, self.stride = units[0][0].K, 2 if cell.reduction else 1
        steps, shifts = [], []
        for module, of in zip(inputs, units):
            self.strides.append(of[0].stride)
            steps.append(_Steps(weights, self.C))
            shifts.append(steps[-1].convolutions(module, of, 1.0, 0))
        self.own = nn.ModuleList()
        self.own_edges: list[tuple[int, int, float]] = []  # source, node and p of each
        out, edge = np.zeros((NODES, self.C)), 0
        steps += [_Steps(weights, self.C) for _ in range(1 + NODES)]
        for node in range(NODES):
            for source in range(2 + node):
                for module, share in zip(cell._ops[edge]._ops, p[edge]):
                    operation = read(module) if module is not None else None  # this edge lacks it
                    if operation and _is_known(operation, self.C, self.stride if source < 2 else 1):
                        out[node] += steps[2 + source].operation(operation, share, node * self.C)
                    elif operation:
                        self.own.append(deepcopy(module))
                        self.own_edges.append((source, node, share))
                edge += 1
        dtype = next(cell.parameters()).dtype
        self.register_buffer("weights", torch.tensor(np.concatenate(weights.pieces), dtype=dtype))  # aligned
        for number, of in enumerate(steps):
            self.register_buffer(f"steps{number}", of.tensor())
        self.register_buffer("shifts", torch.tensor(np.concatenate([*shifts, out.ravel()]), dtype=dtype))

    def forward(self, s0: Tensor, s1: Tensor, _shares: Tensor | None = None) -> Tensor:
        """The output (N, NODES*C, H', W') of two inputs (N, channels, H, W)."""
        inputs, C = [s.permute(0, 2, 3, 1).contiguous() for s in (s0, s1)], self.C
        shifts, states = self.shifts.split([C, C, NODES * C]), []
        for number, (s, stride) in enumerate(zip(inputs, self.strides)):
            states.append(_filled(shifts[number], s, stride))
            self._call(number, s, states[number], stride)
        out = _filled(shifts[2], states[0], self.stride)
        states += out.split(C, 3)
        for source, state in enumerate(states[:-1]):
            for module, (of, node, p) in zip(self.own, self.own_edges):
                if of == source:
                    x = state.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)
                    states[2 + node].add_(module(x).permute(0, 2, 3, 1), alpha=p)
            self._call(2 + source, state, out, self.stride if source < 2 else 1)
        return out.permute(0, 3, 1, 2)

    def _call(self, number: int, x: Tensor, y: Tensor, stride: int) -> None:
        run_steps(self.library, self.get_buffer(f"steps{number}"), self.weights, x, y, self.C, stride)


def run_steps(library: Library, steps: Tensor, weights: Tensor, x: Tensor, y: Tensor, K: int, stride: int) -> None:
    """Add to y (N, H', W', channels) what steps of K channels make of x (N, H, W, C), which may be a node of NODES."""
    N, H, W, C = x.shape
    if len(steps):
        apart = C if x.is_contiguous() else NODES * C
        size = Sizes(N, H, W, C, apart, y.shape[1], y.shape[2], K, 0, 0, stride, 1, 0.0)
        library.of(x.dtype, K).evaluate(byref(size), x.data_ptr(), len(steps), steps.data_ptr(), weights.data_ptr(),
                                        y.data_ptr(), y.shape[3], threads(x.numel()))


def evaluate_operation(library: Library, module: nn.Module, p: float, x: Tensor) -> Tensor:
    """p times the output (N, K, H', W') of an operation that evaluate.c knows, of x (N, C, H, W)."""
    operation, weights, x = read(module), _Weights(), x.permute(0, 2, 3, 1).contiguous()
    units = operation.units
    K = units[-1].K if units else x.shape[3]
    stride = units[0].stride if units else module[0].stride
    steps = _Steps(weights, K)
    y = _filled(torch.tensor(steps.operation(operation, p, 0), dtype=x.dtype), x, stride)
    run_steps(library, steps.tensor(), torch.tensor(np.concatenate(weights.pieces), dtype=x.dtype), x, y, K, stride)
    return y.permute(0, 3, 1, 2)


def _filled(channels: Tensor, x: Tensor, stride: int) -> Tensor:
    """Maps (N, H', W', C) of these values (C,), for what an operation of this stride makes of x (N, H, W, channels)."""
    N, H, W, _ = x.shape
    return channels.expand(N, -(-H // stride), -(-W // stride), -1).contiguous()


class EvaluatedSupernet(nn.Module):
    """A supernet in evaluation as a function of images alone: logits (N, K) of images (N, C, H, W), no gradients.

    The supernet may not change afterwards: its definition computes what is not for kernels, such as gradients, other
    devices and autocast. A cell that computes something else than equations 1 and 2 runs as it is.
    """

    def __init__(self, network: Supernet, library: Library):
        super().__init__()
        self.definition = network.eval()
        for name, part in network.named_children():
            if name == "classifier" or name.startswith("stem"):
                self.add_module(name, deepcopy(part))
        self.shares = {kind: network.shares(kind).detach() for kind in ("normal", "reduce")}
        self.cells = nn.ModuleList(_evaluated(library, cell, self._shares_of(cell)) for cell in network.cells)

    def _shares_of(self, cell: nn.Module) -> Tensor:
        return self.shares["reduce" if cell.reduction else "normal"]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.classifier.weight
        if (x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype or len(x) == 0
                or (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu")
                or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return self.definition(x)
        with torch.no_grad():
            # the last bits of a matrix product may depend on how many rows it has, so there is one for all images
            parts = x.split(BLOCK * torch.get_num_threads())
            return self.classifier(torch.cat([self._features(part) for part in parts]))

    def _features(self, x: Tensor) -> Tensor:
        s0, s1 = stem_outputs(self, x.contiguous(memory_format=torch.channels_last))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, None if isinstance(cell, EvaluatedCell) else self._shares_of(cell))
        return s1.mean(dim=(2, 3))


def _evaluated(library: Library, cell: nn.Module, shares: Tensor) -> nn.Module:
    """A cell by kernels, or itself if it computes something else."""
    if _has_forward_of(cell, SearchCell) and all(_has_forward_of(mixed, MixedOp) for mixed in cell._ops):
        try:
            return EvaluatedCell(library, cell, shares)
        except LookupError:
            pass
    return cell


def _has_forward_of(module: nn.Module, known: type[nn.Module]) -> bool:
    own = vars(module).get("forward")
    return (getattr(type(module), "forward", None) is known.forward and not has_hooks(module)
            and (own is None or getattr(own, "same_numbers", False)))


def evaluates(network: Supernet) -> bool:
    """Whether `EvaluatedSupernet` computes what a network does in evaluation: nothing but cells, by their shares."""
    own = any(name in vars(network) or getattr(type(network), name) is not getattr(Supernet, name)
              for name in ("forward", "shares"))
    return not own and not has_hooks(network) and all(
        p.device.type == "cpu" and p.dtype == network.classifier.weight.dtype in TYPES for p in network.parameters())
