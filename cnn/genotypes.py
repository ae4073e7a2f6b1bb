"""The unrestricted baseline: cells of any operation, by default the published cells of DARTS."""
from conas.darts.genotype import Genotype  # noqa: F401  a printed `Genotype(...)` line can be pasted below
from conas.darts.operations import OPERATIONS

PRIMITIVES = tuple(OPERATIONS)
