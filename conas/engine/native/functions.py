"""One operation, or a sum of some, by kernels, with its gradient.

For cells of supernets that have a `forward` of their own, for derived networks, and for the self-check.
"""
from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from conas.engine.manual_grad import Tape, with_manual_grad
from conas.engine.native.library import Library, integers, pointers, reals, threads
from conas.engine.native.parts import (
    DEPTHWISE,
    POOLS,
    Operation,
    Seen,
    check_pixels,
    new_records,
    pool_sizes,
    running_records,
)


def run_operation(library: Library, operation: Operation, x: Tensor, weights: Sequence[Tensor], training: bool,
                  seen: list[Seen] | None = None) -> Tensor:
    """The output (N, K, H', W') of an operation of x (N, C, H, W); `weights` as its units name them.

    Weight and bias of each unit's BatchNorm come after them, if it has any. A pass in training leaves its statistics in
    `seen`.
    """
    if operation.kind in ("none", "skip", "own"):
        return operation.module(x)

    def run(tape: Tape, x: Tensor, *weights: Tensor):
        kind = _Pool if operation.kind in POOLS else _Units
        return kind(library, operation, training, tape, tape.wanted, x, weights).alone(seen)

    return with_manual_grad(run, x, *weights)


class Edge(NamedTuple):
    """An edge into a node: an operation of x (N, C, H, W), or x itself if that is None; by images' `shares`, if any."""

    operation: Operation | None
    x: Tensor
    weights: Sequence[Tensor] = ()
    shares: Sequence[float] | None = None


def node(library: Library, edges: Sequence[Edge], seen: list[Seen]) -> Tensor:
    """The sum (N, K, H', W') of edges in training, in one pass over what their operations make.

    Operations are of units; `weights` are as of `run_operation`. Raises ValueError if the edges do not fit together.
    """
    def run(tape: Tape, *inputs: Tensor):
        parts, at = [], 0
        for edge in edges:
            here = slice(at, at := at + 1 + len(edge.weights))
            x, *weights = inputs[here]
            parts.append(_Plain(x) if edge.operation is None else _Units(
                library, edge.operation, True, tape, tape.wanted[here], x, weights))
        maps = [part.forward(seen) for part in parts]
        found = [((y.shape[0], y.shape[3], *y.shape[1:3]), y.dtype) for y in maps]
        if len(set(found)) > 1:
            raise ValueError("edges into a node differ: " + ", ".join(f"{shape} in {dtype}" for shape, dtype in found))
        N, H, W, K = maps[0].shape
        out, shares = maps[0].new_empty(N, H, W, K), [edge.shares for edge in edges]
        library.of(out.dtype, K).combine(
            N, H * W, K, len(maps), pointers([y.data_ptr() for y in maps]), integers([K] * len(maps)),
            pointers([part.last_record() for part in parts]),
            reals([share for of in shares for share in of or [1.0] * N]), out.data_ptr(), K, threads(out.numel()))
        for part in parts:
            part.keep()

        def back(grad: Tensor):
            grad = grad.permute(0, 2, 3, 1).contiguous()
            return tuple(d for part, of in zip(parts, shares) for d in part.back(grad, of))

        return out.permute(0, 3, 1, 2), back

    return with_manual_grad(run, *(tensor for edge in edges for tensor in (edge.x, *edge.weights)))


def weighted_sum(library: Library, weights: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Equation 2: the sum (N, C, H, W) of maps of that shape, times `weights` (M,), in one pass over all of them."""
    (N, C, H, W), dtype = maps[0].shape, maps[0].dtype
    calls, pixels, count = library.of(dtype, C), N * H * W, len(maps)
    many = threads(maps[0].numel())

    def run(tape: Tape, weights: Tensor, *maps: Tensor):
        rows, p = [x.permute(0, 2, 3, 1).contiguous() for x in maps], weights.tolist()
        out = rows[0].new_empty(N, H, W, C)
        given = integers([C] * count), pointers([None] * count)  # no records: the maps are as they should be
        calls.combine(1, pixels, C, count, pointers([x.data_ptr() for x in rows]), *given, reals(p), out.data_ptr(), C,
                      many)
        kept = [tape.keep(x) for x in rows] if tape.wanted[0] else []

        def back(grad: Tensor):
            grad, d_weights = grad.permute(0, 2, 3, 1).contiguous(), None
            if kept:
                rows = [give() for give in kept]
                sums = torch.empty(count + 1, C, dtype=torch.float64)
                calls.dots(1, pixels, C, count, pointers([x.data_ptr() for x in rows]), *given, None,
                           grad.data_ptr(), C, sums.data_ptr(), many)
                d_weights = sums[:count].sum(1).to(weights.dtype)
            return d_weights, *((grad * share).permute(0, 3, 1, 2) if wanted else None
                                for share, wanted in zip(p, tape.wanted[1:]))

        return out.permute(0, 3, 1, 2), back

    return with_manual_grad(run, weights, *maps)


class _Plain:
    """A map that is an edge's result as it is."""

    def __init__(self, x: Tensor):
        self.x = x.permute(0, 2, 3, 1).contiguous()

    def forward(self, _seen) -> Tensor:
        return self.x

    def last_record(self) -> None:
        return None

    def keep(self) -> None:
        del self.x

    def back(self, grad: Tensor, shares: Sequence[float] | None) -> tuple[Tensor]:
        grad = grad.permute(0, 3, 1, 2)
        return (grad if shares is None else grad * grad.new_tensor(shares)[:, None, None, None],)


class _Units:
    """A pass through ReLU-convolution-BatchNorm, once or twice."""

    def __init__(self, library: Library, operation: Operation, training: bool, tape: Tape, wanted: Sequence[bool],
                 x: Tensor, weights: Sequence[Tensor]):
        self.units, self.training, self.tape, self.wanted = operation.units, training, tape, wanted
        self.norms = [unit.norm for unit in self.units]
        count = sum(len(unit.weights) for unit in self.units)
        self.x, self.weights = x.permute(0, 2, 3, 1).contiguous(), [w.contiguous() for w in weights[:count]]
        self.K = self.units[-1].K
        self.calls, self.threads = library.of(x.dtype, self.K), threads(x.numel())
        self.sizes, (N, H, W, _) = [], self.x.shape
        for unit in self.units:
            self.sizes.append(unit.sizes(N, H, W, unit.C))
            H, W = self.sizes[-1].OH, self.sizes[-1].OW
        self.shape = N, H, W, self.K
        self.pixels = [N * size.OH * size.OW for size in self.sizes]
        self.records = new_records(len(self.norms), self.K) if training else running_records(self.norms)
        self.affine = len(weights) > count
        if self.affine:  # weight and bias, in turn
            self.records[:, 3:] = torch.stack([w.detach() for w in weights[count:]]).view(len(self.norms), 2, self.K)

    def record(self, i: int) -> int:
        return self.records[i].data_ptr()

    def last_record(self) -> int:
        return self.record(len(self.norms) - 1)

    def arguments(self, tensors: Sequence[Tensor], i: int) -> list[int | None]:
        """The addresses of a unit's tensors, as kernels take them."""
        first = sum(len(unit.weights) for unit in self.units[:i])
        found = [tensor.data_ptr() for tensor in tensors[first:first + len(self.units[i].weights)]]
        return ([*found, None] if self.units[i].kind == DEPTHWISE else [None, *found, None])[:3]

    def forward(self, seen: list[Seen] | None) -> Tensor:
        """The map (N, H, W, K) ahead of the last BatchNorm, which `last_record` is of."""
        if self.training:
            check_pixels(self.pixels)
        self.maps = []
        self.compute()
        if self.training and seen is not None:
            seen.append(Seen([[norm] for norm in self.norms], self.records, self.pixels))
        return self.maps[-1]

    def compute(self) -> None:
        for i, size in enumerate(self.sizes):
            self.maps.append(self.x.new_empty(size.N, size.OH, size.OW, size.K))
            x, record = (self.maps[i - 1], self.record(i - 1)) if i else (self.x, None)
            self.calls.unit_forward(byref(size), x.data_ptr(), record, *self.arguments(self.weights, i),
                                    self.maps[i].data_ptr(), self.record(i) if self.training else None, self.threads)

    def alone(self, seen: list[Seen] | None):
        """The output, after the last BatchNorm, and what leads back."""
        last = self.forward(seen)
        out = torch.empty_like(last)
        self.calls.combine(1, self.pixels[-1], self.K, 1, pointers([last.data_ptr()]), integers([self.K]),
                           pointers([self.last_record()]), reals([1]), out.data_ptr(), self.K, self.threads)
        self.keep()
        return out.permute(0, 3, 1, 2), lambda grad: self.back(grad.permute(0, 2, 3, 1).contiguous())

    def keep(self) -> None:
        """Leave to autograd what the way back needs."""
        self.kept = [self.tape.keep(tensor) for tensor in (self.x, self.records, *self.weights, *self.maps)]
        self.x = self.records = self.weights = self.maps = None

    def back(self, grad: Tensor, shares: Sequence[float] | None = None) -> tuple[Tensor | None, ...]:
        """The gradients w.r.t. x and all weights for that of the output (N, H, W, K), by images' shares, if any."""
        self.x, self.records, *rest = (give() for give in self.kept)
        count = len(rest) - len(self.sizes)
        self.weights, self.maps = rest[:count], rest[count:]
        found = self.backward(grad, shares and reals(shares))
        self.x = self.records = self.weights = self.maps = None
        return found

    def dots(self, i: int, grad: Tensor, shares=None) -> Tensor:
        """(2, K): the sums of the gradient with what BatchNorm i makes ahead of its weights, and of itself."""
        sums = torch.empty(2, self.K, dtype=torch.float64)
        N, H, W, K = self.maps[i].shape
        self.calls.dots(N, H * W, K, 1, pointers([self.maps[i].data_ptr()]), integers([K]),
                        pointers([self.record(i)]), shares, grad.data_ptr(), K, sums.data_ptr(), self.threads)
        return sums

    def backward(self, grad: Tensor, shares) -> tuple[Tensor | None, ...]:
        d_weights = [torch.zeros_like(w) for w in self.weights] if any(self.wanted[1:]) else None
        d_x, d_affine, sums = None, [], self.dots(len(self.sizes) - 1, grad, shares)
        for i in reversed(range(len(self.sizes))):
            size = self.sizes[i]
            if self.affine:
                d_affine[:0] = sums.to(grad.dtype)
            x, record = (self.maps[i - 1], self.record(i - 1)) if i else (self.x, None)
            d_x = torch.empty_like(x) if i or self.wanted[0] else None
            next_sums = torch.empty(2, size.C, dtype=torch.float64) if i and not self.affine else None
            self.calls.unit_backward(
                byref(size), x.data_ptr(), record, *self.arguments(self.weights, i), self.maps[i].data_ptr(),
                self.record(i), 1.0, shares, grad.data_ptr(), size.K, sums[0].data_ptr() if self.training else None,
                sums[1].data_ptr() if self.training else None, None if d_x is None else d_x.data_ptr(), 0,
                None if next_sums is None else next_sums.data_ptr(),
                *(self.arguments(d_weights, i) if d_weights else [None] * 3), self.threads)
            if i:
                grad, shares = d_x, None
                sums = self.dots(i - 1, grad) if self.affine else next_sums
        d_x = None if d_x is None else d_x.permute(0, 3, 1, 2)
        return d_x, *(d_weights or [None] * len(self.weights)), *d_affine


class _Pool(_Units):
    """A pass through a pool and its BatchNorm."""

    def __init__(self, library: Library, operation: Operation, training: bool, tape: Tape, wanted: Sequence[bool],
                 x: Tensor, _weights):
        self.training, self.tape, self.wanted, self.norms, self.weights = training, tape, wanted, [operation.norm], ()
        self.x, self.maximum = x.permute(0, 2, 3, 1).contiguous(), operation.kind == "maximum"
        N, H, W, self.K = self.x.shape
        self.sizes = [pool_sizes(N, H, W, self.K, self.K, operation.module[0].stride, operation.norm.eps)]
        self.shape = N, self.sizes[0].OH, self.sizes[0].OW, self.K
        self.calls, self.threads = library.of(x.dtype, self.K), threads(x.numel())
        self.pixels = [N * self.shape[1] * self.shape[2]]
        self.records = new_records(1, self.K) if training else running_records(self.norms)
        self.places = torch.empty(self.shape, dtype=torch.int8)

    def which(self, address: int, record: int | None) -> tuple[int | None, ...]:
        """A pool's map, places and record where a kernel takes those of both."""
        places = self.places.data_ptr()
        return (None, None, address, places, record) if self.maximum else (address, record, None, places, None)

    def compute(self) -> None:
        self.maps.append(self.x.new_empty(self.shape))
        self.calls.pools_forward(byref(self.sizes[0]), self.x.data_ptr(), *self.which(
            self.maps[0].data_ptr(), self.record(0) if self.training else None), self.threads)

    def backward(self, grad: Tensor, _shares) -> tuple[Tensor | None]:
        if not self.wanted[0]:
            return (None,)
        sums, d_x = self.dots(0, grad), torch.zeros_like(self.x)
        of = [sums[0].data_ptr()] * 2
        self.calls.pools_backward(byref(self.sizes[0]), *self.which(self.maps[0].data_ptr(), self.record(0)), 1,
                                  reals([1, 1, 0]), pointers([grad.data_ptr()]), self.K,
                                  pointers(of) if self.training else None,
                                  pointers([sums[1].data_ptr()]) if self.training else None, d_x.data_ptr(),
                                  self.threads)
        return (d_x.permute(0, 3, 1, 2),)
