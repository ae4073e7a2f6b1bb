"""The kernels of kernels.c, and of what it includes, as Python calls, by type and width."""
import ctypes
import os
from collections.abc import Sequence

import torch

from conas.engine.native.cores import Cores

POINTER, INT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# name: the types of its arguments; the last are the threads
KERNELS = {
    "unit_forward": [POINTER] * 8 + [INT],
    "unit_backward": [POINTER] * 8 + [REAL, POINTER, POINTER, INT] + [POINTER] * 3 + [INT] + [POINTER] * 4 + [INT],
    "pools_forward": [POINTER] * 7 + [INT],
    "pools_backward": [POINTER] * 6 + [INT, POINTER, POINTER, INT] + [POINTER] * 3 + [INT],
    "combine": [INT] * 4 + [POINTER] * 5 + [INT, INT],
    "dots": [INT] * 4 + [POINTER] * 5 + [INT, POINTER, INT],
    "evaluate": [POINTER, POINTER, INT, POINTER, POINTER, POINTER, INT, INT],
}
SUFFIXES = {torch.float32: ("float", "float_wide"), torch.float64: ("double", "double")}
TYPES = tuple(SUFFIXES)  # of the maps that there are kernels for
SMALL = 32768  # fewer numbers are done by one thread before another is awake; torch's own limit
cores = Cores()
_forked = False  # this process is the child of one that may have had threads, which it has not


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads(numbers: int) -> int:
    """How many a kernel may use for a map of so many numbers: torch's number, but one if the map is small.

    One too where threads have to wait for cores, and after a fork, where OpenMP would wait for lost threads.
    """
    many = torch.get_num_threads()
    return 1 if many == 1 or _forked or numbers < SMALL or cores.crowded() else many


class Library:
    """A compiled kernels.c. Its functions take addresses, and raise MemoryError."""

    def __init__(self, path: str):
        library = ctypes.CDLL(path)
        self.path, self._tables = path, {}
        for dtype, suffixes in SUFFIXES.items():
            for wide, suffix in enumerate(suffixes):
                suffix = suffix if hasattr(library, f"evaluate_{suffix}") else suffixes[0]
                self._tables[dtype, bool(wide)] = Table(library, suffix)

    def of(self, dtype: torch.dtype, channels: int) -> "Table":
        """The kernels for maps of this type: vectors of 64 bytes, if there are any, where the channels fill them."""
        return self._tables[dtype, channels % 16 == 0]

    def tables(self) -> list["Table"]:
        """Those of all types and widths."""
        return list(self._tables.values())

    def __deepcopy__(self, _memo: dict) -> "Library":
        return self  # a copy of a network has the same


class Table:
    """The kernels of one type and width, as attributes."""

    def __init__(self, library: ctypes.CDLL, suffix: str):
        for name, types in KERNELS.items():
            function = library[f"{name}_{suffix}"]
            function.argtypes, function.restype, function.errcheck = types, ctypes.c_int, _check
            setattr(self, name, function)


def _check(result: int, function, _arguments) -> int:
    if result:
        raise MemoryError(f"{function.__name__}: out of memory")
    return result


def pointers(addresses: Sequence[int | None]) -> ctypes.Array:
    """As an array of pointers; None is a null pointer."""
    return (POINTER * len(addresses))(*addresses)


def integers(values: Sequence[int]) -> ctypes.Array:
    return (INT * len(values))(*values)


def reals(values: Sequence[float]) -> ctypes.Array:
    return (REAL * len(values))(*values)
