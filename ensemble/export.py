"""Write the committee that test_ensemble.py wrote as one file that needs no CoNAS: uint8 images in, probabilities out.

    python -m ensemble.export committee.pt2 --save NAME
    python -m ensemble.export committee.pt2 --onnx committee.onnx

The file is written by torch.export, for the CPU and any number of images; with --onnx, which needs the packages onnx,
onnxscript and onnxruntime, another one for other programs. Both hold what is needed to prepare an image: classes, mode
and image_size, as JSON, in a part called committee.json. Both are compared with the committee on test images first.
"""
import json
import sys
import warnings
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
from ensemble.combine.network import CommitteeNetwork, load_committee

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "committee.json"
TOLERANCE = 1e-5  # of probabilities: other kernels, other roundings
Check = Callable[[Callable[[Tensor], Tensor]], float]


def about(network: CommitteeNetwork) -> str:
    """What a user of the file has to know, as JSON."""
    return json.dumps({"format": "conas-committee-export", "version": conas.__version__, "members": network.names,
                       "combination": network.combination, "dataset": network.dataset["name"],
                       "classes": network.classes, "mode": "L" if network.channels == 1 else "RGB",
                       "image_size": network.dataset["image_size"],
                       "resize": network.dataset.get("resize", "crop")}, ensure_ascii=False)


def checker(network: CommitteeNetwork, images: Tensor, expected: Tensor, path: str) -> Check:
    """A function that compares an exported one with `expected` on images (N, C, H, W), in batches of 1, 2 and more.

    It returns the largest difference, and raises InputError if that is more than TOLERANCE.
    """
    def check(exported: Callable[[Tensor], Tensor]) -> float:
        sizes = [1, 2, len(images) - 3] if len(images) > 3 else [1] * len(images)
        got = torch.cat([exported(batch) for batch in images.split(sizes)])
        difference = (got.double() - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise InputError(f"{path}: not written, since its probabilities on test images differ from the committee's "
                             f"by up to {difference:.2g}; report this with the versions of torch and onnxruntime")
        return difference

    return check


def test_images(network: CommitteeNetwork, data: str | None, count: int = 256) -> tuple[Tensor, Tensor]:
    """Some test images, uint8, and the committee's probabilities for them, float64, by the way that tests take.

    Raises InputError if the data set is not where the members had it, nor in the folder `data`.
    """
    info = network.dataset
    images = load_images(Path(ABOUT), info, data, "test")
    chosen = torch.arange(min(count, len(images)))
    logits = torch.stack([predict(member, images, 100, torch.device("cpu"), chosen, crop=crop)
                          for member, crop in zip(network.networks, network.crops)])
    return next(images.gather([chosen], "cpu"))[0], network.combine(logits)


test_images.__test__ = False  # not a pytest test


def export_program(network: CommitteeNetwork, example: Tensor) -> torch.export.ExportedProgram:
    """The committee as a graph, for any batch of images like the uint8 `example` (2 or more, C, H, W)."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (example[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_pt2(path: str, program: torch.export.ExportedProgram, text: str, check: Check) -> float:
    """Write, read again, compare; only then does the file get its name. Returns the largest difference."""
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary, extra_files={ABOUT: text})
        return check(torch.export.load(temporary).module())


def _onnxruntime():
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("--onnx needs packages that are not installed; pip install onnx onnxscript onnxruntime"
                         ) from error
    return onnxruntime


def write_onnx(path: str, program: torch.export.ExportedProgram, text: str, check: Check) -> float:
    """Like `write_pt2`. Raises InputError without the packages that this needs."""
    onnxruntime = _onnxruntime()
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], dynamo=True,
                                     optimize=False, verbose=False)  # its runtime optimises too, and fast
        exported.model.metadata_props[ABOUT] = text
        exported.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        return check(lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for a committee that cannot be read or a file that is not equal."""
    parser = Parser(prog="python -m ensemble.export", description=__doc__.splitlines()[0])
    parser.add_argument("path", metavar="FILE.pt2", help="the file to write")
    parser.add_argument("--onnx", metavar="FILE.onnx", help="write this file too")
    parser.add_argument("--save", default="EXP", help="name of the committee: its folder is committee-NAME")
    parser.add_argument("--data", help="where the data set is, if it is no longer where the search had it")
    values = parser.parse_args(argv)
    for path, suffix in ((values.path, ".pt2"), (values.onnx, ".onnx")):
        if path is not None:
            if Path(path).suffix != suffix:
                raise InputError(f"{path}: the name must end in {suffix}")
            check_writable(path)
    if values.onnx is not None:
        _onnxruntime()
    network = load_committee(ROOT, folder_name(values.save))
    images, expected = test_images(network, values.data)
    program, text = export_program(network, images), about(network)
    for path, write in ((values.path, write_pt2), (values.onnx, write_onnx)):
        if path is not None:
            difference = write(path, program, text, checker(network, images, expected, path))
            print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, probabilities of {len(images)} test images equal "
                  f"to the committee's within {difference:.1g}")


if __name__ == "__main__":
    sys.exit(run(main))
