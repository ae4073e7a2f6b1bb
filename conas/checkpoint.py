"""Checkpoints: self-describing files of plain tensors, numbers and strings, the border between search and committee.

A checkpoint holds what is needed to rebuild its network without a command line:

    format version torch stage space primitives network genotype epoch dataset arguments seed state

`network` are the constructor's arguments, `dataset` describes the images (name, classes, ...), `state` is the
`state_dict`, alphas included.
"""
import hashlib
import io
import warnings
from pathlib import Path

import torch

import conas
from conas import genotype as genotypes
from conas.errors import InputError
from conas.files import atomic_path
from conas.supernet import Supernet

FORMAT = "conas-checkpoint"
FIELDS = {"format": str, "version": str, "torch": str, "stage": str, "space": str, "primitives": list,
          "network": dict, "genotype": dict, "epoch": int, "dataset": dict, "arguments": dict, "seed": int,
          "state": dict}


def describe(network: Supernet, *, space: str, epoch: int, dataset: dict, arguments: dict) -> dict:
    """The checkpoint of a supernet after `epoch`, ready for `save`."""
    return {
        "format": FORMAT, "version": conas.__version__, "torch": str(torch.__version__), "stage": "search",
        "space": space, "primitives": list(network.primitives), "network": network.arguments,
        "genotype": genotypes.to_json(network.genotype()), "epoch": epoch, "dataset": dataset,
        "arguments": arguments, "seed": arguments["seed"], "state": network.state_dict(),
    }


def save(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically. Raises OSError, with the earlier file intact, if it cannot be written."""
    buffer = io.BytesIO()  # torch.save to a file reports a full disk as a RuntimeError without a reason
    torch.save(checkpoint, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path) -> dict:
    """Read a checkpoint to the CPU; nothing in the file is executed.

    Raises InputError naming the file if it is missing, damaged, not a CoNAS checkpoint, or holds pickled objects.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch muses about damaged files before it fails on them
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: refused, since it is damaged or holds more than tensors and plain values; nothing "
                         "in it was run. Delete it, or copy a good one here") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a CoNAS checkpoint; train_search.py writes them")
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise InputError(f"{path}: its field {name!r} is missing or not a {kind.__name__}")
    return checkpoint


def restore(path: str | Path, checkpoint: dict, space: str, network_class: type[Supernet]) -> Supernet:
    """The network of a loaded checkpoint, if it belongs to `space` and its primitives; else InputError.

    Names and not shapes decide: spaces with equally many primitives have tensors of equal shapes.
    """
    if checkpoint["space"] != space:
        raise InputError(f"{path}: written by {checkpoint['space']}, not by {space}; move the folder of that run out "
                         f"of {space}, or search there under another --save name")
    if checkpoint["primitives"] != list(network_class.primitives):
        raise InputError(f"{path}: searched over {', '.join(checkpoint['primitives'])}, but genotypes.py of {space} "
                         f"now lists {', '.join(network_class.primitives)}; restore that list or search again")
    try:
        network = network_class(**checkpoint["network"])
        network.load_state_dict(checkpoint["state"])
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its tensors do not fit its own description; copy a good one here") from error
    return network


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
