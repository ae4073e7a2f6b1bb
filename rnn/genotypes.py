"""Recurrent cells: the activations that a search chooses from, and published cells.

ENAS       arXiv:1802.03268, as DARTS' code states it
DARTS_V1   first order, arXiv:1806.09055
DARTS_V2   second order, arXiv:1806.09055; the cell of the published checkpoint
DARTS      DARTS_V2
"""
from conas.recurrent.genotype import Genotype

PRIMITIVES = (
    "none",
    "tanh",
    "relu",
    "sigmoid",
    "identity",
)

ENAS = Genotype(
    recurrent=[
        ("tanh", 0), ("tanh", 1), ("relu", 1), ("tanh", 3), ("tanh", 3), ("relu", 3),
        ("relu", 4), ("relu", 7), ("relu", 8), ("relu", 8), ("relu", 8),
    ],
    concat=range(2, 12),
)

DARTS_V1 = Genotype(
    recurrent=[
        ("relu", 0), ("relu", 1), ("tanh", 2), ("relu", 3),
        ("relu", 4), ("identity", 1), ("relu", 5), ("relu", 1),
    ],
    concat=range(1, 9),
)

DARTS_V2 = Genotype(
    recurrent=[
        ("sigmoid", 0), ("relu", 1), ("relu", 1), ("identity", 1),
        ("tanh", 2), ("sigmoid", 5), ("tanh", 3), ("relu", 5),
    ],
    concat=range(1, 9),
)

DARTS = DARTS_V2
