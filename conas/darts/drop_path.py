"""Drop path in a search, as in RobustDARTS (arXiv:1909.09656, section 6): images lose edges of the supernet's cells."""
from torch import Tensor, nn

from conas import distributed
from conas.darts.derived import drop_path_scales
from conas.darts.supernet import Supernet
from conas.errors import InputError


class DropPath:
    """Lets each image lose each mixed edge with probability `prob` in [0, 1) in training; 0 is off.

    What stays is divided by 1 - prob, so that evaluation rescales nothing. It is hooks on the network and its edges,
    and the network's code knows nothing of it. A pass draws once, from torch's generator: passes that begin with the
    same random state, as all of an architect's step do, lose the same edges. Draws are for the images of all
    processes, so that their number does not matter. Raises InputError for a network whose cells have no mixed edges.
    """

    def __init__(self, network: Supernet):
        self.prob = 0.0
        self.scales: Tensor | None = None  # of the pass that runs: (edges of all cells, N, 1, 1, 1)
        edges = [edge for cell in network.cells for edge in getattr(cell, "_ops", ())]
        if not edges:
            raise InputError("--drop_path_prob: the cells of this space have no edges in `_ops` that an image could "
                             "lose; leave it out")
        self.edges = {edge: number for number, edge in enumerate(edges)}
        network.register_forward_pre_hook(self._draw)
        for edge in self.edges:
            edge.register_forward_hook(self._drop)

    def _draw(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.scales = None
        if self.prob and network.training:
            images = inputs[0]
            self.scales = drop_path_scales(len(self.edges), images, self.prob, distributed.total(len(images)))

    def _drop(self, edge: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return output if self.scales is None else output * self.scales[self.edges[edge]]
