"""Read the tensors of a pickled language model, as torch.save(model) of DARTS' code wrote it, without running anything.

A pickle is a program: it names functions and calls them. This reader looks every name up in the short list below, where
classes are inert stubs that keep their arguments and attributes, and functions only describe tensors. Any other name
ends the reading. Both layouts of torch.save are known: the one before torch 1.6 (five pickles in a row, then the bytes
of all storages) and the zip archive since.
"""
import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conas.errors import InputError
from conas.files import check_regular, check_zip
from conas.runs.wrappers import unwrapped

MAGIC = 0x1950A86A20F9469CFC6C  # opens the older layout
DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
          "LongStorage": torch.int64, "IntStorage": torch.int32, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}
MODULES = {
    "model": ("RNNModel", "DARTSCell"), "model_search": ("RNNModelSearch", "DARTSCellSearch"),
    "locked_dropout": ("LockedDropout",), "genotypes": ("Genotype",),
    "torch.nn.modules.sparse": ("Embedding",), "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.container": ("ModuleList", "ParameterList"),
    "torch.nn.modules.batchnorm": ("BatchNorm1d",), "torch.nn.modules.dropout": ("Dropout",),
    "torch.nn.parallel.data_parallel": ("DataParallel",),
}


class PickledModel(NamedTuple):
    """What is known of the model in a file."""

    state: dict[str, Tensor]   # the state_dict
    genotype: tuple | None     # (recurrent, concat) as the file has it, unchecked


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    size: int


class _Tensor(NamedTuple):
    """A tensor in words, until the bytes of its storage are there."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def build(self, storages: dict[str, Tensor]) -> Tensor:
        flat = storages[self.storage.key]
        reach = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) + 1
        whole = all(type(n) is int and n >= 0 for n in (self.offset, *self.shape, *self.strides))
        numbers = math.prod(self.shape)
        if not whole or len(self.shape) != len(self.strides) or numbers > len(flat) or (numbers and reach > len(flat)):
            raise ValueError("a tensor reaches beyond its storage")
        return flat.as_strided(self.shape, self.strides, self.offset).clone()


class _Call:
    """A function for the unpickler. It has no attributes, so a pickle cannot change it for the next file."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, *_):
        raise pickle.UnpicklingError("a pickle sets attributes of a function")


def _stub(name: str) -> type:
    """A class whose objects do nothing but keep what they are made from. Created for each file."""
    def new(cls, *arguments):
        made = object.__new__(cls)
        made.arguments, made.attributes = arguments, {}
        return made

    def set_state(self, state):
        if isinstance(state, dict):
            self.attributes = state

    return type(name, (), {"__new__": new, "__init__": lambda self, *arguments: None, "__setstate__": set_state})


def _allowed() -> dict[tuple[str, str], object]:
    """All that a file may name."""
    names: dict[tuple[str, str], object] = {
        (module, name): _stub(name) for module, classes in MODULES.items() for name in classes}
    for module in "torch", "torch.cuda":
        names |= {(module, storage): dtype for storage, dtype in DTYPES.items()}
    names["torch.nn.parameter", "Parameter"] = _stub("Parameter")
    names["torch._utils", "_rebuild_parameter"] = _Call(lambda tensor, *_: tensor)
    names["torch._utils", "_rebuild_tensor"] = names["torch._utils", "_rebuild_tensor_v2"] = _Call(
        lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides)))
    names["torch", "Size"] = _Call(lambda numbers=(): tuple(numbers))
    names["torch.nn.backends.thnn", "_get_thnn_function_backend"] = _Call(lambda: None)
    names["collections", "OrderedDict"] = collections.OrderedDict
    for module in "builtins", "__builtin__":
        names[module, "set"] = set
        names[module, "range"] = names[module, "xrange"] = _Call(_short_range)
    return names


def _short_range(*arguments: int) -> list[int]:
    if len(numbers := range(*arguments)) > 1000:
        raise pickle.UnpicklingError("a range too long for a genotype")
    return list(numbers)


class _Reader(pickle.Unpickler):
    def __init__(self, file, names: dict):
        super().__init__(file, encoding="latin1")  # of the strings of Python 2
        self._names = names

    def find_class(self, module: str, name: str):
        try:
            return self._names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid):
        if isinstance(pid, tuple) and pid and pid[0] == "module":  # a class, with its source text
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        _, dtype, key, _, size = pid[:5]
        if not isinstance(dtype, torch.dtype) or type(size) is not int:
            raise pickle.UnpicklingError("a storage of an unknown type")
        return _Storage(str(key), dtype, size)


def read_pickled(path: str | Path) -> PickledModel:
    """The model in a file of torch.save(model). Raises InputError if it is damaged, or names anything unexpected."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            zipped = zipfile.is_zipfile(file)
            if zipped:
                check_zip(path)
            root, storages = (_read_zip if zipped else _read_older)(file)
        found: dict[str, Tensor] = {}
        genotypes: list[tuple] = []
        _collect(root, "", storages, found, genotypes, set())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder") from error
    except Exception as error:  # a damaged or hostile pickle can make the unpickler raise anything
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: refused, since it is no language model of DARTS' code ({reason[:200]}); nothing in "
                         "it was run") from error
    if not found:
        raise InputError(f"{path}: holds no model with weights; replace it with an intact copy")
    return PickledModel(unwrapped(path, found), genotypes[0] if genotypes else None)


def _read_older(file) -> tuple[object, dict[str, Tensor]]:
    file.seek(0)
    names = _allowed()
    if _Reader(file, names).load() != MAGIC:
        raise ValueError("it does not begin as torch.save does")
    _Reader(file, names).load()  # the protocol's version
    if not _Reader(file, names).load().get("little_endian", True):
        raise ValueError("its numbers are in the other byte order")
    reader = _Noting(file, names)
    root = reader.load()
    storages = {}
    for key in _Reader(file, names).load():
        storage = reader.storages[str(key)]
        (size,) = struct.unpack("<q", file.read(8))
        if size != storage.size:
            raise ValueError("a storage has another size than announced")
        storages[storage.key] = _numbers(file.read(size * storage.dtype.itemsize), storage)
    return root, storages


def _read_zip(file) -> tuple[object, dict[str, Tensor]]:
    with zipfile.ZipFile(file) as archive:
        (main,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are in the other byte order")
        reader = _Noting(io.BytesIO(archive.read(main)), _allowed())
        root = reader.load()
        return root, {key: _numbers(archive.read(f"{folder}data/{key}"), storage)
                      for key, storage in reader.storages.items()}


class _Noting(_Reader):
    """Also notes which storages it meets."""

    def __init__(self, file, names: dict):
        super().__init__(file, names)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid):
        value = super().persistent_load(pid)
        if isinstance(value, _Storage):
            self.storages[value.key] = value
        return value


def _numbers(raw: bytes, storage: _Storage) -> Tensor:
    if len(raw) != storage.size * storage.dtype.itemsize:
        raise ValueError("it ends within a storage")
    return torch.frombuffer(bytearray(raw), dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)


def _collect(module, prefix: str, storages: dict[str, Tensor], found: dict[str, Tensor], genotypes: list,
             seen: set[int]) -> None:
    """The `state_dict` of a stub that was a module, and the genotypes on the way."""
    if id(module) in seen:
        raise ValueError("a module is part of itself or of two others")
    seen.add(id(module))
    attributes = module.attributes
    genotype = attributes.get("genotype")
    if genotype is not None and len(getattr(genotype, "arguments", ())) == 2:
        genotypes.append(genotype.arguments)
    for kind in "_parameters", "_buffers":
        for name, value in attributes.get(kind, {}).items():
            if type(value).__name__ == "Parameter":  # as torch 0.3 has it: a call with the tensor
                (value,) = value.arguments[:1]
            if isinstance(value, _Tensor):
                found[f"{prefix}{name}"] = value.build(storages)
    for name, child in attributes.get("_modules", {}).items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", storages, found, genotypes, seen)
