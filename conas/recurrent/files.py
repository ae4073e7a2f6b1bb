"""Language models on disk: their checkpoints, and which cell a training takes."""
import difflib
from collections.abc import Mapping
from pathlib import Path

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


def named_genotypes(module) -> dict[str, Genotype]:
    """The cells of a `genotypes.py`, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Genotype)}


def find_cell(arch: str, named: Mapping[str, Genotype]) -> Genotype:
    """The cell that `--arch` means. Raises InputError, with a name that is near, if there is none."""
    if arch in named:
        return genotypes.check(named[arch], f"--arch {arch}")
    if arch.endswith(".json"):
        return genotypes.load(arch)
    near = difflib.get_close_matches(arch.upper(), named, 2, 0.5) or sorted(named)
    raise InputError(f"--arch {arch}: unknown; did you mean {' or '.join(near)}? A file must end in .json")


def choose_cell(space: Space, named: Mapping[str, Genotype], options: TrainUnitOptions) -> tuple[Genotype, str]:
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
