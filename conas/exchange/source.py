"""Texts that hold cells: Python source, JSON, YAML or a log. Read as data: nothing in them is called or imported."""
import ast
import re

from conas.darts.genotype import Misfit
from conas.errors import InputError
from conas.files import parse_json

LONGEST = 2**20  # characters
MOST_VALUES = 100_000  # of YAML, whose aliases let a short text stand for any number
NAMEDTUPLES = "namedtuple", "NamedTuple"


class Unread(Exception):
    """An expression that stands for nothing that is read here."""


def values_in(text: str, where: str, suffix: str = "") -> dict[str, object]:
    """What a text holds, by name; the name of what has none is "".

    A text is JSON, an expression, a file of assignments as a `genotypes.py`, or a log with `Genotype(...)` in its
    lines, whose names are then the numbers of the lines. Calls become `Misfit`s. What is not understood is left out.
    YAML is only what comes from a file whose name ends in a `suffix` of it. Raises InputError for a text that is none
    of these, or that by its suffix should be JSON or YAML and is not.
    """
    if len(text) > LONGEST:
        raise InputError(f"{where}: has {len(text)} characters, and no file of cells has more than {LONGEST}")
    if suffix in (".yaml", ".yml"):
        return {"": _of_yaml(text, where)}
    try:
        return {"": parse_json(text)}
    except ValueError as error:
        if suffix == ".json":
            raise InputError(f"{where}: cannot be read as a genotype ({error}); name another file, or write this one "
                             "again") from error
    try:
        return _of_python(ast.parse(text.strip()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    try:
        return _of_log(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: is neither Python nor JSON; expected is a cell in one of the forms that `python -m "
                         "conas.exchange --help` lists") from error


def _of_yaml(text: str, where: str) -> object:
    """What a YAML text holds. Its tags, which name Python's classes in files of archai, say nothing here."""
    try:
        import yaml
    except ImportError as error:
        raise InputError(f"{where}: YAML needs a package that is not installed; pip install pyyaml") from error
    try:
        root, rest = yaml.compose(text, Loader=yaml.SafeLoader), [MOST_VALUES]  # nodes of text: no object is made
        if root is None:
            raise ValueError("it is empty")
        return _of_node(root, rest)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: cannot be read as YAML ({reason:.200}); name another file, or write this one again"
                         ) from error


def _of_node(node, rest: list[int]) -> object:
    """Dicts, lists, texts, whole numbers and None of a node of YAML; of `rest` values at most."""
    rest[0] -= 1
    if rest[0] < 0:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    if node.id == "sequence":
        return [_of_node(item, rest) for item in node.value]
    if node.id == "mapping":
        made = {key.value: _of_node(item, rest) for key, item in node.value if key.id == "scalar"}
        if len(made) != len(node.value):
            raise ValueError(f"it has the same key twice, or a key that is no text, in line {node.start_mark.line + 1}")
        return made
    if node.tag == "tag:yaml.org,2002:null":
        return None
    plain = node.tag == "tag:yaml.org,2002:int" and re.fullmatch(r"-?(0|[1-9]\d{0,8})", node.value)
    return int(node.value) if plain else node.value


def _of_python(tree: ast.Module) -> dict[str, object]:
    if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr):
        try:
            return {"": evaluate(tree.body[0].value, {}, {})}
        except Unread:
            return {}
    known: dict[str, object] = {}
    classes: dict[str, list[str]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            classes[statement.name] = [line.target.id for line in statement.body
                                       if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
            continue
        targets = (statement.targets if isinstance(statement, ast.Assign) else
                   [statement.target] if isinstance(statement, ast.AnnAssign) else [])
        for target in targets:
            if isinstance(target, ast.Name) and statement.value is not None:
                if fields := _named_tuple(statement.value):
                    classes[target.id] = fields
                    continue
                try:
                    known[target.id] = evaluate(statement.value, known, classes)
                except Unread:
                    known.pop(target.id, None)  # it is another thing from here on
    return known


def _of_log(text: str) -> dict[str, object]:
    """The cells in the lines of a log, by the number of the line; of equal ones only the first."""
    found: dict[str, object] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r"\bGenotype\(.*\)", line):
            value = evaluate(ast.parse(match[0], mode="eval").body, {}, {})
            if all(value.fields != other.fields or value.values != other.values for other in found.values()):
                found[str(number)] = value
    if not found:
        raise ValueError("no line of it has a genotype")
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def _called(node: ast.expr) -> str:
    """The last part of the name of what a call calls."""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _named_tuple(node: ast.expr) -> list[str] | None:
    """The fields, if an expression is `namedtuple("Name", "a b")` or the same with a list."""
    if not (isinstance(node, ast.Call) and _called(node) in NAMEDTUPLES and len(node.args) == 2):
        return None
    try:
        fields = evaluate(node.args[1], {}, {})
    except Unread:
        return None
    fields = fields.replace(",", " ").split() if isinstance(fields, str) else fields
    return fields if isinstance(fields, list) and all(isinstance(name, str) for name in fields) else None


def evaluate(node: ast.expr, known: dict[str, object], classes: dict[str, list[str]]) -> object:
    """The value of an expression of literals, names that are known, `range`, `list`, `tuple`, `dict` and named tuples.

    Tuples become lists, and any other call a `Misfit`, with its fields by name if `classes` has the fields of what is
    called. Raises Unread for all else.
    """
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [evaluate(item, known, classes) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            names = [evaluate(key, known, classes) for key in keys]
            if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
                raise Unread
            return dict(zip(names, (evaluate(value, known, classes) for value in values)))
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Call(args=args, keywords=keywords) if all(word.arg for word in keywords) and _called(node):
            values = [evaluate(value, known, classes) for value in args]
            fields = {word.arg: evaluate(word.value, known, classes) for word in keywords}
            return _call(_called(node), values, fields, classes)
    raise Unread


def _call(name: str, values: list, fields: dict, classes: dict[str, list[str]]) -> object:
    match name, values, fields:
        case "range", [_, *_], {} if not fields and len(values) < 4 and all(type(v) is int for v in values):
            numbers = range(*values) if values[2:] != [0] else ()
            if len(numbers) > 1000:
                raise Unread
            return list(numbers)
        case ("list" | "tuple"), [list() as items], {} if not fields:
            return items
        case "dict", [], _:
            return fields
    own = classes.get(name, [])
    if len(values) <= len(own) and set(own[:len(values)]).isdisjoint(fields):
        return Misfit(**dict(zip(own, values)), **fields)
    return Misfit(*values, **fields)
