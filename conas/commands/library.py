"""A search as an object, for programs of another kind than the scripts of a space."""
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from conas.commands.search import weight_step
from conas.darts.architect import Batch, Bilevel
from conas.darts.genotype import Genotype
from conas.darts.supernet import Supernet
from conas.engine.cuda_streams import at_once
from conas.engine.door import accelerate


class Search:
    """A supernet over `primitives` with the optimizers of DARTS (arXiv:1806.09055), by the engine if it can.

    `primitives` and `operations` are as PRIMITIVES and OPERATIONS of a space's genotypes.py; further arguments are
    those of `Supernet`: C, num_classes, layers, in_channels. Raises InputError for primitives of which no cell can be
    made.
    """

    def __init__(self, primitives: Sequence | Mapping, *, operations: Mapping[str, Callable] | None = None,
                 device: torch.device | str = "cpu", unrolled: bool = True, learning_rate: float = 0.025,
                 **network: int):
        space = type("Network", (Supernet,), {"primitives": primitives, "operations": dict(operations or {})})
        self.network = space(**network).to(device, memory_format=torch.channels_last)
        self.engine = accelerate(self.network)
        self.optimizer = torch.optim.SGD(self.network.weights().values(), lr=learning_rate, momentum=0.9,
                                         weight_decay=3e-4)
        self.architect = Bilevel(self.network, self.optimizer, unrolled=unrolled)
        self.architect.at_once = at_once

    def step(self, train: Batch, valid: Batch) -> Tensor:
        """One step of the alphas on both batches, then one of the weights on `train`; returns its loss in nats.

        A batch is images (N, in_channels, H, W), normalised, and labels (N,), on the device.
        """
        self.network.train()
        self.architect.step(train, valid, self.optimizer.param_groups[0]["lr"])
        return weight_step(self.network, self.optimizer, train, grad_clip=5.0)[0]

    def genotype(self) -> Genotype:
        """The cells that the alphas stand for now."""
        return self.network.genotype()
