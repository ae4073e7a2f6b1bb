"""Space 2: the 3x3 convolutions only."""
from conas.darts.genotype import Genotype  # a printed `Genotype(...)` line can be pasted below

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "dil_conv_3x3",
)

# The cell that the authors of CoNAS found in this space: their repository Sette/CoNAS, commit 19b061f of 2021-02-24,
# in the folder of its Imagenette search.
CONAS = Genotype(
    normal=[
        ("sep_conv_3x3", 1), ("dil_conv_3x3", 0),
        ("dil_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("dil_conv_3x3", 1), ("sep_conv_3x3", 0),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0), ("skip_connect", 1),
        ("dil_conv_3x3", 2), ("max_pool_3x3", 0),
        ("skip_connect", 2), ("sep_conv_3x3", 3),
        ("dil_conv_3x3", 4), ("sep_conv_3x3", 2),
    ],
    reduce_concat=range(2, 6),
)
