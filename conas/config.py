"""The flags of the scripts, by group. Names and defaults are those of DARTS unless their help says otherwise."""
from dataclasses import dataclass
from pathlib import Path

from conas.cli import option
from conas.data import DATASETS

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class DataOptions:
    """data"""

    dataset: str = option("cifar10", "the images", choices=sorted(DATASETS))
    data: str = option(str(ROOT / "data"), "where data sets are kept or downloaded to; for --dataset folder, "
                       "the folder of class folders")
    image_size: int | None = option(None, "resize images to this many pixels (default: the data set's own, 32 for "
                                    "photographs)", low=8, high=1024)
    subset: int | None = option(None, "use only this many images of each split, for trial runs", low=2)
    workers: int = option(2, "processes that decode images, for data sets too large for memory", low=0, high=256)


@dataclass
class AugmentOptions:
    """augmentation and split"""

    cutout: bool = option(False, "blank a square of every training image")
    cutout_length: int = option(16, "side of that square in pixels", low=1)
    train_portion: float = option(0.5, "part of the training images that trains weights; the rest trains alphas",
                                  low=0.0, high=1.0)
    split_seed: int = option(0, "of that split; equal for all members of a committee, so that it can be fitted on "
                             "images that no member's weights have seen", low=0, high=2**31 - 1)


@dataclass
class SupernetOptions:
    """supernet"""

    init_channels: int = option(16, "channels of the first cells", low=2, high=1024, even=True)
    layers: int = option(8, "number of cells", low=3, high=100)


@dataclass
class WeightOptions:
    """weights: SGD"""

    epochs: int = option(50, "passes over the training half", low=1)
    batch_size: int = option(64, "images in a batch, of each half", low=2)
    learning_rate: float = option(0.025, "of epoch 0, falling along a cosine; also the virtual step's xi", low=0.0)
    learning_rate_min: float = option(0.001, "where the cosine ends", low=0.0)
    momentum: float = option(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = option(3e-4, "of the weights", low=0.0)
    grad_clip: float = option(5.0, "largest 2-norm of the weights' gradient", low=0.0)


@dataclass
class AlphaOptions:
    """alphas: Adam on the hypergradient"""

    unrolled: bool = option(True, "second order, through the virtual step; --no-unrolled is first order")
    arch_learning_rate: float = option(3e-4, "of the alphas", low=0.0)
    arch_weight_decay: float = option(1e-3, "of the alphas", low=0.0)


@dataclass
class RunOptions:
    """run"""

    save: str = option("EXP", "name of the run: everything goes to the folder search-NAME beside the script")
    seed: int = option(2, "of initial weights, order and augmentation", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    report_freq: int = option(50, "steps between two looks at loss and accuracy", low=1)


@dataclass
class TestOptions:
    """which run, and how it is tested"""

    __test__ = False  # not a pytest class

    save: str = option("EXP", "name of the run: its folder is search-NAME")
    data: str | None = option(None, "where the data set is, if it is no longer where the search had it")
    batch_size: int = option(256, "images in a batch", low=1)
    workers: int = option(2, "processes that decode images, for data sets too large for memory", low=0, high=256)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
