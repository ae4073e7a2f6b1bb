"""From what a user names to a checked genotype: a name, a file, or a text, in any of the forms of FORMS."""
import dataclasses
import difflib
import operator
import os
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from conas.darts import genotype as genotypes
from conas.darts.genotype import Genotype, Misfit
from conas.darts.operations import OPERATIONS
from conas.darts.published import GENOTYPES, ROOT, SOURCES, named_genotypes
from conas.errors import InputError, one_line
from conas.exchange import archai, compact, genotype, grouped, nasbench301, nni, source
from conas.exchange.form import FIELDS, Form
from conas.files import check_regular

# The first that recognises a value reads it.
FORMS = {form.name: form for form in (genotype.TEXT, genotype.JSON, genotype.LIST, grouped.PT_DARTS, grouped.AUTODL,
                                      nni.THREE, nni.TWO, nasbench301.CONFIG, compact.COMPACT, archai.ARCHAI)}


class Cell(NamedTuple):
    """A cell that was found, and in words what it was read from."""

    genotype: Genotype
    origin: str


def find_genotype(name: str, named: Mapping[str, object], flag: str = "--arch ",
                  operations: Collection[str] | None = OPERATIONS) -> Genotype:
    """The genotype of `find_cell`."""
    return find_cell(name, named, flag, operations).genotype


def find_cell(name: str, named: Mapping[str, object], flag: str = "--arch ",
              operations: Collection[str] | None = OPERATIONS) -> Cell:
    """The cell that `name` stands for.

    That is one of `named`, else SPACE/NAME of the genotypes.py in a space's folder, else a file, as FILE or, if it has
    several cells, FILE:NAME, else the text of a cell. Raises InputError, which begins with `flag` and the name, for all
    else, and for operations that are not among `operations`; None stands for any.
    """
    where = f"{flag}{one_line(name, 200)}"
    if name in named:
        if name in SOURCES and named[name] is GENOTYPES[name]:
            return Cell(genotypes.check(GENOTYPES[name], where, operations), SOURCES[name])
        return _read(named[name], where, operations, "genotypes.py")
    space, _, own = name.rpartition("/")
    if re.fullmatch(r"cnn\w*", space) and (ROOT / space / "genotypes.py").exists():
        named = named_genotypes(import_module(f"{space}.genotypes"))
        if own in named:
            return _read(named[own], where, operations, f"{own} in {space}/genotypes.py")
    if re.search(r"[(\[{]", name):
        return _only(source.values_in(name, where), "", where, operations, "text")
    file, part = (name, "") if os.path.isfile(name) or ":" not in name else name.rsplit(":", 1)
    if os.path.exists(file) or re.search(r"\.\w{1,5}$", file):
        return _only(_values_of(file, where), part, where, operations, Path(file).name)
    by_lower = {known.lower(): known for known in named}
    near = [by_lower[known] for known in difflib.get_close_matches(own.lower(), by_lower, 2, 0.5)] or sorted(named)
    raise InputError(f"{where}: unknown; did you mean {' or '.join(near)}? It is no file either; a name in the "
                     "genotypes.py of another space begins with its folder, as cnn_space1/CONAS")


def _values_of(file: str, where: str) -> dict[str, object]:
    try:
        check_regular(file)
        text = Path(file).read_text(encoding="utf-8-sig")  # with the mark that Windows begins files with, or without
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is no text; cells are read from Python source, JSON, YAML and logs, never from "
                         "pickles") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as a genotype ({error}); name another file, or write this one again"
                         ) from error
    return source.values_in(text, where, Path(file).suffix)


def _only(values: dict[str, object], name: str, where: str, operations: Collection[str] | None, there: str) -> Cell:
    """The cell called `name` among the values of a file or text, or the only one that it has."""
    values = _one_level(values)
    cells = {key: made for key, value in values.items() if form_of(made := plain(value))}
    if name:
        if name not in values:
            near = difflib.get_close_matches(name, cells, 2, 0.5) or list(cells)[:9]
            raise InputError(f"{where}: has no cell called {name}; it has {', '.join(near) or 'none'}")
        return _read(values[name], where, operations, f"{name} in {there}")
    distinct = {key: made for i, (key, made) in enumerate(cells.items()) if made not in list(cells.values())[:i]}
    if len(distinct) > 1:
        more = f", and {len(distinct) - 9} more" if len(distinct) > 9 else ""
        raise InputError(f"{where}: has {len(distinct)} cells, {', '.join(list(distinct)[:9])}{more}; name one, as "
                         f"{there}:{list(distinct)[-1]}")
    if not cells and len(values) != 1:
        raise InputError(f"{where}: has no cell in a form that is known; `python -m conas.exchange --help` lists them")
    key = next(iter(cells or values))
    return _read(values[key], where, operations, f"{key} in {there}" if key else there)


def _one_level(values: dict[str, object]) -> dict[str, object]:
    """The values, with its cells by name in place of a dict that holds some."""
    made: dict[str, object] = {}
    for name, value in values.items():
        inner = value if isinstance(value, dict) and not form_of(plain(value)) else {}
        made |= {key: item for key, item in inner.items() if form_of(plain(item))} or {name: value}
    return made


def _read(value: object, where: str, operations: Collection[str] | None, there: str) -> Cell:
    made = plain(value)
    form = form_of(made)
    if form is None:
        try:
            genotypes.from_object(value, where, operations)
        except InputError as error:  # which says what it is, and what is expected
            raise InputError(f"{error}, or another form of those that `python -m conas.exchange --help` lists"
                             ) from error
        raise InputError(f"{where}: is in no form that is known; `python -m conas.exchange --help` lists them")
    return Cell(genotypes.from_json(form.read(made, where), where, operations), f"{there}: {form.title}")


def form_of(value: object) -> Form | None:
    """The form of a plain value, if it has any."""
    return next((form for form in FORMS.values() if form.recognise(value)), None)


def plain(value: object) -> object:
    """A value of whatever class as dicts, lists, texts and numbers; an object by its fields."""
    if isinstance(value, Misfit):
        names = (*FIELDS, *grouped.NOTHING)
        if len(value.values) <= len(names) and set(names[:len(value.values)]).isdisjoint(value.fields):
            value = dict(zip(names, value.values)) | value.fields
    elif hasattr(value, "_asdict") and not isinstance(value, type):
        value = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    elif all(hasattr(value, name) for name in FIELDS):
        value = {name: getattr(value, name) for name in FIELDS}
    return {key: _items(item) for key, item in value.items()} if isinstance(value, Mapping) else _items(value)


def _items(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_items(item) for item in value]
    try:
        return value if isinstance(value, bool) else operator.index(value)  # NumPy's integers too
    except TypeError:
        return value
