"""Folders of images as people have them: which part is for training, which for the test, and where labels are.

A part has a folder for each class, or is a flat folder of images with a list of lines `NAME CLASS`, such as
Tiny-ImageNet's val/images and val/val_annotations.txt. A list is read only if it labels every image of its part.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conas.data.imagefiles import ImageFiles, class_folders, entries, images_in
from conas.data.listing import Listing
from conas.errors import InputError
from conas.files import check_regular

TRAIN, TEST = ("train", "training"), ("test", "val")
OTHER_NAMES = ("testing", "valid", "validation", "dev", "eval")  # of parts that are not read under these names
LISTS = (".txt", ".csv", ".tsv")
LONGEST = 2**26  # bytes of a list
WRITE = "sort its images into a folder for each class, or write a list of lines NAME CLASS"

Part = tuple[tuple[str, ...], ImageFiles, Tensor]


@dataclass(frozen=True)
class Layout:
    """The names of the parts of a folder: "" for training if the class folders are its own, no `test` if none is set
    aside; `notes` say which other folders are not read, and why."""

    train: str
    test: str | None
    notes: tuple[str, ...] = ()


def find_layout(root: Path, follow_links: bool = False) -> Layout:
    """Which folders of `root` are for training and for the test. Raises InputError if that is not clear."""
    folders = sorted(_folders(root))
    parts = [name for name in folders if name.lower() in TRAIN + TEST + OTHER_NAMES]
    trains = [name for name in parts if name.lower() in TRAIN and len(_folders(root / name)) > 1]
    if len(trains) > 1:
        raise InputError(f"--data {root}: holds both {trains[0]}/ and {trains[1]}/; take one of them away")
    if not trains:  # a class may be called train, too
        inside = [name for name in parts if _folders(root / name) & set(folders)]
        if inside or (parts and len(folders) - len(parts) < 2):
            raise InputError(f"--data {root}: holds {', '.join(f'{name}/' for name in folders[:9])}, but no train/ "
                             "with a folder for each of two or more classes; move the training images there")
        return Layout("", None)
    train, classes = trains[0], _folders(root / trains[0])
    labelled, notes = [], []
    for name in (name for name in TEST if name in folders):
        listing = Listing(None, follow_links)
        if _is_sorted(root / name, classes) or find_labels(root, name, classes, listing) is not None:
            labelled.append(name)
        elif count := len(_images_of(root, name, Listing(None, follow_links))):
            notes.append(f"{name}/ is not read, since it has no labels for its {count:,} image{'s' * (count > 1)}")
        else:
            notes.append(f"{name}/ is not read, since it holds no images")
    test = labelled[0] if labelled else None
    notes += [f"{name}/ is not read, since {test}/ is the test split" for name in labelled[1:]]
    if others := [name for name in folders if name not in (train, *TEST)]:
        notes.append(f"{', '.join(f'{name}/' for name in others[:9])} beside {train}/ not read (test images lie in "
                     "test/ or val/)")
    if notes and not test:
        notes.append(f"a fifth of every class in {train}/ is the test split")
    return Layout(train, test, tuple(notes))


def read_part(root: Path, part: str, classes: tuple[str, ...], listing: Listing) -> Part:
    """The images of root/part with labels among `classes`, from class folders or a list. Raises InputError."""
    if _is_sorted(root / part, set(classes)):
        return class_folders(root, part, listing)
    labels = find_labels(root, part, set(classes), listing)
    if labels is None:
        raise InputError(f"{root / part}: has neither a folder for each class nor a list of labels; {WRITE}")
    if missing := sorted(set(classes) - set(labels.values())):
        raise InputError(f"{root / part}: its list names no image of {', '.join(missing[:9])}; add some, or take the "
                         "class away")
    numbers = {name: i for i, name in enumerate(classes)}
    names = sorted(labels, key=lambda name: (numbers[labels[name]], name))
    return classes, ImageFiles(root, names), torch.tensor([numbers[labels[name]] for name in names])


def find_labels(root: Path, part: str, classes: set[str], listing: Listing | None = None) -> dict[str, str] | None:
    """The class of every image in root/part, by its name relative to `root`, or None without a list.

    Lists lie in root/part, or in `root`; there, if the list has not the part's name in its own, only lines count whose
    image begins with the part, as val/7.png. Lines may also be `CLASS NAME`. Raises InputError for a list that is of
    these images, but does not label all of them with names of classes, and for two that differ.
    """
    listing = listing or Listing()
    names = _images_of(root, part, listing)
    keys: dict[str, str | None] = {}
    for name in names:
        inside = name.removeprefix(f"{part}/")
        for key in {name, inside, os.path.splitext(inside)[0], Path(name).name, Path(name).stem}:
            keys[key] = None if key in keys else name  # what two images are called names neither
    found: dict[str, str] | None = None
    for path in _lists(root, part) if names else ():
        own = _is_named_after(path, root, part)
        try:
            rows = _rows(path, classes)
        except InputError:
            if own:
                raise
            continue  # a text of another kind
        if any(name in classes and keys.get(label) for name, label in rows):
            rows = [(label, name) for name, label in rows]
        if not own:
            rows = [(name, label) for name, label in rows if name.startswith(f"{part}/")]
        rows = [(keys[name], label) for name, label in rows if keys.get(name)]
        labels, named = dict(rows), len({name for name, _ in rows})
        if 2 * named < len(names):
            continue
        twice = next((name for name, label in rows if labels[name] != label), None)
        unknown = sorted(set(labels.values()) - classes)
        if twice or unknown or named < len(names):
            what = f"gives two classes to {twice}" if twice else \
                f"names classes that have no folder in the training images ({', '.join(unknown[:5])})" \
                if unknown else \
                f"names {named:,} of {len(names):,} images"
            raise InputError(f"{path}: {what}; every image of {root / part} needs one line NAME CLASS, with the name "
                             "of a class folder")
        if found is not None and found != labels:
            raise InputError(f"{path}: gives other labels than another list in {root}; take one of them away")
        found = labels
        if path.parent != root:
            listing.is_used(path.name)
    return found


def _lists(root: Path, part: str) -> list[Path]:
    def is_list(entry: os.DirEntry) -> bool:
        return os.path.isfile(entry.path) and entry.name.lower().endswith(LISTS) and entry.stat().st_size <= LONGEST

    return sorted(Path(entry.path) for entry in (*entries(root / part), *entries(root)) if is_list(entry))


def _is_named_after(path: Path, root: Path, part: str) -> bool:
    """Return True if a list lies in root/part, or in `root` under a name with the part's in it."""
    return path.parent != root or part.lower() in re.split(r"[\W_]+", path.name.lower())


def _rows(path: Path, classes: set[str]) -> list[tuple[str, str]]:
    """Name and label of every line that has two fields, between tabs, commas, semicolons or blanks.

    What comes after the label, such as the boxes of ImageNet, counts for nothing.
    """
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); fix or remove it") from error
    rows = []
    for line in lines:
        between = next((mark for mark in "\t,;" if mark in line), None)
        name, *rest = (field.strip().strip('"') for field in line.strip().split(between))
        if rest and rest[0]:
            rows.append((name.removeprefix("./"), rest[0] if rest[0] in classes else rest[0].split()[0]))
    return rows


def _folders(folder: Path) -> set[str]:
    return {entry.name for entry in entries(folder) if os.path.isdir(entry.path)}


def _is_sorted(folder: Path, classes: set[str]) -> bool:
    """Return True if a part has class folders."""
    folders = _folders(folder)
    return len(folders) > 1 or bool(folders & classes)


def _images_of(root: Path, part: str, listing: Listing) -> list[str]:
    inside = {Path(os.path.realpath(folder)) for folder in (root, root / part)}
    return images_in(root / part, root, inside, listing)
