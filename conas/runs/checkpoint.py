"""Checkpoints: self-describing files of plain tensors, numbers and strings, the border between search and committee.

A checkpoint holds what is needed to rebuild its network without a command line:

    format version torch stage space primitives network genotype epoch dataset arguments seed state code

`stage` is "search" for a supernet and "train" for a derived network. `network` are the constructor's arguments, for
derived networks with their `kind` among NETWORKS; `dataset` describes the images (name, classes, ...), `state` is the
`state_dict`, alphas included. `primitives` are the names of the alphas' columns, and `edges`, if not all edges have all
of them, says which have which. `code` are digests of the space's own code, which old checkpoints lack; see
conas/runs/code.py. A file NAME.safetensors holds `state`, and the other fields as JSON in its metadata,
with a CRC-32 of everything. Both kinds are checked for flipped bits when they are read; files of DARTS' own code that
PyTorch wrote before version 1.6, and .safetensors files of other programs, have no checksum.
"""
import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import conas
from conas.darts import genotype as genotypes
from conas.darts.derived import NETWORKS, DerivedNetwork
from conas.darts.operations import OPERATIONS, check_primitives, with_own
from conas.darts.primitives import Primitives
from conas.darts.supernet import Supernet
from conas.errors import InputError
from conas.files import atomic_path, check_regular, check_writable, check_zip
from conas.runs import code as own_code
from conas.runs import schema as fields
from conas.runs.wrappers import HOLDERS, differences, unwrapped

FORMAT = "conas-checkpoint"
SAFETENSORS = ".safetensors"
FIELDS = {"format": str, "version": str, "torch": str, "stage": str, "space": str, "primitives": list,
          "network": dict, "genotype": dict, "epoch": int, "dataset": dict, "arguments": dict, "seed": int,
          "state": dict}
OPTIONAL = {"code": dict, "edges": dict}


def describe(network: Supernet | DerivedNetwork, *, space: str, epoch: int, dataset: dict, arguments: dict,
             primitives: Sequence[str] | None = None, code: Mapping[str, str] | None = None) -> dict:
    """The checkpoint of a network after `epoch`, ready for `save`. A derived network needs its space's primitives.

    `code` are the space's `conas.runs.code.digests`. Language models go the same way; `conas.recurrent.files` reads
    theirs.
    """
    derived = not hasattr(network, "alphas")
    return {
        "format": FORMAT, "version": conas.__version__, "torch": str(torch.__version__),
        "stage": "train" if derived else "search", "space": space,
        "primitives": list(primitives if derived else network.primitives),
        "network": {"kind": network.kind, **network.arguments} if derived else network.arguments,
        "genotype": genotypes.to_json(network.genotype()), "epoch": epoch, "dataset": dataset,
        "arguments": arguments, "seed": arguments["seed"], "state": network.state_dict(),
        "code": dict(code or {}),
        **({} if derived or not getattr(network.primitives, "restricted", False) else
           {"edges": network.primitives.described()}),
    }


def primitives_of(checkpoint: dict) -> Primitives:
    """What the search of a loaded checkpoint was over."""
    return Primitives(checkpoint.get("edges") or checkpoint["primitives"])


def without_progress(state: dict) -> dict:
    """The checkpoint that is part of the state of a run."""
    return {name: state[name] for name in (*FIELDS, *OPTIONAL) if name in state}


def save(path: str | Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Write a checkpoint atomically. Raises OSError, with the earlier file intact, if it cannot be written.

    The earlier file goes to `keep`, if that is given.
    """
    buffer = io.BytesIO()  # torch.save to a file reports a full disk as a RuntimeError without a reason
    torch.save(checkpoint, buffer)
    with atomic_path(path, keep) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path) -> dict:
    """Read a checkpoint, or what `export` wrote, to the CPU; nothing in the file is executed.

    Raises InputError naming the file if it is missing, damaged, not a CoNAS checkpoint, or holds pickled objects.
    """
    return check(path, read(path))


def is_ours(content: object) -> bool:
    """Return True if what `read` gave was written by `save` or `export`, and not by DARTS' code."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check(path: str | Path, content: object) -> dict:
    """Return what `read` gave, if that is a checkpoint with all its fields; else InputError."""
    if not is_ours(content):
        raise InputError(f"{path}: not a CoNAS checkpoint; train_search.py and train.py write them")
    if isinstance(content.get("state"), dict):
        content = content | {"state": unwrapped(path, content["state"])}
    for name, kind in (FIELDS | OPTIONAL).items():
        if not isinstance(content.get(name), kind) and (name in FIELDS or name in content):
            raise InputError(f"{path}: its field {name!r} is missing or not a {kind.__name__}")
    return fields.check(path, content)


def read(path: str | Path) -> object:
    """Whatever is in a file of tensors and plain values, on the CPU. Raises InputError if that cannot be read."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\3\4"
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror or error})"
        raise InputError(f"{path}: no such checkpoint{reason}") from error
    if Path(path).suffix == SAFETENSORS:
        return _read_safetensors(path)
    if zipped:
        try:
            check_zip(path)
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); delete it, or replace it with an intact copy") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # torch muses about damaged files before it fails on them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: refused, since it is damaged or holds more than tensors and plain values; nothing "
                         "in it was run. Delete it, or replace it with an intact copy") from error


def published_state(path: str | Path, content: object) -> dict[str, Tensor]:
    """The `state_dict` in what `read` gave for a file of DARTS' code: bare, or wrapped in {"state_dict": ...}.

    Names lose the prefixes of wrappers. Raises InputError if there is no `state_dict`.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in HOLDERS if isinstance(content.get(key), dict)), content)
        content = unwrapped(path, content)
    if not content or not fields.is_state(content):
        raise InputError(f"{path}: holds neither a CoNAS checkpoint nor a state_dict; replace it with an intact copy")
    return content


def restore(path: str | Path, checkpoint: dict, space: str, network_class: type[Supernet] | None = None,
            own_operations: Mapping[str, Callable] | None = None, folder: Path | None = None
            ) -> Supernet | DerivedNetwork:
    """The network of a loaded checkpoint, if it belongs to `space`; else InputError.

    A supernet must have the primitives of `network_class`, and names and not shapes decide: spaces with equally many
    primitives have tensors of equal shapes. Derived networks need only the operations of `network_class`, or
    `own_operations` without it. If the code in the space's `folder` has changed since, a line on stderr says so.
    """
    if checkpoint["space"] != space:
        raise InputError(f"{path}: written by {checkpoint['space']}, not by {space}; name a file of this folder, or "
                         f"move that run out of {space} and start another there")
    operations = with_own(network_class.operations if network_class else own_operations or {})
    if checkpoint["stage"] == "train" or network_class is None:
        network = restore_derived(path, checkpoint, operations)
    else:
        network = _restore_supernet(path, checkpoint, space, network_class, operations)
    if folder:
        own_code.tell_changes(folder, path, checkpoint)
    return network


def _restore_supernet(path: str | Path, checkpoint: dict, space: str, network_class: type[Supernet],
                      operations: Mapping[str, Callable]) -> Supernet:
    before, now = primitives_of(checkpoint), Primitives(network_class.primitives)
    if (before, before.by_edge) != (now, now.by_edge):
        others = "" if before != now else " on other edges"
        raise InputError(f"{path}: searched over {before}, but genotypes.py of {space} now lists {now}{others}; "
                         "restore that list or search again")
    check_primitives(now, operations)
    return rebuild(path, checkpoint, network_class, checkpoint["network"])


def restore_derived(path: str | Path, checkpoint: dict, operations: Mapping[str, Callable] = OPERATIONS
                    ) -> DerivedNetwork:
    """The derived network of a loaded checkpoint, built of `operations`. Raises InputError for a supernet."""
    if checkpoint["stage"] != "train" or checkpoint["network"].get("kind") not in list(NETWORKS):
        raise InputError(f"{path}: is of the stage {checkpoint['stage']!r}, and no retrained network; train.py writes "
                         "those")
    genotype = genotypes.from_json(checkpoint["genotype"], str(path), operations)
    arguments = {name: value for name, value in checkpoint["network"].items() if name != "kind"}
    return rebuild(path, checkpoint, NETWORKS[checkpoint["network"]["kind"]], arguments | {
        "genotype": genotype, "operations": operations})


def rebuild(path: str | Path, checkpoint: dict, network_class: type, arguments: dict) -> Supernet | DerivedNetwork:
    described = {}
    try:
        if fields.is_large(checkpoint):
            with torch.device("meta"):  # takes no memory, whatever size the file claims, but half a second
                described = network_class(**arguments).state_dict()
            fields.check_shapes(checkpoint["state"], described)
        network = network_class(**arguments)
        described = network.state_dict()
        network.load_state_dict(checkpoint["state"])
    except (TypeError, RuntimeError, ValueError, AttributeError, ArithmeticError, LookupError, AssertionError) as error:
        wrong = described and differences(checkpoint["state"], described)
        raise InputError(f"{path}: its tensors do not fit its own description{f' ({wrong})' if wrong else ''}; copy a "
                         "good one here") from error
    return network


def check_export(path: str | Path) -> None:
    """Raise InputError unless `export` can write `path`: another suffix, no package, nothing may be written there."""
    if Path(path).suffix != SAFETENSORS:
        raise InputError(f"--export {path}: the name must end in {SAFETENSORS}")
    _safetensors()
    check_writable(path)


def export(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint as .safetensors, atomically. Raises InputError without that package or suffix."""
    check_export(path)
    metadata = {name: json.dumps(value) for name, value in without_progress(checkpoint).items() if name != "state"}
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in checkpoint["state"].items()}
    metadata["crc32"] = f"{_crc32(metadata, state):08x}"
    with atomic_path(path) as temporary:
        temporary.write_bytes(_safetensors().torch.save(state, metadata))


def _read_safetensors(path: str | Path) -> dict:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            known = {*FIELDS, *OPTIONAL, "crc32"}
            metadata = {name: text for name, text in (file.metadata() or {}).items() if name in known}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = metadata.pop("crc32", None)
        content = {name: json.loads(text) for name, text in metadata.items()} | {"state": state}
        if checksum != f"{_crc32(metadata, state):08x}" and (checksum or is_ours(content)):
            raise ValueError("it does not have the checksum that it was written with")
        return content
    except Exception as error:  # damaged bytes can make it raise anything
        raise InputError(f"{path}: damaged ({error}); replace it with an intact copy") from error


def _crc32(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> int:
    """Of all names, texts, shapes and bytes."""
    crc = 0
    for name in sorted(metadata):
        crc = zlib.crc32(f"{name}\0{metadata[name]}\0".encode(), crc)
    for name in sorted(state):
        tensor = state[name]
        crc = zlib.crc32(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(f"{SAFETENSORS} files need a package that is not installed; pip install safetensors"
                         ) from error
    return safetensors


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises InputError if it cannot be read."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); replace it with an intact copy"
                         ) from error
