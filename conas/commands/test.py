"""Test one network: what it gets right, how large it is, how fast it is."""
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from conas import distributed
from conas.cli import find_device, option, parse
from conas.commands import cells as arch
from conas.commands.scoring import load_images, predict
from conas.darts import genotype as genotypes
from conas.darts.derived import DerivedNetwork, count_parameters, multiply_adds
from conas.darts.published import GENOTYPES
from conas.darts.space import Space
from conas.darts.supernet import Supernet
from conas.data import imagenet_augment
from conas.data.imagefiles import RESIZES
from conas.data.images import DATASETS, ImageSet, full_name, load
from conas.errors import InputError, one_line
from conas.exchange.cells import find_cell
from conas.places import find_data
from conas.runs import checkpoint as checkpoints
from conas.runs import wrappers
from conas.runs.folder import best_checkpoint, folder_name
from conas.runs.options import CELL_FILES, RECIPES, ROOT, ModelOptions, TestOptions
from conas.runs.scores import finite_rows, mean_loss, remark, topk_accuracy


@dataclass
class PublishedOptions:
    """network in a file of DARTS' own code; the checkpoints of train.py describe theirs"""

    arch: str = option("DARTS", "the cells: a published name, SPACE/NAME as cnn_space1/CONAS, a file, as FILE or "
                       "FILE:NAME, or their text, in a form of docs/extending.md", path=CELL_FILES)
    auxiliary: bool = option(False, "the network has an auxiliary head")
    init_channels: int | None = option(None, "channels of the first cells (default: the paper's)", low=2, high=1024,
                                       even=True)
    layers: int | None = option(None, "number of cells (default: the paper's)", low=3, high=100)
    dataset: str | None = option(None, "the images (default: the paper's)", choices=sorted(DATASETS))
    image_size: int | None = option(None, "side of the network's input in pixels (default: the data set's own)", low=8,
                                    high=1024)
    resize: str = option("crop", "how images that are not square become so: their central square, black bars on both "
                         "sides, or stretched", choices=list(RESIZES))


@dataclass(frozen=True)
class Published:
    """A published file: recipe, data set and cells of its network, and the figures that were published of it.

    They were measured on the whole test split, `images` of `classes` classes, with the recipe's channels and number of
    cells, after a training with an auxiliary head.
    """

    recipe: str
    dataset: str
    figures: Mapping[str, float]  # by the names of `measure`
    arch: str = "DARTS"
    images: int = 10_000
    classes: int = 10


def measure(network: nn.Module, images: ImageSet, options: TestOptions, crop: int | None = None) -> dict[str, float]:
    """What a network does on a test split.

    top1_error and top5_error in percent, loss in nats, parameters without an auxiliary head, multiply_adds for one
    image, and multiply_adds_thop, as `conas.darts.derived.multiply_adds` counts both, images_per_second with their
    preparation; images, and how many of them have a prediction that is not_finite:
    those are errors, and make the loss NaN.
    """
    device = find_device(options.device)
    some = torch.arange(min(options.batch_size, len(images)))
    predict(network, images, options.batch_size, device, some, crop=crop)  # the first batch pays for what is done once
    began = time.perf_counter()
    logits = predict(network, images, options.batch_size, device, workers=options.workers, crop=crop)
    seconds = time.perf_counter() - began
    size = crop or images.info.image_size
    own, as_thop = multiply_adds(network, (images.info.channels, size, size))
    return {"top1_error": 100 * (1 - topk_accuracy(logits, images.labels)),
            "top5_error": 100 * (1 - topk_accuracy(logits, images.labels, 5)),
            "loss": mean_loss(logits, images.labels),
            "parameters": count_parameters(network),
            "multiply_adds": own, "multiply_adds_thop": as_thop,
            "images_per_second": len(images) / seconds,
            "images": len(images), "not_finite": int((~finite_rows(logits)).sum())}


def differences(published: Published, network: DerivedNetwork, images: ImageSet) -> list[str]:
    """In what a tested network and its images are not those of the published figures: a phrase each."""
    recipe, of = RECIPES[published.recipe], network.arguments
    cells, own_cells = (genotypes.to_json(genotype) for genotype in (GENOTYPES[published.arch], network.genotype()))
    size = DATASETS[published.dataset].image_size
    return [phrase for phrase, same in (
        (f"the cells {published.arch}, not others", cells == own_cells),
        (f"{recipe['init_channels']} channels, not {of['C']}", recipe["init_channels"] == of["C"]),
        (f"{recipe['layers']} cells, not {of['layers']}", recipe["layers"] == of["layers"]),
        ("a network with an auxiliary head", of["auxiliary"]),
        (f"{published.dataset}, not {images.info.name}", published.dataset == images.info.name),
        (f"{published.classes} classes, not {of['num_classes']}", published.classes == of["num_classes"]),
        (f"{published.images} test images, not {len(images)}", published.images == len(images)),
        (f"{size} pixels, not {of['image_size']}", size == of["image_size"])) if not same]


def as_text(figures: Mapping[str, float], published: Mapping[str, float]) -> str:
    """The figures of `measure`, one a line, each beside the published one, if there is one.

    First comes the number of predictions that are not finite, if some are not.
    """
    lines = []
    if figures.get("not_finite"):
        lines.append(f"{remark(figures['not_finite'], figures['images'])}, and count as wrong")
    for name, text in (("top1_error", "top-1 {accuracy:6.2f} %   error {value:.2f} %"),
                       ("top5_error", "top-5 {accuracy:6.2f} %   error {value:.2f} %"),
                       ("loss", "loss {value:.4f}"), ("parameters", "parameters {millions:.2f} M"),
                       ("multiply_adds", "multiply-adds {millions:.1f} M for an image"),
                       ("images_per_second", "{value:.0f} images per second")):
        line, beside = (text.format(value=v, accuracy=100 - v, millions=v / 1e6)
                        for v in (figures[name], published.get(name, 0.0)))
        if name == "multiply_adds":
            line += f"; {figures['multiply_adds_thop'] / 1e6:.1f} M as thop counts"
        lines.append(f"{line:40}published: {beside}" if name in published else line)
    return "\n".join(lines)


def open_published(path: str | Path, content: object, published: Published, options: PublishedOptions, data: str | None,
                   skip_bad_images: bool = False, named: Mapping[str, object] = GENOTYPES
                   ) -> tuple[DerivedNetwork, ImageSet, int | None]:
    """Network, test images and crop for a file of DARTS' code. Raises InputError if they do not fit together."""
    state = checkpoints.published_state(path, content)
    genotype, read_from = find_cell(options.arch, named)
    print(f"--arch {one_line(options.arch, 80)}: {read_from}")
    dataset = options.dataset or published.dataset
    size = options.image_size or DATASETS[dataset].image_size
    crop = size if published.recipe == "imagenet" else None
    images = load(dataset, data or ROOT / "data", "test", image_size=imagenet_augment.canvas(crop) if crop else size,
                  skip_bad_images=skip_bad_images, resize=options.resize)
    C, layers = (getattr(options, name) or RECIPES[published.recipe][name] for name in ("init_channels", "layers"))
    classes = state["classifier.bias"].numel() if "classifier.bias" in state else 0
    if classes and classes != images.info.num_classes:
        raise InputError(f"{path}: knows {classes} classes, but {dataset} has {images.info.num_classes}; give another "
                         "--dataset, or another file")
    network = arch.build(published.recipe, C, layers, options.auxiliary, images.info, size, genotype)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: its tensors do not fit --arch {one_line(options.arch, 80)} with {C} channels and "
                         f"{layers} cells, {'with' if options.auxiliary else 'without'} an auxiliary head; change "
                         "--arch, --init_channels, --layers or --auxiliary "
                         f"({wrappers.differences(state, network.state_dict())})") from error
    return network, images, crop


def check_cells(path: Path, network: DerivedNetwork, name: str, named: Mapping[str, object]) -> None:
    """Raise InputError if --arch was given and means other cells than those of a network whose file describes it."""
    if name != PublishedOptions.arch:
        cells = find_cell(name, named, operations=None).genotype
        if genotypes.to_json(cells) != genotypes.to_json(network.genotype()):
            raise InputError(f"--arch {one_line(name, 80)}: {path} is a network of other cells, which it describes; "
                             "leave --arch out")


def main(folder: Path, network_class: type[Supernet] | None, description: str, published: Published | None = None,
         argv: list[str] | None = None, module=None) -> None:
    """The command `python test.py` of `folder`; with `published`, it also takes files of DARTS' code.

    Then `module` is the folder's `genotypes.py`, which has names for --arch and operations of its own.
    """
    own_operations = getattr(module, "OPERATIONS", None)
    groups = [ModelOptions, TestOptions, *([PublishedOptions] if published else [])]
    model, options, *published_options = parse(description, groups, argv)
    if model.export:
        checkpoints.check_export(model.export)
    space = Space(folder.name, folder, network_class)
    path = Path(model.model_path or best_checkpoint(space.train_folder(folder_name(options.save))))
    content, beside = checkpoints.read(path), {}
    if published and not checkpoints.is_ours(content):
        if model.export:
            raise InputError(f"--export: {path} says nothing of its images and training, as checkpoints of train.py do")
        network, images, crop = open_published(path, content, published, *published_options, options.data,
                                               options.skip_bad_images,
                                               arch.named_genotypes(module) if module else GENOTYPES)
        print(f"{path}: a state_dict, of the network that --arch and the flags beside it describe")
        if unlike := differences(published, network, images):
            print(f"the paper's figures are left out, since they are of {'; '.join(unlike)}")
        else:
            beside = published.figures
    else:
        checkpoint = checkpoints.check(path, content)
        network = checkpoints.restore(path, checkpoint, space.name, network_class, own_operations, folder)
        crop = checkpoint["dataset"].get("crop")
        images = load_images(path, checkpoint["dataset"], options.data, "test", options.skip_bad_images)
        if published:
            check_cells(path, network, published_options[0].arch, arch.named_genotypes(module) if module else GENOTYPES)
        print(f"{path}: {space.name}, stage {checkpoint['stage']}, epoch {checkpoint['epoch']}")
    print(f"{full_name(images.info.name)}: {len(images)} test images, {images.info.num_classes} classes")
    figures = measure(network, images, options, crop)
    print(as_text(figures, beside))
    if model.export and figures["not_finite"]:
        raise InputError(f"--export {model.export}: not written, since "
                         f"{remark(figures['not_finite'], figures['images'])}; name another network with --model_path")
    if model.export and distributed.rank() == 0:
        dataset_info = checkpoint["dataset"]
        if dataset_info["name"] != "digits":  # the file may go elsewhere
            checkpoint["dataset"] = dataset_info | {"root": str(find_data(path, dataset_info["root"], options.data))}
        checkpoints.export(model.export, checkpoint)
        print(f"written: {model.export}")
