"""What the forms have in common: how one is described, and the checks before a cell is written in a poorer one."""
from collections.abc import Callable, Collection
from dataclasses import dataclass

from conas.darts.genotype import NODES, Genotype
from conas.errors import InputError

KINDS = "normal", "reduce"
FIELDS = Genotype._fields


@dataclass(frozen=True)
class Form:
    """One way to write a cell.

    `recognise` says whether a value, made of dicts, lists, texts, numbers and None, is of this form; `read` turns it
    into the four fields of a `Genotype`, or raises InputError that begins with `where`; `write` turns a genotype into
    text, or raises InputError if that would lose something. It is None for a form that says more than a genotype does.
    """

    name: str
    title: str
    recognise: Callable[[object], bool]
    read: Callable[[object, str], dict]
    write: Callable[[Genotype], str] | None = None
    note: str = ""  # what is not kept, though it changes nothing that the cell computes


CONCAT = {f"{kind}_concat": list(range(2, 2 + NODES)) for kind in KINDS}  # where a form does not say


def check_plain(genotype: Genotype, form: str, operations: Collection[str], distinct: bool = False) -> None:
    """Raise InputError unless a form that knows these operations only can say all of a genotype.

    Such forms stand for four nodes, all of which are concatenated; with `distinct`, the two edges of a node must come
    from two states.
    """
    for kind in KINDS:
        edges, concat = getattr(genotype, kind), list(getattr(genotype, f"{kind}_concat"))
        if len(edges) != 2 * NODES or concat != CONCAT[f"{kind}_concat"]:
            raise InputError(f"--to {form}: its cells have {NODES} nodes, all concatenated, but this {kind} cell has "
                             f"{len(edges) // 2} and concatenates {concat}; write it --to json or genotype")
        if foreign := sorted({name for name, _ in edges} - set(operations)):
            raise InputError(f"--to {form}: has no name for {', '.join(foreign)}; write it --to json or genotype")
        for node in range(NODES) if distinct else ():
            (_, first), (_, second) = edges[2 * node:2 * node + 2]
            if first == second:
                raise InputError(f"--to {form}: cannot say that both edges of node {node} of the {kind} cell come from "
                                 f"state {first}; write it --to json or genotype")
