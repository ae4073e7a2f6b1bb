"""Genotypes of recurrent cells: their rule, checks and JSON form (arXiv:1806.09055, sections 2.4 and 3.1.2).

State 0 joins the input word and the previous hidden state. Step i makes state i + 1 from one earlier state: with a gate
c = sigmoid(s W_c) and an activation h = f(s W_h), the new state is s + c (h - s). The cell's output, which is also its
next hidden state, is the mean of the states in `concat`.
"""
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conas.darts.genotype import Misfit, first_wrong, is_edge, is_index, plain_fields, strongest
from conas.errors import InputError
from conas.files import read_json

STEPS = 8
EDGES = STEPS * (STEPS + 1) // 2  # 36: every step may follow any earlier state
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


class _Cell(NamedTuple):
    recurrent: list[tuple[str, int]]
    concat: Sequence[int]


class Genotype(_Cell):
    """One cell. Entry i of `recurrent` is (activation, source state) of step i, which makes state i + 1."""

    __slots__ = ()

    def __new__(cls, *values, **fields):
        return Misfit.or_tuple(cls, values, fields)


def derive(alphas: Tensor, primitives: Sequence[str]) -> Genotype:
    """The strongest edge of every step, from alphas of shape (EDGES, len(primitives)).

    An edge is as strong as `strongest` says. Ties go to the earlier state and the earlier activation.
    """
    best, activation = strongest(alphas, primitives)
    recurrent, start = [], 0
    for step in range(STEPS):
        edge = max(range(start, start + step + 1), key=best.__getitem__)
        recurrent.append((primitives[activation[edge]], edge - start))
        start += step + 1
    return Genotype(recurrent, range(1, STEPS + 1))


def check(genotype: Genotype, where: str, activations: Collection[str] = ACTIVATIONS) -> Genotype:
    """Return `genotype` if a cell can be built from it. Raises InputError, beginning with `where`."""
    recurrent, concat = genotype.recurrent, list(genotype.concat)
    for step, (activation, source) in enumerate(recurrent):
        if activation not in activations:
            raise InputError(f"{where}: step {step} uses {activation!r}, not one of {', '.join(activations)}")
        if not 0 <= source <= step:
            raise InputError(f"{where}: step {step} follows state {source}, but only states 0 to {step} are there")
    if not concat or len(set(concat)) != len(concat) or not set(concat) <= set(range(1, len(recurrent) + 1)):
        raise InputError(f"{where}: concat {concat} must list distinct states from 1 to {len(recurrent)}")
    return genotype


def from_json(obj, where: str, activations: Collection[str] = ACTIVATIONS) -> Genotype:
    """The checked genotype in a decoded JSON object. Raises InputError, beginning with `where`."""
    if not isinstance(obj, dict) or set(obj) != set(Genotype._fields):
        raise InputError(f"{where}: a recurrent genotype is a JSON object with exactly the keys recurrent and concat")
    for name, right, item in (("recurrent", is_edge, "[activation, state number] pairs"),
                              ("concat", is_index, "state numbers")):
        if wrong := first_wrong(obj[name], right):
            raise InputError(f"{where}: {name} must be a list of {item}, {wrong}")
    concat = obj["concat"]
    if concat and concat == list(range(concat[0], concat[-1] + 1)):
        concat = range(concat[0], concat[-1] + 1)  # prints as DARTS does
    return check(Genotype([(name, source) for name, source in obj["recurrent"]], concat), where, activations)


def from_object(value: object, where: str, activations: Collection[str] = ACTIVATIONS) -> Genotype:
    """The checked genotype in an object with its two fields, such as another project's named tuple."""
    return from_json(plain_fields(value, Genotype, where), where, activations)


def load(path: str | Path) -> Genotype:
    """Read and check a genotype. Raises InputError for a file that is missing, not JSON or not a recurrent genotype."""
    try:
        obj = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a genotype ({error})") from error
    return from_json(obj, str(path))
