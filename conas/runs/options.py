"""The flags of the scripts, by group. Names and defaults are those of DARTS unless their help says otherwise."""
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from conas import distributed
from conas.cli import option
from conas.darts.stems import STEMS
from conas.data.imagefiles import RESIZES
from conas.data.images import DATASETS

ROOT = Path(__file__).resolve().parents[2]
CELL_FILES = ".json", ".py", ".txt", ".log", ".yaml", ".yml"  # suffixes of files that --arch and --init_arch take
SKIP = "leave out image files that cannot be read, and list them; all are decoded once at the start"


@dataclass
class DataOptions:
    """data"""

    dataset: str = option("cifar10", "the images", choices=sorted(DATASETS))
    data: str = option(str(ROOT / "data"), "where data sets are kept or downloaded to; for --dataset folder, "
                       "the folder of class folders", path="")
    image_size: int | None = option(None, "resize images to this many pixels (default: the data set's own: 224 for "
                                    "imagenet, 32 for other photographs)", low=8, high=1024)
    resize: str = option("crop", "how images that are not square become so: their central square, black bars on both "
                         "sides, or stretched", choices=list(RESIZES))
    subset: int | None = option(None, "use only this many of the training images, for trial runs", low=2)
    test_subset: int | None = option(None, "test on only this many of the test images (default: all)", low=2)
    workers: int = option(2, "processes that decode images, for data sets too large for memory", low=0, high=256)
    skip_bad_images: bool = option(False, SKIP)
    follow_links: bool = option(False, "read folders and images that are links to elsewhere, which are refused "
                                "otherwise")


@dataclass
class Augmentation:
    """augmentation"""

    cutout: bool = option(False, "blank a square of every training image")
    cutout_length: int | None = option(None, "side of that square in pixels (default: half an image's, the paper's 16 "
                                       "of 32)", low=1)
    flip: bool | None = option(None, "mirror every second training image, left to right (default: but for digits and "
                               "svhn, whose mirror images are no digits)")

    def decided(self, data: DataOptions, before: Mapping[str, object]) -> Self:
        """These options with nothing left open: as in `before`, the arguments a run began with, or else by the images.

        The length stays None without `cutout`, so that it never tells runs apart that it has no part in.
        """
        info = DATASETS[data.dataset]
        defaults = {"cutout_length": (data.image_size or info.image_size) // 2, "flip": info.flip}
        decided = {name: before[name] if type(before.get(name)) is type(default) else default
                   for name, default in defaults.items() if getattr(self, name) is None}
        return replace(self, **decided | ({} if self.cutout else {"cutout_length": None}))


@dataclass
class AugmentOptions(Augmentation):
    """augmentation and split"""

    train_portion: float = option(0.5, "part of the training images that trains weights; the rest trains alphas",
                                  low=0.0, high=1.0)
    split_seed: int = option(0, "of that split; equal for all members of a committee, so that it can be fitted on "
                             "images that no member's weights have seen", low=0, high=2**31 - 1)


@dataclass
class SupernetOptions:
    """supernet"""

    init_channels: int = option(16, "channels of the first cells", low=2, high=1024, even=True)
    layers: int = option(8, "number of cells", low=3, high=100)
    stem: str | None = option(None, "what comes before the first cell: one convolution, or, for large images, three "
                              "that bring them to an eighth of their side (default: imagenet for the data set imagenet "
                              "and from 96 pixels on, else cifar)", choices=STEMS)

    def decided(self, data: DataOptions, before: Mapping[str, object]) -> Self:
        """These options with a stem: as in `before`, the arguments a run began with, or else by the images."""
        large = data.dataset == "imagenet" or (data.image_size or DATASETS[data.dataset].image_size) >= 96
        return replace(self, stem=self.stem or before.get("stem") or ("imagenet" if large else "cifar"))


@dataclass
class WeightOptions:
    """weights: SGD"""

    epochs: int = option(50, "passes over the training half", low=1)
    batch_size: int = option(64, "images in a batch, of each half; over all processes", low=2)
    learning_rate: float = option(0.025, "of epoch 0, falling along a cosine; also the virtual step's xi", low=0.0)
    learning_rate_min: float = option(0.001, "where the cosine ends", low=0.0)
    momentum: float = option(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = option(3e-4, "of the weights", low=0.0)
    grad_clip: float = option(5.0, "largest 2-norm of the weights' gradient", low=0.0)


@dataclass
class AlphaOptions:
    """alphas: Adam on the hypergradient"""

    unrolled: bool = option(True, "second order, through the virtual step; --no-unrolled is first order")
    hvp: str = option("difference", "product of Hessian and vector in the second order: the paper's central "
                      "difference, or exact, by double backward", choices=["difference", "exact"])
    arch_learning_rate: float = option(3e-4, "of the alphas", low=0.0)
    arch_weight_decay: float = option(1e-3, "of the alphas", low=0.0)
    init_arch: str | None = option(None, "cells that the first alphas lean to, given as --arch of train.py takes them "
                                   "(default: none, all operations of an edge have nearly equal shares)",
                                   path=CELL_FILES)
    init_share: float | None = option(None, "share of an operation of --init_arch on its edge at the start, between 0 "
                                      "and 1 (default: 0.5)", low=0.01, high=0.99)


@dataclass
class HealthOptions:
    """health: signs of a collapse into skip connections, and remedies; see docs/health.md"""

    curvature: int | None = option(None, "epochs between two measurements of the dominant eigenvalue of the Hessian "
                                   "w.r.t. the alphas; 0 is never (default: so many that they take 3 % of the passes "
                                   "at most; never in short searches)", low=0)
    stop_on: str = option("never", "end the search with its last sound cell once it collapses, or once its curvature "
                          "rises, as in RobustDARTS", choices=["collapse", "curvature", "never"])
    alpha_warmup: int = option(0, "epochs from 0 that train weights alone; PC-DARTS has 15", low=0)
    drop_path_prob: float = option(0.0, "probability that an image loses an edge in training, rising from 0 to this "
                                   "over the search; RobustDARTS has 0.2 to 0.6", low=0.0, high=0.99)
    max_skips: int | None = option(None, "most skip connections of the normal cell; P-DARTS and DARTS+ have 2 "
                                   "(default: any number)", low=0)


@dataclass
class RunOptions:
    """run"""

    save: str = option("EXP", "name of the run: everything goes to the folder search-NAME beside the script")
    seed: int = option(2, "of initial weights, order and augmentation", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    report_freq: int = option(50, "steps between two looks at loss and accuracy", low=1)
    tensorboard: bool = option(False, "write scalars, alphas and cells for TensorBoard too (pip install tensorboard)")


@dataclass
class KeepOptions:
    """what keeps the run"""

    checkpoint_minutes: float = option(10.0, "between two writings of resume.pt within an epoch", low=0.0)
    on_nan: str = option("stop", "a loss or gradient that is NaN or infinite stops the run and names the batch, or "
                         "that step is skipped, which makes a GPU wait at every step", choices=["stop", "skip"])
    deterministic: bool = option(False, "on a GPU, kernels that give the same bits every time; slower")
    extend: bool = option(False, "let a run go on to more --epochs than it was started with, along a new cosine")
    check_only: bool = option(False, "make all checks of the start, then stop before the first epoch")


@dataclass
class ProcessOptions:
    """several processes, started by torchrun; for one alone these change nothing"""

    sync_bn: bool = option(False, "BatchNorm by the statistics of the whole batch, as in one process, and not of each "
                           "process's part of it")
    scale_lr: bool = option(False, "multiply the learning rates of the weights by the number of processes, though "
                            "--batch_size is that of all together")

    @property
    def lr_scale(self) -> int:
        """What learning rates are multiplied by."""
        return distributed.size() if self.scale_lr else 1


@dataclass
class SpeedOptions:
    """speed and memory"""

    amp: str = option("off", "arithmetic of weight steps and validation: bf16, float32 (off), or bf16 on GPUs that "
                      "have it (auto); the alphas' gradient is float32 in any case", choices=["auto", "bf16", "off"])
    tf32: bool = option(False, "on a GPU, let float32 products and convolutions round to TF32; all passes")
    checkpoint_cells: bool = option(False, "less memory, more time: compute each cell again for its gradient")
    cuda_graph: bool | None = option(None, "every iteration as one graph (default: on a GPU)")
    engine: bool = option(True, "compiled kernels on a CPU, else packed edges where they know all operations of the "
                          "space; --no-engine runs the definition, conas/darts/supernet.py")


# What the paper trains derived networks with, on CIFAR-10 and on ImageNet; without gamma, a cosine ends at 0.
RECIPES = {
    "cifar": {"init_channels": 36, "layers": 20, "epochs": 600, "batch_size": 96, "learning_rate": 0.025,
              "gamma": None, "weight_decay": 3e-4, "label_smooth": 0.0, "drop_path_prob": 0.2},
    "imagenet": {"init_channels": 48, "layers": 14, "epochs": 250, "batch_size": 128, "learning_rate": 0.1,
                 "gamma": 0.97, "weight_decay": 3e-5, "label_smooth": 0.1, "drop_path_prob": 0.0},
}
PHOTOGRAPHS = ("folder", "imagenet", "imagenette")  # data sets that have the recipe imagenet from 128 pixels on


def recipe_option(name: str, help: str, **limits):
    """An `option` whose default is that of the recipe."""
    small, large = RECIPES["cifar"][name], RECIPES["imagenet"][name]
    return option(None, f"{help} (default: {small}; imagenet {large})", **limits)


@dataclass
class NetworkOptions:
    """network"""

    arch: str | None = option(None, "the cells: a published name, a name in genotypes.py such as CONAS, the cell "
                              "that the authors found in this space, a file, as FILE or FILE:NAME, or their text, in a "
                              "form of docs/extending.md (default: what this space's last search found)",
                              path=CELL_FILES)
    search: str = option("EXP", "name of the search whose cells are trained")
    any_ops: bool = option(False, "let --arch use operations that this space does not search over")
    recipe: str | None = option(None, "network and defaults of the paper's experiments with small images, or with "
                                "photographs (default: imagenet for folder, imagenet and imagenette from 128 pixels "
                                "on, else cifar)", choices=list(RECIPES))
    init_channels: int | None = recipe_option("init_channels", "channels of the first cells", low=2, high=1024,
                                              even=True)
    layers: int | None = recipe_option("layers", "number of cells", low=3, high=100)
    auxiliary: bool = option(False, "a second classifier at two thirds of the depth, for training only")
    auxiliary_weight: float = option(0.4, "of its loss", low=0.0)
    init_from: str | None = option(None, "begin with the weights of this checkpoint, .safetensors or published file; "
                                   "without --arch, also with its cells", path="")


@dataclass
class RecipeOptions(Augmentation):
    """recipe: SGD, and what keeps large networks from overfitting"""

    epochs: int | None = recipe_option("epochs", "passes over the training images", low=1)
    batch_size: int | None = recipe_option("batch_size", "images in a batch, over all processes", low=2)
    learning_rate: float | None = recipe_option("learning_rate", "of epoch 0", low=0.0)
    gamma: float | None = recipe_option("gamma", "the learning rate is multiplied by this every --decay_period epochs; "
                                        "None lets it fall along a cosine to 0", low=0.0, high=1.0)
    decay_period: int = option(1, "epochs between two multiplications by --gamma", low=1)
    momentum: float = option(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float | None = recipe_option("weight_decay", "of the weights", low=0.0)
    grad_clip: float = option(5.0, "largest 2-norm of the weights' gradient", low=0.0)
    label_smooth: float | None = recipe_option("label_smooth", "part of every target that all classes share",
                                               low=0.0, high=1.0)
    drop_path_prob: float | None = recipe_option("drop_path_prob", "probability to lose an edge, rising from 0 to this",
                                                 low=0.0, high=0.99)


@dataclass
class HeldOutOptions:
    """images held out of the training images, to choose the best network; test images are for test.py"""

    valid_portion: float = option(0.1, "part of the training images; 0 trains on all of them, and the last network "
                                  "counts as the best", low=0.0, high=0.9)
    split_seed: int = option(0, "of that split; equal for all members of a committee", low=0, high=2**31 - 1)
    patience: int | None = option(None, "stop after so many epochs without a better network (default: never)", low=1)


@dataclass
class TrainRunOptions:
    """run"""

    save: str = option("EXP", "name of the run: everything goes to the folder train-NAME beside the script")
    checkpoint_freq: int | None = option(None, "epochs between two checkpoints that are kept (default: about 50 in a "
                                         "run)", low=1)
    seed: int = option(0, "of initial weights, order and augmentation", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    amp: str = option("auto", "arithmetic of the passes: bf16, float32 (off), or bf16 on GPUs that have it (auto)",
                      choices=["auto", "bf16", "off"])
    compile: str = option("off", "by torch.compile (on, or no value), which takes minutes in the first epochs; auto: "
                          "only if these are won back, which kernels on a CPU do not let it do",
                          choices=["auto", "on", "off"], switch=True)
    report_freq: int = option(50, "steps between two looks at loss and accuracy", low=1)


@dataclass
class ModelOptions:
    """network"""

    model_path: str | None = option(None, "checkpoint or .safetensors file (default: the best network of the run)",
                                    path="")
    export: str | None = option(None, "write its weights, with all that describes them, to this file NAME.safetensors",
                                path="")


STAGES = {"search": "supernets of the search", "train": "retrained networks"}


@dataclass
class StageOptions:
    """which networks"""

    stage: str | None = option(None, "supernets of the search, or retrained networks (default: what there is of both)",
                               choices=list(STAGES))


@dataclass
class TestOptions:
    """which run, and how it is tested"""

    __test__ = False  # not a pytest class

    save: str = option("EXP", "name of the run: its folder is search-NAME or train-NAME")
    data: str | None = option(None, "where the data set is, if it is no longer where the run had it", path="")
    batch_size: int = option(256, "images in a batch", low=1)
    workers: int = option(2, "processes that decode images, for data sets too large for memory", low=0, high=256)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    skip_bad_images: bool = option(False, f"{SKIP} (default: as the network was trained)")
