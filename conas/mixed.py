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

from conas.depthwise import blockwise, convolve, phases
from conas.folded import halfway, in_rows, mix, running_scale
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

    def shares(self, probabilities: Tensor) -> tuple[Tensor | None, Tensor]:
        """p (kinds*S*E,) and q (E, M) of `mix`, from the edges' probabilities (S*E, P)."""
        column = dict(zip(self.primitives, probabilities.unbind(1)))
        convolutions = [column[name] for name in self.sep + self.dil]
        # a map that all edges out of a state share has one column for each state, one of its own for each edge
        q = [column[name].view(self.S, self.E).t() if name not in self.own else
             torch.diag_embed(column[name].view(self.S, self.E)).transpose(0, 1).flatten(1)
             for name in self.pools + self.skip + self.own]
        return (torch.cat(convolutions) if convolutions else None,
                torch.cat(q, 1) if q else probabilities.new_zeros(self.E, 0))

    def __call__(self, x: Tensor, p: Tensor | None, q: Tensor, weights: Iterator[Tensor], statistics: Statistics
                 ) -> tuple[Tensor | None, Tensor | None]:
        """What the states x (S, N, H, W, C) add to each of the E nodes: (E, N, H', W', C), and the same in phases."""
        if not statistics.batch:
            return self._by_running_statistics(x, p, q, weights, statistics)
        rectified = x.relu()
        z, z_shift = self._separable(rectified, weights, statistics)
        inner, inner_shift, phased = self._dilated(rectified, weights, statistics)
        pointwise = _square(next(weights)) if self.sep or self.dil else None
        plain = self._plain(x, self._own(rectified, weights, statistics), statistics)
        if pointwise is None:
            return (q @ plain.view(len(plain), -1)).view(self.E, *plain.shape[1:]), None
        shifts = [shift for shift in (z_shift, inner_shift) if shift is not None]
        out, inner = mix(z, inner, shifts, pointwise, p, plain, q, self._layers(self.sep + self.dil, -1), statistics)
        if phased or inner is None:
            return out, inner
        return (inner if out is None else out + inner), None

    def _separable(self, rectified, weights, statistics):
        if not self.sep:
            return None, None
        kernels = [next(weights) for _ in self.sep]
        z, shift = convolve(rectified, kernels, self.stride, centred=statistics.pool)
        half, again = halfway(z, shift, _square(next(weights)), self._layers(self.sep, 3), statistics)
        kernels = [next(weights) for _ in self.sep]
        return convolve(half, kernels, centred=statistics.pool, again=again)

    def _dilated(self, rectified, weights, statistics):
        if not self.dil:
            return None, None, False
        kernels = [next(weights) for _ in self.dil]
        rectified, dilation, phased = self._undilated(rectified)
        return *convolve(rectified, kernels, 1, dilation, statistics.pool), phased

    def _undilated(self, rectified):
        """The states as convolutions of dilation 2 read them, their dilation then, and whether these are `phases`."""
        if self.stride == 2:  # reads every other pixel only, and is a plain convolution of those
            return rectified[:, :, ::2, ::2].contiguous(), 1, False
        if rectified.shape[2] % 2 == rectified.shape[3] % 2 == 0:
            return phases(rectified), 1, True
        return rectified, 2, False

    def _pools(self, x):
        """The pooled states (S, N, H', W', C) by each of `pools`."""
        images = x.flatten(0, 1).permute(0, 3, 1, 2)
        return [POOLS[name](images, self.stride).permute(0, 2, 3, 1).unflatten(0, x.shape[:2]) for name in self.pools]

    def _plain(self, x, own, statistics):
        """All maps that need no pointwise convolution, one after another; None if there are none."""
        maps = self._pools(x) + ([x] if self.skip else []) + own
        plain = torch.cat(maps) if maps else None
        return statistics.normalise_(plain, self._pool_norms(), len(self.pools) * self.S) if self.pools else plain

    def _pool_norms(self):
        """Of every edge, by pool."""
        return [op[1] for name in self.pools for op in self.ops[name]]

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

    def _by_running_statistics(self, x, p, q, weights, statistics):
        """The sums, a block of edges at a time: with nothing to keep, every map serves while it is in the cache."""
        rectified, E, C = x.relu(), self.E, x.shape[-1]
        kernels = [next(weights) for _ in self.sep]
        if self.sep:
            halfway_scale, halfway_shift = running_scale(_square(next(weights)), None, self._layers(self.sep, 3))
        again, dilated = ([next(weights) for _ in names] for names in (self.sep, self.dil))
        if self.sep or self.dil:
            scale, shift = running_scale(_square(next(weights)), p, self._layers(self.sep + self.dil, -1))
        out = self._running_plain(x, q, self._own(rectified, weights, statistics), statistics)
        total, group = out.view(E, -1, C), 0
        for kernel, second in zip(kernels, again):
            for z in blockwise(rectified, kernel, self.stride):
                groups, at = slice(group, group + len(z)), group % (self.S * E) * C
                half = torch.baddbmm(halfway_shift[groups], in_rows(z), halfway_scale[groups]).relu_().view(z.shape)
                for block in blockwise(half, second[at:at + len(z) * C]):
                    _add_products(total, block, scale[groups], group)
                group = groups.stop
        if self.sep:
            total += shift[:group].view(-1, E, 1, C).sum(0)
        if not self.dil:
            return out, None
        rectified, dilation, phased = self._undilated(rectified)
        inner = out.new_zeros(E, *_after(rectified, 1)) if phased else out
        total = inner.view(E, -1, C)
        total += shift[group:].view(-1, E, 1, C).sum(0)
        for kernel in dilated:
            for z in blockwise(rectified, kernel, 1, dilation):
                _add_products(total, z, scale[group:group + len(z)], group)
                group += len(z)
        return out, inner if phased else None

    def _running_plain(self, x, q, own, statistics):
        """What pools, skips and `own` maps add to each node, (E, N, H', W', C)."""
        rest = ([x] if self.skip else []) + own
        shape, pools = (self.E, *_after(x, self.stride)), len(self.pools) * self.S
        out = (q[:, pools:] @ torch.cat(rest).flatten(1)).view(shape) if rest else x.new_zeros(shape)
        if pools:
            scale, shift = (t.to(x.dtype).view(pools, self.E, 1, 1, 1, -1)
                            for t in statistics.running_scale(self._pool_norms(), q[:, :pools].t().flatten()))
            for pooled, by in zip(torch.cat(self._pools(x)), scale):
                out.addcmul_(pooled, by)
            out += shift.sum(0)
        return out


def _after(x: Tensor, stride: int) -> Sequence[int]:
    """The shape (N, H', W', C) of what an operation of this stride makes of a state of x (S, N, H, W, C)."""
    _, N, H, W, C = x.shape
    return N, -(-H // stride), -(-W // stride), C


def _add_products(total: Tensor, z: Tensor, scale: Tensor, group: int) -> None:
    """Add the products of groups z (B, N, H, W, C), the first is `group`, to their edges' in total (E, pixels, C)."""
    E = len(total)
    if len(z) == 1:
        total[group % E].addmm_(in_rows(z)[0], scale[0])
    else:
        for part, by in zip(in_rows(z).split(E), scale.split(E)):
            total.baddbmm_(part, by)


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
