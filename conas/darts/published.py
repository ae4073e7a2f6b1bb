"""Published genotypes by name, with their operations in DARTS' spelling.

NASNet     NASNet-A, arXiv:1707.07012
AmoebaNet  AmoebaNet-A, arXiv:1802.01548
DARTS_V1   first order, arXiv:1806.09055
DARTS_V2   second order, arXiv:1806.09055; the cell of the published checkpoints
DARTS      DARTS_V2

Those of the authors of CoNAS are named CONAS in the genotypes.py of each space; from elsewhere, cnn_space1/CONAS.
"""
import difflib
import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path

from conas.darts import genotype as genotypes
from conas.darts.genotype import Genotype
from conas.darts.operations import OPERATIONS
from conas.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

_NASNET = Genotype(
    normal=[
        ("sep_conv_5x5", 1), ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
        ("avg_pool_3x3", 1), ("skip_connect", 0),
        ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
        ("sep_conv_3x3", 1), ("skip_connect", 1),
    ],
    normal_concat=[2, 3, 4, 5, 6],
    reduce=[
        ("sep_conv_5x5", 1), ("sep_conv_7x7", 0),
        ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
        ("avg_pool_3x3", 1), ("sep_conv_5x5", 0),
        ("skip_connect", 3), ("avg_pool_3x3", 2),
        ("sep_conv_3x3", 2), ("max_pool_3x3", 1),
    ],
    reduce_concat=[4, 5, 6],
)

_AMOEBANET = Genotype(
    normal=[
        ("avg_pool_3x3", 0), ("max_pool_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
        ("sep_conv_3x3", 0), ("avg_pool_3x3", 3),
        ("sep_conv_3x3", 1), ("skip_connect", 1),
        ("skip_connect", 0), ("avg_pool_3x3", 1),
    ],
    normal_concat=[4, 5, 6],
    reduce=[
        ("avg_pool_3x3", 0), ("sep_conv_3x3", 1),
        ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
        ("sep_conv_7x7", 0), ("avg_pool_3x3", 1),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5),
    ],
    reduce_concat=[3, 4, 6],
)

_DARTS_V1 = Genotype(
    normal=[
        ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("skip_connect", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 0),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("avg_pool_3x3", 0),
    ],
    reduce_concat=range(2, 6),
)

_DARTS_V2 = Genotype(
    normal=[
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("skip_connect", 0),
        ("skip_connect", 0), ("dil_conv_3x3", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("max_pool_3x3", 1),
    ],
    reduce_concat=range(2, 6),
)

GENOTYPES = {
    "NASNet": _NASNET,
    "AmoebaNet": _AMOEBANET,
    "DARTS_V1": _DARTS_V1,
    "DARTS_V2": _DARTS_V2,
    "DARTS": _DARTS_V2,
}


def named_genotypes(module) -> dict[str, object]:
    """The published genotypes and what a `genotypes.py` has that may be some, by name; its own win."""
    return GENOTYPES | genotypes.may_be_genotypes(module)


def find_genotype(name: str, named: Mapping[str, object], flag: str = "--arch ",
                  operations: Collection[str] | None = OPERATIONS) -> Genotype:
    """The genotype called `name`: one of `named`, SPACE/NAME of the genotypes.py in a space's folder, or a file .json.

    Raises InputError, which begins with `flag` and the name, for another, with names that are near.
    """
    where = f"{flag}{name}"
    if name in named:
        return genotypes.from_object(named[name], where, operations)
    if name.endswith(".json"):
        return genotypes.load(name, operations)
    space, _, own = name.rpartition("/")
    if re.fullmatch(r"cnn\w*", space) and (ROOT / space / "genotypes.py").exists():
        named = named_genotypes(import_module(f"{space}.genotypes"))
        if own in named:
            return genotypes.from_object(named[own], where, operations)
    by_lower = {known.lower(): known for known in named}
    near = [by_lower[known] for known in difflib.get_close_matches(own.lower(), by_lower, 2, 0.5)] or sorted(named)
    raise InputError(f"{where}: unknown; did you mean {' or '.join(near)}? A file must end in .json, and a name in the "
                     "genotypes.py of another space begins with its folder, as cnn_space1/CONAS")
