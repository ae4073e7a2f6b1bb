"""Configurations of nasbench301, by the names of its ConfigSpace.

`edge_normal_E` is the operation on the edge number E in DARTS' order; `inputs_node_normal_N`, for states 3 to 5, says
which two states are heard, as "0_2". State 2 hears both inputs.
"""
import json

from conas.darts.genotype import NODES, Genotype
from conas.errors import InputError
from conas.exchange.form import CONCAT, KINDS, Form, check_plain

PREFIX = "NetworkSelectorDatasetInfo:darts:"
OPERATIONS = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
              "dil_conv_5x5")


def _first_edge(state: int) -> int:
    return sum(range(2, state))  # those into earlier states


def is_config(value: object) -> bool:
    return isinstance(value, dict) and any(str(key).startswith(PREFIX) for key in value)


def read(value: dict, where: str) -> dict:
    """The four fields, a node's edges in the order of their states. Raises InputError for what does not fit."""
    fields, used = dict(CONCAT), set()
    for kind in KINDS:
        fields[kind] = []
        for state in range(2, 2 + NODES):
            key = f"{PREFIX}inputs_node_{kind}_{state}"
            heard = "0_1" if state == 2 else value.get(key)
            pairs = [f"{a}_{b}" for b in range(state) for a in range(b)]
            if heard not in pairs:
                raise InputError(f"{where}: {key} must be one of {', '.join(pairs)}, and not {heard!r:.60}")
            used.add(key)
            for source in map(int, heard.split("_")):
                edge = f"{PREFIX}edge_{kind}_{_first_edge(state) + source}"
                if value.get(edge) not in OPERATIONS:
                    raise InputError(f"{where}: {edge} must be one of {', '.join(OPERATIONS)}, and not "
                                     f"{value.get(edge)!r:.60}")
                fields[kind].append([value[edge], source])
                used.add(edge)
    if more := sorted(key for key in value if str(key).startswith(f"{PREFIX}edge_") and key not in used):
        raise InputError(f"{where}: has {len(more)} edges that no node hears, {more[0]} first")
    return fields


def write(genotype: Genotype) -> str:
    check_plain(genotype, "nasbench301", OPERATIONS, distinct=True)
    made = {}
    for kind in KINDS:
        edges = getattr(genotype, kind)
        for state in range(2, 2 + NODES):
            pair = sorted(edges[2 * state - 4:2 * state - 2], key=lambda edge: edge[1])
            made |= {f"{PREFIX}edge_{kind}_{_first_edge(state) + source}": name for name, source in pair}
            if state > 2:
                made[f"{PREFIX}inputs_node_{kind}_{state}"] = "_".join(str(source) for _, source in pair)
    return json.dumps(made)


CONFIG = Form("nasbench301", "configuration of nasbench301", is_config, read, write,
              "a node's two edges come back in the order of their states")
