"""The supernet of this space."""
from conas.darts.supernet import Supernet

if "." in __name__:  # imported from the root, as a module of this folder
    from . import genotypes
else:  # imported by a script of this folder
    import genotypes


class Network(Supernet):
    """DARTS' search network over this space's PRIMITIVES."""

    primitives = genotypes.PRIMITIVES
    operations = getattr(genotypes, "OPERATIONS", {})  # of this space's own, by name
