"""Exported committees: equal to the tested one on real images, and usable where there is no CoNAS."""
import json
import re
import shutil
import subprocess
import sys
from importlib import util

import numpy as np
import pytest
import torch
from PIL import Image

from conas.darts.space import discover
from conas.data.images import load
from conas.errors import InputError
from ensemble import export
from ensemble.combine.network import load_committee
from tests.conftest import ROOT
from tests.ensemble.test_predict import stored
from tests.helpers.untrained import committee_clone, write_runs  # noqa: F401

ONNX = all(util.find_spec(package) for package in ("onnx", "onnxruntime", "onnxscript"))
BATCHES = 1, 2, 77, 200
SMALL_SPACE = '"""Few operations."""\nPRIMITIVES = "none", "max_pool_3x3", "skip_connect"\n'
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
    """The committee of space 3 and of a small space, since tracing takes its time."""
    root = committee_clone.root
    shutil.copytree(root / "cnn_space3", root / "cnn_space4", ignore=shutil.ignore_patterns("search-*"))
    (root / "cnn_space4" / "genotypes.py").write_text(SMALL_SPACE)
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


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """The folder of committee.pt2 and, if there are the packages for it, committee.onnx."""
    folder = tmp_path_factory.mktemp("exported")
    flags = ["--onnx", folder / "committee.onnx"] if ONNX else []
    done = pair.run("-m", "ensemble.export", folder / "committee.pt2", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to the committee's within") == len(list(folder.iterdir())) == 1 + ONNX
    return folder


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


@pytest.mark.skipif(not ONNX, reason="needs onnx, onnxruntime and onnxscript")
def test_onnx(exported, probabilities, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(exported / "committee.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map[export.ABOUT])
    assert about["classes"] == list("0123456789") and about["mode"] == "L" and about["image_size"] == 8
    for batch in BATCHES:
        got = session.run(None, {"images": images[:batch]})[0]
        np.testing.assert_allclose(got, probabilities[:batch], atol=1e-5)


@torch.no_grad()
def test_a_file_that_is_not_equal_is_not_written(pair, tmp_path):
    network = load_committee(pair.root, "EXP")
    images, expected = export.test_images(network, None)
    check = export.checker(network, images, expected, "x.pt2")
    assert check(lambda batch: network(batch)) < export.TOLERANCE
    with pytest.raises(InputError, match=r"x\.pt2: not written.*differ"):
        check(lambda batch: network(batch) + 1e-3 * (len(batch) == 1))  # wrong for one size of batch only
    with pytest.raises(InputError, match="not written"):
        check(lambda batch: torch.full((len(batch), 10), torch.nan))


@pytest.mark.parametrize("arguments, word", [
    (["committee.zip"], "must end in .pt2"), (["a.pt2", "--onnx", "b.pt2"], "must end in .onnx"),
    (["a.pt2", "--save", "none"], "test_ensemble.py --save none")])
def test_wrong_arguments(pair, arguments, word):
    done = pair.run("-m", "ensemble.export", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and word in done.stderr
