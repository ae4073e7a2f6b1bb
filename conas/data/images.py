"""Image sets: `load` gives one split of a data set by its name, with everything that depends on the data set."""
import hashlib
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conas import distributed
from conas.data.augment import central, normalise, resized
from conas.data.decoding import decode_all, quiet_decoders
from conas.data.imagefiles import ImageFiles
from conas.data.listing import Listing
from conas.data.sources import READERS, SPLIT_SEED
from conas.data.splits import stratified_split
from conas.errors import InputError, one_line

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images; a larger set is decoded batch by batch
LISTED = 100              # images that cannot be read, by name


@dataclass(frozen=True)
class DataInfo:
    """What a network and an augmentation need to know about a data set. `mean` and `std` are of pixels in 0..1."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int  # images are square
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool       # whether the mirror image of an object still shows the object
    remark: str = ""  # what every table says of it, if its name does not

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def moments(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in 0..255, (C, 1, 1) each."""
        mean, std = (255 * torch.tensor(m, device=device)[:, None, None] for m in (self.mean, self.std))
        return mean, std


_CIFAR10 = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Class names come with the images.
DATASETS = {info.name: info for info in (
    DataInfo("cifar10", (), 3, 32, *_CIFAR10, True),
    DataInfo("cifar10_jpeg", (), 3, 32, *_CIFAR10, True, "JPEG copy, quality 75"),
    DataInfo("cifar100", (), 3, 32, (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047), True),
    DataInfo("svhn", (), 3, 32, (0.43768210, 0.44376970, 0.47280442), (0.19803012, 0.20101562, 0.19703614), False),
    DataInfo("fashionmnist", (), 1, 28, (0.28604059,), (0.35302424,), True),
    DataInfo("imagenet", (), 3, 224, *_IMAGENET, True),
    DataInfo("imagenette", (), 3, 32, *_IMAGENET, True),
    DataInfo("folder", (), 3, 32, *_IMAGENET, True),
    DataInfo("digits", (), 1, 8, (0.30518072,), (0.37595157,), False),
)}


def full_name(name: str) -> str:
    """A data set's name as tables show it: with its remark, if it has one."""
    remark = DATASETS[name].remark if name in DATASETS else ""
    return f"{name} ({remark})" if remark else name


class LazyImages:
    """Images that are decoded and resized when asked for: item i is uint8 (C, image_size, image_size)."""

    def __init__(self, source: Tensor | ImageFiles, image_size: int):
        self.source, self.image_size = source, image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Tensor:
        if isinstance(self.source, ImageFiles):
            return self.source.decode(i, self.image_size)
        return resized(self.source[i], self.image_size)


class ImageSet:
    """One split: `images` uint8 (N, C, H, W), or LazyImages if too many for memory, and `labels` int64 (N,).

    `names` are those of the images' files, if each is a file.
    """

    def __init__(self, info: DataInfo, images: Tensor | LazyImages, labels: Tensor, names: list[str] | None = None):
        self.info, self.images, self.labels, self.names = info, images, labels, names
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of images and labels in their order; of files not decoded yet, the names and sizes."""
        digest = hashlib.sha256(f"{tuple(self.labels.shape)} {self.info.image_size}".encode())
        digest.update(self.labels.numpy())
        images = self.images.source if isinstance(self.images, LazyImages) else self.images
        if isinstance(images, ImageFiles):
            digest.update(b"" if images.resize == "crop" else images.resize.encode())  # once there was no other
            for name in images.names:
                size = (images.root / name).stat().st_size
                digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        else:
            digest.update(images.contiguous().numpy())
        return digest.hexdigest()

    def batches(self, batch_size: int, device: torch.device | str, indices: Tensor | None = None, workers: int = 0,
                crop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, or those of `indices`: float32 (B, C, H, W), normalised, channels_last, and labels.

        For evaluation: nothing is augmented and none is left out, so that the last batch may be short. `crop` takes
        the central square of that many pixels.
        """
        indices = torch.arange(len(self)) if indices is None else indices.cpu()
        mean, std = self.info.moments(device)
        for x, y in self.gather(indices.split(batch_size), device, workers):
            yield normalise(central(x, crop), mean, std), y

    def gather(self, indices: Iterable[Tensor], device: torch.device | str, workers: int = 0
               ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index tensor (B,), images uint8 (B, C, H, W) and labels (B,) on the device.

        All streams share one copy of the images on the device, or `workers` processes decode ahead.
        """
        device = torch.device(device)
        if isinstance(self.images, Tensor):
            if device not in self._copies:
                self._copies[device] = self.images.to(device), self.labels.to(device)
            images, labels = self._copies[device]
            for batch in indices:
                batch = batch.to(device, non_blocking=True)
                yield images[batch], labels[batch]
            return
        loader = DataLoader(_Batches(self.images, self.labels), sampler=(batch.tolist() for batch in indices),
                            batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
                            generator=torch.Generator())  # else it draws a seed from the global one
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


class _Batches(Dataset):
    """Whole batches of LazyImages, by lists of indices."""

    def __init__(self, images: LazyImages, labels: Tensor):
        self.images, self.labels = images, labels

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | InputError:
        try:
            with quiet_decoders():
                return torch.stack([self.images[i] for i in indices]), self.labels[indices]
        except InputError as error:
            return error  # raised here, it would reach the user inside a worker's traceback


def load(dataset: str, root: str | Path, split: str, image_size: int | None = None, subset: int | None = None,
         skip_bad_images: bool = False, suffixes: Collection[str] | None = None, resize: str = "crop",
         follow_links: bool = False) -> ImageSet:
    """The split "train" or "test" of a data set in DATASETS, from files below `root`, downloaded if need be.

    `image_size` resizes the images, and `resize` is how files that are not square become so: "crop" takes their central
    square, "pad" adds black bars on both sides, "stretch" changes their proportions. `subset` leaves that many of them,
    the same ones each time and as near as possible the same part of every class. Raises InputError for unknown names,
    wrong sizes, and for files that are missing or damaged. `skip_bad_images` leaves out image files that cannot be
    read, and lists them on stderr; the others stay in the splits and the order that they would be in. `suffixes` are
    those of files that are images (default: of all formats that can be read here); what is left out is counted on
    stderr. Links to folders, and to images elsewhere, are refused by name unless `follow_links`.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: unknown; choose from {', '.join(sorted(DATASETS))}")
    if image_size is not None and image_size < 8:
        raise InputError(f"--image_size {image_size}: must be at least 8")
    assert split in ("train", "test"), split
    listing = Listing(suffixes, follow_links)
    classes, images, labels = READERS[dataset](Path(root).expanduser(), split, listing)
    if remarks := [*listing.notes, *([f"left out {listing}"] if listing.left_out else [])]:
        _say_once(f"--data {root}: {'; '.join(remarks)}")
    if isinstance(images, ImageFiles):
        images = replace(images, resize=resize)
    if subset is not None:
        if not 1 <= subset <= len(labels):
            raise InputError(f"--{'test_' * (split == 'test')}subset {subset}: the {split} split of {dataset} has "
                             f"{len(labels)} images; choose at most as many")
        part = subset / len(labels)
        chosen, _ = stratified_split(labels, [part, 1 - part], SPLIT_SEED)
        images, labels = images[chosen], labels[chosen]
    info = replace(DATASETS[dataset], classes=classes)
    if image_size is not None:
        info = replace(info, image_size=image_size)
    N = len(labels)
    right = not isinstance(images, Tensor) or (images.dtype == torch.uint8 and images.shape[1:2] == (info.channels,)
                                               and images.ndim == 4 and min(images.shape[2:]) > 0)
    if not right or len(images) != N or not N or labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(f"{root}: the files of {dataset} hold other images or labels than they should; take them away "
                         "and start again")
    held, bad = _hold(images, info, skip_bad_images)
    names = images.names if isinstance(images, ImageFiles) else None
    if bad:
        good = torch.tensor([i for i in range(N) if i not in bad], dtype=torch.int64)
        _tell(bad, classes, labels, labels[good], split)
        held = LazyImages(images[good], info.image_size) if isinstance(held, LazyImages) else held[good]
        names, labels = [names[i] for i in good.tolist()], labels[good]
    return ImageSet(info, held, labels, names)


def survey(dataset: str, root: str | Path, split: str, suffixes: Collection[str] | None = None,
           follow_links: bool = False) -> tuple[tuple[str, ...], int]:
    """The class names and the number of images of a split, of which no file is decoded. Raises InputError as `load`."""
    classes, _, labels = READERS[dataset](Path(root).expanduser(), split,
                                 Listing(suffixes, follow_links))
    return classes, len(labels)


def _hold(images: Tensor | ImageFiles, info: DataInfo, skip: bool) -> tuple[Tensor | LazyImages, dict[int, InputError]]:
    """The images, decoded and resized now if all of them fit into memory, and what is wrong with some.

    Without `skip` the first image that cannot be read raises its InputError: now, or when its batch is made. With it,
    all files are decoded now, even if only to see whether that is possible.
    """
    lazy, bad = LazyImages(images, info.image_size), {}
    shape = (len(images), info.channels, info.image_size, info.image_size)
    large = torch.Size(shape).numel() > MEMORY_LIMIT
    if isinstance(images, Tensor) and (large or images.shape == shape):
        return (lazy if large else images), bad
    if large and not skip:
        return lazy, bad
    held = None if large else torch.empty(shape, dtype=torch.uint8)
    files = images if isinstance(images, ImageFiles) else None
    with closing(decode_all(lazy.__getitem__, len(lazy), info.image_size, files, f"{info.name}: decoding")) as decoded:
        for i, image in enumerate(decoded):
            if isinstance(image, Tensor):
                if held is not None:
                    held[i] = image
            elif skip:
                bad[i] = image
            else:
                raise image
    return (lazy if large else held), bad


@cache
def _say_once(text: str) -> None:
    """Print a line on stderr, if no process of this run has done so before: both splits may be of one folder."""
    if distributed.first_to_report(text):
        print(one_line(text), file=sys.stderr)


def _tell(bad: dict[int, InputError], classes: Sequence[str], before: Tensor, after: Tensor, split: str) -> None:
    """List images that are left out. Raises InputError if no image of a class is left."""
    print(f"--skip_bad_images: {len(bad)} of {len(before)} images of the {split} split are left out:", file=sys.stderr)
    for _, error in sorted(bad.items())[:LISTED]:
        print(f"    {one_line(error)}", file=sys.stderr)
    if len(bad) > LISTED:
        print(f"    and {len(bad) - LISTED} more", file=sys.stderr)
    left = torch.bincount(after, minlength=len(classes))
    if gone := [classes[i] for i in before.unique().tolist() if not left[i]]:
        raise InputError(f"--skip_bad_images: leaves no image of {', '.join(gone)} in the {split} split; repair some")
