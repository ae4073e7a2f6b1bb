"""Exported committees: equal to the tested one on real images, and usable where there is no CoNAS."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conas.data import load
from conas.errors import InputError
from ensemble import export
from ensemble.network import CommitteeNetwork, load_committee
from tests.conftest import ROOT
from tests.test_predict import stored
from tests.untrained import committee_clone  # noqa: F401


@pytest.fixture(scope="module")
def pair(committee_clone):
    """The committee of the last two spaces only, since tracing takes its time."""
    done = committee_clone.run("test_ensemble.py", "--spaces", "cnn_space2", "cnn_space3")
    assert done.returncode == 0, done.stderr
    return committee_clone


def probabilities_of(clone) -> np.ndarray:
    """The probabilities of `pair`, from what test_all stores."""
    return stored(clone)[1][1:].mean(axis=0)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "committee.pt2"
    done = pair.run("-m", "ensemble.export", path)
    assert done.returncode == 0, done.stderr
    assert "equal to the committee's within" in done.stdout
    return path


def test_any_batch_gives_the_tested_probabilities(pair, exported):
    program = torch.export.load(exported).module()
    images = load("digits", "data", "test", subset=200).images
    committee = probabilities_of(pair)
    for batch in (images[:1], images[:2], images[:77], images):
        got = program(batch)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), committee[:len(batch)], atol=2e-6)


def test_the_example_of_the_docs_runs_without_the_repository(pair, exported, tmp_path):
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "torch.export.load" in code)
    (tmp_path / "classify.py").write_text(example.replace("committee.pt2", str(exported)))
    Image.fromarray(load("digits", "data", "test", subset=200).images[3, 0].numpy()).save(tmp_path / "digit.png")
    code = f"import sys; sys.path = [p for p in sys.path if {str(ROOT)!r} != p]; sys.argv[1:] = ['digit.png']; " \
           "import importlib.util as u; assert not u.find_spec('conas'); exec(open('classify.py').read())"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    committee = probabilities_of(pair)
    best = committee[3].argmax()
    assert str(best) in done.stdout and f"{100 * committee[3][best]:.1f}" in done.stdout


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


def test_onnx(pair, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    whole = load_committee(pair.root, "EXP")
    network = CommitteeNetwork(whole.networks[1:], whole.names[1:], whole.dataset, "mean_softmax", weights=[1.0],
                               temperatures=[1.0], temperature=1.0, crops=[None])  # one member: the conversion is slow
    images, expected = export.test_images(network, None, 20)
    path = str(tmp_path / "committee.onnx")
    check = export.checker(network, images, expected, path)
    assert export.write_onnx(path, export.export_program(network, images), export.about(network), check) < 1e-5
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map[export.ABOUT])
    assert about["classes"] == list("0123456789") and about["mode"] == "L" and about["image_size"] == 8
    got = session.run(None, {"images": images[:7].numpy()})[0]
    np.testing.assert_allclose(got, stored(pair)[1][2, :7], atol=1e-5)
