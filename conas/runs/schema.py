"""What a checkpoint says of itself, checked field by field: a file from elsewhere can claim anything.

Whatever passes can be printed, compared and built without a traceback, and without memory that the file does not
account for.
"""
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from conas.darts.primitives import Primitives
from conas.darts.stems import STEMS
from conas.data.imagefiles import RESIZES
from conas.data.images import DATASETS
from conas.errors import InputError

SIDE = 4096     # pixels of an image
LAYERS = 100    # as for --layers
NUMBER = 10**6  # of channels and classes
VALUES = 10**6  # in one field, those in lists and dicts included
DEPTH = 32      # lists and dicts inside each other


def _between(low: float, high: float, *kinds: type) -> Callable[[object], bool]:
    return lambda value: type(value) in kinds and low <= value <= high


def _optional(right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or right(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


IMAGES = {"name": lambda value: _is_text(value) and value in DATASETS, "root": _is_text,
          "image_size": _between(1, SIDE, int), "subset": _optional(_between(1, 2**62, int)), "classes": _is_texts,
          "fingerprint": _is_text}
MORE = {"crop": _optional(_between(1, SIDE, int)), "train_portion": _between(0, 1, int, float),
        "split_seed": _between(0, 2**31 - 1, int), "test_subset": _optional(_between(1, 2**62, int)),
        "skip_bad_images": lambda value: type(value) is bool,
        "resize": lambda value: _is_text(value) and value in RESIZES, "suffixes": _is_texts,
        "follow_links": lambda value: type(value) is bool}
NETWORK = {"C": _between(1, NUMBER, int), "num_classes": _between(1, NUMBER, int), "layers": _between(1, LAYERS, int),
           "in_channels": _between(1, NUMBER, int), "image_size": _between(1, SIDE, int),
           "stem": lambda value: _is_text(value) and value in STEMS}
TEXTS = {name: IMAGES[name] for name in ("root", "classes", "fingerprint")} | {"name": _is_text}
LANGUAGE = {"words": _between(1, NUMBER, int), "units": _between(1, 10**5, int)}
BASIC = "C", "num_classes", "layers"  # of every network


def check(path: str | Path, checkpoint: dict) -> dict:
    """Return a checkpoint whose fields are of the right types, if what is in them can be used; else InputError."""
    right = {"stage": lambda value: value in ("search", "train"), "epoch": _between(0, 2**31, int),
             "seed": _between(-2**63, 2**63 - 1, int), "primitives": _is_texts}
    _table(path, checkpoint, right, "its field")
    for name, value in checkpoint.items():
        if name in ("network", "genotype", "dataset", "arguments") and not is_plain(value):
            raise InputError(f"{path}: its field {name!r} holds more than numbers and texts; replace it with an intact "
                             "copy")
    if not all(_is_text(digest) and _is_text(name) and re.fullmatch(r"\w{1,64}\.py", name)
               for name, digest in checkpoint.get("code", {}).items()):
        raise InputError(f"{path}: its field 'code' holds more than digests of files; replace it with an intact copy")
    if "edges" in checkpoint:
        _check_edges(path, checkpoint)
    if not is_state(checkpoint["state"]):
        raise InputError(f"{path}: its field 'state' holds more than tensors by name; replace it with an intact copy")
    dataset_info, network = checkpoint["dataset"], checkpoint["network"]
    if "words" in network:
        return _check_language(path, checkpoint)
    _table(path, dataset_info, IMAGES, "its images'")
    _table(path, dataset_info, {name: check for name, check in MORE.items() if name in dataset_info}, "its images'")
    _table(path, network, {name: check for name, check in NETWORK.items() if name in network or name in BASIC},
           "its network's")
    if network["num_classes"] != len(dataset_info["classes"]):
        raise InputError(f"{path}: its network knows {network['num_classes']} classes, but its images have "
                         f"{len(dataset_info['classes'])}; replace it with an intact copy")
    channels = DATASETS[dataset_info["name"]].channels
    if network.get("in_channels", 3) != channels or (dataset_info.get("crop") or 0) > dataset_info["image_size"]:
        raise InputError(f"{path}: its network takes other images than those of {dataset_info['name']}; replace it "
                         "with an intact copy")
    return checkpoint


def _check_edges(path: str | Path, checkpoint: dict) -> None:
    try:
        if list(Primitives(checkpoint["edges"])) == checkpoint["primitives"]:
            return
    except InputError:
        pass
    raise InputError(f"{path}: its field 'edges' does not say which edges have which of its primitives; copy a good "
                     "one here")


def _check_language(path: str | Path, checkpoint: dict) -> dict:
    dataset_info, network = checkpoint["dataset"], checkpoint["network"]
    _table(path, dataset_info, TEXTS, "its text's")
    _table(path, network, LANGUAGE, "its network's")
    if network["words"] != len(dataset_info["classes"]):
        raise InputError(f"{path}: its network knows {network['words']} words, but its text has "
                         f"{len(dataset_info['classes'])}; replace it with an intact copy")
    return checkpoint


def _table(path: str | Path, values: Mapping, right: Mapping[str, Callable[[object], bool]], what: str) -> None:
    for name, check in right.items():
        if name not in values or not check(values[name]):
            raise InputError(f"{path}: {what} {name!r} is missing or out of range; replace it with an intact copy")


def is_plain(value: object) -> bool:
    """Return True if a value is made of numbers, texts, None, lists and dicts by name, not too many and not too deep.

    Counts what a list holds as often as it is reached: 50 lists can otherwise spell 2**50 values.
    """
    level, count = [value], 1
    for _ in range(DEPTH):
        inside = []
        for value in level:
            if isinstance(value, dict) and all(map(_is_text, value)):
                value = value.values()
            elif not isinstance(value, (list, tuple)):
                if value is None or isinstance(value, (str, int, float)):
                    continue
                return False
            count += len(value)
            if count > VALUES:
                return False
            inside += value
        if not inside:
            return True
        level = inside
    return False


def is_state(value: object) -> bool:
    """Return True if a value is a dict of ordinary tensors by name, whose elements all have memory behind them."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and _is_ordinary(t) for name, t in value.items()):
        return False
    encoder, decoder = value.get("encoder.weight"), value.get("decoder.weight")
    if encoder is not None and decoder is not None and encoder.is_set_to(decoder):  # language models: one matrix
        value = {name: tensor for name, tensor in value.items() if name != "decoder.weight"}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in value.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in value.values()) <= sum(storages.values())


def _is_ordinary(tensor: object) -> bool:
    return (isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
            and not tensor.is_quantized and not tensor.is_complex())


def is_large(checkpoint: dict) -> bool:
    """Return True if a checkpoint describes a network so large that its tensors are checked before it is built."""
    network, cell = checkpoint["network"], checkpoint["genotype"].get("normal", ())
    if "words" in network:
        return True
    return network["C"] > 64 or network["layers"] > 20 or network["num_classes"] > 10_000 or len(cell) > 16


def check_shapes(state: Mapping[str, Tensor], described: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless two state_dicts agree in names and shapes."""
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in described.items()}:
        raise ValueError("other names or shapes")
