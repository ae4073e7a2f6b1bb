"""Mixed edges by running statistics, for evaluation: nothing is kept, and a map serves while it is in the cache."""
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from conas.engine.batch_statistics import Statistics
from conas.engine.depthwise import blockwise, groups_of
from conas.engine.edges import MixedEdges, Packs, pooled, square
from conas.engine.forward_train import undilated
from conas.engine.pointwise import in_rows, running_scale

# bytes of a block from which on a CPU's convolution, which adds the shift and needs no copies, beats a product
CONVOLVED = 2**20


def evaluate(edges: MixedEdges, x: Tensor, total: Tensor | None, p: Tensor | None, q: Tensor, weights: Packs,
             statistics: Statistics) -> Tensor:
    """What the states x (S, N, H, W, C) contribute to the E nodes, added to `total`.

    See `conas.engine.forward_train.forward_train`.
    """
    part = _contribution(edges, x, p, q, weights, statistics)
    return part if total is None else total + part


def _contribution(edges, x, p, q, weights, statistics):
    rectified, E, C = x.relu(), edges.E, x.shape[-1]
    out = _plain(edges, x, q, edges.own_maps(rectified, weights.own, statistics), statistics)
    if weights.last:
        scale, shift = statistics.once(lambda: _last_scale(edges, p, weights))
    total, group = out.view(E, -1, C), 0
    if edges.sep:
        halfway_scale, halfway_shift = statistics.once(lambda: running_scale(square(weights.halfway[0]), None,
                                                                             edges.layers(edges.sep, 3)))
    for kernel, second in zip(weights.first, weights.second):
        for z in blockwise(rectified, kernel, edges.stride):
            groups, at = slice(group, group + len(z)), group % (edges.S * E) * C
            half = _halfway(z, halfway_scale[groups], halfway_shift[groups])
            for block in blockwise(half, second[at:at + len(z) * C]):
                _add_products(total, block, scale[groups], group)
            group = groups.stop
    read, dilation = undilated(rectified, edges.stride)
    for kernel in weights.dilated:
        for z in blockwise(read, kernel, 1, dilation):
            _add_products(total, z, scale[group:group + len(z)], group)
            group += len(z)
    if weights.last:
        total += shift
    return out


def _halfway(z, scale, shift):
    """relu(z scale + shift), for groups z (B, N, H, W, C), scale (B, C, C) and shift (B, 1, C)."""
    # an exported graph serves every batch size, and may not depend on it
    if z.device.type != "cpu" or torch.compiler.is_exporting() or z.numel() * z.element_size() < CONVOLVED:
        return torch.baddbmm(shift, in_rows(z), scale).relu_().view(z.shape)
    weight = scale.transpose(1, 2).reshape(-1, scale.shape[1], 1, 1)
    y = conv2d(z.permute(1, 0, 4, 2, 3).flatten(1, 2), weight, shift.flatten(), groups=len(z)).relu_()
    return groups_of(y, scale.shape[2])


def _last_scale(edges, p, weights):
    """`scaled` of all convolutions as `running_scale` has it, and the sum of the shifts (E, 1, C) for every node."""
    scale, shift = running_scale(square(weights.last[0]), p, edges.layers(edges.sep + edges.dil, -1))
    return scale, shift.view(-1, edges.E, *shift.shape[1:]).sum(0)


def _plain(edges, x, q, own, statistics):
    """What pools, skips and `own` maps add to each node, (E, N, H', W', C)."""
    rest, shape = ([x] if edges.skip else []) + own, (edges.E, *_after(x, edges.stride))
    q_rest, scale, shift = statistics.once(lambda: _plain_scale(edges, q, x.dtype))
    out = (q_rest @ torch.cat(rest).flatten(1)).view(shape) if rest else x.new_zeros(shape)
    if edges.pools:
        for maps, by in zip(torch.cat([pooled(name, x, edges.stride) for name in edges.pools]), scale):
            out.addcmul_(maps, by)
        out += shift
    return out


def _plain_scale(edges, q, dtype):
    """q of all but pools, (E, M); by pool the scale (E, 1, 1, 1, C) of its map, and the sum of their shifts."""
    skips, pools = edges.S * len(edges.skip), edges.S * len(edges.pools)
    q_rest, q_pools = torch.cat([q[:, :skips], q[:, skips + pools:]], 1), q[:, skips:skips + pools]
    if not pools:
        return q_rest, q, q
    scale, shift = (t.to(dtype).view(pools, edges.E, 1, 1, 1, -1)
                    for t in Statistics.running_scale(edges.pool_norms(), q_pools.t().flatten()))
    return q_rest, scale, shift.sum(0)


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
