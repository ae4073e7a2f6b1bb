"""Searches that begin near given cells: alphas whose softmax gives each of their operations a share of its edge."""
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from conas import distributed
from conas.darts.genotype import Genotype
from conas.darts.primitives import KINDS, NODES, edge_number
from conas.darts.space import Space
from conas.darts.supernet import Supernet
from conas.errors import InputError, one_line
from conas.exchange.cells import find_cell
from conas.runs.options import AlphaOptions

SHARE = 0.5


def initial_cell(space: Space, options: AlphaOptions, before: Mapping[str, object]
                 ) -> tuple[AlphaOptions, Genotype | None, str]:
    """The options with what the run began with, its initial cells or None, and in words where they are from.

    `before` are the arguments of the run's first start, or {}. They hold the cells, so that a run goes on without the
    file that it read them from. Raises InputError for what is no cell, and for an --init_share without one.
    """
    flag, kept = options.init_arch, before.get("init_cell")
    if flag is None and kept is None:
        if options.init_share is not None:
            raise InputError(f"--init_share {options.init_share}: says how far the alphas of --init_arch lean; give "
                             "that too, or leave it out")
        return options, None, ""
    options = replace(options, init_share=options.init_share or before.get("init_share") or SHARE)
    if kept is not None and flag in (None, before.get("init_arch")):
        text, words = str(kept), "as recorded when the run began"
    else:
        def read() -> tuple[str, str]:
            found = find_cell(flag, space.named, "--init_arch ", space.operations)
            return str(found.genotype), found.origin
        text, words = distributed.from_rank0(read)
        if text == kept:  # another spelling of the same file
            flag = None
    if flag is None:
        options = replace(options, init_arch=before.get("init_arch"))
    cells = find_cell(text, {}, "--init_arch ", space.operations).genotype
    return options, cells, f"{one_line(options.init_arch, 200)} ({words})"


def lean(network: Supernet, cells: Genotype, share: float) -> None:
    """Add to the alphas of a new supernet so that each operation of `cells` has about this share on its edge.

    Other operations of these edges share the rest equally, as all do on other edges. Raises InputError for cells that
    the supernet has no alphas for, and for a share so small that its genotype would be another.
    """
    primitives = network.primitives
    for kind in KINDS:
        edges, concat = getattr(cells, kind), list(getattr(cells, f"{kind}_concat"))
        if len(edges) != 2 * NODES or concat != list(range(2, 2 + NODES)):
            raise InputError(f"--init_arch: supernets have cells of {NODES} nodes, all concatenated, but this {kind} "
                             f"cell has {len(edges) // 2} and concatenates {concat}")
        for index, (operation, source) in enumerate(edges):
            at, node = f"--init_arch: its {kind} cell", index // 2
            if index % 2 and source == edges[index - 1][1]:
                raise InputError(f"{at} has two edges from state {source} to node {node}, but a supernet has one "
                                 "there, and no search can end with two")
            edge = edge_number(node, source)
            names = primitives.by_edge[kind][edge]
            if operation == "none" or operation not in names:
                raise InputError(f"{at} has {operation} on the edge from state {source} to node {node}, where a search "
                                 f"in this space can choose {', '.join(n for n in names if n != 'none')} only")
            if len(names) > 1:
                with torch.no_grad():
                    getattr(network, f"alphas_{kind}")[edge, primitives.index(operation)] += math.log(
                        share / (1 - share) * (len(names) - 1))
    if _by_node(network.genotype()) != _by_node(cells):
        raise InputError(f"--init_share {share}: too small: other cells follow from such alphas; give a larger one")


def _by_node(cells: Genotype) -> list[set]:
    """The edges into each node, in any order."""
    return [set(edges[i:i + 2]) for edges in (cells.normal, cells.reduce) for i in range(0, len(edges), 2)]
