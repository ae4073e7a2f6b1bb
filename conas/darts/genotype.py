"""Genotypes: the discrete cells that a search ends with, their rule, their checks and their JSON form.

A cell has 2 inputs (states 0 and 1) and NODES intermediate nodes (states 2, 3, ...). Node n sums operations
on edges from earlier states; the cell's output concatenates the nodes. See DARTS, arXiv:1806.09055, section 2.4.
"""
import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType
from typing import NamedTuple

from torch import Tensor

from conas.darts.primitives import EDGES, NODES, Primitives  # noqa: F401  others have EDGES from here
from conas.errors import InputError
from conas.files import read_json, write_json

MOST_NODES = 64  # of a cell that somebody else has written

RULE = "rule"  # in a file: by which rule the genotype was derived
SKIP = "skip_connect"
NAME = r"[\w.+-]{1,64}"  # of an operation

Edge = tuple[str, int]  # operation, source state


class _Cells(NamedTuple):
    normal: list[Edge]
    normal_concat: Sequence[int]
    reduce: list[Edge]
    reduce_concat: Sequence[int]


class Misfit:
    """What `Genotype(...)` gives for other fields than its own, as lines of other projects have: refused when used."""

    def __init__(self, *values, **fields):
        self.values, self.fields = values, fields

    @classmethod
    def or_tuple(cls, kind: type, values: tuple, fields: dict):
        """A new `kind`, a named tuple, or a Misfit if its fields are others."""
        names = kind._fields
        if len(values) <= len(names) and set(fields) == set(names[len(values):]):
            return tuple.__new__(kind, (*values, *(fields[name] for name in names[len(values):])))
        return cls(*values, **fields)


class Genotype(_Cells):
    """Two cells. Entries 2n and 2n+1 of `normal` and `reduce` are the (operation, source) pairs of node n.

    `str(genotype)` is the line that DARTS prints and that a `genotypes.py` takes as it is.
    """

    __slots__ = ()

    def __new__(cls, *values, **fields):
        return Misfit.or_tuple(cls, values, fields)


def strongest(alphas: Tensor, primitives: Sequence[str], kind: str = "normal", without: Collection[str] = ("none",)
              ) -> tuple[Tensor, Tensor]:
    """Of every edge its best operation other than those `without`, in softmax probability: that, and its index, (E,).

    Of equal ones the first (DARTS, section 2.4). Alphas are (E, P); `primitives` are P names, or the Primitives of
    a space, of which the edges in a `kind` of cell have theirs. The probability is -1 where an edge has no other.
    Raises InputError for alphas that are not finite, which say nothing.
    """
    if not alphas.isfinite().all():
        raise InputError("no cell follows from these alphas, since some are NaN or infinite; search again with a lower "
                         "--learning_rate or --arch_learning_rate under another --save name")
    primitives = Primitives(primitives)
    strength = primitives.shares(kind, alphas.detach().double().cpu())
    if primitives.restricted:
        strength[~primitives.allowed(kind)] = -1
    strength[:, [index for index, name in enumerate(primitives) if name in without]] = -1
    best, operation = strength.max(dim=-1)
    return best, operation


def derive_cell(alphas: Tensor, primitives: Sequence[str], edges: Tensor | None = None, kind: str = "normal",
                max_skips: int | None = None) -> list[Edge]:
    """The two strongest incoming edges of every node, from alphas (EDGES, P), see `strongest`.

    An edge is as strong as `strongest` says, times its own weight in `edges` (EDGES,), if these are given. Ties go to
    the earlier edge and the earlier operation. Both edges of a node have distinct sources, since there is one edge for
    each source.

    Of skip connections the `max_skips` strongest stay; on the edges of others the next operation takes their place, as
    in P-DARTS (arXiv:1904.12760, section 3.3) and DARTS+ (arXiv:1909.06035). Raises InputError if there is no other.
    """
    primitives = Primitives(primitives)
    best, operation = strongest(alphas, primitives, kind)
    if edges is not None:
        best = best * edges.detach().double().cpu()
    chosen, start = [], 0
    for node in range(NODES):
        incoming = range(start, start + 2 + node)
        chosen += [(edge, edge - start) for edge in sorted(incoming, key=lambda e: -best[e].item())[:2]]
        start = incoming.stop
    if max_skips is not None:
        check_max_skips(max_skips, primitives, kind)
        skips = sorted((edge for edge, _ in chosen if primitives[operation[edge]] == SKIP),
                       key=lambda e: (-best[e].item(), e))
        _, instead = strongest(alphas, primitives, kind, ("none", SKIP))
        operation[skips[max_skips:]] = instead[skips[max_skips:]]
    return [(primitives[operation[edge]], source) for edge, source in chosen]


def check_max_skips(max_skips: int, primitives: Sequence[str], kind: str = "normal") -> None:
    """Raise InputError if an edge has nothing that could take the place of its skip connection."""
    for number, names in enumerate(Primitives(primitives).by_edge[kind]):
        if SKIP in names and not set(names) - {"none", SKIP}:
            raise InputError(f"--max_skips {max_skips}: edge {number} of {kind} cells has no operation besides {SKIP}; "
                             "leave it out")


def derive(alphas_normal: Tensor, alphas_reduce: Tensor, primitives: Sequence[str],
           edges: tuple[Tensor | None, Tensor | None] = (None, None), max_skips: int | None = None) -> Genotype:
    """The genotype of a pair of alphas, each (EDGES, P); the rest is as of `derive_cell`.

    `max_skips` holds for the normal cell: in the other one, a skip connection of stride 2 has weights.
    """
    concat = range(2, 2 + NODES)
    return Genotype(derive_cell(alphas_normal, primitives, edges[0], "normal", max_skips), concat,
                    derive_cell(alphas_reduce, primitives, edges[1], "reduce"), concat)


def rule_in_words(max_skips: int | None = None) -> str:
    """How `derive` chooses, for the files of genotypes."""
    rule = "of each node the two strongest edges, each with its strongest operation other than none (DARTS)"
    return rule if max_skips is None else (f"{rule}; at most {max_skips} {SKIP} in the normal cell, the next operation "
                                           "in place of others (--max_skips)")


def check(genotype: Genotype, where: str, operations: Collection[str] | None) -> Genotype:
    """Return `genotype` if a network can be built from it with `operations`; None stands for any name.

    Raises InputError, beginning with `where`, for an unknown operation, an edge from a state that does not exist
    yet, an odd number of edges, or a concatenation of states that the cell does not have.
    """
    for kind in ("normal", "reduce"):
        edges, concat = getattr(genotype, kind), list(getattr(genotype, f"{kind}_concat"))
        if not edges or len(edges) % 2 or len(edges) > 2 * MOST_NODES:
            raise InputError(f"{where}: {kind} has {len(edges)} edges; a cell needs two for each node, and has at most "
                             f"{MOST_NODES} nodes")
        for index, (operation, source) in enumerate(edges):
            if operations is None:
                if not re.fullmatch(NAME, operation):
                    raise InputError(f"{where}: {kind} edge {index} uses {operation[:64]!r}, which is no name of an "
                                     "operation: at most 64 letters, digits and _.+-")
            elif operation not in operations:
                raise InputError(f"{where}: {kind} edge {index} uses {operation!r}, not one of {', '.join(operations)}"
                                 "; an operation of a space's own must be in OPERATIONS of its genotypes.py")
            if not 0 <= source < 2 + index // 2:
                raise InputError(f"{where}: {kind} edge {index} comes from state {source}, but node {index // 2} "
                                 f"reads only states 0 to {1 + index // 2}")
        if not concat or len(set(concat)) != len(concat) or not set(concat) <= set(range(2, 2 + len(edges) // 2)):
            raise InputError(f"{where}: {kind}_concat {concat} must list distinct nodes of the cell, "
                             f"states 2 to {1 + len(edges) // 2}")
    return genotype


def to_json(genotype: Genotype) -> dict:
    """Plain lists and strings, in the field order of `Genotype`."""
    return {name: [list(item) if isinstance(item, tuple) else item for item in value]
            for name, value in genotype._asdict().items()}


def from_json(obj, where: str, operations: Collection[str] | None) -> Genotype:
    """The checked genotype in a decoded JSON object. Raises InputError, beginning with `where`."""
    if not isinstance(obj, dict) or set(obj) - {RULE} != set(Genotype._fields):
        raise InputError(f"{where}: a genotype is a JSON object with exactly the keys {', '.join(Genotype._fields)}")
    fields = {}
    for name in Genotype._fields:
        value = obj[name]
        concat = name.endswith("_concat")
        right = is_index if concat else is_edge
        if wrong := first_wrong(value, right):
            item = "state numbers" if concat else "[operation, state number] pairs"
            raise InputError(f"{where}: {name} must be a list of {item}, {wrong}")
        fields[name] = value if concat else [(operation, source) for operation, source in value]
    if fields["normal_concat"] == fields["reduce_concat"] == list(range(2, 2 + NODES)):
        fields |= {name: range(2, 2 + NODES) for name in ("normal_concat", "reduce_concat")}  # prints as DARTS does
    return check(Genotype(**fields), where, operations)


def first_wrong(value: object, right: Callable[[object], bool]) -> str:
    """In words, what keeps a value from being a list of right items; nothing if it is one."""
    if not isinstance(value, list):
        return f"and not {value!r:.60}"
    return next((f"and its item {i} is {item!r:.60}" for i, item in enumerate(value) if not right(item)), "")


def from_object(value: object, where: str, operations: Collection[str]) -> Genotype:
    """The checked genotype in an object with its four fields, such as another project's named tuple or class.

    Raises InputError, which says what the object is and what is expected.
    """
    return from_json(plain_fields(value, Genotype, where), where, operations)


def plain_fields(value: object, kind: type, where: str) -> dict:
    """The fields of a genotype of whatever class as lists, texts and numbers, by the names of `kind`, a named tuple."""
    names = kind._fields
    if isinstance(value, Misfit):
        given = {str(i): v for i, v in enumerate(value.values)} | value.fields
    elif isinstance(value, Mapping):
        given = {name: item for name, item in value.items() if name != RULE}
    elif hasattr(value, "_asdict") and not isinstance(value, type):
        given = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = vars(value)
    else:
        given = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if set(given) != set(names):
        what = f"a {type(value).__name__}" if not isinstance(value, Misfit) else "a genotype"
        held = f" with {len(given)} fields, {', '.join(map(str, given))}" if given else ""
        raise InputError(f"{where}: is {what}{held}, and cannot be read; expected is one with the {len(names)} fields "
                         f"{', '.join(names)}")
    return {name: _plain(given[name]) for name in names}


def _plain(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    try:
        return operator.index(value)  # NumPy's integers too
    except TypeError:
        return value


def may_be_genotypes(module) -> dict[str, object]:
    """What a `genotypes.py` defines by name but PRIMITIVES, OPERATIONS, modules, classes, functions, numbers, texts
    and lists of texts."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and not (
        name in ("PRIMITIVES", "OPERATIONS") or isinstance(value, (ModuleType, str, int, float, NoneType))
        or (callable(value) and not (hasattr(value, "normal") or hasattr(value, "recurrent")))
        or (isinstance(value, type) and hasattr(value, "_fields"))  # the named tuple itself
        or (isinstance(value, Sequence) and not hasattr(value, "_fields") and all(isinstance(v, str) for v in value)))}


def is_index(item) -> bool:
    return type(item) is int and 0 <= item < 1000


def is_edge(item) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and is_index(item[1])


def save(path: str | Path, genotype: Genotype) -> None:
    """Write a genotype as JSON, atomically."""
    write_json(path, to_json(genotype))


def load(path: str | Path, operations: Collection[str] | None) -> Genotype:
    """Read and check a genotype. Raises InputError for a file that is missing, not JSON or not a genotype."""
    try:
        obj = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a genotype ({error}); name another file, or write this one again"
                         ) from error
    return from_json(obj, str(path), operations)
