"""Networks as few plain operations, for files that other programs run.

The definitions of conas/darts in evaluation, with all that takes no images computed beforehand: BatchNorm by running
statistics and the shares of mixed edges are folded into convolutions, and the pointwise convolutions that end the
operations into one node are one. What is known by its class is changed; all else stays as its own code has it.
"""
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from conas.darts.batchnorm import has_own_forward
from conas.darts.derived import DerivedNetwork
from conas.darts.genotype import NODES
from conas.darts.operations import AveragePool, DilConv, FactorizedReduce, ReLUConvBN, SepConv, Zero
from conas.darts.stems import is_stem, stem_outputs
from conas.darts.supernet import MixedOp, SearchCell, Supernet

POOLS = {nn.MaxPool2d: lambda x, stride: max_pool2d(x, 3, stride, 1),
         AveragePool: lambda x, stride: avg_pool2d(x, 3, stride, 1, count_include_pad=False)}


def plain(network: nn.Module) -> nn.Module:
    """A network in evaluation mode as a function of images alone, with the same logits; itself it stays as it is.

    Raises TypeError for one that is not given by its definition.
    """
    if not isinstance(network, (Supernet, DerivedNetwork)):
        raise TypeError(f"a {type(network).__name__} is no definition of a network")
    network = copy.deepcopy(network).eval().float().requires_grad_(False)
    if isinstance(network, Supernet) and type(network).forward is Supernet.forward and is_stem(network):
        return PlainSupernet(network)
    if isinstance(network, DerivedNetwork):
        network.auxiliary_head = None  # for training only
    return fold(network)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What BatchNorm by running statistics multiplies by and adds, (C,) float64 each."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def convolution(weight: Tensor, bias: Tensor | None, stride: int | tuple = 1, padding: int | tuple = 0,
                dilation: int | tuple = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with these weights."""
    out, inputs, *kernel = weight.shape
    made = nn.Conv2d(inputs * groups, out, kernel, stride, padding, dilation, groups)
    made.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    bias = torch.zeros(out) if bias is None else bias  # without one, torch.onnx writes five nodes that make one
    made.bias = nn.Parameter(bias.float().contiguous(), requires_grad=False)
    return made


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, share: float = 1.0) -> nn.Conv2d:
    """A convolution with the BatchNorm that follows it, the result multiplied by `share`."""
    scale, shift = affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias.double() * scale
    return convolution(conv.weight.double() * (share * scale)[:, None, None, None], share * bias, conv.stride,
                       conv.padding, conv.dilation, conv.groups)


class Halving(nn.Module):
    """`FactorizedReduce` as one convolution of 2x2 pixels: its two halves look at two of the four."""

    def __init__(self, reduce: FactorizedReduce, share: float = 1.0, rectify: bool = True):
        super().__init__()
        first, second = reduce.conv_1.weight.double(), reduce.conv_2.weight.double()
        weight = torch.zeros(len(first) + len(second), first.shape[1], 2, 2, dtype=torch.float64)
        weight[:len(first), :, 0, 0], weight[len(first):, :, 1, 1] = first[:, :, 0, 0], second[:, :, 0, 0]
        scale, shift = affine(reduce.bn)
        self.conv = convolution(weight * (share * scale)[:, None, None, None], share * shift, stride=2)
        self.rectify = rectify

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.rectify else x
        if x.shape[2] % 2 or x.shape[3] % 2:
            x = pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.conv(x)


def _untouched(*modules: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or has_own_forward(m) for m in modules)


def fold(network: nn.Module) -> nn.Module:
    """Fold the BatchNorms of a network in evaluation mode into convolutions before them, in place; returns it."""
    for name, child in network.named_children():
        if type(child) is FactorizedReduce and _untouched(*child.modules()):
            network.register_module(name, Halving(child))
        else:
            fold(child)
    if type(network) is nn.Sequential:
        for index in range(len(network) - 1):
            conv, norm = network[index], network[index + 1]
            if (type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats
                    and conv.padding_mode == "zeros" and _untouched(conv, norm)):
                network[index], network[index + 1] = folded(conv, norm), nn.Identity()
    for child in network.children():
        if type(child) is nn.Conv2d and child.bias is None:
            child.bias = nn.Parameter(torch.zeros(child.out_channels), requires_grad=False)  # see `convolution`
    return network


class PlainCell(nn.Module):
    """A `SearchCell` whose edges are weighed by fixed shares."""

    def __init__(self, cell: SearchCell, shares: Tensor):
        super().__init__()
        C, edge, nodes = cell.preprocess1.op[1].out_channels, 0, []
        self.preprocess0, self.preprocess1 = fold(nn.ModuleList([cell.preprocess0, cell.preprocess1]))
        for node in range(NODES):
            nodes.append(PlainNode(cell._ops[edge:edge + 2 + node], shares[edge:edge + 2 + node].tolist(), C))
            edge += 2 + node
        self.nodes = nn.ModuleList(nodes)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        rectified = [state.relu() for state in states]
        pooled: dict[tuple, Tensor] = {}  # every node behind a state takes the same
        for node in self.nodes:
            states.append(node(states, rectified, pooled))
            rectified.append(states[-1].relu())
        return torch.cat(states[2:], dim=1)


class PlainNode(nn.Module):
    """The sum of all mixed edges into one node, as one pointwise convolution of all that the operations end with.

    Operations of one kind on several edges are one operation on the states side by side, and what multiplies a state or
    a pool of it, channel by channel, is a diagonal part of that convolution.
    """

    def __init__(self, edges: Sequence[MixedOp], shares: Sequence[Sequence[float]], C: int):
        super().__init__()
        alike: dict[tuple, list[tuple[int, nn.Module, float]]] = {}  # source, operation, share
        self.others, self.taken, self.pools = nn.ModuleList(), [], []
        blocks, shift, pooled = [], 0, []
        for source, (mixed, weights) in enumerate(zip(edges, shares)):
            for operation, share in zip(mixed._ops, weights):
                if operation is None:  # which this edge lacks
                    continue
                kind = type(operation) if _untouched(*operation.modules()) else None
                if kind in (SepConv, DilConv):
                    first = operation.op[1]
                    alike.setdefault((kind, first.kernel_size, first.stride), []).append((source, operation, share))
                elif kind is nn.Identity:
                    pooled.append((source, None, None, share))
                elif kind is nn.Sequential and _is_pool(operation):
                    scale, more = (share * value for value in affine(operation[1]))
                    shift = shift + more
                    pooled.append((source, type(operation[0]), operation[0].stride, scale))
                elif kind is FactorizedReduce:
                    self._add(Halving(operation, share, rectify=False), source, True)
                elif kind is not Zero:
                    self._add(Weighed(operation, share), source, False)
        groups = []
        for operations in alike.values():
            ends = [folded(*operation.op[-2:], share) for _, operation, share in operations]
            blocks += [end.weight.double() for end in ends]
            shift = shift + sum(end.bias.double() for end in ends)
            groups.append(SideBySide(operations))
        for source, kind, stride, scale in pooled:
            self.pools.append((source, kind, stride))
            blocks.append((torch.eye(C, dtype=torch.float64) * scale)[:, :, None, None])
        self.groups = nn.ModuleList(groups)
        self.end = None
        if blocks:
            self.end = convolution(torch.cat(blocks, dim=1), torch.as_tensor(shift, dtype=torch.float64).expand(C))

    def _add(self, operation: nn.Module, source: int, rectified: bool) -> None:
        self.others.append(operation)
        self.taken.append((source, rectified))

    def forward(self, states: list[Tensor], rectified: list[Tensor], pooled: dict[tuple, Tensor]) -> Tensor:
        beside: dict[tuple, Tensor] = {}
        maps, terms = [], []
        for group in self.groups:
            if group.sources not in beside:
                beside[group.sources] = torch.cat([rectified[source] for source in group.sources], dim=1)
            maps.append(group(beside[group.sources]))
        for place in self.pools:
            if place not in pooled:
                source, kind, stride = place
                pooled[place] = states[source] if kind is None else POOLS[kind](states[source], stride)
            maps.append(pooled[place])
        if maps:
            terms.append(self.end(torch.cat(maps, dim=1)))
        for operation, (source, behind) in zip(self.others, self.taken):
            terms.append(operation(rectified[source] if behind else states[source]))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _is_pool(operation: nn.Sequential) -> bool:
    """Whether an operation is a 3x3 pool and BatchNorm."""
    if len(operation) != 2 or type(operation[0]) not in POOLS or type(operation[1]) is not nn.BatchNorm2d:
        return False
    pool = operation[0].pool if type(operation[0]) is AveragePool else operation[0]
    return (pool.kernel_size, pool.padding, pool.ceil_mode, getattr(pool, "dilation", 1)) == (3, 1, False, 1)


class SideBySide(nn.Module):
    """All but the last convolution of equal separable operations, whose inputs are behind ReLU and side by side."""

    def __init__(self, operations: Sequence[tuple[int, nn.Module, float]]):
        super().__init__()
        self.sources = tuple(source for source, _, _ in operations)
        parts = [list(operation.op) for _, operation, _ in operations]
        layers = [_depthwise([own[1] for own in parts])]
        if len(parts[0]) == 8:  # of SepConv
            first = [folded(own[2], own[3]) for own in parts]
            layers.append(convolution(torch.cat([p.weight for p in first]), torch.cat([p.bias for p in first]),
                                      groups=len(first)))
            layers += [nn.ReLU(), _depthwise([own[5] for own in parts])]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _depthwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    weight, first = torch.cat([conv.weight for conv in convs]), convs[0]
    return convolution(weight, None, first.stride, first.padding, first.dilation, len(weight))


class Weighed(nn.Module):
    """An operation that is not known, times its share."""

    def __init__(self, operation: nn.Module, share: float):
        super().__init__()
        self.operation, self.share = fold(nn.ModuleList([operation]))[0], share

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x) * self.share


class PlainSupernet(nn.Module):
    """A `Supernet`, with cells of any class."""

    def __init__(self, network: Supernet):
        super().__init__()
        for name, part in network.named_children():
            if name.startswith("stem"):
                self.add_module(name, fold(part))
        self.cells = nn.ModuleList()
        for cell in network.cells:
            shares = network.shares("reduce" if cell.reduction else "normal")
            known = (type(cell).forward is SearchCell.forward and type(cell.preprocess1) is ReLUConvBN and all(
                type(mixed).forward is MixedOp.forward for mixed in cell._ops) and _untouched(cell, *cell._ops))
            self.cells.append(PlainCell(cell, shares) if known else OwnCell(cell, shares))
        self.classifier = network.classifier

    def forward(self, x: Tensor) -> Tensor:
        s0, s1 = stem_outputs(self, x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean(dim=(2, 3)))


class OwnCell(nn.Module):
    """A cell of a space's own class, with its shares."""

    def __init__(self, cell: nn.Module, shares: Tensor):
        super().__init__()
        self.cell = fold(cell)
        self.register_buffer("shares", shares.detach().clone())

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        return self.cell(s0, s1, self.shares)
