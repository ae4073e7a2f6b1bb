"""Space 3: the 5x5 convolutions only."""
from conas.darts.genotype import Genotype  # a printed `Genotype(...)` line can be pasted below

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_5x5",
    "dil_conv_5x5",
)

# The cell that the authors of CoNAS found in this space: their repository Sette/CoNAS, commit 19b061f of 2021-02-24,
# in the folders of its CIFAR-10 and of its Imagenette search.
CONAS = Genotype(
    normal=[
        ("dil_conv_5x5", 1), ("dil_conv_5x5", 0),
        ("dil_conv_5x5", 0), ("dil_conv_5x5", 2),
        ("dil_conv_5x5", 2), ("skip_connect", 0),
        ("sep_conv_5x5", 0), ("sep_conv_5x5", 1),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("dil_conv_5x5", 2), ("max_pool_3x3", 0),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("sep_conv_5x5", 2), ("max_pool_3x3", 1),
    ],
    reduce_concat=range(2, 6),
)
