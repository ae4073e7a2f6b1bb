"""The supernet of recurrent cells."""
from conas.recurrent.model import RecurrentSupernet

if "." in __name__:  # imported from the root, as a module of this folder
    from .genotypes import PRIMITIVES
else:  # imported by a script of this folder
    from genotypes import PRIMITIVES


class Network(RecurrentSupernet):
    """DARTS' recurrent search network over PRIMITIVES."""

    primitives = PRIMITIVES
