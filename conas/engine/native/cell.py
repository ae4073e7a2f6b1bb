"""A search cell by kernels: equations 1 and 2 and their gradients, written down, with few trips through memory.

The numbers are those of `SearchCell.forward` in conas/darts/supernet.py, and the weights are a part of the flat vector
of all of them. An operation that the kernels do not know runs as the module that it is, beside the others.
"""
from ctypes import byref

from torch import Tensor, nn

from conas.darts.genotype import NODES
from conas.engine.manual_grad import Tape, with_manual_grad
from conas.engine.native.forward import Forward
from conas.engine.native.library import Library
from conas.engine.native.parts import POOLS, Operation, Seen, Term, pool_sizes, read, read_units


class NativeCell:
    """What computes a search cell. Raises LookupError, saying why, for one whose inputs it cannot preprocess.

    `offsets` are the places of its weights, by their names, in the part of the flat vector that a call takes; weights
    of operations that it does not know need none.
    """

    def __init__(self, library: Library, cell: nn.Module, offsets: dict[str, int]):
        self.library = library
        self.preprocess = []
        for module in cell.preprocess0, cell.preprocess1:
            units = read_units(module)
            if units is None or len(units) != 1:
                raise LookupError(f"its inputs go through a {type(module).__name__}")
            self.preprocess += units
        self.C = self.preprocess[0].K
        self.stride = 2 if cell.reduction else 1
        self.rows: list[list[nn.BatchNorm2d]] = [[unit.norm] for unit in self.preprocess]  # of a map each
        self.nodes: list[list[Term]] = []
        self.offsets: dict[tuple[int, int], list] = {}  # of the weights of every unit of an operation
        self.pools: dict[tuple[int, str], int] = {}
        self.eval_norms = [unit.norm for unit in self.preprocess]
        self.own: list[nn.Module] = []
        edge, pooled = 0, []
        for node in range(NODES):
            terms = []
            for source in range(2 + node):
                for place, module in enumerate(cell._ops[edge]._ops):
                    if module is None:  # this edge lacks it
                        continue
                    operation = read(module)
                    if operation.kind == "units" and any(unit.K != self.C for unit in operation.units):
                        operation = Operation("own", module)
                    row = None
                    if operation.kind == "units":
                        row = len(self.rows)
                        self.rows += [[unit.norm] for unit in operation.units]
                        self.eval_norms += [unit.norm for unit in operation.units]
                        prefix = f"_ops.{edge}._ops.{place}."
                        self.offsets[edge, place] = [[offsets[prefix + name] for name in unit.weights]
                                                     for unit in operation.units]
                    elif operation.kind in POOLS:
                        pooled.append((source, operation))
                    elif operation.kind == "own":
                        self.own.append(module)
                    if operation.kind != "none":
                        terms.append(Term(edge, place, source, row, row, operation))
                edge += 1
            self.nodes.append(terms)
        for source, operation in pooled:
            row = self.pools.setdefault((source, operation.kind), len(self.rows))
            if row == len(self.rows):
                self.rows.append([])
            self.rows[row].append(operation.norm)
        for terms in self.nodes:
            for i, term in enumerate(terms):
                if term.operation.kind in POOLS:
                    terms[i] = term._replace(row=self.pools[term.source, term.operation.kind],
                                             row_eval=len(self.eval_norms))
                    self.eval_norms.append(term.operation.norm)
        self.weights = [[offsets[f"preprocess{i}.{name}"] for name in unit.weights]
                        for i, unit in enumerate(self.preprocess)]
        self._shapes: dict[tuple, Shape] = {}

    def __call__(self, s0: Tensor, s1: Tensor, shares: Tensor, w: Tensor, training: bool,
                 seen: list[Seen] | None = None) -> Tensor:
        """The output (N, NODES*C, H', W') of two inputs (N, channels, H, W); `shares` (EDGES, P), `w` flat.

        A pass in training leaves its statistics in `seen`.
        """
        def run(tape: Tape, s0: Tensor, s1: Tensor, shares: Tensor, w: Tensor, *own: Tensor):
            return Forward(self, tape, s0, s1, shares, w, own, training, seen).forward()

        own = [p for module in self.own for p in module.parameters()]
        return with_manual_grad(run, s0, s1, shares, w, *own)

    def shape(self, s0: Tensor, s1: Tensor) -> "Shape":
        """The sizes for inputs like these; those of the last few are kept."""
        key = s0.dtype, s0.shape, s1.shape
        if key not in self._shapes:
            while len(self._shapes) > 3:
                self._shapes.pop(next(iter(self._shapes)))
            self._shapes[key] = Shape(self, s0, s1)
        return self._shapes[key]


class Shape:
    """The sizes of every kernel call of a cell for inputs of one shape."""

    def __init__(self, cell: NativeCell, s0: Tensor, s1: Tensor):
        (N, _, H0, W0), (_, _, H1, W1) = s0.shape, s1.shape
        C, stride, eps = cell.C, cell.stride, cell.preprocess[0].norm.eps
        self.inputs = [unit.sizes(N, H, W, unit.C) for unit, H, W in zip(cell.preprocess, (H0, H1), (W0, W1))]
        first = self.inputs[0]
        self.N, self.H, self.W = N, first.OH, first.OW
        if (first.OH, first.OW) != (self.inputs[1].OH, self.inputs[1].OW):
            raise LookupError("its inputs differ in size")
        self.OH, self.OW = -(-self.H // stride), -(-self.W // stride)
        self.calls = cell.library.of(s0.dtype, C)
        self.lds = [C, C] + NODES * [NODES * C]  # of the states
        self.units: dict[tuple[int, int], list] = {}
        for terms in cell.nodes:
            for term in terms:
                sizes = []
                for i, unit in enumerate(term.operation.units):
                    small = i > 0 or term.source > 1
                    H, W = (self.OH, self.OW) if small else (self.H, self.W)
                    sizes.append(byref(unit.sizes(N, H, W, C if i else self.lds[term.source])))
                self.units[term.edge, term.place] = sizes
        self.pools = [byref(pool_sizes(N, self.H, self.W, C, C, stride, eps))] * 2
        self.pools += [byref(pool_sizes(N, self.OH, self.OW, C, NODES * C, 1, eps))] * NODES
        self.pixels = [N * self.H * self.W] * 2 + [N * self.OH * self.OW] * (len(cell.rows) - 2)
