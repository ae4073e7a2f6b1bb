"""A search cell computed by packed edges: all edges out of a state at once, with gradients written by hand.

The numbers are those of `SearchCell.forward` in conas/darts/supernet.py; conas/engine/edges.py explains the packing.
"""
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from conas.darts.genotype import NODES
from conas.darts.operations import FactorizedReduce
from conas.darts.supernet import SearchCell
from conas.engine.batch_statistics import Statistics
from conas.engine.edges import MixedEdges, Packs, Room, factorized_reduce
from conas.engine.forward_eval import evaluate
from conas.engine.forward_train import Wanted, forward_train
from conas.engine.manual_grad import Tape, with_manual_grad

# The edges of a cell are numbered by node: 0, 1 into the first, 2, 3, 4 into the second, ... They are computed by what
# they leave: OUTGOING[n] are those out of both inputs for n = 0, then out of node n-1, each to node n and all after it.
OUTGOING = [[node * (node + 3) // 2 + source for source in ((0, 1) if n == 0 else (n + 1,)) for node in range(n, NODES)]
            for n in range(NODES)]


class PackedCell:
    """What computes a search cell; the cell keeps its modules, parameters and running statistics."""

    def __init__(self, cell: SearchCell, primitives: Sequence[str]):
        self.preprocess0, self.preprocess1, self.reduction = cell.preprocess0, cell.preprocess1, cell.reduction
        self.mixed = [MixedEdges(primitives, [cell._ops[edge] for edge in edges], states=1 if n else 2,
                                 stride=2 if cell.reduction and n == 0 else 1) for n, edges in enumerate(OUTGOING)]
        self.takes = len(self.packs())  # of the weights

    def packs(self) -> list[list[nn.Parameter]]:
        """The weights as packs to be concatenated, in the order in which a call takes them."""
        preprocess = [[p] for module in (self.preprocess0, self.preprocess1) for p in module.parameters()]
        return preprocess + [pack for edges in self.mixed for pack in edges.packs()]

    def shares(self, probabilities: Tensor) -> Tensor:
        """What a call takes, one vector, from the edges' probabilities (EDGES, P), or from their places."""
        pairs = [mixed.shares(probabilities[edges]) for mixed, edges in zip(self.mixed, OUTGOING)]
        return torch.cat([share.flatten() for shares in zip(*pairs) for share in shares])

    def __call__(self, s0: Tensor, s1: Tensor, shares: Tensor, weights: Sequence[Tensor], arranged: Sequence[Tensor],
                statistics: Statistics) -> Tensor:
        """`s0`, `s1` (N, H, W, C) come after ReLU; `shares` are made of the alphas: p of all `mixed`, then q."""
        weights = iter(weights)
        inputs = [_preprocess(self.preprocess0, s0, weights), _preprocess(self.preprocess1, s1, weights)]
        if statistics.batch:
            return with_manual_grad(partial(self._train, statistics), *inputs, shares, *weights, *arranged)
        return self._evaluate(statistics, inputs, shares, weights)

    def _take(self, shares: Tensor, rest: Iterator[Tensor]) -> tuple[list[Tensor], list[Packs]]:
        """p of all `mixed`, then q, in their shapes, and the weights of each of `mixed`, taken from `rest`."""
        shapes = [shape for of in zip(*(edges.shapes for edges in self.mixed)) for shape in of]
        parts = shares.split([prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)], [edges.take(rest) for edges in self.mixed]

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [_norm(self.preprocess0), _norm(self.preprocess1)]

    def _evaluate(self, statistics: Statistics, inputs: list[Tensor], shares: Tensor, rest: Iterator[Tensor]) -> Tensor:
        """The output (N, H', W', NODES*C) by running statistics, from both inputs ahead of their BatchNorm."""
        shares, weights = self._take(shares, rest)
        source, sums, nodes = statistics.normalise_by_running(torch.stack(inputs), self._norms()), None, []
        for n, edges in enumerate(self.mixed):
            sums = evaluate(edges, source, sums, shares[n], shares[NODES + n], weights[n], statistics)
            source, sums = sums[:1], sums[1:]  # all edges into node n have been computed: equation 1
            nodes.append(source)
        return torch.cat([node[0] for node in nodes], 3)

    def _train(self, statistics: Statistics, tape: Tape, s0: Tensor, s1: Tensor, shares: Tensor, *others: Tensor):
        """The output from both inputs ahead of their BatchNorm, and its backward; see `with_manual_grad`."""
        rest = iter(others)
        shares, weights = self._take(shares, rest)
        wanted = Wanted(any(tape.wanted[:2]), tape.wanted[2], any(tape.wanted[3:]))
        rooms = Room.of_cell(self.mixed, s0)
        source, source_back = statistics.normalise_by_batch(
            tape, torch.stack([s0, s1], out=rooms[0].maps[:2]), self._norms())
        sums, nodes, backwards = None, [], []  # `sums`: what has come to each node that is not complete
        for n, edges in enumerate(self.mixed):
            sums, backward = forward_train(tape, edges, source, sums, shares[n], shares[NODES + n], weights[n], rest,
                                           rooms[n], statistics, wanted._replace(x=n > 0 or wanted.x))
            backwards.append(backward)
            source, sums = sums[:1], sums[1:]  # all edges into node n have been computed: equation 1
            nodes.append(source)

        def back(grad: Tensor):
            """From the last node to the first: when its turn comes, all edges out of it have added to its gradient.

            Gradients are made of mean zero in every channel, see conas/engine/forward_train.py.
            """
            d_nodes = grad.unflatten(3, (NODES, -1)).permute(3, 0, 1, 2, 4).contiguous()
            d_p, d_q, d_weights = ([None] * NODES for _ in range(3))
            for n in reversed(range(NODES)):
                d_nodes[n].sub_(statistics.scope.all_reduce_mean(d_nodes[n].mean((0, 1, 2))))
                d_source, d_p[n], d_q[n], d_weights[n] = backwards[n](d_nodes[n:], d_nodes[n - 1:n] if n else None)
            d_inputs, d_shares = source_back(d_source) if wanted.x else (None, None), None
            if wanted.alphas:
                d_p = [torch.cat(d_p).sum(1)] if weights[0].last else []
                d_shares = torch.cat(d_p + [share.flatten() for share in d_q if share is not None])
            gradients = [*d_inputs, d_shares, *chain(*d_weights)]
            return *gradients, *[None] * (3 + len(others) - len(gradients))

        return torch.cat([node[0] for node in nodes], 3), back


def _preprocess(module: nn.Module, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    """Its output ahead of BatchNorm."""
    if isinstance(module, FactorizedReduce):
        return factorized_reduce(x[None], next(weights), next(weights), 1)
    return linear(x, next(weights).flatten(1))


def _norm(module: nn.Module) -> nn.BatchNorm2d:
    return module.bn if isinstance(module, FactorizedReduce) else module.op[2]
