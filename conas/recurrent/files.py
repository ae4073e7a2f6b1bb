"""Language models on disk: their checkpoints, and which cell a training takes."""
import difflib
from collections.abc import Mapping
from pathlib import Path

from conas.darts.genotype import may_be_genotypes
from conas.darts.space import Space
from conas.errors import InputError
from conas.recurrent import genotype as genotypes
from conas.recurrent.genotype import Genotype
from conas.recurrent.model import LanguageModel, RecurrentNetwork, RecurrentSupernet
from conas.recurrent.options import TrainUnitOptions
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import folder_name


def restore(path: str | Path, checkpoint: dict, supernet: type[RecurrentSupernet] | None = None) -> LanguageModel:
    """The network of a loaded checkpoint: of a training, or of a search over the primitives of `supernet`.

    Raises InputError for anything else.
    """
    arguments = checkpoint["network"]
    if checkpoint["stage"] == "train" and arguments.get("kind") == RecurrentNetwork.kind:
        genotype = genotypes.from_json(checkpoint["genotype"], str(path))
        arguments = {name: value for name, value in arguments.items() if name != "kind"} | {"genotype": genotype}
        return checkpoints.rebuild(path, checkpoint, RecurrentNetwork, arguments)
    if checkpoint["stage"] == "search" and supernet and checkpoint["primitives"] == list(supernet.primitives):
        return checkpoints.rebuild(path, checkpoint, supernet, arguments)
    raise InputError(f"{path}: holds no language model of this folder; its train.py writes those")


def named_genotypes(module) -> dict[str, object]:
    """The cells of a `genotypes.py`, and what else in it may be some, by name."""
    return may_be_genotypes(module)


def find_cell(arch: str, named: Mapping[str, object]) -> Genotype:
    """The cell that `--arch` means. Raises InputError, with a name that is near, if there is none."""
    if arch in named:
        return genotypes.from_object(named[arch], f"--arch {arch}")
    if arch.endswith(".json"):
        return genotypes.load(arch)
    by_upper = {name.upper(): name for name in named}
    near = [by_upper[name] for name in difflib.get_close_matches(arch.upper(), by_upper, 2, 0.5)] or sorted(named)
    meant = f"did you mean {' or '.join(near)}?" if near else "genotypes.py names no cells."
    raise InputError(f"--arch {arch}: unknown; {meant} A file must end in .json")


def choose_cell(space: Space, named: Mapping[str, object], options: TrainUnitOptions) -> tuple[Genotype, str]:
    """The cell that a training takes, and where it is from: --arch, else the search's, else DARTS'."""
    if options.arch is not None:
        return find_cell(options.arch, named), options.arch
    path = space.search_folder(folder_name(options.search, "--search")) / "genotype.json"
    if path.exists():
        return genotypes.load(path), str(path)
    if options.search != TrainUnitOptions.search:
        raise InputError(f"{path}: no such file; start train_search.py there first, or name another search with "
                         "--search, or a cell with --arch")
    return find_cell("DARTS", named), "DARTS"
