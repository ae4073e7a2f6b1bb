"""Write files whole or not at all: to a temporary neighbour, flushed to disk, then renamed over the target.

And read what others may have written: nothing here runs what is in a file, waits for a pipe, or takes flipped bits.
"""
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conas.errors import InputError

TEMPORARY = ".*.tmp*"  # matches the names of temporary files
DOS_FOLDER = 0x10  # in the attributes of a zip file's record


@contextmanager
def atomic_path(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path`, on an error it is removed.

    The temporary keeps the suffix of `path`, because some writers choose their format by it. What was at `path` goes
    to `keep`, if that is given: at every instant one of the two is whole.
    Raises OSError as the file system does (disk full, read-only folder); `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say what was being written
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    r"""Write `text` as UTF-8, atomically; what is no text, as in the name of a file, as `\udcff`, which JSON reads."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(path: str | Path) -> None:
    """Raise InputError, naming what is in the way, unless a file can be written at `path`. Nothing is written."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    there = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if there != path and not there.is_dir():
        raise InputError(f"{path}: cannot be written, since {there} is a file; move it away, or name another file")
    folder = there if there.is_dir() else there.absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written, since nothing may be written in {folder}; permit it, or name "
                         "another file")


def write_json(path: str | Path, obj) -> None:
    """Write `obj` as indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")


def check_regular(path: str | Path) -> None:
    """Raise OSError unless `path` is a file: opening a pipe would wait for ever, and some devices never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a pipe, a socket or a device, and no file")


def check_zip(path: str | Path) -> None:
    """Raise ValueError, saying what is wrong, unless every record of a zip file has its CRC-32 and is uncompressed.

    PyTorch does not compare checksums, and NumPy does only for what it reads to the end. Neither of them compresses,
    so that no file here unpacks to more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"its record {record.filename} is compressed")
                if record.is_dir() or record.external_attr & DOS_FOLDER:  # PyTorch then reads nothing
                    raise zipfile.BadZipFile(f"its record {record.filename} is marked as a folder")
                with archive.open(record) as file:
                    while file.read(2**20):
                        pass
    except Exception as error:  # damaged bytes can make it raise anything
        raise ValueError(str(error) or type(error).__name__) from error


def read_json(path: str | Path) -> object:
    """What a JSON file holds. Raises OSError if it cannot be opened, and ValueError as `parse_json` does."""
    check_regular(path)
    return parse_json(Path(path).read_text(encoding="utf-8"))


def read_json_lines(path: str | Path) -> list:
    """What each line of a file holds, as JSON. Raises as `read_json` does."""
    check_regular(path)
    return [parse_json(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def parse_json(text: str) -> object:
    """What a JSON text holds. Raises ValueError if it is not JSON.

    More than 64 levels of brackets and an object with the same key twice count as not JSON.
    """
    try:
        content = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error
    level, depth = [content], 0
    while level := [inner for value in level if isinstance(value, (dict, list))
                    for inner in (value.values() if isinstance(value, dict) else value)]:
        depth += 1
        if depth > 64:
            raise ValueError("too many brackets inside each other")
    return content


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has the same key twice")
    return content
