"""Weights from elsewhere: transfer, published files, derived networks from their checkpoints, .safetensors."""
import json
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from cnn_space1 import genotypes as space1
from cnn_space1.model_search import Network
from conas.commands import cells as arch
from conas.commands import train
from conas.darts.derived import NetworkCIFAR, NetworkImageNet
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import best_checkpoint
from tests.commands.test_train import DARTS, run
from tests.runs.test_checkpoint import ABOUT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The best checkpoint of a training of DARTS' cells in space 1."""
    return best_checkpoint(run(tmp_path_factory.mktemp("trained") / "cnn_space1", "--arch", "DARTS"))


@pytest.fixture
def space(tmp_path):
    """A folder without runs."""
    (tmp_path / "cnn_space1").mkdir()
    return tmp_path / "cnn_space1"


def network_like(trained, **change):
    checkpoint = checkpoints.load(trained)
    arguments = {name: value for name, value in checkpoint["network"].items() if name != "kind"} | change
    return checkpoint["state"], NetworkCIFAR(genotype=DARTS, **arguments)


def test_transfer_replaces_the_classifier_of_other_classes_and_says_so(trained):
    state, network = network_like(trained, num_classes=7)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    text = arch.init_from_pretrained(network, arch.load_pretrained(str(trained)))
    new = "newly initialised: auxiliary_head.classifier, classifier; there but not loaded: "
    assert f"{len(state) - 4} tensors loaded from {trained}" in text and new in text
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, fresh[name] if "classifier" in name else state[name]), name


@pytest.mark.parametrize("change, new, unused", [
    ({}, "nothing", "nothing"),
    ({"auxiliary": False}, "nothing", "auxiliary_head.features.2"),
    ({"in_channels": 3}, "stem.0", "stem.0"),
    ({"image_size": 32}, "nothing", "nothing"),
])
def test_transfer_to_other_images(trained, change, new, unused):
    text = arch.init_from_pretrained(network_like(trained, **change)[1], arch.load_pretrained(str(trained)))
    assert f"newly initialised: {new}; there but not loaded: {unused}" in text


def test_transfer_through_the_script(trained, space):
    argv = ["--dataset", "digits", "--subset", "300", "--batch_size", "50", "--epochs", "1", "--learning_rate", "0"]
    train.main(space, space1, "", argv=[*argv, "--init_from", str(trained), "--auxiliary"])  # cells and size from there
    checkpoint = checkpoints.load(best_checkpoint(space / "train-EXP"))
    assert checkpoint["network"]["C"] == 2 and checkpoint["network"]["layers"] == 3
    weight = "cells.0.preprocess0.op.1.weight"
    assert torch.equal(checkpoint["state"][weight], checkpoints.load(trained)["state"][weight])
    assert f"tensors loaded from {trained}" in (space / "train-EXP" / "log.txt").read_text()
    for flags, words in ((["--arch", "DARTS_V1"], "was trained with other cells than --arch DARTS_V1"),
                         (["--init_channels", "4"], "is a network of other cells, or of another --init_channels"),
                         (["--layers", "5"], "is a network of other cells, or of another --init_channels"),
                         (["--recipe", "imagenet"], "is a network of the recipe cifar, but this would be one of")):
        with pytest.raises(InputError, match=rf"--init_from .*best\.pt: {words}"):
            train.main(space, space1, "", argv=[*argv, "--init_from", str(trained), "--save", "x", *flags])
    assert not (space / "train-x").exists()


def test_transfer_from_a_published_file(trained, space):
    state = {f"module.{name}": tensor for name, tensor in checkpoints.load(trained)["state"].items()
             if "num_batches" not in name}
    torch.save({"state_dict": OrderedDict(state), "epoch": 250}, space / "old.pt", _use_new_zipfile_serialization=False)
    run(space, "--init_from", space / "old.pt", "--arch", "DARTS", "--learning_rate", 0, "--epochs", 1)
    checkpoint = checkpoints.load(best_checkpoint(space / "train-EXP"))
    assert all(torch.equal(tensor, checkpoint["state"][name.removeprefix("module.")])
               for name, tensor in state.items() if "running" not in name)
    with pytest.raises(InputError, match="other cells"):
        run(space, "--init_from", space / "old.pt", "--arch", "DARTS_V1", "--save", "other")
    torch.save({"a": 1}, space / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: holds neither a CoNAS checkpoint nor a state_dict"):
        run(space, "--init_from", space / "odd.pt", "--arch", "DARTS", "--save", "odd")


def test_the_log_says_so_if_held_out_images_may_have_been_trained_on(trained, space):
    argv = ["--dataset", "digits", "--batch_size", "50", "--epochs", "1", "--init_from", str(trained)]
    for save, flags, warned in (("same", ["--subset", "300"], False), ("more", ["--subset", "320"], True),
                                ("split", ["--subset", "300", "--split_seed", "1"], True),
                                ("all", ["--subset", "320", "--valid_portion", "0"], False)):
        train.main(space, space1, "", argv=[*argv, "--auxiliary", "--save", save, *flags])
        log = (space / f"train-{save}" / "log.txt").read_text()
        assert ("images that are held out now" in log) == warned, save


def test_a_supernet_is_no_start(space):
    checkpoints.save(space / "super.pt", checkpoints.describe(
        Network(C=2, layers=3, in_channels=1), space="cnn_space1", epoch=0, dataset=ABOUT, arguments={"seed": 0}))
    with pytest.raises(InputError, match=r"super\.pt: is of the stage 'search', and no retrained network"):
        run(space, "--init_from", space / "super.pt")


def test_derived_networks_are_rebuilt_from_the_file_alone(tmp_path):
    for dataset, network in (
            ("digits", NetworkCIFAR(4, 10, 3, True, DARTS, in_channels=1, image_size=8)),
            ("imagenette", NetworkImageNet(4, 10, 3, True, GENOTYPES["AmoebaNet"], image_size=40))):
        checkpoints.save(tmp_path / "a.pt", checkpoints.describe(
            network, space="cnn", epoch=3, dataset=ABOUT | {"name": dataset}, arguments={"seed": 0},
            primitives=["none"]))
        again = checkpoints.restore(tmp_path / "a.pt", checkpoints.load(tmp_path / "a.pt"), "cnn")
        assert type(again) is type(network) and again.genotype() == network.genotype()
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())
        with pytest.raises(InputError, match=r"a\.pt: written by cnn, not by cnn_space1"):
            checkpoints.restore(tmp_path / "a.pt", checkpoints.load(tmp_path / "a.pt"), "cnn_space1")
        spoilt = checkpoints.load(tmp_path / "a.pt")
        spoilt["genotype"]["normal"][0] = ["sep_conv_3x3", 5]
        with pytest.raises(InputError, match=r"a\.pt: normal edge 0 comes from state 5"):
            checkpoints.restore("a.pt", spoilt, "cnn")


# .safetensors

def test_safetensors_round_trip(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    checkpoint = checkpoints.load(trained)
    checkpoints.export(tmp_path / "w.safetensors", checkpoint)
    again = checkpoints.load(tmp_path / "w.safetensors")
    assert {k: v for k, v in again.items() if k != "state"} == {k: v for k, v in checkpoint.items() if k != "state"}
    assert again["state"].keys() == checkpoint["state"].keys()
    assert all(torch.equal(again["state"][name], tensor) for name, tensor in checkpoint["state"].items())
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:  # as another program sees it
        assert json.loads(file.metadata()["genotype"]) == checkpoint["genotype"]
        assert json.loads(file.metadata()["arguments"])["init_channels"] == 2
        assert np.array_equal(file.get_tensor("classifier.bias"), checkpoint["state"]["classifier.bias"])
    assert arch.load_pretrained(str(tmp_path / "w.safetensors")).genotype == DARTS


def test_bad_safetensors(trained, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(InputError, match=r"--export w\.pt: the name must end in \.safetensors"):
        checkpoints.export("w.pt", checkpoints.load(trained))
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load(path)
    checkpoints.export(path, checkpoints.load(trained))
    for content in (b"", b"x" * 100, path.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"w\.safetensors: damaged"):
            checkpoints.load(path)
    safetensors.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a CoNAS checkpoint"):
        checkpoints.load(path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: checkpoints.load(path), lambda: checkpoints.export(path, checkpoints.load(trained))):
        with pytest.raises(InputError, match="pip install safetensors"):
            use()
