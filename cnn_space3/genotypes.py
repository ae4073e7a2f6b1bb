"""Space 3: the 5x5 convolutions only."""
from conas.darts.genotype import Genotype  # noqa: F401  a printed `Genotype(...)` line can be pasted below

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_5x5",
    "dil_conv_5x5",
)
