"""Write the committee that test_ensemble.py wrote as one file that needs no CoNAS: uint8 images in, probabilities out.

    python -m ensemble.export committee.pt2 --save NAME
    python -m ensemble.export committee.pt2 --onnx committee.onnx
    python -m ensemble.export --check

The first file is written by torch.export, for the CPU and any number of images; with --onnx, which needs the packages
onnx, onnxscript and onnxruntime, another one for other programs. Both hold what is needed to prepare an image: classes,
mode and image_size, as JSON, in a part called committee.json. Both are compared with the committee on test images
first. --check tries files for the committee in every runtime that is installed, and prints what came out.
"""
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import conas
from conas.cli import Parser, run
from conas.commands.scoring import load_images, predict
from conas.errors import InputError
from conas.files import atomic_path, check_writable
from conas.runs.folder import folder_name
from conas.runs.scores import finite_rows, remark
from ensemble.combine.network import CommitteeNetwork, load_committee
from ensemble.deploy.committee import PlainCommittee
from ensemble.deploy.files import check_packages, equal_on, export_program, missing_packages, write_onnx, write_pt2
from ensemble.deploy.runtimes import RUNTIMES, TOLERANCE, table

ROOT = Path(__file__).resolve().parent.parent
SIZES = [1, 7, 64]  # of batches, in which files are compared


def about(network: CommitteeNetwork, dtype: torch.dtype = torch.uint8) -> str:
    """What a user of the file has to know, as JSON."""
    return json.dumps({"format": "conas-committee-export", "version": conas.__version__, "members": network.names,
                       "combination": network.combination, "dataset": network.dataset["name"],
                       "classes": network.classes, "mode": "L" if network.channels == 1 else "RGB",
                       "image_size": network.dataset["image_size"], "input": str(dtype).removeprefix("torch."),
                       "resize": network.dataset.get("resize", "crop")}, ensure_ascii=False)


def compare(run: Callable[[Tensor], object], images: Tensor, expected: Tensor, sizes: Sequence[int], path: str
            ) -> float:
    """The largest difference of a file's probabilities from `expected`. Raises InputError if it exceeds TOLERANCE."""
    difference = equal_on(images, sizes, run, expected)
    if not difference <= TOLERANCE:
        raise InputError(f"{path}: not written, since its probabilities on test images differ from the committee's by "
                         f"up to {difference:.2g}; report this with the versions of torch and onnxruntime")
    return difference


def test_images(network: CommitteeNetwork, data: str | None, count: int = 256) -> tuple[Tensor, Tensor]:
    """Some test images, uint8, and the committee's probabilities for them, float64, by the way that tests take.

    Raises InputError if the data set is not where the members had it, nor in the folder `data`, and for a member some
    of whose predictions are not finite.
    """
    info = network.dataset
    images = load_images(network.checkpoints[0], info, data, "test")
    chosen = torch.arange(min(count, len(images)))
    logits = torch.stack([predict(member, images, 100, torch.device("cpu"), chosen, crop=crop)
                          for member, crop in zip(network.networks, network.crops)])
    for name, own in zip(network.names, logits):
        if bad := remark(int((~finite_rows(own)).sum()), len(own)):
            raise InputError(f"{name}: {bad} on test images, so nothing is exported; start test_ensemble.py again with "
                             "--spaces or --members that leave it out")
    return next(images.gather([chosen], "cpu"))[0], network.combine(logits)


test_images.__test__ = False  # not a pytest test


def write(path: str, program: torch.export.ExportedProgram, text: str, images: Tensor, expected: Tensor,
          sizes: Sequence[int]) -> float:
    """Write a file of either kind; only what was read again and found equal gets its name. Returns the difference."""
    suffix = Path(path).suffix
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, f"committee{suffix}")
        (write_pt2 if suffix == ".pt2" else write_onnx)(there, program, text)
        load = next(runtime.load for runtime in RUNTIMES if runtime.suffix == suffix)  # torch.export, onnxruntime
        difference = compare(load(there), images, expected, sizes, path)
        with atomic_path(path) as temporary:
            temporary.write_bytes(there.read_bytes())
    return difference


def check(program: torch.export.ExportedProgram, text: str, images: Tensor, expected: Tensor, sizes: Sequence[int],
          pt2: str | None, onnx: str | None) -> list[str]:
    """The table of what files of the committee, which are written if they are None, do in every runtime there is."""
    with tempfile.TemporaryDirectory() as folder:
        if pt2 is None:
            write_pt2(pt2 := str(Path(folder, "committee.pt2")), program, text)
        if onnx is None and not missing_packages("onnx", "onnxscript"):
            write_onnx(onnx := str(Path(folder, "committee.onnx")), program, text)
        return table(Path(pt2), onnx and Path(onnx), images, expected, sizes)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for a committee that cannot be read or a file that is not equal."""
    parser = Parser(prog="python -m ensemble.export", description=__doc__.splitlines()[0])
    parser.add_argument("path", metavar="FILE.pt2", nargs="?", help="the file to write")
    parser.add_argument("--onnx", metavar="FILE.onnx", help="write this file too")
    parser.add_argument("--check", action="store_true", help="try the committee in every runtime that is installed")
    parser.add_argument("--batch", type=int, metavar="N", help="take N images, not any number")
    parser.add_argument("--max_batch", type=int, metavar="N", help="take any number of images up to N")
    parser.add_argument("--float_input", action="store_true", help="take images as float32 numbers from 0 to 255")
    parser.add_argument("--save", default="EXP", help="name of the committee: its folder is committee-NAME")
    parser.add_argument("--data", help="where the data set is, if it is no longer where the search had it")
    values = parser.parse_args(argv)
    check_flags(values)
    save = folder_name(values.save)
    images, expected = test_images(load_committee(ROOT, save), values.data)
    definition = load_committee(ROOT, save, prepare=lambda network: network)
    dtype = torch.float32 if values.float_input else torch.uint8
    program = export_program(PlainCommittee(definition), tuple(images.shape[1:]), dtype=dtype, batch=values.batch,
                             max_batch=values.max_batch)
    largest = min(len(images), values.max_batch or len(images))
    sizes = [values.batch] if values.batch else sorted({min(size, largest) for size in SIZES})
    if len(images) < sizes[0]:
        raise InputError(f"--batch {values.batch}: the files are compared on {len(images)} test images first; give at "
                         "most that")
    text, given = about(definition, dtype), images.to(dtype)
    for path in (values.path, values.onnx):
        if path is not None:
            difference = write(path, program, text, given, expected, sizes)
            print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, probabilities of {len(images)} test images equal "
                  f"to the committee's within {difference:.1g}")
    if values.check:
        print(*check(program, text, given, expected, sizes, values.path, values.onnx), sep="\n")


def check_flags(values) -> None:
    """Raise InputError for flags that do not go together, and for files that cannot be written."""
    if values.path is None and not values.check:
        raise InputError("FILE.pt2: name the file to write, or give --check")
    for path, suffix in ((values.path, ".pt2"), (values.onnx, ".onnx")):
        if path is not None:
            if Path(path).suffix != suffix:
                raise InputError(f"{path}: the name must end in {suffix}")
            check_writable(path)
    for flag, low in (("batch", 1), ("max_batch", 2)):
        if getattr(values, flag) is not None and getattr(values, flag) < low:
            raise InputError(f"--{flag} {getattr(values, flag)}: must be at least {low}")
    if values.batch and values.max_batch:
        raise InputError("--max_batch: is for files that take any number of images; leave out it or --batch")
    if values.onnx is not None:
        check_packages("onnx", "onnxscript", "onnxruntime")


if __name__ == "__main__":
    sys.exit(run(main))
