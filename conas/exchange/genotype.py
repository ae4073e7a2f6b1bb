"""The four fields of DARTS: `Genotype(normal=[...], ...)` as its projects print it, JSON, and lists of the fields."""
import json

from conas.darts import genotype as genotypes
from conas.darts.genotype import Genotype
from conas.exchange.form import FIELDS, Form


def _is_edge_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) and item and isinstance(item[0], str)
                                           for item in value)


def is_fields(value: object) -> bool:
    """Return True for a dict of exactly the four fields whose edges are not grouped by node; a search adds its rule."""
    return isinstance(value, dict) and set(value) - {genotypes.RULE} == set(FIELDS) and not any(
        isinstance(value[kind], list) and value[kind] and all(isinstance(item, list) and item and
                                                              isinstance(item[0], list) for item in value[kind])
        for kind in ("normal", "reduce"))


def is_list(value: object) -> bool:
    """Return True for a list of the four fields, in DARTS' order."""
    return (isinstance(value, list) and len(value) == len(FIELDS) and _is_edge_list(value[0]) and bool(value[0])
            and _is_edge_list(value[2]) and isinstance(value[1], list) and isinstance(value[3], list))


def write_json(genotype: Genotype) -> str:
    return json.dumps(genotypes.to_json(genotype))


TEXT = Form("genotype", "the four fields of DARTS", is_fields, lambda value, where: value, str)
JSON = Form("json", "the four fields of DARTS, as JSON", is_fields, lambda value, where: value, write_json)
LIST = Form("list", "a list of the four fields of DARTS", is_list, lambda value, where: dict(zip(FIELDS, value)),
            lambda genotype: json.dumps(list(genotypes.to_json(genotype).values())))
