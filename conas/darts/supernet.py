"""The search network: DARTS' continuous relaxation (arXiv:1806.09055, section 2.2) over a space's primitives."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice, zip_longest
from math import prod
from operator import call

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad

from conas.darts.genotype import EDGES, NODES, Genotype, derive
from conas.darts.operations import OPERATIONS, FactorizedReduce, ReLUConvBN
from conas.engine.batch_statistics import Statistics
from conas.engine.batchnorm import Pool
from conas.engine.edges import MixedEdges, Room, factorized_reduce
from conas.engine.forward_eval import evaluate
from conas.engine.forward_train import Wanted, train
from conas.engine.manual_grad import Tape, by_hand, recorded
from conas.errors import InputError

STEM_MULTIPLIER = 3

# The edges of a cell are numbered by node: 0, 1 into the first, 2, 3, 4 into the second, ... They are computed by what
# they leave: OUTGOING[n] are those out of both inputs for n = 0, then out of node n-1, each to node n and all after it.
OUTGOING = [[node * (node + 3) // 2 + source for source in ((0, 1) if n == 0 else (n + 1,)) for node in range(n, NODES)]
            for n in range(NODES)]


def check_primitives(primitives: Sequence[str]) -> None:
    """Raise InputError unless a space can search over these: known, distinct, and one of them other than `none`."""
    for name in primitives:
        if name not in OPERATIONS:
            near = get_close_matches(str(name), OPERATIONS, 3, 0.4) or sorted(OPERATIONS)
            raise InputError(f"PRIMITIVES: {name!r} is no operation; did you mean {' or '.join(near)}?")
    if twice := sorted({name for name in primitives if list(primitives).count(name) > 1}):
        raise InputError(f"PRIMITIVES: {', '.join(twice)} is there twice; take one away, since each has an alpha")
    if not set(primitives) - {"none"}:
        raise InputError(f"PRIMITIVES: {', '.join(primitives) or 'empty'}; a cell needs an operation other than none")


class MixedOp(nn.Module):
    """All primitives on one edge (equation 2 of DARTS): parameters and running statistics, under the published names.

    What is computed with them, for many edges at once, is in `conas/engine/edges.py`.
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

    def shares(self, probabilities: Tensor) -> Tensor:
        """What `forward` takes, one vector, from the edges' probabilities (EDGES, P), or from their places."""
        pairs = [mixed.shares(probabilities[edges]) for mixed, edges in zip(self.mixed, OUTGOING)]
        return torch.cat([share.flatten() for shares in zip(*pairs) for share in shares])

    def forward(self, s0: Tensor, s1: Tensor, shares: Tensor, weights: Sequence[Tensor], arranged: Sequence[Tensor],
                statistics: Statistics) -> Tensor:
        """`s0`, `s1` (N, H, W, C) come after ReLU; `shares` are made of the alphas: p of all `mixed`, then q."""
        weights = iter(weights)
        inputs = [_preprocess(self.preprocess0, s0, weights), _preprocess(self.preprocess1, s1, weights)]
        run = partial(self._nodes, statistics)
        return (by_hand if statistics.batch else recorded)(run, *inputs, shares, *weights, *arranged)

    def _nodes(self, statistics: Statistics, tape: Tape, s0: Tensor, s1: Tensor, shares: Tensor, *others: Tensor):
        """The output from both inputs ahead of their BatchNorm, and the way back; see `by_hand`."""
        rest, shapes = iter(others), [shape for of in zip(*(edges.shapes for edges in self.mixed)) for shape in of]
        weights = [edges.take(rest) for edges in self.mixed]
        shares = [share.view(shape) for share, shape in zip(shares.split([prod(shape) for shape in shapes]), shapes)]
        wanted = Wanted(any(tape.wanted[:2]), tape.wanted[2], any(tape.wanted[3:]))
        norms = [_norm(self.preprocess0), _norm(self.preprocess1)]
        rooms = Room.of_cell(self.mixed, s0) if tape.by_hand else [None] * NODES
        inputs = torch.stack([s0, s1], out=rooms[0].maps[:2] if tape.by_hand else None)
        source, source_back = statistics.normalise_states(tape, inputs, norms)
        sums, nodes, ways_back = None, [], []  # what has come to each node that is not complete
        for n, edges in enumerate(self.mixed):
            terms = edges, source, sums, shares[n], shares[NODES + n], weights[n]
            if statistics.batch:
                sums, way_back = train(tape, *terms, rest, rooms[n], statistics,
                                       wanted._replace(x=n > 0 or wanted.x))
                ways_back.append(way_back)
            else:
                sums = evaluate(*terms, statistics)
            source, sums = sums[:1], sums[1:]  # all edges into node n have been computed: equation 1
            nodes.append(source)

        def back(grad: Tensor):
            """From the last node to the first: when its turn comes, all edges out of it have added to its gradient."""
            d_nodes = grad.unflatten(3, (NODES, -1)).permute(3, 0, 1, 2, 4).contiguous()
            d_p, d_q, d_weights = ([None] * NODES for _ in range(3))
            for n in reversed(range(NODES)):
                d_nodes[n].sub_(statistics.pool.mean(d_nodes[n].mean((0, 1, 2))))  # see conas/engine/forward_train.py
                d_source, d_p[n], d_q[n], d_weights[n] = ways_back[n](d_nodes[n:], d_nodes[n - 1:n] if n else None)
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


class Supernet(nn.Module):
    """A stack of search cells, with reduction cells at one and two thirds of the depth.

    A space is a subclass that sets `primitives`. All normal cells share `alphas_normal` and all reduction cells
    `alphas_reduce`, both (EDGES, len(primitives)). The alphas are Parameters, hence part of the `state_dict`;
    optimizers take `weights()` or `alphas()`, never `parameters()`.
    """

    primitives: Sequence[str] = ()

    def __init__(self, C: int = 16, num_classes: int = 10, layers: int = 8, in_channels: int = 3):
        super().__init__()
        check_primitives(self.primitives)
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
        self.frozen = False  # see `frozen_statistics`
        self.synced = False  # whether BatchNorm is by the images of all processes
        self.run_cell: Callable = call  # or what conas/engine/precision.py puts in its place
        self._packs = [[self.stem[0].weight], [self.stem[1].weight], [self.stem[1].bias],
                       *(pack for cell in self.cells for pack in cell.packs()),
                       [self.classifier.weight], [self.classifier.bias]]
        places, count = {}, 0
        for p in self.packing():
            places[p] = torch.arange(count, count + p.numel()).view(p.shape)
            count += p.numel()
        arranged = [[part for edges in cell.mixed for part in edges.arrangements(places, count)] for cell in self.cells]
        self._arranged = [[part.shape for part in parts] for parts in arranged]  # by cell
        index = torch.cat([part.flatten() for parts in arranged for part in parts] or [torch.empty(0)]).int()
        self.register_buffer("arrangement", index, persistent=False)
        edges = 1 + torch.arange(2 * self.alphas_normal.numel()).view(2, *shape)  # by kind; 0 is the place of a zero
        kinds = [[cell for cell in self.cells if cell.reduction == kind] for kind in (False, True)]
        shares = [cells[0].shares(of) if cells else of[0, :0] for cells, of in zip(kinds, edges)]
        self._kinds = [(len(cells), len(share)) for cells, share in zip(kinds, shares)]
        self.register_buffer("shares", torch.cat(shares), persistent=False)

    def packing(self) -> list[nn.Parameter]:
        """The weights in the order of the flat vector that `with_weights` takes."""
        return [p for pack in self._packs for p in pack]

    def flat(self) -> Tensor:
        """The weights as one vector."""
        return torch.cat([p.reshape(-1) for p in self.packing()])

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W), by the network's weights or by `flat()` ones.

        Under autocast all of the pass is in its type, since the cells' gradients by hand know one type only: images and
        weights are cast once, logits come back in the type of the weights.
        """
        w, kind = self.flat() if w is None else w, x.device.type
        if not torch.is_autocast_enabled(kind):
            return self.with_weights(x, w)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return self.with_weights(x.to(dtype), w.to(dtype)).to(w.dtype)

    def with_weights(self, x: Tensor, w: Tensor | None, once: Callable = call) -> Tensor:
        """`forward` with the weights in the flat vector `w` in place of the network's own.

        `once` gives what a function makes that takes no images, see conas/engine/inference.py; if it asks none, w may
        be None.
        """
        weights, arranged = iter(once(lambda: self._unpack(w))), self._arrange(w) if self.training else ()
        pool = Pool.of_all(len(x)) if self.synced and self.training else None
        statistics = Statistics(batch=self.training, keep=not self.frozen, pool=pool, once=once)
        shares = once(lambda: self._shares(w.dtype))
        x = conv2d(x.contiguous(memory_format=torch.channels_last), next(weights), padding=1).permute(0, 2, 3, 1)
        out = statistics.normalise(x, [self.stem[1]], next(weights), next(weights))
        s0 = s1 = out.relu()  # every cell begins with it
        for cell, share, kernels in zip_longest(self.cells, shares, arranged, fillvalue=()):
            own = list(islice(weights, cell.takes))
            out = self.run_cell(cell, s0, s1, share, own, kernels, statistics)
            s0, s1 = s1, out.relu()
        statistics.update()
        statistics.keep = False  # a checkpointed cell that is computed again brings no other batch
        return linear(out.mean(dim=(1, 2)), next(weights), next(weights))

    def _unpack(self, w: Tensor) -> list[Tensor]:
        packs = w.split([sum(p.numel() for p in pack) for pack in self._packs])
        return [flat.view(-1, *pack[0].shape[1:]) for flat, pack in zip(packs, self._packs)]

    def _arrange(self, w: Tensor) -> list[list[Tensor]]:
        """Depthwise kernels in other orders by cell, see `MixedEdges.arrangements`: in one call for all."""
        flat = pad(w, (0, 1)).index_select(0, self.arrangement)
        parts = iter(flat.split([shape.numel() for shapes in self._arranged for shape in shapes]))
        return [[next(parts).view(shape) for shape in shapes] for shapes in self._arranged]

    def _shares(self, dtype: torch.dtype) -> list[Tensor]:
        """The probabilities of equation 2 by cell, as these take them."""
        p = torch.stack([self.alphas_normal, self.alphas_reduce]).softmax(dim=-1).to(dtype)
        parts = pad(p.flatten(), (1, 0)).index_select(0, self.shares).split([size for _, size in self._kinds])
        parts = [iter(part.expand(count, -1).unbind()) for part, (count, _) in zip(parts, self._kinds)]
        return [next(parts[cell.reduction]) for cell in self.cells]

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


@contextmanager
def constant_alphas(network: nn.Module) -> Iterator[None]:
    """Inside, passes know that no gradient by the alphas is wanted, and leave out what only these need."""
    for alpha in network.alphas().values():
        alpha.requires_grad_(False)
    try:
        yield
    finally:
        for alpha in network.alphas().values():
            alpha.requires_grad_(True)
