"""A committee as a program of torch.export and as an ONNX file, neither of which says where it was written."""
import io
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from conas.errors import InputError
from conas.files import atomic_path
from ensemble.deploy.committee import PlainCommittee

ABOUT = "committee.json"
TRACES = "stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"  # of what file made a node


def export_program(network: PlainCommittee, shape: tuple[int, int, int], *, dtype: torch.dtype = torch.uint8,
                   batch: int | None = None, max_batch: int | None = None) -> torch.export.ExportedProgram:
    """The committee as a graph for images of a `shape` (C, H, W).

    It takes `batch` images, or else any number, of at most `max_batch`. Raises InputError for a network, such as one
    with a space's own operations, that cannot be traced.
    """
    # no image of anybody goes into the file; as many as it may take, since ExecuTorch traces with the example's number
    # again, and took 15 as the limit where that was 2
    example = torch.zeros(batch or max_batch or 2, *shape, dtype=dtype)
    sizes = None if batch else ({0: torch.export.Dim("batch", max=max_batch) if max_batch else
                                 torch.export.Dim("batch")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=sizes, strict=False)
        except Exception as error:  # whatever tracing somebody's operations raises
            raise InputError(f"the committee cannot be traced by torch.export, {type(error).__name__}: {error!s:.300}; "
                             "leave out the member with operations that cannot be (test_ensemble.py --spaces)"
                             ) from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for name in TRACES:
                node.meta.pop(name, None)
    return program


def write_pt2(path: str | Path, program: torch.export.ExportedProgram, about: str) -> None:
    """Write a program, for torch.export.load, with `about` as an extra file."""
    buffer = io.BytesIO()  # a file's name would be in the archive, and that of a temporary one has a process number
    torch.export.save(program, buffer, extra_files={ABOUT: about})
    with atomic_path(path) as temporary:
        _compress(buffer, temporary)


def _compress(archive: io.BytesIO, path: Path) -> None:
    """Write a zip archive with compressed members: torch only stores them, though a graph is mostly names."""
    with zipfile.ZipFile(archive) as stored, zipfile.ZipFile(path, "w") as made:
        for name in stored.namelist():
            made.writestr(zipfile.ZipInfo(name), stored.read(name), zipfile.ZIP_DEFLATED)  # of no date


def missing_packages(*names: str) -> list[str]:
    """Those of these packages that are not installed."""
    return [name for name in names if find_spec(name) is None]


def check_packages(*names: str) -> None:
    """Raise InputError unless these packages, of those that ONNX files need, are installed."""
    if missing := missing_packages(*names):
        raise InputError(f"--onnx needs packages that are not installed; pip install {' '.join(missing)}")


def write_onnx(path: str | Path, program: torch.export.ExportedProgram, about: str) -> None:
    """Write a program as ONNX with input `images`, output `probabilities` and `about` as a metadata entry.

    Equal programs give equal bytes. Raises InputError without the packages that this needs.
    """
    check_packages("onnx", "onnxscript")
    import onnx_ir
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], dynamo=True,
                                  verbose=False).model
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)]
    for part in (model, graph, *graph.all_nodes(), *values):
        part.metadata_props.clear()
        part.doc_string = None
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]  # shapes that every reader infers
    _shorten(proto.graph)
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, about
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _shorten(graph) -> None:
    """Give values and nodes of a graph short names, but for its inputs and outputs."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {}

    def name(old: str) -> str:
        return old if old in kept or not old else short.setdefault(old, f"v{len(short)}")

    for tensor in graph.initializer:
        tensor.name = name(tensor.name)
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
        node.input[:] = [name(old) for old in node.input]
        node.output[:] = [name(old) for old in node.output]


def equal_on(images: Tensor, sizes: list[int], run, expected: Tensor) -> float:
    """The largest difference of `run` from `expected` probabilities on images, in batches of each of the `sizes`.

    NaN counts as infinite.
    """
    worst = 0.0
    for size in sizes:
        whole = len(images) // size * size
        for batch, wanted in zip(images[:whole].split(size), expected[:whole].split(size)):
            difference = (torch.as_tensor(run(batch)).double() - wanted).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst
