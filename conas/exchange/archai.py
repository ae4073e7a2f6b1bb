"""Model descriptions of archai, in YAML: a list of cells, each with nodes, edges, and an operation for each edge.

Such a file describes a whole network: a genotype follows from it only if all of its cells of a kind are equal. None is
written, since channels, stems and towers are no part of a genotype.
"""
from conas.darts.genotype import NODES
from conas.errors import InputError
from conas.exchange.form import CONCAT, KINDS, Form

CELLS = "_cell_descs"
TYPES = dict(zip(("regular", "reduction"), KINDS))


def is_description(value: object) -> bool:
    return isinstance(value, dict) and CELLS in value


def read(value: dict, where: str) -> dict:
    """The four fields. Raises InputError for cells of other sizes, for unequal ones, and if a kind is missing."""
    if not isinstance(value[CELLS], list):
        raise InputError(f"{where}: {CELLS} must be a list of cells, and not {value[CELLS]!r:.60}")
    found: dict[str, tuple[int, list]] = {}  # by kind, its first cell
    for number, cell in enumerate(value[CELLS]):
        at = f"{where}: cell {number}"
        kind = TYPES.get(_only(_entry(cell, "cell_type", at)))
        if kind is None:
            raise InputError(f"{at}: its cell_type must be {' or '.join(TYPES)}, and not {cell['cell_type']!r:.60}")
        edges = _edges(cell, at)
        first, other = found.setdefault(kind, (number, edges))
        if edges != other:
            raise InputError(f"{where}: its {kind} cells {first} and {number} differ; a genotype has one of each kind")
    if missing := [theirs for theirs, kind in TYPES.items() if kind not in found]:
        raise InputError(f"{where}: has no cell of the cell_type {missing[0]}")
    return CONCAT | {kind: edges for kind, (_, edges) in found.items()}


def _edges(cell: dict, at: str) -> list:
    """A cell's edges, in the order of its nodes, as pairs of operation and state."""
    end = _entry(cell, "post_op", at)
    if _entry(end, "name", at) != "concate_channels" or _entry(_entry(end, "params", at), "out_states", at) != NODES:
        raise InputError(f"{at}: its post_op must be concate_channels of {NODES} states")
    nodes, edges = _entry(cell, "_nodes", at), []
    if not isinstance(nodes, list) or len(nodes) != NODES:
        raise InputError(f"{at}: cells of {NODES} nodes are read, and not of {_count(nodes)}")
    for number, node in enumerate(nodes):
        own = _entry(node, "edges", at)
        if not isinstance(own, list) or len(own) != 2:
            raise InputError(f"{at}: its node {number} has {_count(own)} edges; a node has two in a cell that a search "
                             "has ended with")
        edges += [[_entry(_entry(edge, "op_desc", at), "name", at), _only(_entry(edge, "input_ids", at))]
                  for edge in own]
    return edges


def _entry(value: object, key: str, at: str) -> object:
    if not isinstance(value, dict) or key not in value:
        raise InputError(f"{at}: has no {key} where a model description of archai has one")
    return value[key]


def _only(value: object) -> object:
    """The item of a list of one, else None."""
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], (list, dict)) else None


def _count(value: object) -> object:
    return len(value) if isinstance(value, list) else repr(value)[:60]


ARCHAI = Form("archai", "YAML of a model description of archai", is_description, read)
