"""Exported committees: equal to the tested one on real images, and usable where there is no CoNAS."""
import getpass
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module, util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conas.darts.space import discover
from conas.data.images import load
from conas.errors import InputError
from ensemble import export
from ensemble.combine.network import CommitteeNetwork, load_committee
from ensemble.deploy import files
from ensemble.deploy.committee import PlainCommittee
from ensemble.deploy.plain import plain
from ensemble.deploy.runtimes import RUNTIMES, Runtime, try_runtime
from ensemble.predict import predict
from tests.commands.test_own_operation import OWN
from tests.conftest import ROOT
from tests.ensemble.test_predict import stored
from tests.helpers.untrained import committee_clone, write_runs  # noqa: F401

ONNX = all(util.find_spec(package) for package in ("onnx", "onnxruntime", "onnxscript"))
BATCHES = 1, 2, 77, 200
# the first argument is for the example of the docs
PROGRAM = f"""
import importlib.util, sys
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
assert not importlib.util.find_spec("conas")
exec(open("classify.py").read())
images = torch.from_numpy(np.load(sys.argv[2]))
np.savez(sys.argv[3], *[committee(images[:count]).numpy() for count in {BATCHES}])
"""


@pytest.fixture(scope="module")
def pair(committee_clone):
    """The committee of space 3 and of one with an operation of its own, and few others: tracing takes its time."""
    root = committee_clone.root
    shutil.copytree(root / "cnn_space3", root / "cnn_space4", ignore=shutil.ignore_patterns("search-*"))
    (root / "cnn_space4" / "genotypes.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.delitem(sys.modules, "cnn_space4", raising=False)
        write_runs(root, "digits", "data", None, 200, 2, discover(root)[3:])
        done = committee_clone.run("test_ensemble.py", "--spaces", "cnn_space3", "cnn_space4")
        assert done.returncode == 0, done.stderr
        yield committee_clone


@pytest.fixture(scope="module")
def probabilities(pair) -> np.ndarray:
    """Of `pair`, from what test_all stores."""
    return stored(pair)[1][2:].mean(axis=0)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return load("digits", "data", "test", subset=200).images.numpy()


def test_predictions(pair, probabilities, images, tmp_path):
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for name, image in zip(names, images):
        Image.fromarray(image[0]).save(name)
    answers = list(predict(load_committee(pair.root, "EXP"), names, top_k=10))
    for answer, expected in zip(answers, probabilities[:3], strict=True):
        found = {row["class"]: row["probability"] for row in answer["top"]}
        np.testing.assert_allclose([found[name] for name in "0123456789"], expected, atol=2e-6)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """The folder of committee.pt2 and, if there are the packages for it, committee.onnx."""
    folder = tmp_path_factory.mktemp("exported")
    flags = ["--onnx", folder / "committee.onnx"] if ONNX else []
    done = pair.run("-m", "ensemble.export", folder / "committee.pt2", *flags, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to the committee's within") == len(list(folder.iterdir())) == 1 + ONNX
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == [runtime.name for runtime in RUNTIMES]
    for runtime, row in zip(RUNTIMES, rows[2:]):
        right = "right, within" in row[3] or runtime.name == "tinygrad"
        assert right or (row[1] == "" and f"not installed; pip install {runtime.package}" in row[3]), row
    return folder


@pytest.fixture(scope="module")
def program(pair):
    """The committee of `pair` as a graph, made here."""
    network = load_committee(pair.root, "EXP", prepare=lambda network: network)
    return files.export_program(PlainCommittee(network), (1, 8, 8)), export.about(network)


def contents(path: Path) -> bytes:
    """All bytes of a file, and of the files in it if it is an archive, and in those."""
    data = path.read_bytes()
    todo, found = [data], []
    while todo:
        found.append(todo.pop())
        if zipfile.is_zipfile(io.BytesIO(found[-1])):
            archive = zipfile.ZipFile(io.BytesIO(found[-1]))
            found.append("\n".join(archive.namelist()).encode())
            todo += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(found)


def test_a_file_says_nothing_of_where_it_was_written(exported, program, tmp_path):
    files.write_pt2(tmp_path / "here.pt2", *program)
    paths = [*exported.iterdir(), tmp_path / "here.pt2"]
    if ONNX:
        files.write_onnx(tmp_path / "here.onnx", *program)
        paths.append(tmp_path / "here.onnx")
        assert (tmp_path / "here.onnx").read_bytes() == (exported / "committee.onnx").read_bytes()  # another process
    for path in paths:
        text = contents(path)
        texts = [run.decode() for run in re.findall(rb"[ -~]{8,}", text)]
        for word in (str(ROOT), str(tmp_path.parent), sys.prefix, tempfile.gettempdir(), str(Path.home()) + "/", ".py",
                     "site-packages", "tmp", getpass.getuser(), socket.gethostname()):
            if len(word) > 3:
                assert word.encode() not in text, (path.name, word)
            else:  # numbers may look like it
                alone = re.compile(rf"(?<![a-z]){re.escape(word)}(?![a-z])", re.I)
                assert not any(alone.search(run) for run in texts), (path.name, word)
        assert not re.search(rb"(?<![0-9.])%d(?![0-9])" % os.getpid(), text)
        assert b"committee.json" in text and b"conas-committee-export" in text


def test_a_committee_of_the_demo_is_less_than_three_megabytes(exported, program):
    """By what each of the files here needs besides its numbers: to write that committee takes too long for a test."""
    demo = [plain(import_module(f"cnn_space{i}.model_search").Network(8, 10, 3, 1).eval()) for i in (1, 2, 3)]

    def numbers_and_tensors(values):
        return sum(value.numel() for value in values), len(values)

    numbers, tensors = numbers_and_tensors(list(program[0].state_dict.values()))
    demo_numbers, demo_tensors = numbers_and_tensors([v for network in demo for v in network.state_dict().values()])
    assert demo_numbers > 600_000
    for path in exported.iterdir():
        each = (path.stat().st_size - 4 * numbers) / tensors
        assert 4 * demo_numbers + each * demo_tensors < 3e6, (path.name, each)


@pytest.mark.slow
def test_the_file_of_a_committee_of_the_demo(tmp_path):
    demo = [import_module(f"cnn_space{i}.model_search").Network(8, 10, 3, 1) for i in (1, 2, 3)]
    committee = CommitteeNetwork(demo, list("abc"), {"name": "digits", "classes": list("0123456789")}, "mean_softmax",
                                 weights=[1 / 3] * 3, temperatures=[1.0] * 3, temperature=1.0, crops=[None] * 3,
                                 prepare=lambda network: network)
    program = files.export_program(PlainCommittee(committee), (1, 8, 8))
    files.write_pt2(tmp_path / "committee.pt2", program, "{}")
    assert (tmp_path / "committee.pt2").stat().st_size < 3e6
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(torch.export.load(tmp_path / "committee.pt2").module()(images), program.module()(images))


@pytest.mark.skipif(not ONNX, reason="needs onnx, onnxruntime and onnxscript")
def test_an_onnx_file_is_of_few_plain_operations(exported):
    import onnx
    graph = onnx.load(exported / "committee.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert set(kinds) <= {"Add", "AveragePool", "Cast", "Concat", "Conv", "Div", "Gemm", "MaxPool", "Mul", "ReduceMean",
                          "ReduceSum", "Relu", "Softmax", "Sub"}
    assert kinds.count("Cast") == 1 and len(kinds) < 450  # uint8 to float32
    types = {tensor.data_type for tensor in graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_the_runtimes_that_are_installed_are_right(runtime, exported, probabilities, images):
    if util.find_spec(runtime.package) is None or (runtime.suffix == ".onnx" and not ONNX):
        pytest.skip(f"needs {runtime.package}")
    if runtime.name == "tinygrad":
        pytest.skip("needs clang, and a minute")
    run = runtime.load(exported / f"committee{runtime.suffix}")
    for batch in (1, 7, 64):
        np.testing.assert_allclose(run(torch.from_numpy(images[:batch])), probabilities[:batch], atol=1e-5)


def test_a_runtime_that_is_wrong_or_fails_is_told(exported, images, probabilities):
    given, expected = torch.from_numpy(images), torch.from_numpy(probabilities)

    def row(load):
        return try_runtime(Runtime("x", "torch", ".pt2", load), exported / "committee.pt2", given, expected, [1, 7])

    assert row(lambda path: lambda batch: expected[:len(batch)])[1].startswith("WRONG, within")
    assert row(lambda path: lambda batch: torch.full((len(batch), 10), torch.nan))[1] == "WRONG, within inf"
    assert row(lambda path: path.nothing)[1].startswith("fails: AttributeError: ")
    assert try_runtime(Runtime("x", "no-such-package", ".pt2", None), ROOT, given, expected, [1]) == (
        "", "not installed; pip install no-such-package")


def test_fixed_and_bounded_batches_and_float_input(pair, program, images, probabilities, tmp_path):
    network = PlainCommittee(load_committee(pair.root, "EXP", prepare=lambda network: network))
    fixed = files.export_program(network, (1, 8, 8), batch=3, dtype=torch.float32)
    run = fixed.module()
    np.testing.assert_allclose(run(torch.from_numpy(images[:3]).float()), probabilities[:3], atol=1e-5)
    with pytest.raises((RuntimeError, AssertionError)):
        run(torch.from_numpy(images[:4]).float())
    bounded = files.export_program(network, (1, 8, 8), max_batch=8)
    np.testing.assert_allclose(bounded.module()(torch.from_numpy(images[:8])), probabilities[:8], atol=1e-5)
    with pytest.raises((RuntimeError, AssertionError)):
        bounded.module()(torch.from_numpy(images[:9]))


def test_the_example_of_the_docs_and_any_batch_without_the_repository(exported, probabilities, images, tmp_path):
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "torch.export.load" in code)
    (tmp_path / "classify.py").write_text(example.replace("committee.pt2", str(exported / "committee.pt2")))
    Image.fromarray(images[3, 0]).save(tmp_path / "digit.png")
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run([sys.executable, "-I", "-c", PROGRAM, "digit.png", "images.npy", "found.npz"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    best = probabilities[3].argmax()
    assert done.stdout == f"{best} {100 * probabilities[3][best]:.1f} %\n"
    with np.load(tmp_path / "found.npz") as found:
        for batch, got in zip(BATCHES, found.values(), strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, probabilities[:batch], atol=2e-6)


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "tract"])
def test_the_other_programs_of_the_docs(package, exported, probabilities, images, tmp_path):
    if util.find_spec(package) is None or not ONNX:
        pytest.skip(f"needs {package}")
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    program = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if f", {package}\n" in code)
    assert len(program.splitlines()) <= 11
    shutil.copy(exported / "committee.onnx", tmp_path)
    Image.fromarray(images[3, 0]).save(tmp_path / "digit.png")
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "program.py", "digit.png", "L", "8"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    best = probabilities[3].argmax()
    assert done.stdout == f"{best} {100 * probabilities[3][best]:.1f} %\n", done.stderr


@pytest.mark.skipif(not ONNX, reason="needs onnx, onnxruntime and onnxscript")
def test_onnx(exported, probabilities, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(exported / "committee.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map[files.ABOUT])
    assert about["classes"] == list("0123456789") and about["mode"] == "L" and about["image_size"] == 8
    for batch in BATCHES:
        got = session.run(None, {"images": images[:batch]})[0]
        np.testing.assert_allclose(got, probabilities[:batch], atol=1e-5)


def test_a_file_that_is_not_equal_is_not_written(program, images, probabilities, tmp_path, monkeypatch):
    given, expected = torch.from_numpy(images[:64]), torch.from_numpy(probabilities[:64])
    assert export.write(str(tmp_path / "x.pt2"), *program, given, expected, [1, 7]) < 1e-5
    before = (tmp_path / "x.pt2").read_bytes()
    with pytest.raises(InputError, match=r"x\.pt2: not written.*differ"):
        export.write(str(tmp_path / "x.pt2"), *program, given, expected + 1e-3, [1, 7])
    assert (tmp_path / "x.pt2").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("arguments, word", [
    (["committee.zip"], "must end in .pt2"), (["a.pt2", "--onnx", "b.pt2"], "must end in .onnx"),
    (["a.pt2", "--save", "none"], "test_ensemble.py --save none"), ([], "name the file to write, or give --check"),
    (["a.pt2", "--batch", "0"], "--batch 0: must be at least 1"),
    (["a.pt2", "--batch", "4", "--max_batch", "8"], "leave out it or --batch")])
def test_wrong_arguments(arguments, word):
    with pytest.raises(InputError, match=word):
        export.main(arguments)
