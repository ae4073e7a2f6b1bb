"""Images that are files: which ones belong to a data folder, and how one becomes pixels.

The folder may come from anywhere. Nothing is read through a link that leaves it, no other program is started to decode
an image, and none takes more memory than its size allows for.
"""
import os
import threading
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from conas.data.listing import OUTSIDE, Listing, formats
from conas.errors import InputError
from conas.files import check_regular

PIXELS = 2**27            # in one image; a file of a few bytes can claim any number
LARGE = 2**24             # images above are decoded two at a time, as each may take half a gigabyte
RESIZES = {"crop": ImageOps.fit, "pad": ImageOps.pad, "stretch": Image.Image.resize}  # to a square, by --resize
_large = threading.Semaphore(2)


@dataclass(frozen=True)
class ImageFiles:
    """Files below `root`, by their relative names; `resize`, of RESIZES, is how they become square."""

    root: Path
    names: list[str]
    resize: str = "crop"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return replace(self, names=[self.names[i] for i in indices.tolist()])

    def decode(self, i: int, image_size: int) -> Tensor:
        """Image i in RGB, made square and resized: uint8 (3, image_size, image_size).

        Upright as its EXIF data say; of an animation the first picture; 16 bits become the upper 8, and transparency
        is left out. Raises InputError naming a file that cannot be read.
        """
        path = self.root / self.names[i]
        try:
            check_regular(path)
            with Image.open(path, formats=formats()) as image:
                if image.width * image.height > PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                if image.width * image.height <= LARGE:
                    return _square(image, image_size, self.resize)
                with _large:
                    return _square(image, image_size, self.resize)
        except Exception as error:  # PIL's decoders raise whatever broken bytes lead them to
            raise InputError(f"{path}: cannot be read as an image ({error}); repair it or take it away") from error


def _square(image: Image.Image, image_size: int, resize: str) -> Tensor:
    image.load()
    with suppress(Exception):  # damaged EXIF data say nothing of the pixels, and raise as they like
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: PIL would cut values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    longest = max(image.size)
    if resize == "pad" and round(min(image.size) / longest * image_size) == 0:  # so thin that nothing would be left
        image = image.resize([image_size if length == longest else 1 for length in image.size])
    image = RESIZES[resize](image, (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def class_folders(root: Path, part: str, listing: Listing | None = None) -> tuple[tuple[str, ...], ImageFiles, Tensor]:
    """The images in the class folders of root/part, at any depth, by class and name; hidden ones do not count.

    `listing` tells which files are images, and counts the others. `root` and root/part may be links; what is in them
    may not be, unless the listing follows links, or it is an image that links to another of the same folder. Raises
    InputError for others by name, and for too few classes or a class without images, with what is there instead.
    """
    listing = listing or Listing()
    beside = listing.fresh()
    inside_part = sorted(entries(root / part), key=lambda entry: entry.name)
    folders = [entry for entry in inside_part if _is_class(entry, listing)]
    for entry in inside_part:
        if not entry.is_dir() and beside.takes(entry.name):
            beside.leave_out(OUTSIDE, entry.name)
    if len(folders) < 2:
        besides = f" and {beside}" if beside.left_out else ""
        raise InputError(f"{root / part}: holds {len(folders)} folders{besides}, but needs one folder for each of two "
                         "or more classes")
    listing.add(beside)
    inside = {Path(os.path.realpath(folder)) for folder in (root, root / part)}
    names, labels = [], []
    for label, folder in enumerate(folders):
        own = listing.fresh()
        found = images_in(Path(folder.path), root, inside, own)
        if not found:
            only = f"only {own}" if own.left_out else f"which are files with the suffixes {' '.join(own.suffixes)}"
            raise InputError(f"{folder.path}: no images in this class folder, {only}; fill it or take it away")
        listing.add(own)
        names += found
        labels += [label] * len(found)
    return tuple(folder.name for folder in folders), ImageFiles(root, names), torch.tensor(labels)


def entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); permit it, or name another folder with --data"
                         ) from error


def _is_class(entry: os.DirEntry, listing: Listing) -> bool:
    if entry.is_symlink() and ((os.path.isdir(entry.path) and not listing.follow_links)
                               or not os.path.exists(entry.path)):
        _refuse(entry)
    if not entry.is_dir():
        return False
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in entry.name):  # control characters; bytes that are not UTF-8
        raise InputError(f"{entry.path}: the name of this class is no text; rename it")
    return True


def images_in(folder: Path, root: Path, inside: set[Path], listing: Listing) -> list[str]:
    """The names of all images below a folder, relative to `root`, sorted."""
    found, folders = [], [folder]
    while folders:
        folder = folders.pop()
        if listing.follow_links and not listing.enter(str(folder)):
            raise InputError(f"{folder}: leads to a folder that is read already, {os.path.realpath(folder)}; take the "
                             "link away")
        for entry in entries(folder):
            if entry.is_symlink() and os.path.isdir(entry.path) and not listing.follow_links:
                _refuse(entry)
            if os.path.isdir(entry.path):  # and not entry.is_dir(), which raises for a link to itself
                folders.append(Path(entry.path))
            elif listing.takes(entry.name):
                if entry.is_symlink() and (not os.path.exists(entry.path) if listing.follow_links else
                                           inside.isdisjoint(Path(os.path.realpath(entry.path)).parents)):
                    _refuse(entry)
                found.append(Path(entry.path).relative_to(root).as_posix())
    return sorted(found)


def _refuse(link: os.DirEntry) -> None:
    target = os.path.realpath(link.path)
    what = "a folder" if os.path.isdir(target) else "a file out of the data folder" if os.path.exists(target) else \
        "nothing"
    follow = "give --follow_links, " if os.path.exists(target) else ""
    raise InputError(f"{link.path}: is a link to {what}, {target}; {follow}put a copy in its place, or take it away")
