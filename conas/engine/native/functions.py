"""One operation, or a mixture of some, by kernels, with its gradient.

For cells that have a `forward` of their own, and for the self-check.
"""
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from conas.engine.manual_grad import Tape, with_manual_grad
from conas.engine.native.library import Library, integers, pointers, reals, threads
from conas.engine.native.parts import DEPTHWISE, POOLS, Operation, Seen, check_pixels, pool_sizes, running_records


def run_operation(library: Library, operation: Operation, x: Tensor, weights: Sequence[Tensor], training: bool,
                  seen: list[Seen] | None = None) -> Tensor:
    """The output (N, K, H', W') of an operation of x (N, C, H, W); `weights` as its units name them.

    A pass in training leaves its statistics in `seen`.
    """
    if operation.kind in ("none", "skip", "own"):
        return operation.module(x)

    def run(tape: Tape, x: Tensor, *weights: Tensor):
        kind = _Pool if operation.kind in POOLS else _Units
        return kind(library, operation, training, tape, x, weights).forward(seen)

    return with_manual_grad(run, x, *weights)


def weighted_sum(library: Library, weights: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Equation 2: the sum (N, C, H, W) of maps of that shape, times `weights` (M,), in one pass over all of them."""
    (N, C, H, W), dtype = maps[0].shape, maps[0].dtype
    calls, pixels, count = library.of(dtype, C), N * H * W, len(maps)
    many = threads(maps[0].numel())

    def run(tape: Tape, weights: Tensor, *maps: Tensor):
        rows, p = [x.permute(0, 2, 3, 1).contiguous() for x in maps], weights.tolist()
        out = rows[0].new_empty(N, H, W, C)
        given = integers([C] * count), pointers([None] * count)  # no records: the maps are as they should be
        calls.combine(pixels, C, count, pointers([x.data_ptr() for x in rows]), *given, reals(p), out.data_ptr(), C,
                      many)
        kept = [tape.keep(x) for x in rows] if tape.wanted[0] else []

        def back(grad: Tensor):
            grad, d_weights = grad.permute(0, 2, 3, 1).contiguous(), None
            if kept:
                rows = [give() for give in kept]
                sums = torch.empty(count + 1, C, dtype=torch.float64)
                calls.dots(pixels, C, count, pointers([x.data_ptr() for x in rows]), *given, grad.data_ptr(), C,
                           sums.data_ptr(), many)
                d_weights = sums[:count].sum(1).to(weights.dtype)
            return d_weights, *((grad * share).permute(0, 3, 1, 2) if wanted else None
                                for share, wanted in zip(p, tape.wanted[1:]))

        return out.permute(0, 3, 1, 2), back

    return with_manual_grad(run, weights, *maps)


class _Units:
    """A pass through ReLU-convolution-BatchNorm, once or twice."""

    def __init__(self, library: Library, operation: Operation, training: bool, tape: Tape, x: Tensor,
                 weights: Sequence[Tensor]):
        self.units, self.training, self.tape = operation.units, training, tape
        self.norms = [unit.norm for unit in self.units]
        self.x, self.weights = x.permute(0, 2, 3, 1).contiguous(), [w.contiguous() for w in weights]
        self.K = self.units[-1].K
        self.calls, self.threads = library.of(x.dtype, self.K), threads(x.numel())
        self.sizes, (N, H, W, _) = [], self.x.shape
        for unit in self.units:
            self.sizes.append(unit.sizes(N, H, W, unit.C))
            H, W = self.sizes[-1].OH, self.sizes[-1].OW
        self.shape = N, H, W, self.K
        self.pixels = [N * size.OH * size.OW for size in self.sizes]
        self.records = (torch.empty(len(self.norms), 3, self.K, dtype=torch.float64) if training else
                        running_records(self.norms))

    def record(self, i: int) -> int:
        return self.records[i].data_ptr()

    def arguments(self, tensors: Sequence[Tensor], i: int) -> list[int | None]:
        """The addresses of a unit's tensors, as kernels take them."""
        first = sum(len(unit.weights) for unit in self.units[:i])
        found = [tensor.data_ptr() for tensor in tensors[first:first + len(self.units[i].weights)]]
        return ([*found, None] if self.units[i].kind == DEPTHWISE else [None, *found, None])[:3]

    def forward(self, seen: list[Seen] | None):
        maps = []
        for i, size in enumerate(self.sizes):
            maps.append(self.x.new_empty(size.N, size.OH, size.OW, size.K))
            x, record = (maps[i - 1], self.record(i - 1)) if i else (self.x, None)
            self.calls.unit_forward(byref(size), x.data_ptr(), record, *self.arguments(self.weights, i),
                                    maps[i].data_ptr(), self.record(i) if self.training else None, self.threads)
        return self.finish(maps, seen)

    def finish(self, maps: list[Tensor], seen: list[Seen] | None):
        """BatchNorm of the last map, and what leads back."""
        if self.training:
            check_pixels(self.pixels)
        out = self.x.new_empty(self.shape)
        self.calls.combine(self.pixels[-1], self.K, 1, pointers([maps[-1].data_ptr()]), integers([self.K]),
                           pointers([self.record(len(maps) - 1)]), reals([1]), out.data_ptr(), self.K, self.threads)
        if self.training and seen is not None:
            seen.append(Seen([[norm] for norm in self.norms], self.records, self.pixels))
        kept = [self.tape.keep(tensor) for tensor in (self.x, self.records, *self.weights, *maps)]
        count = len(self.weights)
        self.x = self.records = None
        self.weights = ()

        def back(grad: Tensor):
            self.x, self.records, *rest = (give() for give in kept)
            self.weights, maps = rest[:count], rest[count:]
            gradients = self.backward(grad.permute(0, 2, 3, 1).contiguous(), maps)
            self.x = self.records = None
            self.weights = ()
            return gradients

        return out.permute(0, 3, 1, 2), back

    def dots(self, last: Tensor, grad: Tensor) -> Tensor:
        """(2, K): the sums of the gradient with BatchNorm's output, and of itself."""
        sums = torch.empty(2, self.K, dtype=torch.float64)
        self.calls.dots(self.pixels[-1], self.K, 1, pointers([last.data_ptr()]), integers([self.K]),
                        pointers([self.record(len(self.records) - 1)]), grad.data_ptr(), self.K, sums.data_ptr(),
                        self.threads)
        return sums

    def backward(self, grad: Tensor, maps: Sequence[Tensor]):
        """The gradients w.r.t. x and the weights."""
        wanted, sums = self.tape.wanted, self.dots(maps[-1], grad)
        d_weights = [torch.zeros_like(w) for w in self.weights] if any(wanted[1:]) else None
        d_x = None
        for i in reversed(range(len(self.sizes))):
            size = self.sizes[i]
            x, record = (maps[i - 1], self.record(i - 1)) if i else (self.x, None)
            d_x = torch.empty_like(x) if i or wanted[0] else None
            next_sums = torch.empty(2, size.C, dtype=torch.float64) if i else None
            self.calls.unit_backward(
                byref(size), x.data_ptr(), record, *self.arguments(self.weights, i), maps[i].data_ptr(),
                self.record(i), 1.0, grad.data_ptr(), size.K, sums[0].data_ptr() if self.training else None,
                sums[1].data_ptr() if self.training else None, None if d_x is None else d_x.data_ptr(), 0,
                next_sums.data_ptr() if i else None,
                *(self.arguments(d_weights, i) if d_weights else [None] * 3), self.threads)
            grad, sums = d_x, next_sums
        d_x = None if d_x is None else d_x.permute(0, 3, 1, 2)
        return d_x, *(d_weights or [None] * len(self.weights))


class _Pool(_Units):
    """A pass through a pool and its BatchNorm."""

    def __init__(self, library: Library, operation: Operation, training: bool, tape: Tape, x: Tensor, _weights):
        self.training, self.tape, self.norms, self.weights = training, tape, [operation.norm], ()
        self.x, self.maximum = x.permute(0, 2, 3, 1).contiguous(), operation.kind == "maximum"
        N, H, W, self.K = self.x.shape
        self.sizes = [pool_sizes(N, H, W, self.K, self.K, operation.module[0].stride, operation.norm.eps)]
        self.shape = N, self.sizes[0].OH, self.sizes[0].OW, self.K
        self.calls, self.threads = library.of(x.dtype, self.K), threads(x.numel())
        self.pixels = [N * self.shape[1] * self.shape[2]]
        self.records = (torch.empty(1, 3, self.K, dtype=torch.float64) if training else running_records(self.norms))
        self.places = torch.empty(self.shape, dtype=torch.int8)

    def which(self, address: int, record: int | None) -> tuple[int | None, ...]:
        """A pool's map, places and record where a kernel takes those of both."""
        places = self.places.data_ptr()
        return (None, None, address, places, record) if self.maximum else (address, record, None, places, None)

    def forward(self, seen: list[Seen] | None):
        y = self.x.new_empty(self.shape)
        self.calls.pools_forward(byref(self.sizes[0]), self.x.data_ptr(),
                                 *self.which(y.data_ptr(), self.record(0) if self.training else None), self.threads)
        return self.finish([y], seen)

    def backward(self, grad: Tensor, maps: Sequence[Tensor]):
        if not self.tape.wanted[0]:
            return (None,)
        sums, d_x = self.dots(maps[0], grad), torch.zeros_like(self.x)
        of = [sums[0].data_ptr()] * 2
        self.calls.pools_backward(byref(self.sizes[0]), *self.which(maps[0].data_ptr(), self.record(0)), 1,
                                  reals([1, 1, 0]), pointers([grad.data_ptr()]), self.K,
                                  pointers(of) if self.training else None,
                                  pointers([sums[1].data_ptr()]) if self.training else None, d_x.data_ptr(),
                                  self.threads)
        return (d_x.permute(0, 3, 1, 2),)
