"""The search network: DARTS' continuous relaxation (arXiv:1806.09055, section 2.2) over a space's primitives."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from conas.genotype import EDGES, NODES, Genotype, derive
from conas.operations import OPERATIONS, FactorizedReduce, ReLUConvBN, scaled_norm

STEM_MULTIPLIER = 3


class State:
    """A state of a cell, with what its outgoing edges share: its ReLU, and its pools with their BatchNorm."""

    def __init__(self, x: Tensor):
        self.x, self.rectified = x, x.relu()
        self._pools: dict[tuple, tuple] = {}

    def scaled_pool(self, primitive: str, stride: int, pool: nn.Module, norm: nn.BatchNorm2d, scale: Tensor) -> Tensor:
        """scale * norm(pool(x)). In training all edges of a stride normalise by the same batch: that is done once."""
        if (primitive, stride) not in self._pools:
            pooled = pool(self.x)
            normalised = batch_norm(pooled, None, None, training=True, eps=norm.eps) if norm.training else None
            self._pools[primitive, stride] = pooled, normalised
        pooled, normalised = self._pools[primitive, stride]
        if not norm.training:  # every edge has running statistics of its own
            return scaled_norm(norm, pooled, scale)
        if norm.track_running_stats:
            with torch.no_grad():
                variance, mean = torch.var_mean(pooled, dim=(0, 2, 3))
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(variance, norm.momentum)
                norm.num_batches_tracked.add_(1)
        return scale * normalised


class MixedOp(nn.Module):
    """Equation 2 of DARTS: all primitives on one edge, summed with the softmax of the edge's alphas as weights."""

    def __init__(self, primitives: Sequence[str], C: int, stride: int):
        super().__init__()
        self.primitives, self.stride = primitives, stride
        self._ops = nn.ModuleList()
        for primitive in primitives:
            operation = OPERATIONS[primitive](C, stride, False)
            if "pool" in primitive:  # a pool's output has no fixed scale otherwise
                operation = nn.Sequential(operation, nn.BatchNorm2d(C, affine=False))
            self._ops.append(operation)

    def terms(self, state: State, probabilities: Tensor) -> Iterator[Tensor]:
        """The summands p * operation(x) but for `none`, whose is zero; `probabilities` (P,)."""
        for primitive, p, operation in zip(self.primitives, probabilities.unbind(), self._ops):
            if "pool" in primitive:
                yield state.scaled_pool(primitive, self.stride, *operation, p)
            elif isinstance(operation, nn.Identity):
                yield p * state.x
            elif primitive != "none":
                yield operation.scaled(state.rectified, p)


class SearchCell(nn.Module):
    """A cell whose every edge is mixed. Output: the NODES intermediate states, concatenated, (N, NODES*C, H', W')."""

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

    def forward(self, s0: Tensor, s1: Tensor, probabilities: Tensor) -> Tensor:
        """`probabilities` (EDGES, P) are the softmax of the alphas of this kind of cell."""
        states = [State(self.preprocess0(s0)), State(self.preprocess1(s1))]
        edges = iter(zip(self._ops, probabilities))
        for _ in range(NODES):
            incoming = [(state, *next(edges)) for state in states]
            states.append(State(sum(term for state, mixed, p in incoming for term in mixed.terms(state, p))))
        return torch.cat([state.x for state in states[-NODES:]], dim=1)


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

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        normal, reduce = self.alphas_normal.softmax(dim=-1), self.alphas_reduce.softmax(dim=-1)
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classifier(s1.mean(dim=(2, 3)))

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
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by the batch as usual but leaves its running statistics alone.

    For the architect: its passes look at weights that the search never has.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, track in zip(norms, tracked):
            norm.track_running_stats = track
