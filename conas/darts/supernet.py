"""The search network: DARTS' continuous relaxation (arXiv:1806.09055, section 2.2) over a space's primitives.

This is the definition. It is plain torch: any operation, any number of derivatives. What computes the same numbers
faster is applied from outside, by `conas.engine`.
"""
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from conas.darts.batchnorm import has_exact_sums, use_exact_sums
from conas.darts.genotype import EDGES, NODES, Genotype, derive
from conas.darts.operations import OPERATIONS, FactorizedReduce, ReLUConvBN, Zero, choose_operations
from conas.darts.passes import constant_alphas, frozen_statistics  # noqa: F401  a space imports them from here
from conas.darts.primitives import SOURCES
from conas.darts.stems import add_stem, stem_outputs

STEM_MULTIPLIER = 3
NOTHING = Zero, type(None)  # add nothing to a sum


class MixedOp(nn.Module):
    """All primitives on one edge, each with its share; None stands for one that this edge lacks."""

    def __init__(self, primitives: Sequence[str | None], C: int, stride: int, operations: Mapping = OPERATIONS):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in primitives:
            operation = operations[primitive](C, stride, False) if primitive else None
            if primitive and "pool" in primitive:  # a pool's output has no fixed scale otherwise
                operation = nn.Sequential(operation, nn.BatchNorm2d(C, affine=False))
            self._ops.append(operation)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The output (N, C, H', W') for a state x (N, C, H, W); `weights` (P,) is the softmax of the edge's alphas."""
        return sum(w * op(x) for w, op in zip(weights, self._ops) if type(op) not in NOTHING)             # equation 2


class SearchCell(nn.Module):
    """A cell whose every edge is mixed, of its own row of `primitives`, which are as of `Primitives.columns`."""

    mixed_op: type[nn.Module] = MixedOp

    def __init__(self, primitives: Sequence[Sequence[str | None]], C_prev_prev: int, C_prev: int, C: int,
                 reduction: bool, reduction_prev: bool, operations: Mapping[str, Callable] = OPERATIONS):
        super().__init__()
        self.reduction = reduction
        # after a reduction, the cell before the last has maps of twice the size
        self.preprocess0 = (FactorizedReduce(C_prev_prev, C, affine=False) if reduction_prev else
                            ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False))
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList(self.mixed_op(names, C, 2 if reduction and source < 2 else 1, operations)
                                  for source, names in zip(SOURCES, primitives))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The NODES nodes (N, NODES*C, H', W') from the outputs of the two cells before; `weights` (EDGES, P)."""
        states, edge = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(NODES):
            node = sum(self._ops[edge + j](state, weights[edge + j]) for j, state in enumerate(states))  # equation 1
            edge += len(states)
            states.append(node)
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """A stack of search cells, with reduction cells at one and two thirds of the depth.

    A space is a subclass that sets `primitives`, and, if it has any, its own `operations` (see docs/extending.md) and
    `cell`. All normal cells share `alphas_normal` and all reduction cells `alphas_reduce`, both (EDGES, P). The alphas
    are Parameters, hence part of the `state_dict`; optimizers take `weights()` or `alphas()`, never `parameters()`.
    `stem` is one of STEMS in conas/darts/stems.py. Raises InputError for primitives of which no cell can be made.
    """

    primitives: Sequence | Mapping = ()
    operations: Mapping[str, Callable] = {}
    cell: type[SearchCell] = SearchCell
    max_skips: int | None = None  # of the cells in `genotype`; see `derive_cell`

    def __init__(self, C: int = 16, num_classes: int = 10, layers: int = 8, in_channels: int = 3, stem: str = "cifar"):
        super().__init__()
        self.arguments = dict(C=C, num_classes=num_classes, layers=layers, in_channels=in_channels, stem=stem)
        self.primitives, operations = choose_operations(self.primitives, self.operations, C)
        C_curr = STEM_MULTIPLIER * C
        add_stem(self, stem, in_channels, C_curr)
        C_prev_prev, C_prev, C_curr, reduction_prev = C_curr, C_curr, C, stem == "imagenet"  # whose outputs shrink
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            if reduction:
                C_curr *= 2
            self.cells.append(self.cell(self.primitives.columns("reduce" if reduction else "normal"), C_prev_prev,
                                        C_prev, C_curr, reduction, reduction_prev, operations))
            C_prev_prev, C_prev, reduction_prev = C_prev, NODES * C_curr, reduction
        self.classifier = nn.Linear(C_prev, num_classes)
        shape = (EDGES, len(self.primitives))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(shape))
        self.statistics = use_exact_sums(self)  # of BatchNorm; see `frozen_statistics`
        self._order: dict[str, nn.Parameter] | None = None

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W); flat weights `w` take the place of its own."""
        if w is not None:
            return self.with_weights(x, w)
        s0, s1 = stem_outputs(self, x.contiguous(memory_format=torch.channels_last))  # the layout that all maps inherit
        shares = {kind: self.shares(kind) for kind in ("normal", "reduce")}
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, shares["reduce" if cell.reduction else "normal"])
        return self.classifier(s1.mean(dim=(2, 3)))

    def shares(self, kind: str) -> Tensor:
        """What the cells of a kind, "normal" or "reduce", weigh by: (EDGES, P), a row for each mixed edge."""
        return self.primitives.shares(kind, getattr(self, f"alphas_{kind}"))

    def with_weights(self, x: Tensor, w: Tensor) -> Tensor:
        """`forward` by the weights in the flat vector `w`. An engine may replace it by a faster function."""
        order = self.flat_order()
        parts = w.split([p.numel() for p in order.values()])
        state = {name: part.view(p.shape) for (name, p), part in zip(order.items(), parts)}
        if self.statistics.frozen:  # buffers of modules that do not know that stay as they are too
            state |= {f"{place}.{name}".lstrip("."): buffer.clone() for place, module in self.named_modules()
                      if not has_exact_sums(module) for name, buffer in module._buffers.items()}
        return functional_call(self, state, (x,))

    def flat_order(self, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
        """The weights by name in the order of the flat vectors; `names` sets another order, which an engine may."""
        if names is not None or self._order is None:
            weights = self.weights()
            self._order = {name: weights[name] for name in names or weights}
        return self._order

    def packing(self) -> list[nn.Parameter]:
        """The weights in the order of the flat vectors."""
        return list(self.flat_order().values())

    def flat(self) -> Tensor:
        """The weights as one vector."""
        return torch.cat([p.reshape(-1) for p in self.packing()])

    def alphas(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by name: all of this network's own whose names begin with alphas_."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("alphas_")}

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters but the alphas, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("alphas_")}

    def genotype(self) -> Genotype:
        """The discrete cells that the alphas stand for now."""
        return derive(self.alphas_normal, self.alphas_reduce, self.primitives, max_skips=self.max_skips)
