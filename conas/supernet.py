"""The search network: DARTS' continuous relaxation (arXiv:1806.09055, section 2.2) over a space's primitives."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import islice
from operator import call

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from conas.depthwise import interleave
from conas.genotype import EDGES, NODES, Genotype, derive
from conas.mixed import MixedEdges, factorized_reduce
from conas.operations import OPERATIONS, FactorizedReduce, ReLUConvBN
from conas.statistics import Statistics
from conas.synced import Pool

STEM_MULTIPLIER = 3

# The edges of a cell are numbered by node: 0, 1 into the first, 2, 3, 4 into the second, ... They are computed by what
# they leave: OUTGOING[n] are those out of both inputs for n = 0, then out of node n-1, each to node n and all after it.
OUTGOING = [[node * (node + 3) // 2 + source for source in ((0, 1) if n == 0 else (n + 1,)) for node in range(n, NODES)]
            for n in range(NODES)]


class MixedOp(nn.Module):
    """All primitives on one edge (equation 2 of DARTS): parameters and running statistics, under the published names.

    What is computed with them, for many edges at once, is in `conas/mixed.py`.
    """

    def __init__(self, primitives: Sequence[str], C: int, stride: int):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in primitives:
            operation = OPERATIONS[primitive](C, stride, False)
            if "pool" in primitive:  # a pool's output has no fixed scale otherwise
                operation = nn.Sequential(operation, nn.BatchNorm2d(C, affine=False))
            self._ops.append(operation)


class SearchCell(nn.Module):
    """A cell whose every edge is mixed. Output: the NODES intermediate states, concatenated, (N, H', W', NODES*C)."""

    def __init__(self, primitives: Sequence[str], C_prev_prev: int, C_prev: int, C: int, reduction: bool,
                 reduction_prev: bool):
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList(MixedOp(primitives, C, 2 if reduction and source < 2 else 1)
                                  for node in range(NODES) for source in range(2 + node))
        self.mixed = [MixedEdges(primitives, [self._ops[edge] for edge in edges], states=1 if n else 2,
                                 stride=2 if reduction and n == 0 else 1) for n, edges in enumerate(OUTGOING)]
        self.takes = len(self.packs())  # of the weights

    def packs(self) -> list[list[nn.Parameter]]:
        """The weights as packs to be concatenated, in the order in which `forward` takes them."""
        preprocess = [[p] for module in (self.preprocess0, self.preprocess1) for p in module.parameters()]
        return preprocess + [pack for edges in self.mixed for pack in edges.packs()]

    def forward(self, s0: Tensor, s1: Tensor, shares: Sequence[tuple], weights: Sequence[Tensor],
                statistics: Statistics) -> Tensor:
        """`s0`, `s1` (N, H, W, C) come after ReLU; `shares` are the softmax of the alphas, for each of `mixed`."""
        weights = iter(weights)
        source = torch.stack([_preprocess(self.preprocess0, s0, weights), _preprocess(self.preprocess1, s1, weights)])
        source = statistics.normalise_(source, [_norm(self.preprocess0), _norm(self.preprocess1)])
        nodes, arriving, arriving_in_phases = [], [[] for _ in range(NODES)], [[] for _ in range(NODES)]
        for n, (edges, (p, q)) in enumerate(zip(self.mixed, shares)):
            out, in_phases = edges(source, p, q, weights, statistics)
            for terms, sums in (arriving, out), (arriving_in_phases, in_phases):
                for node, term in enumerate([] if sums is None else sums.unbind(), start=n):
                    terms[node].append(term)
            # all edges into node n have now been computed: equation 1
            if arriving_in_phases[n]:
                arriving[n].append(interleave(reduce(torch.add, arriving_in_phases[n])))
            nodes.append(reduce(torch.add, arriving[n]))
            source = nodes[n][None]
        return torch.cat(nodes, dim=3)


def _preprocess(module: nn.Module, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    """Its output ahead of BatchNorm."""
    if isinstance(module, FactorizedReduce):
        return factorized_reduce(x[None], next(weights), next(weights), 1)
    return linear(x, next(weights).flatten(1))


def _norm(module: nn.Module) -> nn.BatchNorm2d:
    return module.bn if isinstance(module, FactorizedReduce) else module.op[2]


class Supernet(nn.Module):
    """A stack of search cells, with reduction cells at one and two thirds of the depth.

    A space is a subclass that sets `primitives`. All normal cells share `alphas_normal` and all reduction cells
    `alphas_reduce`, both (EDGES, len(primitives)). The alphas are Parameters, hence part of the `state_dict`;
    optimizers take `weights()` or `alphas()`, never `parameters()`.
    """

    primitives: Sequence[str] = ()

    def __init__(self, C: int = 16, num_classes: int = 10, layers: int = 8, in_channels: int = 3):
        super().__init__()
        self.arguments = {"C": C, "num_classes": num_classes, "layers": layers, "in_channels": in_channels}
        C_curr = STEM_MULTIPLIER * C
        self.stem = nn.Sequential(nn.Conv2d(in_channels, C_curr, 3, padding=1, bias=False), nn.BatchNorm2d(C_curr))
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, C
        self.cells = nn.ModuleList()
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            if reduction:
                C_curr *= 2
            self.cells.append(SearchCell(self.primitives, C_prev_prev, C_prev, C_curr, reduction, reduction_prev))
            C_prev_prev, C_prev, reduction_prev = C_prev, NODES * C_curr, reduction
        self.classifier = nn.Linear(C_prev, num_classes)
        shape = (EDGES, len(self.primitives))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(shape))
        self.register_buffer("outgoing", torch.tensor([edge for edges in OUTGOING for edge in edges]), persistent=False)
        self.frozen = False  # see `frozen_statistics`
        self.synced = False  # whether BatchNorm is by the images of all processes
        self.run_cell: Callable = call  # or what conas/speed.py puts in its place
        self._packs = [[self.stem[0].weight], [self.stem[1].weight], [self.stem[1].bias],
                       *(pack for cell in self.cells for pack in cell.packs()),
                       [self.classifier.weight], [self.classifier.bias]]

    def packing(self) -> list[nn.Parameter]:
        """The weights in the order of the flat vector that `with_weights` takes."""
        return [p for pack in self._packs for p in pack]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W).

        Under autocast all of the pass is in its type, since the cells' gradients by hand know one type only: images and
        weights are cast once, logits come back in the type of the weights.
        """
        w, kind = torch.cat([p.reshape(-1) for p in self.packing()]), x.device.type
        if not torch.is_autocast_enabled(kind):
            return self.with_weights(x, w)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return self.with_weights(x.to(dtype), w.to(dtype)).to(w.dtype)

    def with_weights(self, x: Tensor, w: Tensor) -> Tensor:
        """`forward` with the weights in the flat vector `w` in place of the network's own."""
        weights = self._unpack(w)
        pool = Pool.of_all(len(x)) if self.synced and self.training else None
        statistics = Statistics(batch=self.training, keep=not self.frozen, pool=pool)
        shares = {reduction: self._shares(alphas, reduction, w.dtype)
                  for reduction, alphas in ((False, self.alphas_normal), (True, self.alphas_reduce))}
        x = conv2d(x.contiguous(memory_format=torch.channels_last), next(weights), padding=1).permute(0, 2, 3, 1)
        out = statistics.normalise(x, [self.stem[1]], next(weights), next(weights))
        s0 = s1 = out.relu()  # every cell begins with it
        for cell in self.cells:
            own = list(islice(weights, cell.takes))
            out = self.run_cell(cell, s0, s1, shares[cell.reduction], own, statistics)
            s0, s1 = s1, out.relu()
        statistics.update()
        statistics.keep = False  # a checkpointed cell that is computed again brings no other batch
        return linear(out.mean(dim=(1, 2)), next(weights), next(weights))

    def _unpack(self, w: Tensor) -> Iterator[Tensor]:
        packs = w.split([sum(p.numel() for p in pack) for pack in self._packs])
        return iter([flat.view(-1, *pack[0].shape[1:]) for flat, pack in zip(packs, self._packs)])

    def _shares(self, alphas: Tensor, reduction: bool, dtype: torch.dtype) -> list[tuple]:
        """The probabilities of equation 2 as each of a cell's `mixed` takes them; cells of a kind share them."""
        edges = next((cell.mixed for cell in self.cells if cell.reduction == reduction), [])
        rows = alphas.softmax(dim=-1).to(dtype)[self.outgoing].split([len(edges) for edges in OUTGOING])
        return [mixed.shares(part) for mixed, part in zip(edges, rows)]

    def alphas(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by name."""
        return {"alphas_normal": self.alphas_normal, "alphas_reduce": self.alphas_reduce}

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters but the alphas, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("alphas_")}

    def genotype(self) -> Genotype:
        """The discrete cells that the alphas stand for now."""
        return derive(self.alphas_normal, self.alphas_reduce, self.primitives)


@contextmanager
def frozen_statistics(network: Supernet) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by the batch as usual but leaves its running statistics alone.

    For the architect: its passes look at weights that the search never has.
    """
    network.frozen = True
    try:
        yield
    finally:
        network.frozen = False
