"""The compact form of NASLib and BANANAS: two lists of pairs (state, index of an operation), normal and reduce.

Indices count the seven operations of NASLib. Early versions of BANANAS count another list, with `none` first: nothing
in such a cell says so unless it has an index above 6, hence the title of this form names what it was read by.
"""
import json

from conas.darts.genotype import NODES, Genotype, is_index
from conas.errors import InputError
from conas.exchange.form import CONCAT, KINDS, Form, check_plain

OPERATIONS = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
              "dil_conv_5x5")


def is_compact(value: object) -> bool:
    return (isinstance(value, list) and len(value) == len(KINDS) and all(
        isinstance(cell, list) and cell and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_index, pair))
                                                for pair in cell) for cell in value))


def read(value: list, where: str) -> dict:
    """The four fields. Raises InputError for other numbers of edges, and for indices of other lists."""
    fields = dict(CONCAT)
    for kind, cell in zip(KINDS, value):
        if len(cell) != 2 * NODES:
            raise InputError(f"{where}: its {kind} cell has {len(cell)} pairs, and cells of {2 * NODES} are read")
        for pair in cell:
            if pair[1] >= len(OPERATIONS):
                raise InputError(f"{where}: its {kind} cell has the operation {pair[1]}, but NASLib's list ends with "
                                 f"{len(OPERATIONS) - 1}, {OPERATIONS[-1]}; name the operations, as Genotype(...) does")
        fields[kind] = [[OPERATIONS[operation], state] for state, operation in cell]
    return fields


def write(genotype: Genotype) -> str:
    check_plain(genotype, "compact", OPERATIONS)
    return json.dumps([[[source, OPERATIONS.index(name)] for name, source in getattr(genotype, kind)]
                       for kind in KINDS])


COMPACT = Form("compact", f"pairs of state and index of NASLib's list (0 {OPERATIONS[0]}, ..., 6 {OPERATIONS[-1]})",
               is_compact, read, write)
