"""What NNI's DARTS exports: version 3 names operation and input of each edge, version 2 a choice for each edge."""
import json
import re

from conas.darts.genotype import NODES, Genotype
from conas.errors import InputError
from conas.exchange.form import CONCAT, KINDS, Form, check_plain

OPERATIONS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
              "dil_conv_5x5")
# of version 2, in the order by which it counts them
NAMES = {"maxpool": "max_pool_3x3", "avgpool": "avg_pool_3x3", "skipconnect": "skip_connect",
         "sepconv3x3": "sep_conv_3x3", "sepconv5x5": "sep_conv_5x5", "dilconv3x3": "dil_conv_3x3",
         "dilconv5x5": "dil_conv_5x5"}
SIZES = "width", "depth", "num_cells"  # of the network, which some exports hold too


def _entry(value: dict, key: str, where: str) -> object:
    if key not in value:
        raise InputError(f"{where}: has no {key}; a cell of DARTS has {NODES} nodes, numbered from 2, with two edges "
                         "each")
    return value[key]


def _check_keys(value: dict, used: set[str], where: str) -> None:
    if more := sorted(set(value) - used - set(SIZES)):
        raise InputError(f"{where}: has {len(more)} entries that are not known, {more[0]} first; cells of {NODES} "
                         "nodes are read")


def is_three(value: object) -> bool:
    return isinstance(value, dict) and any(re.fullmatch(r"(normal|reduce)/(op|input)_\d+_\d+", str(key))
                                           for key in value)


def read_three(value: dict, where: str) -> dict:
    """The four fields; an input is a number, or a list of one. Raises InputError for cells of other sizes."""
    fields, used = dict(CONCAT), set()
    for kind in KINDS:
        fields[kind] = []
        for node in range(2, 2 + NODES):
            for edge in range(2):
                keys = f"{kind}/op_{node}_{edge}", f"{kind}/input_{node}_{edge}"
                operation, source = (_entry(value, key, where) for key in keys)
                if isinstance(source, list) and len(source) == 1:
                    source = source[0]
                fields[kind].append([operation, source])
                used.update(keys)
    _check_keys(value, used, where)
    return fields


def write_three(genotype: Genotype) -> str:
    check_plain(genotype, "nni3", OPERATIONS)
    made = {}
    for kind in KINDS:
        for index, (operation, source) in enumerate(getattr(genotype, kind)):
            place = f"{2 + index // 2}_{index % 2}"
            made |= {f"{kind}/op_{place}": operation, f"{kind}/input_{place}": source}
    return json.dumps(made)


def is_two(value: object) -> bool:
    return isinstance(value, dict) and any(re.fullmatch(r"(normal|reduce)_n\d+_(p\d+|switch)", str(key))
                                           for key in value)


def read_two(value: dict, where: str) -> dict:
    """The four fields. A node's switch lists its two edges, as names or numbers.

    An operation is a name, its number, or a list of truth values one of which is true. Raises InputError for others.
    """
    fields, used = dict(CONCAT), set()
    for kind in KINDS:
        fields[kind] = []
        for node in range(2, 2 + NODES):
            at = f"{kind}_n{node}"
            chosen = _entry(value, f"{at}_switch", where)
            names = [f"{at}_p{source}" for source in range(node)]
            if isinstance(chosen, list):
                chosen = [names[c] if type(c) is int and 0 <= c < node else c for c in chosen]
            if not isinstance(chosen, list) or len(chosen) != 2 or not all(c in names for c in chosen):
                raise InputError(f"{where}: {at}_switch must list two of {', '.join(names)}, and not {chosen!r:.60}")
            fields[kind] += [[_operation(_entry(value, name, where), f"{where}: {name}"), names.index(name)]
                             for name in chosen]
            used.update(names, [f"{at}_switch"])
    _check_keys(value, used, where)
    return fields


def _operation(value: object, where: str) -> str:
    if isinstance(value, list) and value.count(True) == 1 and len(value) == len(NAMES) and all(
            isinstance(v, bool) for v in value):
        value = value.index(True)
    if type(value) is int and 0 <= value < len(NAMES):
        value = list(NAMES)[value]
    if not isinstance(value, str) or value not in (*NAMES, "none"):
        raise InputError(f"{where}: is {value!r:.60}, and no operation of NNI 2: {', '.join(NAMES)}, or 0 to "
                         f"{len(NAMES) - 1}")
    return NAMES.get(value, value)


def write_two(genotype: Genotype) -> str:
    check_plain(genotype, "nni2", [*NAMES.values(), "none"], distinct=True)
    made, names = {}, {ours: theirs for theirs, ours in NAMES.items()}
    for kind in KINDS:
        edges = getattr(genotype, kind)
        for node in range(2, 2 + NODES):
            pair, at = edges[2 * node - 4:2 * node - 2], f"{kind}_n{node}"
            own = {source: names.get(operation, operation) for operation, source in pair}
            made |= {f"{at}_p{source}": own.get(source, []) for source in range(node)}
            made[f"{at}_switch"] = [f"{at}_p{source}" for _, source in pair]
    return json.dumps(made)


THREE = Form("nni3", "JSON of NNI 3.0", is_three, read_three, write_three)
TWO = Form("nni2", "JSON of NNI 2", is_two, read_two, write_two)
