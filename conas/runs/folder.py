"""Run folders: one folder holds one run, is never overwritten, and goes on when the same command is started again.

    search-EXP/                                     of train_search.py; train-EXP/ is of train.py
        args.json  log.txt  metrics.jsonl           arguments, what was printed, one line of numbers an epoch
        moved.json  folders.json                    where its data and it itself are, if moved: conas/places.py
        checkpoints/epoch_000.pt ...                networks by epoch
        resume.pt  resume.before.pt                 all that the next step needs, and the same of some minutes earlier
        checkpoints/best.pt                         train-EXP: the network that did best on the held-out images
        genotypes/epoch_000.json ...  genotype.json  search-EXP: the cells by epoch, and the last
        cells/                                      search-EXP: pictures of the last cells
        probabilities/epoch_000.npz ...  test_all.csv  written by test_all.py
"""
import json
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

import conas
from conas import distributed
from conas.data.images import DATASETS
from conas.data.listing import EARLIER, readable_suffixes
from conas.errors import InputError
from conas.files import TEMPORARY, read_json, write_json, write_text
from conas.places import moved_along, note_folder, same
from conas.runs.extension import Stretches, stretches_of

# Where and how fast a run computes is free to change between two starts; what it computes is not. Which images
# these are, their fingerprint tells, and not a flag.
FREE = {"data", "device", "workers", "report_freq", "save", "tensorboard", "compile", "checkpoint_freq",
        "checkpoint_minutes", "on_nan", "deterministic", "skip_bad_images", "checkpoint_cells", "cuda_graph", "engine",
        "suffixes", "follow_links", "extend", "check_only", "curvature", "init_cell"}  # init_arch decides
OF_A_MACHINE = {"data", "workers"}  # may differ between processes that compute one run together
PATHS = {"arch", "init_arch", "init_from"}  # one place has several spellings, and others on other machines


class Run:
    """The folder of a run, opened for writing. Use it as a context: inside, no other process can open it.

    Of processes that compute one run together, the first alone opens it and writes; the others know where it is.
    Raises InputError if another process has it open, if the folder holds a run with other arguments, or something
    that is not a run.
    """

    def __init__(self, folder: Path, arguments: dict):
        self.folder, self.arguments = folder, arguments
        self.stretches = Stretches(((0, arguments.get("epochs", 1)),))
        # The system releases this lock when the process ends, however it ends: it cannot become stale.
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> "Run":
        distributed.check_equal("flags", {k: Path(v).name if k in PATHS and v else v
                                          for k, v in self.arguments.items() if k not in OF_A_MACHINE})
        with distributed.raise_on_all_ranks():
            if distributed.rank() == 0:
                self._take()
        return self

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.folder}: another process is at work on this run; wait for it or stop it, or give "
                             "--save another name") from error
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        self._lock.release()

    def _open(self) -> None:
        folder, arguments = self.folder, self.arguments
        path = folder / "args.json"
        if path.exists():
            before = read_arguments(folder)
            if differ := _differences(folder, before, arguments, _has_saved(folder)):
                if _has_saved(folder):
                    more = arguments.get("epochs", 0) > before.get("epochs", 0) and not arguments.get("extend")
                    raise InputError(f"{folder}: holds a run with {differ}; start it with those arguments to go on, or "
                                     f"give --save another name{', or --extend to add epochs' if more else ''}")
                write_json(path, read_json(path) | {"arguments": arguments})
                self.log(f"{folder}: nothing of the run with {differ} was saved, so it begins with the flags of now")
            note_folder(folder)
        elif folder.is_dir() and any(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise InputError(f"{folder}: is not empty and holds no run; give --save another name, or move it away")
        else:
            write_json(path, {"version": conas.__version__, "folders": [str(folder.absolute())],
                              "arguments": arguments})
        for unfinished in folder.rglob(TEMPORARY):  # of a process that was killed while it wrote
            unfinished.unlink()

    def extend(self, following: int) -> None:
        """Read the run's stretches, and begin a new one with the epoch `following` if it now has more epochs."""
        self.stretches, text = stretches_of(self.folder, self.arguments, following)
        if text:
            self.log(text)

    def log(self, text: str) -> None:
        """Print a line, above a progress bar if there is one, and keep it in log.txt."""
        if distributed.rank():
            return
        tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")

    def write_metrics(self, rows: list[dict]) -> None:
        """Write metrics.jsonl anew: whole, so that no epoch is ever there twice or missing."""
        if distributed.rank() == 0:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def path(self, kind: str, epoch: int, suffix: str) -> Path:
        """For example checkpoints/epoch_007.pt."""
        return self.folder / kind / f"epoch_{epoch:03d}{suffix}"


def begun_with(folder: Path) -> dict:
    """`read_arguments` of the first process, on all; {} before the run's first start."""
    return distributed.from_rank0(lambda: read_arguments(folder) if (folder / "args.json").exists() else {})


def portable(arguments: dict) -> dict:
    """Arguments without those that are absolute paths of a machine."""
    return {name: value for name, value in arguments.items() if not os.path.isabs(str(value))}


def read_arguments(folder: Path) -> dict:
    """The arguments of the run in `folder`. Raises InputError if there is none or its args.json is damaged.

    A run from before there was --test_subset has the value of --subset, which then held for both splits, and one from
    before there was --flip that of its data set; --resize was crop, and --stem cifar. Searches had none of the remedies
    for a collapse. A --cutout_length that no --cutout uses is None.
    """
    arguments = _stored_arguments(folder)
    if "subset" in arguments:
        arguments.setdefault("test_subset", arguments["subset"])
    dataset = arguments.get("dataset")
    if isinstance(dataset, str) and dataset in DATASETS:  # else a text
        arguments.setdefault("flip", DATASETS[dataset].flip)
        arguments.setdefault("resize", "crop")
        if "unrolled" in arguments:  # a search
            for name, value in {"stem": "cifar", "stop_on": "never", "alpha_warmup": 0, "drop_path_prob": 0.0}.items():
                arguments.setdefault(name, value)
        arguments["cutout_length"] = arguments.get("cutout_length") if arguments.get("cutout") else None
    return arguments


def predates(folder: Path, flag: str) -> bool:
    """Return True if `folder` holds a run from before the flag existed. Raises InputError for a damaged args.json."""
    return (folder / "args.json").exists() and flag not in _stored_arguments(folder)


def read_record(folder: Path) -> dict:
    """What the args.json of the run in `folder` holds. Raises InputError if there is none or it is damaged."""
    path = folder / "args.json"
    try:
        return {**read_json(path)}
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such run; start {_script(folder)} there first, or name another "
                         "with --save") from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    return f"{path}: damaged; delete it, if you know that the run's arguments are the same"


def _stored_arguments(folder: Path) -> dict:
    path, record = folder / "args.json", read_record(folder)
    if "arguments" not in record:
        raise InputError(_damaged(path))
    if not isinstance(record["arguments"], dict):
        raise InputError(f"{path}: damaged; its arguments are not an object")
    return record["arguments"]


def suffixes_of(folder: Path) -> list[str]:
    """Of the files that count as images in the run in `folder`; in a new run, of all formats that can be read here.

    Processes of one run get what the first of them finds. Raises InputError for a damaged args.json.
    """
    def find() -> list[str]:
        if not (folder / "args.json").exists():
            return list(readable_suffixes())
        found = read_arguments(folder).get("suffixes", list(EARLIER))
        if not (isinstance(found, list) and found and all(isinstance(suffix, str) for suffix in found)):
            raise InputError(f"{folder / 'args.json'}: damaged; its suffixes are not a list of texts")
        return found

    return distributed.from_rank0(find)


def _differences(folder: Path, before: dict, now: dict, may_extend: bool) -> str:
    """The arguments that decide what is computed and differ between two starts, in words.

    More epochs are none of them with --extend, which a run needs that `may_extend`.
    """
    if may_extend and now.get("extend") and (now.get("epochs") or 0) > (before.get("epochs") or 0):
        before = before | {"epochs": now["epochs"]}
    names = (name for name in sorted(before.keys() | now.keys())
             if name not in FREE and not _is_same(folder, name, before.get(name), now.get(name)))
    return ", ".join(f"--{name} {before.get(name)} (now {now.get(name)})" for name in names)


def _has_saved(folder: Path) -> bool:
    """Return True if a run has kept anything of its steps."""
    return any(next(folder.glob(pattern), None) for pattern in (
        "resume*.pt", "checkpoints/*", "genotypes/*", "genotype.json", "metrics.jsonl"))


def _is_same(folder: Path, name: str, before: object, now: object) -> bool:
    if before == now or name not in PATHS or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    return same(before, now, folder.parent, folder.parent.parent) or Path(now) in moved_along(folder, before)


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by epoch. Raises InputError if there is none."""
    found = {int(match[1]): path for path in sorted((folder / "checkpoints").glob("epoch_*.pt"))
             if (match := re.fullmatch(r"epoch_(\d+)\.pt", path.name))}
    if not found:
        raise InputError(f"{folder}: has no checkpoints; start {_script(folder)} there first, or name another run "
                         "with --save")
    return dict(sorted(found.items()))


def best_checkpoint(folder: Path) -> Path:
    """The network of a `train-` run that did best on its held-out images. Raises InputError if there is none."""
    path = folder / "checkpoints" / "best.pt"
    if not path.exists() and (folder / "metrics.jsonl").exists():
        raise InputError(f"{path}: no such checkpoint; if log.txt says that in no epoch were all predictions finite, "
                         "train again with a lower learning rate under another --save name")
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; start {_script(folder)} there first, or name another run "
                         "with --save")
    return path


def _script(folder: Path) -> str:
    return "train.py" if folder.name.startswith("train-") else "train_search.py"


def folder_name(save: str, flag: str = "--save") -> str:
    """Check the value of a flag: it becomes part of a folder's name."""
    if not re.fullmatch(r"[\w.-]{1,50}", save):
        raise InputError(f"{flag} {save}: use letters, digits, dots, dashes and underscores only, at most 50")
    return save
