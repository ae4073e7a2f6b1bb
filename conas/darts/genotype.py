"""Genotypes: the discrete cells that a search ends with, their rule, their checks and their JSON form.

A cell has 2 inputs (states 0 and 1) and NODES intermediate nodes (states 2, 3, ...). Node n sums operations
on edges from earlier states; the cell's output concatenates the nodes. See DARTS, arXiv:1806.09055, section 2.4.
"""
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conas.errors import InputError
from conas.files import read_json, write_json

NODES = 4
MOST_NODES = 64  # of a cell that somebody else has written
EDGES = sum(2 + node for node in range(NODES))  # 14: every node hears all earlier states

Edge = tuple[str, int]  # operation, source state


class Genotype(NamedTuple):
    """Two cells. Entries 2n and 2n+1 of `normal` and `reduce` are the (operation, source) pairs of node n.

    `str(genotype)` is the line that DARTS prints and that a `genotypes.py` takes as it is.
    """

    normal: list[Edge]
    normal_concat: Sequence[int]
    reduce: list[Edge]
    reduce_concat: Sequence[int]


def strongest(alphas: Tensor, primitives: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Of every edge its best operation other than `none`, in softmax probability: that, and its index, (E,) each.

    Of equal ones the first (DARTS, section 2.4). Alphas are (E, len(primitives)). Raises InputError for alphas that are
    not finite, which say nothing.
    """
    if not alphas.isfinite().all():
        raise InputError("no cell follows from these alphas, since some are NaN or infinite; search again with a lower "
                         "--learning_rate or --arch_learning_rate under another --save name")
    strength = torch.softmax(alphas.detach().double().cpu(), dim=-1)
    if "none" in primitives:
        strength[:, list(primitives).index("none")] = -1
    best, operation = strength.max(dim=-1)
    return best, operation


def derive_cell(alphas: Tensor, primitives: Sequence[str]) -> list[Edge]:
    """The two strongest incoming edges of every node, from alphas of shape (EDGES, len(primitives)).

    An edge is as strong as `strongest` says. Ties go to the earlier edge and the earlier operation. Both edges of a
    node have distinct sources, since there is one edge for each source.
    """
    best, operation = strongest(alphas, primitives)
    cell, start = [], 0
    for node in range(NODES):
        edges = range(start, start + 2 + node)
        for edge in sorted(edges, key=lambda e: -best[e].item())[:2]:
            cell.append((primitives[operation[edge]], edge - start))
        start = edges.stop
    return cell


def derive(alphas_normal: Tensor, alphas_reduce: Tensor, primitives: Sequence[str]) -> Genotype:
    """The genotype of a pair of alphas, each of shape (EDGES, len(primitives))."""
    concat = range(2, 2 + NODES)
    return Genotype(derive_cell(alphas_normal, primitives), concat, derive_cell(alphas_reduce, primitives), concat)


def check(genotype: Genotype, where: str, operations: Collection[str]) -> Genotype:
    """Return `genotype` if a network can be built from it with `operations`.

    Raises InputError, beginning with `where`, for an unknown operation, an edge from a state that does not exist
    yet, an odd number of edges, or a concatenation of states that the cell does not have.
    """
    for kind in ("normal", "reduce"):
        edges, concat = getattr(genotype, kind), list(getattr(genotype, f"{kind}_concat"))
        if not edges or len(edges) % 2 or len(edges) > 2 * MOST_NODES:
            raise InputError(f"{where}: {kind} has {len(edges)} edges; a cell needs two for each node, and has at most "
                             f"{MOST_NODES} nodes")
        for index, (operation, source) in enumerate(edges):
            if operation not in operations:
                raise InputError(f"{where}: {kind} edge {index} uses {operation!r}, not one of {', '.join(operations)}")
            if not 0 <= source < 2 + index // 2:
                raise InputError(f"{where}: {kind} edge {index} comes from state {source}, but node {index // 2} "
                                 f"hears only states 0 to {1 + index // 2}")
        if not concat or len(set(concat)) != len(concat) or not set(concat) <= set(range(2, 2 + len(edges) // 2)):
            raise InputError(f"{where}: {kind}_concat {concat} must list distinct nodes of the cell, "
                             f"states 2 to {1 + len(edges) // 2}")
    return genotype


def to_json(genotype: Genotype) -> dict:
    """Plain lists and strings, in the field order of `Genotype`."""
    return {name: [list(item) if isinstance(item, tuple) else item for item in value]
            for name, value in genotype._asdict().items()}


def from_json(obj, where: str, operations: Collection[str]) -> Genotype:
    """The checked genotype in a decoded JSON object. Raises InputError, beginning with `where`."""
    if not isinstance(obj, dict) or set(obj) != set(Genotype._fields):
        raise InputError(f"{where}: a genotype is a JSON object with exactly the keys {', '.join(Genotype._fields)}")
    fields = {}
    for name, value in obj.items():
        concat = name.endswith("_concat")
        right = is_index if concat else is_edge
        if not isinstance(value, list) or not all(right(item) for item in value):
            item = "state numbers" if concat else "[operation, state number] pairs"
            raise InputError(f"{where}: {name} must be a list of {item}")
        fields[name] = value if concat else [(operation, source) for operation, source in value]
    if fields["normal_concat"] == fields["reduce_concat"] == list(range(2, 2 + NODES)):
        fields |= {name: range(2, 2 + NODES) for name in ("normal_concat", "reduce_concat")}  # prints as DARTS does
    return check(Genotype(**fields), where, operations)


def is_index(item) -> bool:
    return type(item) is int and 0 <= item < 1000


def is_edge(item) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and is_index(item[1])


def save(path: str | Path, genotype: Genotype) -> None:
    """Write a genotype as JSON, atomically."""
    write_json(path, to_json(genotype))


def load(path: str | Path, operations: Collection[str]) -> Genotype:
    """Read and check a genotype. Raises InputError for a file that is missing, not JSON or not a genotype."""
    try:
        obj = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a genotype ({error}); name another file, or write this one again"
                         ) from error
    return from_json(obj, str(path), operations)
