"""The runtimes in which exported committees are tried, and the table of what came out."""
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ensemble.deploy.files import equal_on

TOLERANCE = 1e-5  # of probabilities: other kernels, other roundings
Run = Callable[[Tensor], object]  # images to probabilities


@dataclass(frozen=True)
class Runtime:
    """A way to run one of the two files: `load` raises ImportError where a package is missing."""

    name: str
    package: str
    suffix: str
    load: Callable[[Path], Run]
    remark: str = ""


def _torch_export(path: Path) -> Run:
    return torch.export.load(path).module()


def _onnxruntime(path: Path) -> Run:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def _openvino(path: Path) -> Run:
    import openvino
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: model(images.numpy())[0]


def _openvino_program(path: Path) -> Run:
    import openvino
    converted = openvino.convert_model(torch.export.load(path))
    model = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: model(images.numpy())[0]


def _tract(path: Path) -> Run:
    import tract
    model = tract.onnx().load(str(path)).into_model().into_runnable()
    return lambda images: model.run([images.numpy()])[0].to_numpy()


def _tinygrad(path: Path) -> Run:
    from tinygrad import Tensor as Array
    from tinygrad.nn.onnx import OnnxRunner
    runners: dict[int, OnnxRunner] = {}  # each takes one size of batch

    def run(images: Tensor):
        runner = runners.setdefault(len(images), OnnxRunner(str(path)))
        return next(iter(runner({"images": Array(images.numpy())}).values())).numpy()
    return run


RUNTIMES = (
    Runtime("torch.export", "torch", ".pt2", _torch_export),
    Runtime("onnxruntime", "onnxruntime", ".onnx", _onnxruntime),
    Runtime("OpenVINO", "openvino", ".onnx", _openvino, "with INFERENCE_PRECISION_HINT=f32"),
    Runtime("OpenVINO, convert_model", "openvino", ".pt2", _openvino_program, "with INFERENCE_PRECISION_HINT=f32"),
    Runtime("tract", "tract", ".onnx", _tract),
    Runtime("tinygrad", "tinygrad", ".onnx", _tinygrad, "needs clang"),
)


def try_runtime(runtime: Runtime, path: Path, images: Tensor, expected: Tensor, sizes: list[int]) -> tuple[str, str]:
    """Version and result in words: the largest difference from `expected`, or why it does not run."""
    try:
        found = version(runtime.package)
    except ImportError:
        return "", f"not installed; pip install {runtime.package}"
    try:
        with _silent():
            difference = equal_on(images, sizes, runtime.load(path), expected)
    except Exception as error:  # whatever somebody else's program raises
        text = " ".join(str(error).split())
        return found, f"fails: {type(error).__name__}: {text[:90]}"
    return found, f"{'right' if difference <= TOLERANCE else 'WRONG'}, within {difference:.1g}"


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing is printed, also by code that is not Python."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    outputs = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = io.StringIO()
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, copy in zip((1, 2), kept):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
        sys.stdout, sys.stderr = outputs


def table(pt2: Path, onnx: Path | None, images: Tensor, expected: Tensor, sizes: list[int]) -> list[str]:
    """A line for each runtime, in Markdown."""
    rows = []
    for runtime in RUNTIMES:
        path = pt2 if runtime.suffix == ".pt2" else onnx
        found, words = ("", "no ONNX file; pip install onnx onnxscript") if path is None else try_runtime(
            runtime, path, images, expected, sizes)
        remark = f", {runtime.remark}" if runtime.remark and found else ""
        rows.append(f"| {runtime.name} | {found} | `{runtime.suffix}` | {words}{remark} |")
    numbers = ", ".join(map(str, sizes))
    return [f"| runtime | version | file | in batches of {numbers} |", "| --- | --- | --- | --- |", *rows]
