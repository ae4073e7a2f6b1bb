"""The mixed edges of a cell, packed: all edges that leave the same states, computed together.

One by one they are hundreds of small tensors. But the edges out of a state share its ReLU, its pools with their
BatchNorm, and the windows that their convolutions read; and a convolution of one kind is the same work on every edge.
So the maps of one kind on all edges are groups of one tensor, channels last:

    state (S, N, H, W, C) --relu--> depthwise --halfway--> depthwise ---.      S states, E nodes: S*E edges
                             |                      sep_conv            |
                             '----> dilated depthwise ------------------+--mix--> (E, N, H', W', C), to be summed
          '--> pools with BatchNorm, skip ------------------------------'
                                                                      p, q: softmax of the alphas

Here is what belongs to such edges; `conas/engine/forward_train.py` computes them in training,
`conas/engine/forward_eval.py` in evaluation.
"""
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad

from conas.darts.batchnorm import has_own_forward
from conas.darts.operations import AveragePool, DilConv, FactorizedReduce, SepConv, Zero, average_pool
from conas.engine.batch_statistics import Statistics

POOLS = {"max_pool_3x3": lambda x, stride: max_pool2d(x, 3, stride, 1),
         "avg_pool_3x3": average_pool}

# What the functions here compute, by name: the classes of the modules that it is right for. A name alone proves
# nothing, since OPERATIONS may be changed.
COMPUTED = {
    "none": [(Zero,)],
    "skip_connect": [(nn.Identity,), (FactorizedReduce,)],
    "max_pool_3x3": [(nn.MaxPool2d, nn.BatchNorm2d)],
    "avg_pool_3x3": [(AveragePool, nn.BatchNorm2d)],
    "sep_conv_3x3": [(SepConv,)],
    "sep_conv_5x5": [(SepConv,)],
    "sep_conv_7x7": [(SepConv,)],
    "dil_conv_3x3": [(DilConv,)],
    "dil_conv_5x5": [(DilConv,)],
    "conv_7x1_1x7": [(nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d)],
}
INSIDE = {nn.Sequential, nn.ReLU, nn.Conv2d, nn.AvgPool2d, nn.BatchNorm2d}


def is_computed(primitive: str, operation: nn.Module) -> bool:
    """Return True if packed edges compute what this operation, called `primitive`, does."""
    parts = list(operation) if type(operation) is nn.Sequential else [operation]
    if tuple(map(type, parts)) not in COMPUTED.get(primitive, []) or any(map(has_own_forward, operation.modules())):
        return False  # of another class, or with a forward that was replaced in this instance
    if "pool" in primitive:
        pool = parts[0].pool if type(parts[0]) is AveragePool else parts[0]
        if (pool.kernel_size, pool.padding) != (3, 1):
            return False
    if primitive == "conv_7x1_1x7" and [(part.kernel_size, part.padding) for part in parts[1:3]] != [
            ((1, 7), (0, 3)), ((7, 1), (3, 0))]:
        return False
    own = {type(part) for part in operation.modules()} - {type(operation), *map(type, parts)}
    return own <= INSIDE


class Packs(NamedTuple):
    """The weights of mixed edges, or their gradients: for each kind those of all edges, one after another."""

    first: list[Tensor]    # of each sep_conv: the first depthwise kernels (S*E*C, 1, k, k)
    halfway: list[Tensor]  # one tensor: the first pointwise weights (kinds*S*E*C, C, 1, 1); none without sep_conv
    second: list[Tensor]   # of each sep_conv
    dilated: list[Tensor]  # of each dil_conv
    last: list[Tensor]     # one tensor: the pointwise weights ahead of the sum
    own: list[Tensor]      # two for each operation that has maps of its own on every edge


class MixedEdges:
    """The edges out of S states into E nodes, all of one stride.

    `mixed` are their MixedOps, by state, then node: the modules that hold parameters and running statistics.
    """

    def __init__(self, primitives: Sequence[str], mixed: Sequence[nn.Module], states: int, stride: int):
        self.S, self.E, self.stride = states, len(mixed) // states, stride
        self.primitives = primitives
        self.ops = {primitive: [m._ops[k] for m in mixed] for k, primitive in enumerate(primitives)}
        self.sep = [name for name in primitives if name.startswith("sep_conv")]
        self.dil = [name for name in primitives if name.startswith("dil_conv")]
        self.pools = [name for name in primitives if name in POOLS]
        self.own = [name for name in primitives if name == "conv_7x1_1x7" or (name == "skip_connect" and stride == 2)]
        self.skip = ["skip_connect"] if "skip_connect" in primitives and stride == 1 else []
        self.dilations = [1] * bool(self.sep) + [2] * bool(self.dil)
        own = self.S * self.E * len(self.own)
        self.shapes = [((len(self.sep) + len(self.dil)) * self.S * self.E,),  # of p and q, see `shares`
                       (self.E, self.S * len(self.skip + self.pools) + own)]

    def layers(self, names: Sequence[str], i: int) -> list[nn.Module]:
        """Layer i of these operations, for every operation on all edges."""
        return [op.op[i] for name in names for op in self.ops[name]]

    def packs(self) -> list[list[nn.Parameter]]:
        """The parameters that are concatenated to make each of the tensors that `take` takes."""
        layers = [self.layers([name], 1) for name in self.sep]
        layers += [self.layers(self.sep, 2)] if self.sep else []
        layers += [self.layers([name], 5) for name in self.sep]
        layers += [self.layers([name], 1) for name in self.dil]
        layers += [self.layers(self.sep + self.dil, -2)] if self.sep or self.dil else []
        for name in self.own:
            names = ("conv_1", "conv_2") if name == "skip_connect" else ("1", "2")
            layers += [[op.get_submodule(layer) for op in self.ops[name]] for layer in names]
        return [[layer.weight for layer in pack] for pack in layers]

    def take(self, weights: Iterator[Tensor]) -> Packs:
        """The next of the weights, as `packs` orders them."""
        sep, dil = len(self.sep), len(self.dil)
        counts = sep, min(sep, 1), sep, dil, min(sep + dil, 1), 2 * len(self.own)
        return Packs(*([next(weights) for _ in range(count)] for count in counts))

    def arrangements(self, places: Mapping[nn.Parameter, Tensor], nothing: int) -> list[Tensor]:
        """Depthwise kernels in other orders, as places in the flat vector of all weights; at `nothing` is a zero.

        `places` has those of each parameter, in its shape. First, for `shifts`, those that read the states,
        (F, k*k, K, S, E, C); then what `convolve_back` needs `flipped`.
        """
        def kernels(names, i):
            return [torch.cat([places[layer.weight] for layer in self.layers([name], i)]) for name in names]

        first, second, dilated = kernels(self.sep, 1), kernels(self.sep, 5), kernels(self.dil, 1)
        families, arranged = [family for family in (first, dilated) if family], []
        if families:  # those of fewer kinds, or of smaller kernels, get kernels of zeros, or borders
            kinds, blank = max(map(len, families)), torch.full_like(families[0][0], nothing)
            packs = [pack for family in families for pack in family + [blank] * (kinds - len(family))]
            k = max(pack.shape[-1] for pack in packs)
            packs = [pad(pack, [(k - pack.shape[-1]) // 2] * 4, value=nothing) for pack in packs]
            packs = [pack.view(self.S, self.E, -1, k * k).permute(3, 0, 1, 2) for pack in packs]
            arranged.append(torch.stack(packs).unflatten(0, (len(families), kinds)).transpose(1, 2))
        turned = (first if self.stride == 1 else []) + second + dilated
        return arranged + [pack.flip(2, 3) for pack in turned]

    def shares(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """p (kinds*S*E,) and q (E, M) of equation 2, from the edges' probabilities (S*E, P), or from their places.

        p weighs convolutions, in the order of `sep` and `dil`; q the maps of `skip`, `pools` and `own`, and has zeros
        where a map is of another edge.
        """
        column = dict(zip(self.primitives, probabilities.unbind(1)))
        nothing = probabilities.new_zeros(self.E, 0)
        convolutions = [column[name] for name in self.sep + self.dil] or [nothing.flatten()]
        # a map that all edges out of a state share has one column for each state, one of its own for each edge
        q = [column[name].view(self.S, self.E).t() if name not in self.own else
             torch.diag_embed(column[name].view(self.S, self.E)).transpose(0, 1).flatten(1)
             for name in self.skip + self.pools + self.own]
        return torch.cat(convolutions), torch.cat(q or [nothing], 1)

    def pool_norms(self) -> list[nn.BatchNorm2d]:
        """Of every edge, by pool."""
        return [op[1] for name in self.pools for op in self.ops[name]]

    def own_maps(self, rectified: Tensor, weights: Sequence[Tensor], statistics: Statistics) -> list[Tensor]:
        """The maps (S*E, N, H', W', C) of each of `own`, with BatchNorm, from the states after ReLU."""
        maps, edges, weights = [], self.S * self.E, iter(weights)
        for name, first, second in zip(self.own, weights, weights):
            if name == "skip_connect":
                y, norms = factorized_reduce(rectified, first, second, edges), [op.bn for op in self.ops[name]]
            else:
                y, norms = rectified.permute(1, 0, 4, 2, 3).flatten(1, 2), [op[3] for op in self.ops[name]]
                y = conv2d(y, first, None, (1, self.stride), (0, 3), 1, self.S)
                y = conv2d(y, second, None, (self.stride, 1), (3, 0), 1, edges).permute(0, 2, 3, 1)
            maps.append(statistics.normalise(y, norms).unflatten(3, (edges, -1)).permute(3, 0, 1, 2, 4))
        return maps


class Room(NamedTuple):
    """Memory for what belongs together, so that products take it as one: for passes with gradients by hand."""

    maps: Tensor            # (S*(2 + P), N, H, W, C): S states, P pools, their ReLU; P is 0 if pools are smaller
    sums: Tensor            # (E, N, H', W', C): the nodes
    indices: Tensor | None  # (S, N, H', W', C): of max pooling, if there is room for pools

    @classmethod
    def of_cell(cls, mixed: Sequence[MixedEdges], like: Tensor) -> "list[Room]":
        """For each of a cell's `mixed` edges, for inputs (N, H, W, C) like this; behind a node are its pools."""
        S, E, stride = mixed[0].S, mixed[0].E, mixed[0].stride
        N, H, W, C = like.shape
        size, pools, first = (N, -(-H // stride), -(-W // stride), C), len(mixed[0].pools), S if stride == 1 else 0
        step = 2 + pools
        counts = [S * 2 + first * pools, (E - 1) * step + 1]
        inputs, nodes = (like.new_empty(sum(counts), *size).split(counts) if stride == 1 else
                         [like.new_empty(counts[0], *like.shape), like.new_empty(counts[1], *size)])
        sums, indices = nodes[::step], [None] * E
        if "max_pool_3x3" in mixed[0].pools:
            indices = like.new_empty(first + E - 1, *size, dtype=torch.int64).split([first] + [1] * (E - 1))
        return [cls(inputs if n == 0 else nodes[(n - 1) * step:n * step], sums[n:], indices[n]) for n in range(E)]


def pooled(name: str, x: Tensor, stride: int) -> Tensor:
    """States (S, N, H, W, C), pooled."""
    return states(POOLS[name](images(x), stride), len(x))


def images(x: Tensor) -> Tensor:
    """(S, N, H, W, C) -> (S*N, C, H, W)."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def states(x: Tensor, S: int) -> Tensor:
    """The inverse of `images`."""
    return x.permute(0, 2, 3, 1).unflatten(0, (S, -1))


def square(weight: Tensor) -> Tensor:
    """(K*C, C, 1, 1) -> (K, C, C)."""
    return weight.view(-1, weight.shape[1], weight.shape[1])


def factorized_reduce(x: Tensor, first: Tensor, second: Tensor, edges: int) -> Tensor:
    """Two pointwise convolutions of stride 2, the second one pixel further on, of all edges out of each state.

    x (S, N, H, W, C), weights (edges*C_out/2, C, 1, 1): C_out is even, it was doubled there. Returns
    (N, H', W', edges*C_out).
    """
    S, N, H, W, C = x.shape
    x = pad(x, (0, 0, 0, W % 2, 0, H % 2)) if H % 2 or W % 2 else x
    both = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).diagonal(dim1=3, dim2=5)  # (S, N, H', W', C, 2)
    pixels, weights = both.movedim(5, 0).reshape(2 * S, -1, C), torch.stack([first, second]).view(2 * S, -1, C)
    y = torch.bmm(pixels, weights.transpose(1, 2)).view(2, S, -1, edges // S, first.shape[0] // edges)
    return y.permute(2, 1, 3, 0, 4).reshape(N, (H + 1) // 2, (W + 1) // 2, 2 * len(first))
