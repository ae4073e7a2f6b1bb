"""Find the search spaces: the only code that globs for `cnn_space*` folders."""
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from conas.darts.operations import with_own
from conas.darts.primitives import Primitives
from conas.darts.published import GENOTYPES, named_genotypes
from conas.darts.supernet import Supernet
from conas.errors import InputError


@dataclass(frozen=True)
class Space:
    """A folder with a `model_search.py`: its name, where it is, and its supernet class.

    Derived networks are trained and tested without that class; they need the operations that are the space's own.
    """

    name: str
    folder: Path
    network: type[Supernet] | None = None
    own_operations: Mapping[str, Callable] = field(default_factory=dict, compare=False)

    @property
    def primitives(self) -> Primitives:
        return Primitives(self.network.primitives)

    @property
    def operations(self) -> dict[str, Callable]:
        """Every operation that cells of this space may have, by name: those of conas, and its own, which win."""
        return with_own(self.network.operations if self.network else self.own_operations)

    @property
    def named(self) -> dict[str, object]:
        """Genotypes by name: the published ones, and those of the genotypes.py that the supernet's module imports."""
        own = getattr(sys.modules.get(self.network.__module__), "genotypes", None)
        return named_genotypes(own) if own else dict(GENOTYPES)

    def search_folder(self, save: str) -> Path:
        """The run folder of `train_search.py --save SAVE`."""
        return self.folder / f"search-{save}"

    def train_folder(self, save: str) -> Path:
        """The run folder of `train.py --save SAVE`."""
        return self.folder / f"train-{save}"


def discover(root: Path) -> list[Space]:
    """All spaces below `root`, by name; `root` must be importable (on `sys.path`).

    A space is imported as `<folder>.model_search`, so two spaces never share a module.
    """
    folders = sorted(path.parent for path in root.glob("cnn_space*/model_search.py"))
    if not folders:
        raise InputError(f"{root}: holds no cnn_space* folder with a model_search.py; restore one from the repository")
    return [Space(folder.name, folder, import_module(f"{folder.name}.model_search").Network) for folder in folders]


def of_members(root: Path) -> list[Space]:
    """`discover`, and the folder `cnn/`, whose networks are of published cells: it has no supernet, and no search."""
    spaces = discover(root)
    if (root / "cnn" / "genotypes.py").is_file():
        own = getattr(import_module("cnn.genotypes"), "OPERATIONS", {})
        spaces.append(Space("cnn", root / "cnn", own_operations=own))
    return spaces
