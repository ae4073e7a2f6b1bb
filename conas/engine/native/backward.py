"""The way back through a search cell by kernels, from its last node to its first.

When a node's turn comes, all edges out of it have added to its gradient. First the sums that BatchNorm's gradient and
the gradient w.r.t. the alphas need, in one pass over all maps; then each operation, which adds to its state's gradient.
"""
from ctypes import byref

import torch
from torch import Tensor

from conas.darts.genotype import NODES
from conas.engine.native.library import integers, pointers, reals
from conas.engine.native.parts import POOLS, Term


class Backward:
    """Of a `Forward` from the gradient w.r.t. its output."""

    def __init__(self, forward, grad: Tensor, inputs: tuple[Tensor, Tensor], states: Tensor, out: Tensor):
        self.forward, self.cell, self.shape, self.inputs, self.out = forward, forward.cell, forward.shape, inputs, out
        self.calls, self.threads, self.training = forward.calls, forward.threads, forward.training
        wanted = forward.tape.wanted
        self.of_inputs, self.of_shares, self.of_weights = wanted[:2], wanted[2], wanted[3]
        self.below = any(self.of_inputs) or self.of_weights  # the gradients w.r.t. what is ahead of the nodes
        grad = grad.permute(0, 2, 3, 1)
        self.d_out = grad.clone(memory_format=torch.contiguous_format)
        self.d_states = torch.zeros_like(states) if self.below else None
        size, C = out.element_size(), self.cell.C
        first = self.d_states.data_ptr() if self.below else 0
        self.d_state = [first, first + states[0].numel() * size] if self.below else [None, None]
        self.d_state += [self.d_out.data_ptr() + node * C * size for node in range(NODES)]
        self.d_w = torch.zeros_like(forward.w) if self.of_weights else None
        self.dots: list[Tensor | None] = [None] * NODES  # by node: of each term, then of the gradient itself
        self.rows: list[dict[tuple[int, int], int]] = [{} for _ in range(NODES)]
        self.between = torch.empty_like(out[..., :C], memory_format=torch.contiguous_format)  # two units
        self.sums = out.new_empty((2, C), dtype=torch.float64)

    def run(self):
        """The gradients w.r.t. both inputs, the shares, the weights and those of own operations."""
        own = self._own_gradients()
        for node in reversed(range(NODES)):
            self._shared(2 + node)
            self._dots(node)
            for term in self.cell.nodes[node]:
                if term.operation.kind == "units" and (self.below or term.source > 1):
                    self._chain(node, term)
            self._own(node, own)
        d_inputs = [None, None]
        if self.below:
            for state in 0, 1:
                self._shared(state)
                d_inputs[state] = self._preprocessed(state)
        d_shares = self._d_shares() if self.of_shares else None
        return *d_inputs, d_shares, self.d_w, *own

    def _dots(self, node: int) -> None:
        """For every term of a node the sums of its gradient with what the term adds."""
        forward, shape, C = self.forward, self.shape, self.cell.C
        maps, lds, records = [], [], []
        for term in self.cell.nodes[node]:
            kind = term.operation.kind
            if kind == "own":
                continue
            self.rows[node][term.edge, term.place] = len(maps)
            if kind == "skip":
                found = forward.state[term.source], shape.lds[term.source], None
            else:
                row = term.row + max(len(term.operation.units) - 1, 0)
                record = row if self.training or kind == "units" else term.row_eval
                found = forward.map[row], C, forward._record(record)
            for of, value in zip((maps, lds, records), found):
                of.append(value)
        self.dots[node] = self.out.new_empty((len(maps) + 1, C), dtype=torch.float64)
        self.calls.dots(1, shape.pixels[-1], C, len(maps), pointers(maps), integers(lds), pointers(records), None,
                        self.d_state[2 + node], NODES * C, self.dots[node].data_ptr(), self.threads)

    def _sums(self, node: int, row: int) -> int | None:
        """The address of a row of `dots`; by running statistics there is none."""
        return self.dots[node].data_ptr() + row * 8 * self.cell.C if self.training else None

    def _chain(self, node: int, term: Term) -> None:
        """From the gradient of a node to that of a state, through an operation's units."""
        forward, cell, C = self.forward, self.cell, self.cell.C
        offsets, sizes = cell.offsets[term.edge, term.place], self.shape.units[term.edge, term.place]
        p, grad, ld = forward.p[term.edge][term.place], self.d_state[2 + node], NODES * C
        dot, total = (self._sums(node, row)
                      for row in (self.rows[node][term.edge, term.place], len(self.dots[node]) - 1))
        for i in reversed(range(len(sizes))):
            row, unit = term.row + i, term.operation.units[i]
            x, record = ((forward.map[row - 1], forward._record(row - 1)) if i else
                         (forward.state[term.source], None))
            self.calls.unit_backward(
                sizes[i], x, record, *forward._addresses(forward.weight, offsets[i], unit.kind), forward.map[row],
                forward._record(row), p, None, grad, ld, dot, total,
                self.between.data_ptr() if i else self.d_state[term.source], i == 0,
                self.sums.data_ptr() if i else None, *self._gradients(offsets[i], unit.kind), self.threads)
            p, grad, ld = 1.0, self.between.data_ptr(), C
            dot, total = (self.sums.data_ptr(), self.sums.data_ptr() + 8 * C) if self.training else (None, None)

    def _gradients(self, offsets, kind: int) -> tuple[int | None, ...]:
        """Where those w.r.t. a unit's weights go."""
        return self.forward._addresses(self.d_w.data_ptr(), offsets, kind) if self.of_weights else (None, None, None)

    def _shared(self, state: int) -> None:
        """Through the pools of a state, and from what skips it to later nodes."""
        cell, forward = self.cell, self.forward
        rows = [cell.pools.get((state, kind)) for kind in POOLS]
        found = [{} for _ in range(NODES)]  # by node: the state's term of each kind
        for node in range(max(state - 1, 0), NODES):
            for term in cell.nodes[node]:
                if term.source == state and term.operation.kind in (*POOLS, "skip"):
                    found[node][term.operation.kind] = term
        nodes = [node for node in range(NODES) if found[node]]
        # by running statistics each edge has its own
        for together in [nodes] if self.training else [[node] for node in nodes]:
            p, grads, dots, totals = [], [], [], []
            records = [None, None]
            for node in together:
                terms = [found[node].get(kind) for kind in (*POOLS, "skip")]
                p += [0.0 if term is None else forward.p[term.edge][term.place] for term in terms]
                grads.append(self.d_state[2 + node])
                last = len(self.dots[node]) - 1
                dots += [self._sums(node, self.rows[node][term.edge, term.place] if term else last)
                         for term in terms[:2]]
                totals.append(self._sums(node, last))
                for i, (term, row) in enumerate(zip(terms[:2], rows)):
                    if self.training:
                        records[i] = None if row is None else forward._record(row)
                    elif term:
                        records[i] = forward._record(term.row_eval)
            if together:
                average, maximum = (None if record is None else forward.map[row] for record, row in zip(records, rows))
                self.calls.pools_backward(
                    self.shape.pools[state], average, records[0], maximum, forward.place[state], records[1],
                    len(together), reals(p), pointers(grads), NODES * cell.C,
                    pointers(dots) if self.training else None, pointers(totals) if self.training else None,
                    self.d_state[state], self.threads)

    def _preprocessed(self, state: int) -> Tensor | None:
        """From the gradient of one of the first two states to that of the cell's input, and of the weights between."""
        cell, forward, sizes = self.cell, self.forward, self.shape.inputs[state]
        unit, pixels, C, wanted = cell.preprocess[state], self.shape.pixels[state], cell.C, self.of_inputs[state]
        self.calls.dots(1, pixels, C, 1, pointers([forward.map[state]]), integers([C]),
                        pointers([forward._record(state)]), None, self.d_state[state], C, self.sums.data_ptr(),
                        self.threads)
        x = self.inputs[state]
        d_x = torch.empty_like(x) if wanted else None
        dot, total = (self.sums.data_ptr(), self.sums.data_ptr() + 8 * C) if self.training else (None, None)
        weights = cell.weights[state]
        self.calls.unit_backward(
            byref(sizes), x.data_ptr(), None, *forward._addresses(forward.weight, weights, unit.kind),
            forward.map[state], forward._record(state), 1.0, None, self.d_state[state], C, dot, total,
            d_x.data_ptr() if wanted else None, 0, None, *self._gradients(weights, unit.kind), self.threads)
        return d_x.permute(0, 3, 1, 2) if wanted else None

    def _d_shares(self) -> Tensor:
        """dL/dp of every operation: what it adds to its node, times the node's gradient, summed."""
        d_shares = [[0.0] * self.forward.share_shape[1] for _ in range(self.forward.share_shape[0])]
        for node, rows in enumerate(self.rows):
            of = self.dots[node].sum(1).tolist()
            for (edge, place), row in rows.items():
                d_shares[edge][place] = of[row]
        for (edge, place), value in self.of_own.items():
            d_shares[edge][place] = value
        return self.out.new_tensor(d_shares)

    def _own_gradients(self) -> list[Tensor | None]:
        """Of the parameters of own operations: none so far."""
        self.of_own: dict[tuple[int, int], float] = {}
        return [None] * len(self.forward.own)

    def _own(self, node: int, own: list[Tensor | None]) -> None:
        """Through the own operations on the edges into a node."""
        C, forward = self.cell.C, self.forward
        grad = self.d_out[..., node * C:(node + 1) * C]
        for into, term, x, y in forward.results:
            if into != node:
                continue
            at = forward.first_own(term.operation.module)
            places = [i for i in range(*at) if forward.own[i].requires_grad]
            gradient = grad.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            self.of_own[term.edge, term.place] = (y.detach().double() * gradient).sum().item()
            gradient = gradient * forward.p[term.edge][term.place]
            d_x, *d_own = torch.autograd.grad(y, [x, *(forward.own[i] for i in places)], gradient, allow_unused=True,
                                              retain_graph=True)
            for i, d in zip(places, d_own):
                own[i] = d
            if d_x is not None and (self.below or term.source > 1):
                self._state_gradient(term.source).add_(d_x.permute(0, 2, 3, 1))

    def _state_gradient(self, state: int) -> Tensor:
        C = self.cell.C
        return self.d_states[state] if state < 2 else self.d_out[..., (state - 2) * C:(state - 1) * C]
