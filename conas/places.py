"""Where a run's files are: paths are recorded absolute, and what moved together with a run is found again.

In the folder of a run:

    args.json     says under `folders` where that folder was when the run was started
    folders.json  lists where it has moved to since
    moved.json    data that are no longer where the run had them, and where --data found them instead
"""
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from conas import distributed
from conas.errors import InputError
from conas.files import read_json, write_json

MOVED, FOLDERS = "moved.json", "folders.json"


def absolute(path: str, *bases: str | Path) -> str:
    """The absolute spelling of a path, which is relative to the first of `bases` where it exists, else to here.

    Links stay as they are named, unless `..` comes after one.
    """
    path = os.path.expanduser(path)
    seen = [os.path.join(base, path) for base in (os.getcwd(), *bases)]
    path = next(filter(os.path.exists, seen), seen[0])
    short, real = os.path.abspath(path), os.path.realpath(path)
    return short if os.path.realpath(short) == real else real


def is_path(value: str, suffixes: str | tuple[str, ...]) -> bool:
    """Return True if a value ends in one of these, or is FILE:NAME where FILE does."""
    return value.endswith(suffixes) or (":" in value and "\n" not in value and
                                        value.rpartition(":")[0].endswith(suffixes))


def absolute_words(words: list[str], flags: dict[str, str | tuple[str, ...]], *bases: str | Path) -> list[str]:
    """The words of a command with all paths among them made absolute.

    `flags` are those whose value is a path, each with the suffixes of which its value must have one to be a path.
    """
    made = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag in flags and is_path(value, flags[flag]):
            word = f"{flag}={absolute(value, *bases)}"
        elif made and made[-1] in flags and is_path(word, flags[made[-1]]):
            word = absolute(word, *bases)
        made.append(word)
    return made


def same(one: object, other: object, *bases: str | Path) -> bool:
    """Return True if two values are equal or, if both are texts, name one place, seen from here or one of `bases`."""
    if one == other:
        return True
    if not (isinstance(one, str) and isinstance(other, str)) or "\0" in one + other:
        return False
    return os.path.realpath(other) in {os.path.realpath(os.path.join(base, one)) for base in (os.getcwd(), *bases)}


def earlier_folders(run: Path) -> list[str]:
    """Where the folder of a run has been, as far as its files tell: where it was made, then where it has moved to."""
    return [*_texts(run / "args.json", "folders"), *_texts(run / FOLDERS, None)]


def _texts(path: Path, key: str | None) -> list[str]:
    """The texts of a list in a JSON file, of its field `key` if that is given; none if it cannot be read."""
    try:
        content = read_json(path)
        content = content if key is None else content.get(key, [])
    except (OSError, ValueError, AttributeError):
        return []
    return [text for text in content if isinstance(text, str)] if isinstance(content, list) else []


def note_folder(run: Path) -> None:
    """Record where the folder of a run is now, unless its files say so. args.json itself stays as it was written."""
    here = os.path.abspath(run)
    if earlier_folders(run)[-1:] != [here]:
        write_json(run / FOLDERS, [*_texts(run / FOLDERS, None), here])


def moved_along(run: Path, path: str) -> Iterator[Path]:
    """Where a recorded absolute path is now if it was moved together with the folder of a run."""
    here = os.path.abspath(run)
    for folder in reversed(earlier_folders(run)):
        if folder != here and os.path.isabs(folder) and os.path.isabs(path):
            yield Path(os.path.abspath(os.path.join(here, os.path.relpath(path, folder))))


def find_data(checkpoint: Path, recorded: str, given: str | None = None) -> Path:
    """The folder of the data that the checkpoint of a run says were in `recorded`, or `given`, if that is not None.

    It is sought where an earlier --data found it, where it was, and where it would be if it had been moved together
    with the run. A relative path of an earlier version is seen from here, from the run's space, and from the root.
    Raises InputError if it is nowhere.
    """
    if given is not None:
        return Path(given)
    if "\0" in recorded:
        raise InputError(f"{checkpoint}: the folder of its data has no possible name; name theirs with --data")
    run = Path(os.path.abspath(checkpoint)).parent.parent
    if (found := read_moved(run).get(recorded)) is not None and Path(found).is_dir():
        return Path(found)
    places = Path(absolute(recorded, run.parent, run.parent.parent)), *moved_along(run, found or recorded)
    for place in places:
        if place.is_dir():
            if place != places[0]:
                _say(f"{run}: its data were in {recorded}, and have moved with it to {place}")
            return place
    raise InputError(f"{checkpoint}: its data were in {found or recorded}, and there is no such folder; name theirs "
                     "with --data, once for this run")


def remember_data(run: Path, recorded: str, now: str | Path) -> None:
    """Record in the folder of a run that its data are in `now`, unless they are still found without that."""
    if distributed.rank() or not (run / "args.json").is_file():
        return
    try:
        find_data(run / "checkpoints" / "none", recorded)
    except InputError:
        try:
            write_json(run / MOVED, read_moved(run) | {recorded: absolute(str(now))})
            note_folder(run)
        except OSError as error:
            _say(f"{run / MOVED}: cannot be written ({error.strerror}), so --data is needed the next time too")
        else:
            _say(f"{run}: its data are in {absolute(str(now))} from now on; no later command needs --data for it")


def read_moved(run: Path) -> dict[str, str]:
    """The places that --data has recorded in the folder of a run. Raises InputError if its record is damaged."""
    try:
        moved = read_json(run / MOVED)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{run / MOVED}: damaged ({error}); delete it, and name the data with --data again") from error
    if not isinstance(moved, dict) or not all(isinstance(place, str) for place in moved.values()):
        raise InputError(f"{run / MOVED}: damaged; delete it, and name the data with --data again")
    return moved


_said: set[str] = set()


def _say(text: str) -> None:
    """Print a line on stderr, once."""
    if not distributed.rank() and text not in _said:
        _said.add(text)
        print(text, file=sys.stderr)
