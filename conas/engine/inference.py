"""A supernet for many batches in evaluation: what takes no images is computed once.

Two thirds of the operators that a traced pass in evaluation has, views among them, only arrange weights: they cut them
out of one vector, weigh them by alphas, and fold running statistics into them. For large batches on a CPU that is
nothing, but it is a third of what the answer to one image takes, and it would be a part of every exported file and of
every launch of a CUDA graph.

Where a pass makes such things it asks `once` for them, with a function that makes them. As a rule that is a plain call.
Here the results of the first pass are kept, and given again in the same order.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conas.darts.stems import convolutions
from conas.darts.supernet import Supernet
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.door import why_not
from conas.engine.native.evaluation import EvaluatedSupernet, evaluates
from conas.engine.native.loader import kernels
from conas.engine.packed import PackedPass


class Prepared(nn.Module):
    """A supernet in evaluation mode as a function of images alone: logits (N, K) of images (N, C, H, W), no gradients.

    The supernet may not change afterwards. All that is needed of it are buffers here, on its device.
    """

    def __init__(self, network: Supernet):
        super().__init__()
        weight, self._counts, made = convolutions(network)[0][0].weight, [], []
        # of a network that is being searched, its own: a validation builds no second one
        engine = getattr(vars(network).get("with_weights"), "__self__", None)
        packed = getattr(engine, "packed", engine) or PackedPass(network)
        self._pass, self.dtype = packed.run, weight.dtype  # a bound method: the network is no part of this
        kind = weight.device.type
        self.computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

        def make(function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
            parts = list(function())
            self._counts.append(len(parts))
            made.extend(parts)
            return parts

        with torch.no_grad(), torch.autocast(kind, enabled=False):
            some = torch.zeros(1, weight.shape[1], 8, 8, device=weight.device, dtype=self.computed_in)
            network.eval()
            flat = torch.cat([network.get_parameter(name).reshape(-1) for name in packed.order])
            packed.run(some, flat.to(self.computed_in), make)
            for number, tensor in enumerate(made):
                self.register_buffer(f"made_{number}", tensor.clone())

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self(images)
        made, counts = iter(self.buffers()), iter(self._counts)
        given = self._pass(images.to(self.computed_in), None, lambda _: [next(made) for _ in range(next(counts))])
        return given.to(self.dtype)


def prepared(network: nn.Module) -> nn.Module:
    """A network in evaluation mode for many batches: by kernels, or `Prepared`, of a supernet that the engine knows.

    It may not change afterwards. Of other networks all there is to do is to have weights channels last.
    """
    if isinstance(network, (Prepared, EvaluatedSupernet)):
        return network
    if isinstance(network, Supernet):
        if not torch.is_autocast_enabled("cpu") and evaluates(network) and (library := kernels()) is not None:
            return EvaluatedSupernet(network, library)
        if why_not(network) is None:
            return Prepared(network)
    return accelerate_convolutions(network).eval().to(memory_format=torch.channels_last)
