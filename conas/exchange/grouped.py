"""Edges grouped by node: pt.darts has the four fields, AutoDL-Projects two more and sometimes a name."""
from conas.darts.genotype import Genotype
from conas.errors import InputError
from conas.exchange.form import FIELDS, KINDS, Form

NOTHING = "connectN", "connects"  # the two fields more, None in every cell that stands for a network of cells


def is_grouped(value: object) -> bool:
    """Return True for a dict of the four fields, and perhaps those of AutoDL-Projects, with edges in groups."""
    return isinstance(value, dict) and set(FIELDS) <= set(value) <= {*FIELDS, *NOTHING, "name"}


def read(value: dict, where: str) -> dict:
    """The four fields with edges in one list. Raises InputError for a node without exactly two edges."""
    for name in NOTHING:
        if value.get(name) is not None:
            raise InputError(f"{where}: its {name} is {value[name]!r:.60}, and only None is known")
    fields = {name: value[name] for name in FIELDS}
    for kind in KINDS:
        groups = fields[kind]
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise InputError(f"{where}: {kind} must be a list of nodes, each with its edges, and not {groups!r:.60}")
        if all(group and isinstance(group[0], str) for group in groups):
            continue  # six fields, but edges in one list
        for node, group in enumerate(groups):
            if len(group) != 2:
                raise InputError(f"{where}: {kind} has {len(group)} edges at node {node}; a node has two")
        fields[kind] = [edge for group in groups for edge in group]
    return fields


def _groups(edges: list) -> list[tuple]:
    return list(zip(edges[::2], edges[1::2]))


def _write_four(genotype: Genotype) -> str:
    normal, normal_concat, reduce, reduce_concat = genotype
    return (f"Genotype(normal={list(map(list, _groups(normal)))}, normal_concat={normal_concat}, "
            f"reduce={list(map(list, _groups(reduce)))}, reduce_concat={reduce_concat})")


def _write_six(genotype: Genotype) -> str:
    return (f"Genotype(normal={_groups(genotype.normal)}, normal_concat={list(genotype.normal_concat)}, "
            f"reduce={_groups(genotype.reduce)}, reduce_concat={list(genotype.reduce_concat)}, connectN=None, "
            "connects=None)")


PT_DARTS = Form("pt.darts", "edges grouped by node, as in pt.darts", lambda value: is_grouped(value) and set(value) ==
                set(FIELDS), read, _write_four)
AUTODL = Form("autodl", "edges grouped by node, with the fields of AutoDL-Projects", is_grouped, read, _write_six)
