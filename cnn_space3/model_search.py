"""The supernet of this space."""
from conas.darts.supernet import Supernet

if "." in __name__:  # imported from the root, as a module of this folder
    from .genotypes import PRIMITIVES
else:  # imported by a script of this folder
    from genotypes import PRIMITIVES


class Network(Supernet):
    """DARTS' search network over this space's PRIMITIVES."""

    primitives = PRIMITIVES
