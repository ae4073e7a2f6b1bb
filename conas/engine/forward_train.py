"""Mixed edges in training, by statistics of the batch: forward, and backward by hand.

A backward pass by hand writes where its operands were, adds gradients up in place, and knows what autograd does not:
all states of a cell have mean zero in every channel, whatever the weights, since all that is summed there comes out
of BatchNorm. So a constant in a state's gradient has no effect, and once it has been taken out, every gradient through
a BatchNorm into that state is free of it.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from conas.engine import pointwise as folded
from conas.engine import pointwise_alpha_only as unfolded
from conas.engine.batch_statistics import Statistics
from conas.engine.batchnorm import centred_back, constant, normalise
from conas.engine.centering import own_shift, shifts
from conas.engine.depthwise import (
    apart,
    bordered,
    convolve,
    convolve_back,
    goes_by_phases,
    in_phases,
    inside,
    into_border,
    out_of_phases,
    side_by_side,
)
from conas.engine.edges import MixedEdges, Packs, Room, images, pooled, square, states
from conas.engine.manual_grad import Tape
from conas.engine.pointwise import EPS, in_rows
from conas.engine.pooling import average_pool_back

aten = torch.ops.aten
threshold_backward = aten.threshold_backward.grad_input


class Wanted(NamedTuple):
    """Whose gradients a pass is for."""

    x: bool
    alphas: bool
    weights: bool


def forward_train(tape: Tape, edges: MixedEdges, x: Tensor, total: Tensor | None, p: Tensor | None, q: Tensor,
                  weights: Packs, arranged: Iterator[Tensor], room: Room, statistics: Statistics, wanted: Wanted):
    """What the states x (S, N, H, W, C) contribute to the E nodes (E, N, H', W', C), added to `total` if that is given.

    Returns `(out, back)`. `back(grad, grad_x)` takes the gradient w.r.t. `out`, of mean zero in every channel, and a
    buffer into which that w.r.t. `x` is accumulated, and returns the gradients w.r.t. x, p, q and the weights. Takes
    its own of `arranged`, see `MixedEdges.arrangements`. x and `total` are in the `room`.
    """
    scope, S, maps, added = statistics.scope, edges.S, [], []
    rectified = torch.clamp_min(x, 0, out=room.maps[-S:])
    kept, pointwise = tape.keep(room.maps), folded if wanted.weights else unfolded
    total, plain_back = _plain(edges, tape, x, rectified, total, q, weights.own, room, statistics, wanted)
    if edges.dilations:
        means = shifts(rectified, next(arranged), edges.stride, edges.dilations)
        blocks = side_by_side(rectified, edges.E)
    if edges.sep:
        shift = [scope.all_reduce_mean(mean.flatten()) for mean in means[0][:len(edges.sep)]]
        maps, added, sep_back = _separable(edges, tape, rectified.shape, blocks, shift, weights, arranged, statistics,
                                           pointwise)
    if edges.dil:
        flipped = [next(arranged) for _ in edges.dil]
        read, dilation = undilated(rectified, edges.stride)
        shift = [scope.all_reduce_mean(mean.flatten()) for mean in means[-1][:len(edges.dil)]]
        if phased := goes_by_phases(read, 1, dilation):
            read, dilation = in_phases(read), 1
        blocks = blocks if read is rectified else side_by_side(read, edges.E)
        parts = convolve([blocks] * len(shift), weights.dilated, shift, x.shape[-1], 1, dilation)
        maps += [[out_of_phases(part) for part in of] for of in parts] if phased else parts
        added = added + shift
    if maps:
        z, last = apart(maps), square(weights.last[0])
        total, rstd, mix_back = pointwise.mix(tape, total, z, last, p, edges.E, scope)
        statistics.add_folded(edges.layers(edges.sep + edges.dil, -1), added, last, rstd, _pixels(z))

    def back(grad: Tensor, d_x: Tensor | None):
        maps, d, d_p, d_rectified = kept(), Packs(*([] for _ in Packs._fields)), None, None
        rectified = maps[-S:]
        if edges.dilations:
            d_z, d_last, d_p = mix_back(grad, wanted)
            d.last.append(_unsquare(d_last))
            separable = len(edges.sep) * S * edges.E
        if edges.sep and (wanted.x or wanted.weights):
            d_rectified = sep_back(d_z[:separable], rectified, d, wanted)
        if edges.dil and (wanted.x or wanted.weights):
            read, dilation = undilated(rectified, edges.stride)
            if wanted.x and d_rectified is None:
                d_rectified = rectified.new_zeros(rectified.shape)
            total = undilated(d_rectified, edges.stride)[0] if wanted.x else None
            _, d_kernels = convolve_back(d_z[separable:], read.shape, read if wanted.weights else None, weights.dilated,
                                         flipped, 1, dilation, wanted.x, total=total)
            d.dilated.extend(d_kernels)
        d_x, d_q = plain_back(grad, d_x, d_rectified, maps, d)
        packs = zip(d, weights)
        return d_x, d_p, d_q, [gradient for ours, pack in packs for gradient in ours or [None] * len(pack)]

    return total, back


def _separable(edges, tape, read, blocks, shift, weights, arranged, statistics, pointwise):
    """The maps of all sep_conv ahead of the last pointwise convolution, what was added to them, and `back`."""
    first, second, weight, stride = weights.first, weights.second, square(weights.halfway[0]), edges.stride
    flipped = [next(arranged) for _ in first] if stride == 1 else first, [next(arranged) for _ in second]
    maps = convolve([blocks] * len(first), first, shift, read[-1], stride)
    z = apart(maps)
    # in one part each, and copied: then these have served
    memory = [parts[0] for parts in maps] if all(len(of) == 1 and of[0] is not z for of in maps) else None
    parts, rstd, again, halfway_back = pointwise.halfway(tape, z, weight, edges.S * edges.E, memory, statistics.scope)
    statistics.add_folded(edges.layers(edges.sep, 3), shift, weight, rstd, _pixels(z))
    shift = [statistics.scope.all_reduce_mean(own_shift(part, kernel)) for part, kernel in zip(parts, second)]

    def back(d_z, rectified, d, wanted):
        maps = parts = None
        if wanted.weights:
            maps = [bordered(d_z, edges.S * edges.E, kernel) for kernel in second]
            parts = again([inside(of, kernel) for of, kernel in zip(maps, second)])
            maps = [part if of is None else of for of, part in zip(maps, parts)]
        d_parts, d_second = convolve_back(d_z, d_z.shape, maps, second, flipped[1], own=True)
        d_z, d_halfway = halfway_back(d_parts, parts, d_z)
        del d_parts  # memory, for the next
        inputs = rectified if wanted.weights else None
        if wanted.weights and stride == 1:  # where the parts were
            inputs = [into_border(rectified, *of) for of in zip(first, maps)]
        d_x, d_first = convolve_back(d_z, read, inputs, first, flipped[0], stride, 1, wanted.x)
        d.first.extend(d_first)
        d.halfway.append(_unsquare(d_halfway))
        d.second.extend(d_second)
        return d_x

    return convolve([side_by_side(part) for part in parts], second, shift, read[-1]), shift, back


def _plain(edges, tape, x, rectified, total, q, weights, room, statistics, wanted):
    """Skips, pools and maps of edges' own, added to `total` if that is given; `back` gives the gradients by x and q.

    For that it takes the `maps` of the room, and overwrites all but x.
    """
    S, E, stride, P, shape = edges.S, edges.E, edges.stride, len(edges.pools), x.shape
    skips, pools = S * len(edges.skip), S * P
    own, own_back = _own(edges, rectified, weights, statistics, wanted)
    in_room = stride == 1 and not own  # all of these maps
    if in_room:
        plain, indices = room.maps[S - skips:S + pools], room.indices
        for name, maps in zip(edges.pools, room.maps[S:].split(S)):
            _pool(name, images(x), images(maps), indices)
    else:
        maps, indices = [x] * len(edges.skip), None
        for name in edges.pools:
            if name == "max_pool_3x3":
                y, indices = max_pool2d(images(x), 3, stride, 1, return_indices=True)
                maps.append(states(y, S))
                indices = states(indices, S)
            else:
                maps.append(pooled(name, x, stride))
        plain = torch.cat(maps + own) if maps or own else x.new_empty(0)
    if pools:
        rows, scope = in_rows(plain[skips:skips + pools]), statistics.scope
        rows, mean, rstd = normalise(rows, EPS, scope, True)
        statistics.add(edges.pool_norms(), mean, rstd, rows.shape[1])
    if len(plain):
        flat, out = plain.view(len(plain), -1), room.sums.view(E, -1)
        total = torch.mm(q, flat, out=out) if total is None else torch.addmm(total.view(E, -1), q, flat, out=out)
        total = total.view(E, *plain.shape[1:])
    elif total is None:
        total = room.sums.zero_()
    kept, kept_indices = tape.keep(None if in_room else plain), tape.keep(indices)

    def back(grad, d_x, d_rectified, maps, d):
        plain, flat, rectified = maps[S - skips:S + pools] if in_room else kept(), grad.view(E, -1), maps[-S:]
        d_q = flat @ plain.view(len(plain), -1).t() if len(plain) and wanted.alphas else None
        if own:
            part, d_own = own_back((q[:, skips + pools:].t() @ flat).view(-1, *plain.shape[1:]), rectified)
            d.own.extend(d_own)
            if wanted.x:
                d_rectified = part if d_rectified is None else d_rectified.add_(part)
        if not wanted.x:
            return None, d_q
        parts = maps[S:] if stride == 1 else rectified.new_empty((P + 1) * S, *shape[1:])
        if pools:
            d_pools = (q[:, skips:skips + pools].t() @ flat).view(pools, *plain.shape[1:])
            centred_back(in_rows(d_pools), in_rows(plain[skips:skips + pools]), rstd, statistics.scope)
            for name, d_pool, part in zip(edges.pools, d_pools.split(S), parts.split(S)):
                _pool_back(name, images(d_pool), images(rectified), stride, kept_indices(), images(part))
        if d_rectified is None:
            parts = parts[:-S]
        else:
            threshold_backward(d_rectified, rectified, 0, grad_input=parts[-S:])
        if skips:
            q_skip = q[:, :skips].t()
            d_x = torch.mm(q_skip, flat) if d_x is None else d_x.view(S, -1).addmm_(q_skip, flat)
        if len(parts):
            parts = parts.view(len(parts) // S, -1)
            ones = constant(1.0, x.dtype, x.device).expand(1, len(parts))
            d_x = torch.mm(ones, parts) if d_x is None else d_x.view(1, -1).addmm_(ones, parts)
        return None if d_x is None else d_x.view(shape), d_q

    return total, back


def _own(edges, rectified, weights, statistics, wanted):
    """Maps of edges' own, and `back`: these few are computed again, by autograd."""
    def back(grad, rectified):
        if not wanted.x and not wanted.weights:
            return None, ()
        with torch.enable_grad():
            x = rectified.detach().requires_grad_(wanted.x)
            inputs = [x, *(weight.detach().requires_grad_(wanted.weights) for weight in weights)]
            maps = edges.own_maps(x, inputs[1:], statistics)
        of = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(maps, of, grad.split([len(m) for m in maps]))
        return (gradients[0], gradients[1:]) if wanted.x else (None, gradients)

    return edges.own_maps(rectified, weights, statistics), back


def _pool(name, x, out, indices):
    """Pools of stride 1 of the images x into `out`; max pooling leaves its indices too."""
    if name == "max_pool_3x3":
        aten.max_pool2d_with_indices.out(x, [3, 3], [1, 1], [1, 1], [1, 1], False, out=out, indices=images(indices))
    else:
        aten.avg_pool2d.out(x, [3, 3], [1, 1], [1, 1], False, False, None, out=out)


def _pool_back(name, grad, x, stride, indices, out):
    """Into `out`, the gradient by the images x, of which only the shape is read."""
    if name == "max_pool_3x3":
        aten.max_pool2d_with_indices_backward.grad_input(grad, x, [3, 3], [stride] * 2, [1, 1], [1, 1], False,
                                                         images(indices), grad_input=out)
    else:
        average_pool_back(grad, x, stride, out)


def _unsquare(weight: Tensor | None) -> Tensor | None:
    """The inverse of `square`."""
    return None if weight is None else weight.flatten(0, 1)[:, :, None, None]


def _pixels(z: Tensor) -> int:
    return z[0].numel() // z.shape[-1]


def undilated(x: Tensor, stride: int) -> tuple[Tensor, int]:
    """A view of the states as convolutions of dilation 2 read them, and their dilation then, at stride 1."""
    # of stride 2 they read every other pixel only, and are plain ones of those
    return (x[:, :, ::2, ::2], 1) if stride == 2 else (x, 2)
