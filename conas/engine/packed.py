"""A supernet's logits by packed edges: the numbers of `Supernet.with_weights`, faster."""
from collections.abc import Callable
from itertools import islice, zip_longest
from operator import call

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, pad

from conas.darts.stems import convolutions
from conas.darts.supernet import Supernet
from conas.engine.batch_statistics import Statistics
from conas.engine.batchnorm import BatchScope
from conas.engine.cell import PackedCell


class PackedPass:
    """What computes a supernet's logits; the network keeps its modules, parameters and running statistics.

    The weights come as one flat vector, in an order that puts next to each other what is computed together:
    `order` lists their names. `synced` lets BatchNorm in training be by the images of all processes, and `run_cell`
    may be replaced by what computes a cell again for its gradient.
    """

    def __init__(self, network: Supernet):
        self.network, self.synced = network, False
        self.run_cell: Callable = call
        self.cells = [PackedCell(cell, network.primitives) for cell in network.cells]
        self._stem = convolutions(network)
        self._packs = [*([p] for convolution, norm in self._stem for p in (convolution.weight, norm.weight, norm.bias)),
                       *(pack for cell in self.cells for pack in cell.packs()),
                       [network.classifier.weight], [network.classifier.bias]]
        names = {p: name for name, p in network.weights().items()}
        weights = [p for pack in self._packs for p in pack]
        self.order = tuple(names[p] for p in weights)
        places, count = {}, 0
        for p in weights:
            places[p] = torch.arange(count, count + p.numel()).view(p.shape)
            count += p.numel()
        arranged = [[part for edges in cell.mixed for part in edges.arrangements(places, count)] for cell in self.cells]
        self._arranged = [[part.shape for part in parts] for parts in arranged]  # by cell
        self._arrangement = torch.cat([part.flatten() for parts in arranged for part in parts]
                                      or [torch.empty(0)]).int()
        shape = network.alphas_normal.shape
        edges = 1 + torch.arange(2 * network.alphas_normal.numel()).view(2, *shape)  # by kind; 0 is a zero's place
        kinds = [[cell for cell in self.cells if cell.reduction == kind] for kind in (False, True)]
        shares = [cells[0].shares(of) if cells else of[0, :0] for cells, of in zip(kinds, edges)]
        self._kinds = [(len(cells), len(share)) for cells, share in zip(kinds, shares)]
        self._share_index = torch.cat(shares)

    def logits(self, x: Tensor, w: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W), by the weights in the flat vector `w`.

        Under autocast all of the pass is in its type, since the cells' gradients by hand know one type only: images and
        weights are cast once, logits come back in the type of the weights.
        """
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return self.run(x, w)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return self.run(x.to(dtype), w.to(dtype)).to(w.dtype)

    logits.same_numbers = True  # as the method of a network that it is put in place of; see conas/engine/door.py

    def run(self, x: Tensor, w: Tensor | None, once: Callable = call) -> Tensor:
        """`logits` in the type of x and w.

        `once` gives what a function makes that takes no images, see conas/engine/inference.py; if it asks none, w may
        be None.
        """
        network = self.network
        weights, arranged = iter(once(lambda: self._unpack(w))), self._arrange(w) if network.training else ()
        scope = BatchScope.of_all(len(x)) if self.synced and network.training else None
        statistics = Statistics(batch=network.training, keep=not network.statistics.frozen, scope=scope, once=once)
        shares = once(lambda: self._shares(w.dtype))
        s1 = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for convolution, norm in self._stem:
            s0, x = s1, conv2d(s1.permute(0, 3, 1, 2), next(weights), stride=convolution.stride, padding=1)
            out = statistics.normalise(x.permute(0, 2, 3, 1), [norm], next(weights), next(weights))
            s1 = out.relu()  # every cell begins with it, and every further convolution
        if len(self._stem) == 1:
            s0 = s1
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
        flat = pad(w, (0, 1)).index_select(0, self._on(w.device)[0])
        parts = iter(flat.split([shape.numel() for shapes in self._arranged for shape in shapes]))
        return [[next(parts).view(shape) for shape in shapes] for shapes in self._arranged]

    def _shares(self, dtype: torch.dtype) -> list[Tensor]:
        """The probabilities of equation 2 by cell, as these take them."""
        p = torch.stack([self.network.alphas_normal, self.network.alphas_reduce]).softmax(dim=-1).to(dtype)
        parts = pad(p.flatten(), (1, 0)).index_select(0, self._on(p.device)[1]).split([size for _, size in self._kinds])
        parts = [iter(part.expand(count, -1).unbind()) for part, (count, _) in zip(parts, self._kinds)]
        return [next(parts[cell.reduction]) for cell in self.cells]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both index tensors on the device of a pass."""
        if self._arrangement.device != device:
            self._arrangement, self._share_index = self._arrangement.to(device), self._share_index.to(device)
        return self._arrangement, self._share_index
