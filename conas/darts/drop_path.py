"""Drop path in a search, as in RobustDARTS (arXiv:1909.09656, section 6): images lose edges of the supernet's cells."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from conas.darts.derived import drop_path_scales
from conas.darts.supernet import Supernet


class DropPath:
    """What in training each image loses an edge by, with probability `prob`: hooks on the edges of all cells.

    Draws come from torch's generators, edge after edge: passes that begin with the same random state, as those of an
    architect's step do, lose the same edges. `images` says how many images all processes have together, by the number
    that this one has; without, a process draws for its own.
    """

    def __init__(self, network: Supernet):
        self.prob = 0.0
        self.images: Mapping[int, int] = {}
        for cell in network.cells:
            for edge in cell._ops:
                edge.register_forward_hook(self._drop)
        network.drop_path = self

    def _drop(self, edge: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
        if not self.prob or not edge.training:
            return None
        return output * drop_path_scales(1, output, self.prob, self.images.get(len(output)))[0]


@contextmanager
def without_drop_path(network: nn.Module) -> Iterator[None]:
    """Inside, no image loses an edge."""
    drop_path = getattr(network, "drop_path", None)
    if drop_path is None:
        yield
        return
    prob, drop_path.prob = drop_path.prob, 0.0
    try:
        yield
    finally:
        drop_path.prob = prob
