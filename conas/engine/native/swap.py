"""A supernet by kernels: its definition runs as it is, with cells and operations swapped for compiled ones by class.

They are swapped for the length of a pass only, in this network's own modules. So the definition stays what it is for
everything else: `--hvp exact`, `conas/engine/check.py`, copies and checkpoints.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter, call

import torch
from torch import Tensor, nn
from torch.func import functional_call

from conas.darts.batchnorm import has_exact_sums
from conas.darts.passes import by_definition
from conas.darts.supernet import NOTHING, MixedOp, SearchCell, Supernet
from conas.engine.native.cell import NativeCell
from conas.engine.native.functions import run_operation, weighted_sum
from conas.engine.native.library import TYPES, Library
from conas.engine.native.parts import Operation, Seen, is_changed, read
from conas.engine.packed import PackedPass


class NativePass:
    """What computes a supernet's logits by kernels; the network keeps its modules, parameters and running statistics.

    A cell whose `forward` and mixed operations are those of the definition is one function; of other cells each
    operation that the kernels know is one. All else runs as it is. `packed` takes what is not for kernels, if it knows
    the network: other devices and types, autocast, tracing, and BatchNorm by the images of all processes (`synced`).
    """

    def __init__(self, network: Supernet, library: Library, packed: PackedPass | None):
        self.network, self.library, self.packed, self.synced = network, library, packed, False
        self.run_cell: Callable = call  # may be replaced by what computes a cell again for its gradient
        self.order = packed.order if packed else tuple(network.weights())
        weights = network.weights()
        places, count = {}, 0
        for name in self.order:
            places[name] = count
            count += weights[name].numel()
        self.cells: dict[str, NativeCell] = {}
        self.plain: set[str] = set()  # cells that run by their definition all the same
        self.operations: dict[str, Operation] = {}
        self.mixed: list[str] = []  # edges of other cells, whose sums are one pass over all maps
        self._pieces: list[tuple[str, int]] = []  # of the flat vector: a native cell's, or a weight's
        for number, cell in enumerate(getattr(network, "cells", ())):
            self._take(f"cells.{number}.", cell, places)
        self._cell_weights = {prefix: [name for name in self.order if name.startswith(prefix)] for prefix in self.cells}
        owner = {name: prefix for prefix, names in self._cell_weights.items() for name in names}
        for name in self.order:
            piece, size = owner.get(name, name), weights[name].numel()
            if self._pieces and self._pieces[-1][0] == piece:
                size += self._pieces.pop()[1]
            self._pieces.append((piece, size))
        self._with_buffers = [(place, module) for place, module in network.named_modules()
                              if module._buffers and not has_exact_sums(module)]
        self._shapes = {name: weights[name].shape for name in self.order}

    def _take(self, prefix: str, cell: nn.Module, places: dict[str, int]) -> None:
        """Make what computes a cell, or operations of it."""
        own = {name: place for name, place in places.items() if name.startswith(prefix)}
        first = min(own.values(), default=0)
        plain = (isinstance(cell, SearchCell) and type(cell).forward is SearchCell.forward and not is_changed(cell)
                 and all(mixes_as_defined(mixed) for mixed in cell._ops))
        size = sum(p.numel() for p in cell.parameters())
        together = own and max(places[name] + self._count(name) for name in own) - first == size
        if plain and together:
            try:
                offsets = {name.removeprefix(prefix): place - first for name, place in own.items()}
                self.cells[prefix] = NativeCell(self.library, cell, offsets)
                return
            except (LookupError, AttributeError):  # another preprocessing than any that kernels know
                pass
        for name, module in cell.named_modules():
            if mixes_as_defined(module):
                self.mixed.append(prefix + name)
            operation = read(module) if name else None
            if operation and operation.kind not in ("none", "skip", "own"):
                self.operations[prefix + name] = operation

    def _count(self, name: str) -> int:
        return self.network.get_parameter(name).numel()

    def logits(self, x: Tensor, w: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W), by the weights in the flat vector `w`."""
        if not self._is_for_kernels(x, w):
            if self.packed is None:
                with by_definition(self.network):
                    return self.network.with_weights(x, w)
            self.packed.synced = self.synced
            return self.packed.logits(x, w)
        network, state, parts, seen = self.network, {}, {}, []
        for (piece, _), part in zip(self._pieces, w.split([size for _, size in self._pieces])):
            if piece in self.cells:
                if piece not in self.plain:
                    parts[piece] = part
                if self.cells[piece].own or piece in self.plain:  # which run as modules, with their weights
                    names = self._cell_weights[piece]
                    sizes = [self._shapes[name].numel() for name in names]
                    state |= {name: p.view(self._shapes[name]) for name, p in zip(names, part.split(sizes))}
            else:
                state[piece] = part.view(self._shapes[piece])
        if network.statistics.frozen:  # as in the definition
            state |= {f"{place}.{name}".lstrip("."): buffer.clone() for place, module in self._with_buffers
                      for name, buffer in module._buffers.items()}
        with self._swapped(parts, seen):
            logits = functional_call(network, state, (x,), tie_weights=False)
        if network.training and not network.statistics.frozen:
            update_running(seen)
        return logits

    logits.same_numbers = True  # as the method of a network that it is put in place of; see conas/engine/door.py

    def let_cells_be_repeated(self) -> None:
        """Compute only those cells that can be computed again for their gradient, which is after their pass.

        Modules then have no longer the weights of the pass.
        """
        self.plain = {prefix for prefix, cell in self.cells.items() if cell.own}
        self.operations, self.mixed = {}, []

    def _is_for_kernels(self, x: Tensor, w: Tensor) -> bool:
        alphas = self.network.alphas().values()
        return (x.device.type == w.device.type == "cpu" and x.dtype == w.dtype in TYPES and len(x) > 0
                and all(a.dtype == w.dtype for a in alphas) and not (self.synced and self.network.training)
                and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
                and not torch.jit.is_tracing())

    @contextmanager
    def _swapped(self, parts: dict[str, Tensor], seen: list[Seen]) -> Iterator[None]:
        """Inside, cells and operations of the network are computed by kernels."""
        def of_cell(prefix: str, cell: nn.Module) -> Callable:
            native, w = self.cells[prefix], parts[prefix]
            return lambda s0, s1, shares: self.run_cell(native, s0, s1, shares, w, cell.training, seen)

        def of_operation(operation: Operation, module: nn.Module) -> Callable:
            weights = [attrgetter(name) for unit in operation.units for name in unit.weights]  # of this pass
            return lambda x: run_operation(self.library, operation, x, [weight(module) for weight in weights],
                                           module.training, seen)

        def replacements() -> Iterator[tuple[nn.Module, Callable]]:
            module = self.network.get_submodule
            for prefix in parts:
                cell = module(prefix.rstrip("."))
                yield cell, of_cell(prefix, cell)
            for name, operation in self.operations.items():
                yield module(name), of_operation(operation, module(name))
            for name in self.mixed:
                yield module(name), partial(mixture, self.library, module(name))

        modules = []
        try:
            for module, forward in replacements():
                modules.append((module, vars(module).get("forward")))
                vars(module)["forward"] = forward
            yield
        finally:
            for module, before in modules:
                vars(module).pop("forward")
                if before is not None:
                    vars(module)["forward"] = before


def mixes_as_defined(module: nn.Module) -> bool:
    """Whether a module is an edge that computes equation 2 as its class says."""
    return isinstance(module, MixedOp) and type(module).forward is MixedOp.forward and not is_changed(module)


def mixture(library: Library, mixed: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
    """What `MixedOp.forward` gives, by one pass over the outputs of all operations where they are alike."""
    terms = [(w, op(x)) for w, op in zip(weights.unbind(), mixed._ops) if type(op) not in NOTHING]
    maps = [y for _, y in terms]
    alike = maps and all(y.shape == maps[0].shape and y.dtype == weights.dtype in TYPES and y.dim() == 4
                         and y.device.type == "cpu" for y in maps)
    return weighted_sum(library, torch.stack([w for w, _ in terms]), maps) if alike else sum(w * y for w, y in terms)


def knows_any(network: nn.Module) -> bool:
    """Whether there is an operation on the edges of a network's cells that kernels know."""
    return any(read(module).kind not in ("none", "skip", "own") for cell in getattr(network, "cells", ())
               for name, module in cell.named_modules() if not name.startswith("preprocess"))


@torch.no_grad()
def update_running(seen: list[Seen]) -> None:
    """Let the running statistics follow what a pass has seen, as BatchNorm does in training."""
    running, found, counts, momentum = [], [], [], None
    for norms, records, pixels in seen:
        factors = torch.tensor([count / (count - 1) for count in pixels], dtype=torch.float64)
        dtype = norms[0][0].running_mean.dtype
        means, variances = records[:, 0].to(dtype).unbind(), (records[:, 1] * factors[:, None]).to(dtype).unbind()
        for of_row, mean, variance in zip(norms, means, variances):
            for norm in of_row:
                if momentum not in (None, norm.momentum):
                    _follow(running, found, momentum)
                momentum = norm.momentum
                running += [norm.running_mean, norm.running_var]
                found += [mean, variance]
                counts.append(norm.num_batches_tracked)
    _follow(running, found, momentum)
    if counts:
        torch._foreach_add_(counts, 1)


def _follow(running: list[Tensor], found: list[Tensor], momentum: float) -> None:
    if running:
        torch._foreach_lerp_(running, found, momentum)
    running.clear()
    found.clear()
