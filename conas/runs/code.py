"""A space's own code, as checkpoints know it: edited code of equal shapes would give other numbers without a word.

A checkpoint holds a digest of every file that decides what its network computes: `genotypes.py`, for supernets
`model_search.py` too, and what these import of the same folder. The files of the run's loop count when it goes on.
Layout, comments, docstrings and genotypes that were pasted in do not count, nor does the version of Python.
"""
import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

from conas import distributed

FILES = {"search": ("genotypes.py", "model_search.py"), "train": ("genotypes.py",)}  # by stage
LOOPS = {"search": ("architect.py", "train_search.py"), "train": ("train.py",)}  # how a run goes on

_told: set[tuple] = set()


@cache
def digests(folder: Path, stage: str) -> dict[str, str]:
    """The digests of a space's code for the networks of a stage, by file; {} if there is none.

    Read once by a process: what has been imported does not change any more.
    """
    found, waiting = {}, [*LOOPS[stage], *FILES[stage]]
    while waiting:
        name = waiting.pop()
        if name in found or not (folder / name).is_file():
            continue
        tree = ast.parse((folder / name).read_bytes())
        found[name] = hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:16]
        if name not in LOOPS[stage]:
            waiting += [f"{module}.py" for module in _imported(tree)]
    return dict(sorted(found.items()))


def changes(folder: Path, checkpoint: dict, resumed: bool = False) -> str:
    """Which files of the space in `folder` are others than when the checkpoint was written, in words; "" if none.

    The loop and the update of the alphas matter only to a run that is `resumed`. A checkpoint without digests says
    nothing.
    """
    stage = checkpoint["stage"]
    before, now = checkpoint.get("code") or {}, digests(folder, stage)
    return ", ".join(name for name in sorted(before.keys() | now.keys()) if before and before.get(name) != now.get(name)
                     and (resumed or name not in LOOPS[stage]))


def tell_changes(folder: Path, path: Path, checkpoint: dict) -> str:
    """`changes`, and say so on stderr, once for each space and run."""
    names = changes(folder, checkpoint)
    run = Path(path).absolute().parent
    run = run.parent if run.name == "checkpoints" else run
    if names and (folder, run) not in _told and distributed.rank() == 0:
        print(sentence(folder, path, names), file=sys.stderr)
    if names:
        _told.add((folder, run))
    return names


def sentence(folder: Path, path: Path, names: str) -> str:
    """What a user is told of `changes`."""
    return (f"note: {names} of {folder.name} changed after {path} was written, so that its network may now compute "
            "something else")


def _plain(node: object) -> object:
    """A syntax tree as tuples, without positions, docstrings, pasted genotypes and fields that are empty."""
    if isinstance(node, list):
        return tuple(_plain(item) for item in node)
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if "body" in fields and isinstance(fields["body"], list):
        fields["body"] = [part for part in fields["body"] if not _is_text(part) and not _is_genotype(part)]
    return type(node).__name__, *((name, _plain(value)) for name, value in fields.items())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_genotype(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return [name.name for name in node.names] == ["Genotype"]
    value = node.value if isinstance(node, ast.Assign) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Genotype"


def _imported(tree: ast.AST) -> list[str]:
    """The first names of all modules that are imported, also below an `if`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.module):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return [name.partition(".")[0] for name in names]
