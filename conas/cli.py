"""What every script shares at its outermost edge: flags from dataclasses, one-line errors, exit codes, the device."""
import argparse
import dataclasses
import difflib
import errno
import io
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence

import torch

from conas import distributed
from conas.errors import InputError, Stopped, one_line
from conas.memory import is_out_of_memory, keep_freed_memory, needs_less
from conas.places import absolute, is_path

STOPPED = "stopped; start the same command again to go on from what was kept"


def option(default, help: str, *, low=None, high=None, choices: Sequence[str] | None = None, even: bool = False,
           path: str | tuple[str, ...] | None = None, switch: bool = False):
    """A dataclass field that is also a command-line flag. `low` and `high` are inclusive bounds.

    With `path`, a value that ends in it, or in one of them, is a path, and is made absolute: "" for any value. With
    `switch`, --NAME alone is its value "on", and --no-NAME "off".
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices,
                                                        "even": even, "path": path, "switch": switch})


def path_flags(groups: Sequence[type]) -> dict[str, str | tuple[str, ...]]:
    """The flags of dataclasses whose values are paths, each with the suffix, or suffixes, that make its value one."""
    return {f"--{field.name}": field.metadata["path"] for group in groups for field in dataclasses.fields(group)
            if field.metadata["path"] is not None}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are InputErrors: one line, not a usage text."""

    flags: typing.ClassVar[dict[str, object]] = {}  # of the command that was parsed last, with their values

    def parse_known_args(self, *arguments, **settings):
        found, unknown = super().parse_known_args(*arguments, **settings)
        Parser.flags = vars(found)
        return found, unknown

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def parse(description: str, groups: Sequence[type], argv: Sequence[str] | None = None) -> list:
    """Parse `argv` into one instance of each dataclass in `groups`; a dataclass is a group of flags in --help.

    Its docstring is the group's title, its fields are `option`s. Raises InputError for unknown flags, values that
    do not parse, and values out of range.
    """
    parser = Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in groups:
        arguments = parser.add_argument_group(group.__doc__.splitlines()[0])
        types_of_fields = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add_flag(arguments, field, types_of_fields[field.name])
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        parser.error(f"{unknown[0]}: unknown flag" + (f"; did you mean {near[0]}?" if near else ""))
    for group in groups:
        for field in dataclasses.fields(group):
            value, suffix = getattr(values, field.name), field.metadata["path"]
            _check_range(field, value)
            if value and suffix is not None and is_path(value, suffix):
                setattr(values, field.name, absolute(value))
    return [group(**{f.name: getattr(values, f.name) for f in dataclasses.fields(group)}) for group in groups]


def _add_flag(arguments, field: dataclasses.Field, kind) -> None:
    if isinstance(kind, types.UnionType):  # X | None: absent unless given
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    shown = "" if field.default is None else f" (default: {field.default})"
    text = field.metadata["help"].replace("%", "%%")
    settings = {"default": field.default, "help": text + shown}
    if kind is bool:
        settings |= {"action": argparse.BooleanOptionalAction}
    elif typing.get_origin(kind) is tuple:
        settings |= {"type": typing.get_args(kind)[0], "nargs": "+", "choices": field.metadata["choices"]}
    else:
        settings |= {"type": kind, "choices": field.metadata["choices"],
                     "metavar": None if field.metadata["choices"] else kind.__name__.upper()}
    if field.metadata["switch"]:
        settings |= {"nargs": "?", "const": "on"}
        arguments.add_argument(f"--no-{field.name}", dest=field.name, action="store_const", const="off",
                               default=argparse.SUPPRESS, help=f"--{field.name} off")
    arguments.add_argument(f"--{field.name}", **settings)


def _check_range(field: dataclasses.Field, value) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{field.name} {value}: must be a finite number")
        if low is not None and value < low:
            raise InputError(f"--{field.name} {value}: must be at least {low}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise InputError(f"--{field.name} {value}: must have at most 18 digits")
        if high is not None and value > high:
            raise InputError(f"--{field.name} {value}: must be at most {high}")
        if field.metadata["even"] and value % 2:
            raise InputError(f"--{field.name} {value}: must be even, since a reduction splits channels in two halves")


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code: 0, 2 for the user's errors (one line on stderr), 130 and 143 if stopped.

    A lack of memory is one of the user's errors: the line names the flags that would help. Under torchrun `main` runs
    in all processes; 1 is the code of one that has lost another.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        signal.signal(signal.SIGTERM, _terminate)
        keep_freed_memory()
        with distributed.processes():
            main()
    except InputError as error:  # a file that cannot be read may claim too much memory, or there is too little of it
        return _complain(f"{error} (or there was too little memory to read it)" if is_out_of_memory(error) else error)
    except Stopped as stop:
        _say(f"\n{stop}")
        return stop.code
    except KeyboardInterrupt:
        _say(f"\n{STOPPED}")
        return 130
    except BrokenPipeError:  # `python test_all.py | head`: nobody reads on, which is no error of ours
        sys.stderr.close()
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _complain(needs_less(Parser.flags))
    except OSError as error:
        if is_out_of_memory(error):
            return _complain(needs_less(Parser.flags))
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
                           errno.EIO) and error.filename:
            return _complain(f"{error.filename}: {error.strerror}; name another file or folder")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return _complain(f"{error.filename or 'output'}: {error.strerror}; nothing earlier was changed. "
                         "Free space or permit writing there, then start the same command again")
    return 0


def _terminate(*_) -> None:
    raise Stopped(STOPPED, 143)


def _complain(error) -> int:
    _say(f"error: {one_line(error)}")
    return 2


def _say(text: str) -> None:
    if distributed.first_to_report(text):
        print(text, file=sys.stderr)


def find_device(name: str, deterministic: bool = False) -> torch.device:
    """The device for a `--device` value: auto, cpu, cuda, cuda:N or mps. Raises InputError if it is not there.

    With `deterministic`, its kernels are those that give the same bits every time; PyTorch warns by name of any that
    has no such form.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    if distributed.size() > 1:
        return _own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else
                            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices; "
                         "use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: no Metal device here; use --device cpu or auto")
    return device


def _own_device(name: str) -> torch.device:
    """Of one among several processes: on GPUs each has its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: several processes use auto, cpu or cuda, which gives each a GPU of its own")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torchrun started more processes here than the {torch.cuda.device_count()} "
                         "CUDA devices that this machine shows; give a smaller --nproc-per-node, or --device cpu")
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device
