"""Checkpoints: exact round trip, and every kind of wrong file refused by name without running it."""
import json
import pickle
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conas.darts.supernet import Supernet
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from tests.helpers.hostile import Payload

ABOUT = {"name": "digits", "root": "data", "image_size": 8, "subset": None, "classes": list("0123456789"),
         "fingerprint": "f"}


class Tiny(Supernet):
    primitives = ("none", "skip_connect", "max_pool_3x3")


class Other(Supernet):
    """As many primitives as Tiny and tensors of the same shapes."""

    primitives = ("none", "skip_connect", "avg_pool_3x3")


def tiny():
    torch.manual_seed(0)
    return Tiny(C=2, num_classes=10, layers=3, in_channels=1)


def written(path, network=None, space="cnn_space7"):
    network = network or tiny()
    checkpoints.save(path, checkpoints.describe(network, space=space, epoch=4, dataset=ABOUT, arguments={"seed": 2}))
    return path


def test_round_trip_from_the_file_alone(tmp_path):
    network = tiny()
    path = written(tmp_path / "a.pt", network)
    again = checkpoints.restore(path, checkpoints.load(path), "cnn_space7", Tiny)
    assert {name: entry.tolist() for name, entry in again.state_dict().items()} == \
           {name: entry.tolist() for name, entry in network.state_dict().items()}
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(x), network.eval()(x))
    assert again.genotype() == network.genotype()


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
def test_every_space_loads_from_the_root(tmp_path, space):
    network_class = import_module(f"{space}.model_search").Network
    path = written(tmp_path / "a.pt", network_class(C=2, layers=3, in_channels=1), space)
    network = checkpoints.restore(path, checkpoints.load(path), space, network_class)
    assert type(network) is network_class


def test_another_space_is_refused_though_the_shapes_agree(tmp_path):
    path = written(tmp_path / "a.pt")
    Other(C=2, num_classes=10, layers=3, in_channels=1).load_state_dict(tiny().state_dict())  # the shapes do agree
    with pytest.raises(InputError, match=r"a\.pt: written by cnn_space7, not by cnn_space8"):
        checkpoints.restore(path, checkpoints.load(path), "cnn_space8", Tiny)
    with pytest.raises(InputError, match=r"a\.pt: searched over .*max_pool_3x3.* now lists .*avg_pool_3x3"):
        checkpoints.restore(path, checkpoints.load(path), "cnn_space7", Other)


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [
    lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    lambda path, payload: torch.save(payload, path),
    lambda path, payload: torch.save({"format": checkpoints.FORMAT, "state": payload}, path),
    lambda path, payload: torch.save(payload, path, _use_new_zipfile_serialization=False),
], ids=["pickle", "torch", "inside a checkpoint", "legacy torch"])
def test_a_pickle_with_a_payload_does_not_run(tmp_path, write):
    write(tmp_path / "a.pt", Payload(tmp_path / "ran"))
    with pytest.raises(InputError, match=r"a\.pt"):
        checkpoints.load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "a.pt")
    torch.save({"state": {}}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="not a CoNAS checkpoint"):
        checkpoints.load(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_text(json.dumps({"format": checkpoints.FORMAT}))
    with pytest.raises(InputError, match=r"c\.pt"):
        checkpoints.load(tmp_path / "c.pt")


@pytest.mark.parametrize("field", sorted(checkpoints.FIELDS))
def test_a_missing_field_is_named(tmp_path, field):
    whole = checkpoints.load(written(tmp_path / "a.pt"))
    del whole[field]
    checkpoints.save(tmp_path / "b.pt", whole)
    with pytest.raises(InputError, match=r"b\.pt"):
        checkpoints.load(tmp_path / "b.pt")


def test_tensors_of_other_shapes_are_refused(tmp_path):
    whole = checkpoints.load(written(tmp_path / "a.pt"))
    whole["network"]["C"] = 4
    with pytest.raises(InputError, match=r"a\.pt: its tensors do not fit"):
        checkpoints.restore(tmp_path / "a.pt", whole, "cnn_space7", Tiny)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(tmp_path_factory.mktemp("good") / "a.pt").read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_input_error_or_harmless(good, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bad") / "a.pt"
    if data.draw(st.booleans(), "truncate"):
        path.write_bytes(good[:data.draw(st.integers(0, len(good) - 1), "length")])
    else:
        damaged = bytearray(good)
        for position in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=20), "flips"):
            damaged[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
        path.write_bytes(damaged)
    try:
        checkpoints.restore(path, checkpoints.load(path), "cnn_space7", Tiny)
    except InputError as error:
        assert "a.pt" in str(error)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = written(tmp_path / "a.pt")
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017  whatever the writer cannot write
        checkpoints.save(path, {"state": lambda: None})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]
