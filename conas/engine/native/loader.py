"""Compile kernels.c at its first use, into the user's cache, and load it; or say in words why there are no kernels.

Nothing is compiled at installation. The cache is $XDG_CACHE_HOME/conas (~/.cache/conas), which only its owner may read.
A file there is named by all that it depends on, source, flags, compiler and processor, and by its own content: one that
is broken, or that somebody else has put there, is compiled again. CONAS_NATIVE=0 turns them off.
"""
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from conas.engine.native.library import Library
from conas.engine.native.selfcheck import wrong_kernels

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = sorted(SOURCE.parent.glob("*.c"))  # which it includes
FLAGS = "-std=gnu11", "-O3", "-fPIC", "-shared", "-w"
NATIVE = ("-march=native",), ("-mcpu=native",), ()  # the first of these that a compiler takes
PATIENCE = 300  # seconds for a compiler


class Unavailable(Exception):
    """There are no kernels; the message says why."""


def kernels() -> Library | None:
    """The kernels, compiled, loaded and compared with torch, or None; `why_no_kernels` says why."""
    return _found()[0]


def why_no_kernels() -> str | None:
    """Say in one line why there are no kernels, or return None if there are."""
    return _found()[1]


@lru_cache(maxsize=1)
def _found() -> tuple[Library | None, str | None]:
    try:
        return load(), None
    except Unavailable as error:
        return None, str(error)


def load() -> Library:
    """Compile, if need be, load and compare. Raises Unavailable."""
    if (setting := os.environ.get("CONAS_NATIVE", "1")) != "1":
        raise Unavailable(f"CONAS_NATIVE={setting}")
    compiler = find_compiler()
    try:
        library = Library(str(compiled(compiler, cache_folder())))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        raise Unavailable(f"the kernels cannot be compiled or loaded ({_first_line(error)})") from error
    if wrong := wrong_kernels(library):
        raise Unavailable(f"{', '.join(wrong)} of {library.path} computes other numbers than torch")
    return library


def find_compiler() -> list[str]:
    """The C compiler as the beginning of a command: CC, or cc, gcc or clang. Raises Unavailable."""
    if named := shlex.split(os.environ.get("CC", "")):
        if not shutil.which(named[0]):
            raise Unavailable(f"CC names {named[0]}, which is not there")
        return named
    for name in "cc", "gcc", "clang":
        if path := shutil.which(name):
            return [path]
    raise Unavailable("there is no C compiler (cc, gcc, clang or CC)")


def cache_folder() -> Path:
    """The folder for compiled files, made if need be. Raises Unavailable if it is not this user's alone."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "conas"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{folder} cannot be written ({_first_line(error)}); XDG_CACHE_HOME names another") from error
    if not stat.S_ISDIR(about.st_mode) or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
        raise Unavailable(f"{folder} is not a folder of this user; XDG_CACHE_HOME names another")
    if about.st_mode & 0o077:  # what others may have put there is not used
        for path in folder.iterdir():
            path.unlink()
        folder.chmod(0o700)
    return folder


def compiled(compiler: list[str], folder: Path) -> Path:
    """The compiled file, from the cache or new. Raises OSError or SubprocessError."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    openmp = openmp_library()
    about = [*(part.read_bytes() for part in PARTS), repr((FLAGS, NATIVE, compiler, openmp)).encode(), version,
             processor().encode()]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in about)).hexdigest()[:24]
    if path := _cached(folder, key):
        return path
    with _locked(folder / f"{key}.lock"):  # a second process waits for the first
        return _cached(folder, key) or _compile(compiler, folder, key, openmp)


def _cached(folder: Path, key: str) -> Path | None:
    """The file of this key whose content is that of its name; others of the key are deleted."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        about = path.lstat()
        own = stat.S_ISREG(about.st_mode) and (not hasattr(os, "getuid") or about.st_uid == os.getuid())
        if own and not about.st_mode & 0o022 and path.name == _name(key, path):
            return path
        path.unlink()
    return None


def _name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _compile(compiler: list[str], folder: Path, key: str, openmp: str | None) -> Path:
    """By the first set of flags that works: for this processor and with OpenMP, if possible."""
    error: Exception | None = None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "kernels.so"
        for parallel in ([True, False] if openmp else [False]):
            for native in NATIVE:
                # linked with the very OpenMP that torch has loaded, by its path: another one would have other threads
                flags = [*FLAGS, *native, *(["-fopenmp"] if parallel else [])]
                try:
                    if parallel:
                        part = str(Path(temporary) / "kernels.o")
                        _run([*compiler, *(flag for flag in flags if flag != "-shared"), "-c", str(SOURCE), "-o", part])
                        _run([*compiler, "-shared", "-Wl,--no-undefined", part, openmp, "-lm", "-lc", "-o", str(made)])
                    else:
                        _run([*compiler, *flags, str(SOURCE), "-lm", "-o", str(made)])
                except subprocess.SubprocessError as failed:
                    error = failed
                    continue
                made.chmod(0o600)
                path = folder / _name(key, made)
                os.replace(made, path)
                return path
    raise error or OSError("no compiler")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)


def openmp_library() -> str | None:
    """The path of the GNU OpenMP that torch has loaded, or None if it has none or that is not to be found."""
    torch.get_num_threads()
    with suppress(OSError):
        loaded = {line.split(None, 5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines()
                  if "libgomp" in line}
        home = Path(torch.__file__).parent.parent
        of_torch = sorted(path for path in loaded if Path(path).is_relative_to(home)
                          and Path(path).relative_to(home).parts[0].startswith("torch"))
        return (of_torch or sorted(loaded) or [None])[0]
    return None


def processor() -> str:
    """What `-march=native` depends on."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        kept = ("model", "flags", "features", "cpu", "vendor", "isa")
        return "\n".join(line for line in lines if line.lower().startswith(kept) and "mhz" not in line.lower())
    return f"{platform.machine()} {platform.processor()} {sys.platform}"


@contextmanager
def _locked(path: Path):
    """Hold a lock that ends with the process."""
    try:
        import fcntl
    except ImportError:  # a system without: two processes compile the same
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(text).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(error).__name__)
