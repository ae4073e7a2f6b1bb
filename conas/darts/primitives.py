"""The primitives of a space: the candidate operations, the same on all edges of a cell or others on each.

A cell has 2 inputs (states 0 and 1) and NODES intermediate nodes; every node reads all earlier states.
"""
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from conas.errors import InputError

NODES = 4
SOURCES = [source for node in range(NODES) for source in range(2 + node)]  # by edge: 0, 1 into the first node, ...
EDGES = len(SOURCES)  # 14
KINDS = "normal", "reduce"


def edge_number(node: int, source: int) -> int:
    """Of the edge into a node, counted from 0, from a state."""
    return node * (node + 3) // 2 + source


class Primitives(tuple):
    """All names, in the order in which they first appear: those of the alphas' columns. `by_edge` says where they are.

    Made of PRIMITIVES of a genotypes.py: names for all edges, a list of EDGES sequences of names, or a dict with one
    of both for each kind of cell, "normal" and "reduce". Raises InputError for anything else.
    """

    by_edge: dict[str, tuple[tuple[str, ...], ...]]
    restricted: bool  # whether some edge lacks some of the operations

    def __new__(cls, given: object) -> "Primitives":
        if isinstance(given, Primitives):
            return given
        if not isinstance(given, Mapping):
            normal = _by_edge(given, "PRIMITIVES")
            by_edge = {"normal": normal, "reduce": normal}
        elif set(given) == set(KINDS):
            by_edge = {kind: _by_edge(given[kind], f"PRIMITIVES[{kind!r}]") for kind in KINDS}
        else:
            raise InputError(f"PRIMITIVES: a dict of {', '.join(map(str, given)) or 'nothing'}; its keys must be normal"
                             " and reduce, the kinds of cells")
        self = super().__new__(cls, dict.fromkeys(name for kind in KINDS for edge in by_edge[kind] for name in edge))
        self.by_edge = {kind: tuple(tuple(sorted(edge, key=self.index)) for edge in by_edge[kind]) for kind in KINDS}
        self.restricted = any(set(edge) != set(self) for kind in KINDS for edge in self.by_edge[kind])
        return self

    def columns(self, kind: str) -> list[tuple[str | None, ...]]:
        """The operations of every edge in cells of a kind, by column; None where the edge lacks that of the column."""
        return [tuple(name if name in edge else None for name in self) for edge in self.by_edge[kind]]

    def allowed(self, kind: str, device: torch.device | str = "cpu") -> Tensor:
        """Which operations the edges of a kind of cell have: (EDGES, P) bool."""
        return _allowed(tuple(self), self.by_edge[kind], torch.device(device))

    def shares(self, kind: str, alphas: Tensor) -> Tensor:
        """The softmax of alphas (EDGES, P) over the operations that each edge has; 0 and no gradient for the others."""
        if self.restricted:
            alphas = alphas.masked_fill(~self.allowed(kind, alphas.device), -torch.inf)
        return alphas.softmax(dim=-1)

    def places(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Where edges have which operations, a place in words and names, once where several have the same."""
        seen = set()
        for kind in KINDS:
            for number, names in enumerate(self.by_edge[kind]):
                if names not in seen:
                    seen.add(names)
                    everywhere = all(edge == names for of in KINDS for edge in self.by_edge[of])
                    yield "PRIMITIVES" if everywhere else f"PRIMITIVES, edge {number} of {kind} cells", names

    def described(self) -> dict[str, list[list[str]]]:
        """`by_edge` in lists, as a checkpoint has it and this class takes it."""
        return {kind: [list(edge) for edge in self.by_edge[kind]] for kind in KINDS}

    def __str__(self) -> str:
        """For a line of text."""
        return ", ".join(self) + (" (other ones by edge)" if self.restricted else "")


def _by_edge(given: object, where: str) -> tuple[tuple[str, ...], ...]:
    if _is_list(given) and all(isinstance(item, str) for item in given):
        return (tuple(given),) * EDGES
    if not _is_list(given) or not all(_is_list(item) and all(isinstance(name, str) for name in item) for item in given):
        raise InputError(f"{where}: must be a tuple of names, for all edges, or a list of {EDGES} tuples of names, one "
                         "for each edge")
    if len(given) != EDGES:
        raise InputError(f"{where}: is a list of {len(given)} edges, but a cell has {EDGES}: two into the first of its "
                         f"{NODES} nodes, three into the second, and so on")
    return tuple(map(tuple, given))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


@lru_cache
def _allowed(names: tuple[str, ...], edges: tuple[tuple[str, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor([[name in edge for name in names] for edge in edges], dtype=torch.bool, device=device
                        ).view(len(edges), len(names))
