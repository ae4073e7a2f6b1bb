"""A pass through a search cell by kernels: its maps, and what leads back."""
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor, nn
from torch.func import functional_call

from conas.darts.genotype import NODES
from conas.engine.manual_grad import Tape
from conas.engine.native.backward import Backward
from conas.engine.native.library import integers, pointers, reals, threads
from conas.engine.native.parts import DEPTHWISE, POOLS, Seen, Term, check_pixels, new_records, running_records


class Forward:
    """One pass through a cell, and its way back."""

    def __init__(self, cell, tape: Tape, s0: Tensor, s1: Tensor, shares: Tensor, w: Tensor,
                 own: Sequence[Tensor], training: bool, seen: list[Seen] | None):
        self.cell, self.tape, self.training, self.seen, self.own = cell, tape, training, seen, own
        self.shape = cell.shape(s0, s1)
        self.calls, self.threads = self.shape.calls, threads(s1.numel())
        self.p, self.share_shape = shares.tolist(), shares.shape
        self.inputs = [s.permute(0, 2, 3, 1).contiguous() for s in (s0, s1)]
        self.w = w.contiguous()
        self.size = w.element_size()

    def forward(self):
        """The output, and what takes the gradient w.r.t. it to those w.r.t. all inputs."""
        cell, shape, C = self.cell, self.shape, self.cell.C
        if self.training:
            check_pixels(shape.pixels)
        N, OH, OW, new = shape.N, shape.OH, shape.OW, self.w.new_empty
        before, states = new((2, N, shape.H, shape.W, C)), new((2, N, shape.H, shape.W, C))
        maps, out = new((len(cell.rows) - 2, N, OH, OW, C)), new((N, OH, OW, NODES * C))
        self.places = torch.empty(2 + NODES, N, OH, OW, C, dtype=torch.int8)
        self.records = (new_records(len(cell.rows), C) if self.training else
                        running_records(cell.eval_norms))
        self._locate(before, maps, states, out)
        for i, sizes in enumerate(shape.inputs):
            self._forward(byref(sizes), self.inputs[i].data_ptr(), None, cell.weights[i], i,
                          cell.preprocess[i].kind)
            self._combine(shape.pixels[i], [(self.map[i], C, self._record(i), 1.0)], self.state[i], C)
        pooled: set[int] = set()
        self.results: list[tuple[int, Term, Tensor, Tensor]] = []
        for node, terms in enumerate(cell.nodes):
            summands, own = [], []
            for term in terms:
                kind, p, source = term.operation.kind, self.p[term.edge][term.place], term.source
                if kind == "units":
                    self._chain(term)
                    row = term.row + len(term.operation.units) - 1
                    summands.append((self.map[row], C, self._record(row), p))
                elif kind == "skip":
                    summands.append((self.state[source], shape.lds[source], None, p))
                elif kind == "own":
                    own.append((term, p))
                else:
                    if source not in pooled:
                        pooled.add(source)
                        self._pool(source)
                    record = self._record(term.row if self.training else term.row_eval)
                    summands.append((self.map[term.row], C, record, p))
            self._combine(N * OH * OW, summands, self.state[2 + node], NODES * C)
            for term, p in own:
                first = (term.source - 2) * C
                state = states[term.source] if term.source < 2 else out[..., first:first + C]
                self._own(node, term, p, state, out[..., node * C:(node + 1) * C])
        if self.training and self.seen is not None:
            self.seen.append(Seen(cell.rows, self.records, shape.pixels))
        kept = [self.tape.keep(tensor) for tensor in (before, maps, states, out, *self.inputs, self.w, self.places,
                                                      self.records)]
        self.inputs = self.w = self.places = self.records = None  # autograd keeps them, or computes the cell again
        return out.permute(0, 3, 1, 2), lambda grad: self.backward(grad, *(give() for give in kept))

    def _locate(self, before: Tensor, maps: Tensor, states: Tensor, out: Tensor) -> None:
        """The addresses of all maps, states and weights."""
        C, size, one, small = self.cell.C, self.size, states[0].numel() * self.size, out.numel() // NODES * self.size
        self.map = [before.data_ptr(), before.data_ptr() + one]
        self.map += [maps.data_ptr() + i * small for i in range(len(maps))]
        self.state = [states.data_ptr(), states.data_ptr() + one]
        self.state += [out.data_ptr() + node * C * size for node in range(NODES)]
        self.weight, self.record = self.w.data_ptr(), self.records.data_ptr()
        self.place = [self.places.data_ptr() + i * self.places[0].numel() for i in range(len(self.places))]

    def _record(self, row: int) -> int:
        return self.record + row * 40 * self.cell.C  # five doubles for each channel

    def _addresses(self, base: int, offsets: Sequence[int], kind: int) -> tuple[int | None, ...]:
        """Of a unit's depthwise and pointwise weights."""
        found = [base + offset * self.size for offset in offsets]
        return (*found, None) if kind == DEPTHWISE else (None, *found, None)[:3]

    def _forward(self, sizes, x: int, x_record: int | None, weights: Sequence[int], row: int, kind: int) -> None:
        self.calls.unit_forward(sizes, x, x_record, *self._addresses(self.weight, weights, kind), self.map[row],
                                self._record(row) if self.training else None, self.threads)

    def _chain(self, term: Term) -> None:
        """The units of an operation, one after another."""
        x, record = self.state[term.source], None
        for i, unit in enumerate(term.operation.units):
            row = term.row + i
            self._forward(self.shape.units[term.edge, term.place][i], x, record,
                          self.cell.offsets[term.edge, term.place][i], row, unit.kind)
            x, record = self.map[row], self._record(row)

    def _pool(self, source: int) -> None:
        rows = [self.cell.pools.get((source, kind)) for kind in POOLS]
        average, maximum = (None if row is None else self.map[row] for row in rows)
        of_average, of_maximum = (None if row is None or not self.training else self._record(row) for row in rows)
        self.calls.pools_forward(self.shape.pools[source], self.state[source], average, of_average, maximum,
                                 self.place[source], of_maximum, self.threads)

    def _combine(self, pixels: int, summands: Sequence[tuple], out: int, ld: int) -> None:
        maps, lds, records, p = zip(*(summands or [(self.state[0], self.shape.lds[0], None, 0.0)]))
        self.calls.combine(1, pixels, self.cell.C, len(maps), pointers(maps), integers(lds), pointers(records),
                           reals(p), out, ld, self.threads)

    def first_own(self, module: nn.Module) -> tuple[int, int]:
        """From where to where the parameters of an own operation are in `own`."""
        at = 0
        for other in self.cell.own:
            end = at + len(list(other.parameters()))
            if other is module:
                return at, end
            at = end
        raise KeyError(module)

    def _own(self, into: int, term: Term, p: float, state: Tensor, node: Tensor) -> None:
        """Add an own operation's result to a node (N, H', W', C), and keep what leads to its gradient."""
        wanted = any(self.tape.wanted)
        x = state.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last).requires_grad_(wanted)
        module = term.operation.module
        with torch.set_grad_enabled(wanted):
            names = [name for name, _ in module.named_parameters()]
            y = functional_call(module, dict(zip(names, self.own[slice(*self.first_own(module))])), (x,))
        node.add_(y.detach().permute(0, 2, 3, 1), alpha=p)
        if wanted:
            self.results.append((into, term, x, y))

    def backward(self, grad: Tensor, before: Tensor, maps: Tensor, states: Tensor, out: Tensor, s0: Tensor, s1: Tensor,
                 w: Tensor, places: Tensor, records: Tensor):
        """The gradients w.r.t. both inputs, the shares, the weights and those of own operations."""
        self.w, self.places, self.records, self.threads = w, places, records, threads(s1.numel())
        self._locate(before, maps, states, out)
        return Backward(self, grad, (s0, s1), states, out).run()
