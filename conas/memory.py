"""How the C library treats memory that torch has freed, and what to say when there is no more."""
import ctypes
import errno
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors. Returns whether that was possible: with glibc only.

    Otherwise glibc gives large maps back to the system, and has every page of the next one cleared on its first touch:
    a sixth of the time of a search step with batches of 64, up to half of that of testing supernets with batches of
    256. A process then stays as large as it was at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and all([library.mallopt(M_MMAP_THRESHOLD, 2**30),
                                                library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])


# of RuntimeErrors: PyTorch's allocators on CPU, CUDA and Metal, C++, cuBLAS and cuDNN, oneDNN, threads, shared memory
SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
         "status_alloc_failed", "could not create a memory", "could not create a primitive",
         "can't start new thread", "unable to mmap")
# flags in the order of what a smaller value saves, and how that is said
SMALLER = {"batch_size": "a smaller --batch_size", "image_size": "a smaller --image_size",
           "checkpoint_cells": "--checkpoint_cells", "init_channels": "fewer --init_channels",
           "layers": "fewer --layers", "nhid": "a smaller --nhid", "bptt": "a smaller --bptt"}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if an error, or what it was raised from, says that memory could not be had, on whatever device."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS):
            return True
        error = error.__cause__
    return False


def needs_less(flags: Mapping[str, object]) -> str:
    """In one line, what would need less memory, of the flags that a command has, by name, with their values."""
    ways = [f"{way} ({flags[name]} now)" if flags[name] not in (None, False) else way
            for name, way in SMALLER.items() if name in flags and flags[name] is not True]
    ways = ways or ["fewer or smaller networks"]
    listed = f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]
    return f"out of memory; {listed} would need less. Nothing that was kept before is lost"
