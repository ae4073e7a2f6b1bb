"""The mixed edges of a cell, computed together for all edges that leave the same states.

One by one they are hundreds of small tensors. But the edges out of a state share its ReLU, its pools with their
BatchNorm, and the windows that their convolutions read; and a convolution of one kind is the same work on every edge.
So the maps of one kind on all edges are groups of one tensor, channels last:

    state (S, N, H, W, C) --relu--> depthwise --halfway--> depthwise ---.      S states, E nodes: S*E edges
                             |                      sep_conv            |
                             '----> depthwise on phases ----------------+--mix--> (E, N, H', W', C), to be summed
          '--> pools with BatchNorm, skip ------------------------------'
                                                                      p, q: softmax of the alphas
"""
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad

from conas.depthwise import convolve, phases
from conas.folded import halfway, mix
from conas.statistics import Statistics

POOLS = {"max_pool_3x3": lambda x, stride: max_pool2d(x, 3, stride, 1),
         "avg_pool_3x3": lambda x, stride: avg_pool2d(x, 3, stride, 1, count_include_pad=False)}


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

    def _layers(self, names: list[str], i: int) -> list[nn.Module]:
        """Layer i of these operations, for every operation on all edges."""
        return [op.op[i] for name in names for op in self.ops[name]]

    def packs(self) -> list[list[nn.Parameter]]:
        """The parameters as packs to be concatenated, in the order in which `__call__` takes them."""
        layers = [self._layers([name], 1) for name in self.sep]
        layers += [self._layers(self.sep, 2)] if self.sep else []
        layers += [self._layers([name], 5) for name in self.sep]
        layers += [self._layers([name], 1) for name in self.dil]
        layers += [self._layers(self.sep + self.dil, -2)] if self.sep or self.dil else []
        for name in self.own:
            names = ("conv_1", "conv_2") if name == "skip_connect" else ("1", "2")
            layers += [[op.get_submodule(layer) for op in self.ops[name]] for layer in names]
        return [[layer.weight for layer in pack] for pack in layers]

    def shares(self, probabilities: Tensor, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
        """p (kinds*S*E,) and q (E, M) of `mix`, from the edges' probabilities (S*E, P)."""
        column = dict(zip(self.primitives, probabilities.unbind(1)))
        convolutions = [column[name] for name in self.sep + self.dil]
        # a map that all edges out of a state share has one column for each state, one of its own for each edge
        shared = self.pools + self.skip if statistics.batch else self.skip
        q = [column[name].view(self.S, self.E).t() if name in shared else
             torch.diag_embed(column[name].view(self.S, self.E)).transpose(0, 1).flatten(1)
             for name in self.pools + self.skip + self.own]
        return (torch.cat(convolutions) if convolutions else None,
                torch.cat(q, 1) if q else probabilities.new_zeros(self.E, 0))

    def __call__(self, x: Tensor, p: Tensor | None, q: Tensor, weights: Iterator[Tensor], statistics: Statistics
                 ) -> tuple[Tensor | None, Tensor | None]:
        """What the states x (S, N, H, W, C) add to each of the E nodes: (E, N, H', W', C), and the same in phases."""
        rectified = x.relu()
        z, z_mean = self._separable(rectified, weights, statistics)
        inner, inner_mean, phased = self._dilated(rectified, weights, statistics)
        pointwise = _square(next(weights)) if self.sep or self.dil else None
        maps = self._pools(x, statistics) + ([x] if self.skip else []) + self._own(rectified, weights, statistics)
        plain = torch.cat(maps) if maps else None
        if pointwise is None:
            return (q @ plain.view(len(plain), -1)).view(self.E, *plain.shape[1:]), None
        mean = torch.cat([m for m in (z_mean, inner_mean) if m is not None]) if statistics.batch else None
        out, inner = mix(z, inner, mean, pointwise, p, plain, q, self._layers(self.sep + self.dil, -1), statistics)
        if phased or inner is None:
            return out, inner
        return (inner if out is None else out + inner), None

    def _separable(self, rectified, weights, statistics):
        if not self.sep:
            return None, None
        kernels = [next(weights) for _ in self.sep]
        z, mean = convolve(rectified, kernels, self.stride, centred=statistics.centred)
        half, again = halfway(z, mean, _square(next(weights)), self._layers(self.sep, 3), statistics)
        kernels = [next(weights) for _ in self.sep]
        return convolve(half, kernels, centred=statistics.centred, again=again)

    def _dilated(self, rectified, weights, statistics):
        if not self.dil:
            return None, None, False
        kernels, phased, dilation = [next(weights) for _ in self.dil], False, 2
        if self.stride == 2:  # reads every other pixel only, and is a plain convolution of those
            rectified, dilation = rectified[:, :, ::2, ::2], 1
        elif rectified.shape[2] % 2 == rectified.shape[3] % 2 == 0:
            rectified, dilation, phased = phases(rectified), 1, True
        return *convolve(rectified.contiguous(), kernels, 1, dilation, statistics.centred), phased

    def _pools(self, x, statistics):
        maps = []
        for name in self.pools:
            for s, state in enumerate(x):
                pooled = POOLS[name](state.permute(0, 3, 1, 2), self.stride).permute(0, 2, 3, 1)
                norms = [op[1] for op in self.ops[name][s * self.E:][:self.E]]
                if statistics.batch:
                    maps.append(statistics.normalise(pooled, norms)[None])
                else:  # every edge has running statistics of its own
                    maps.append(_apart(statistics.normalise(pooled.repeat(1, 1, 1, self.E), norms), self.E))
        return maps

    def _own(self, rectified, weights, statistics):
        maps, edges = [], self.S * self.E
        for name in self.own:
            first, second = next(weights), next(weights)
            if name == "skip_connect":
                y, norms = factorized_reduce(rectified, first, second, edges), [op.bn for op in self.ops[name]]
            else:
                y, norms = rectified.permute(1, 0, 4, 2, 3).flatten(1, 2), [op[3] for op in self.ops[name]]
                y = conv2d(y, first, None, (1, self.stride), (0, 3), 1, self.S)
                y = conv2d(y, second, None, (self.stride, 1), (3, 0), 1, edges).permute(0, 2, 3, 1)
            maps.append(_apart(statistics.normalise(y, norms), edges))
        return maps


def factorized_reduce(x: Tensor, first: Tensor, second: Tensor, edges: int) -> Tensor:
    """Two pointwise convolutions of stride 2, the second one pixel further on, of all edges out of each state.

    x (S, N, H, W, C), weights (edges*C_half, C, 1, 1); returns (N, H', W', edges*C_out).
    """
    S, N, H, W, C = x.shape
    x = pad(x, (0, 0, 0, W % 2, 0, H % 2))
    halves = []
    for i, weight in enumerate((first, second)):
        pixels = x[:, :, i::2, i::2].reshape(S, -1, C)
        halves.append((pixels @ weight.view(S, -1, C).transpose(1, 2)).unflatten(2, (edges // S, -1)))
    y = torch.cat(halves, 3).permute(1, 0, 2, 3)
    return y.reshape(N, (H + 1) // 2, (W + 1) // 2, -1)


def _square(weight: Tensor) -> Tensor:
    """(K*C, C, 1, 1) -> (K, C, C)."""
    return weight.view(-1, weight.shape[1], weight.shape[1])


def _apart(x: Tensor, groups: int) -> Tensor:
    """(N, H, W, groups*C) -> (groups, N, H, W, C)."""
    return x.unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 4)
