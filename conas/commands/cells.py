"""Which network is trained: its cells, by name or from a file, its size, and the weights that it begins with."""
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from conas.darts import genotype as genotypes
from conas.darts.derived import DerivedNetwork, NetworkCIFAR, NetworkImageNet
from conas.darts.genotype import Genotype
from conas.darts.operations import OPERATIONS
from conas.darts.primitives import KINDS, NODES, Primitives, edge_number
from conas.darts.published import named_genotypes  # noqa: F401  also for those who import it here
from conas.darts.space import Space
from conas.data.images import DATASETS, DataInfo
from conas.errors import InputError, one_line
from conas.exchange.cells import find_cell, find_genotype  # noqa: F401  also for those who import it here
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import folder_name
from conas.runs.options import PHOTOGRAPHS, RECIPES, DataOptions, NetworkOptions, RecipeOptions
from conas.runs.wrappers import differences

REPLACEABLE = ("stem.0.", "classifier.", "auxiliary_head.")  # what depends on image channels, classes and --auxiliary


def found_genotype(space: Space, search: str) -> tuple[Genotype, Path]:
    """The cells that the space's search called `search` has found, and the file that holds them."""
    path = space.search_folder(search) / "genotype.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; start train_search.py there first, or name another search with "
                         "--search, or cells with --arch")
    return genotypes.load(path, space.operations), path


def check_operations(genotype: Genotype, where: str, primitives: Sequence[str]) -> None:
    """Raise InputError if the genotype uses operations that a space does not search over, or not on that edge."""
    primitives = Primitives(primitives)
    used = {operation for operation, _ in [*genotype.normal, *genotype.reduce]}
    foreign, on = sorted(used - set(primitives)), ""
    if not foreign and len(genotype.normal) == len(genotype.reduce) == 2 * NODES:  # else its edges are others
        foreign = sorted({operation for kind in KINDS for i, (operation, source) in enumerate(getattr(genotype, kind))
                          if operation not in primitives.by_edge[kind][edge_number(i // 2, source)]})
        on = " on those edges"
    if foreign:
        raise InputError(f"{where}: uses {', '.join(foreign)}, which this space does not search over{on}; give "
                         "--any_ops to train it here all the same")


@dataclass
class PretrainedWeights:
    """Weights that were trained elsewhere, and the checkpoint that describes them; published files have none."""

    path: str
    state: dict[str, Tensor]
    checkpoint: dict | None
    operations: Collection[str] = tuple(OPERATIONS)

    @property
    def genotype(self) -> Genotype | None:
        """The cells, if they are known."""
        return self.checkpoint and genotypes.from_json(self.checkpoint["genotype"], self.path, self.operations)


def load_pretrained(path: str, operations: Mapping[str, Callable] = OPERATIONS) -> PretrainedWeights:
    """The weights in a checkpoint of train.py, a .safetensors file or a published file."""
    content = checkpoints.read(path)
    if not checkpoints.is_ours(content):
        return PretrainedWeights(path, checkpoints.published_state(path, content), None)
    checkpoint = checkpoints.check(path, content)
    checkpoints.restore_derived(path, checkpoint, operations)
    return PretrainedWeights(path, checkpoint["state"], checkpoint, operations)


def choose_cells(space: Space, primitives: Sequence[str], named: Mapping[str, object], shape: NetworkOptions,
                 pretrained: PretrainedWeights | None) -> tuple[Genotype, str]:
    """The cells to train, and where they come from in words. Raises InputError for those that may not be trained."""
    there = pretrained.genotype if pretrained else None
    if shape.arch is not None:
        genotype, read_from = find_cell(shape.arch, named, operations=space.operations)
        where = f"--arch {one_line(shape.arch, 200)}"
        if there is not None and genotypes.to_json(there) != genotypes.to_json(genotype):
            raise InputError(f"--init_from {pretrained.path}: was trained with other cells than {where}; without "
                             "--arch, its own are taken")
    elif there is not None:
        genotype, where = there, pretrained.path
    else:
        genotype, path = found_genotype(space, folder_name(shape.search, "--search"))
        where = path.relative_to(space.folder).as_posix()
    if not shape.any_ops:
        check_operations(genotype, where, primitives)
    return genotype, f"{where} ({read_from})" if shape.arch is not None else where


def resolve_defaults(data: DataOptions, shape: NetworkOptions, recipe: RecipeOptions,
                     pretrained: PretrainedWeights | None) -> tuple[DataOptions, NetworkOptions, RecipeOptions]:
    """The options with all that was left open decided by the data, the recipe and the pretrained network."""
    size = data.image_size or DATASETS[data.dataset].image_size
    kind = shape.recipe or ("imagenet" if data.dataset in PHOTOGRAPHS and size >= 128 else "cifar")
    defaults = dict(RECIPES[kind])
    if pretrained and pretrained.checkpoint:
        there = pretrained.checkpoint["network"]
        if there["kind"] != kind:
            raise InputError(f"--init_from {pretrained.path}: is a network of the recipe {there['kind']}, but this "
                             f"would be one of {kind}; give --recipe {there['kind']}, or begin from another")
        defaults |= {"init_channels": there["C"], "layers": there["layers"]}
    shape, recipe = (replace(group, **{k: v for k, v in defaults.items() if getattr(group, k, "absent") is None})
                     for group in (shape, recipe))
    return replace(data, image_size=size), replace(shape, recipe=kind), recipe


def build(recipe: str, C: int, layers: int, auxiliary: bool, info: DataInfo, image_size: int, genotype: Genotype,
          operations: Mapping[str, Callable] = OPERATIONS) -> DerivedNetwork:
    """The network of a recipe for a data set. Raises InputError for images that it cannot take."""
    if recipe == "cifar":
        return NetworkCIFAR(C, info.num_classes, layers, auxiliary, genotype, info.channels, image_size,
                            operations)
    if info.channels != 3:
        raise InputError(f"--recipe imagenet: is for colour images, but those of {info.name} are grey; give --recipe "
                         "cifar")
    return NetworkImageNet(C, info.num_classes, layers, auxiliary, genotype, image_size, operations)


def init_from_pretrained(network: DerivedNetwork, pretrained: PretrainedWeights) -> str:
    """Load all weights that fit, and say what was not loaded.

    Only the stem's first convolution, for other channels, and the classifiers, for other classes, may not fit. Raises
    InputError if more does not.
    """
    own = network.state_dict()
    fits = {name for name in own.keys() & pretrained.state.keys() if own[name].shape == pretrained.state[name].shape}
    new = [name for name in own if name not in fits and not name.endswith("num_batches_tracked")]
    unused = [name for name in pretrained.state if name not in fits]
    if wrong := [name for name in [*new, *unused] if not name.startswith(REPLACEABLE)]:
        differ = differences({name: t for name, t in pretrained.state.items() if not name.startswith(REPLACEABLE)},
                             {name: t for name, t in own.items() if not name.startswith(REPLACEABLE)})
        raise InputError(f"--init_from {pretrained.path}: is a network of other cells, or of another --init_channels "
                         f"or --layers; {len(set(wrong))} tensors do not fit, {differ}")
    network.load_state_dict({name: pretrained.state[name] for name in fits}, strict=False)
    return (f"{len(fits)} tensors loaded from {pretrained.path}; newly initialised: {_modules(new)}; "
            f"there but not loaded: {_modules(unused)}")


def leakage_warning(pretrained: PretrainedWeights | None, dataset_info: dict) -> str:
    """What to add to the log if pretrained weights may have been trained on images that a run holds out.

    `dataset_info` describes the images of the run, as its checkpoints do.
    """
    there = pretrained.checkpoint["dataset"] if pretrained and pretrained.checkpoint else dataset_info
    same = {name: there.get(name) == dataset_info[name] for name in dataset_info}
    if dataset_info["train_portion"] == 1 or not (same["name"] and same["classes"]) or (
            same["fingerprint"] and same["train_portion"] and same["split_seed"]):
        return ""
    return ("; it was trained on another part of this data set, or the set has changed since, so that it may have seen "
            "images that are held out now, and their figures may flatter")


def _modules(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names)) or "nothing"
