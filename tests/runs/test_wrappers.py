"""Weights of networks that were wrapped when they were saved load as those of the bare network."""
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conas.commands import cells as arch
from conas.commands import test as measure
from conas.darts.derived import NetworkCIFAR
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from conas.recurrent.model import RecurrentNetwork
from conas.runs import checkpoint as checkpoints
from conas.runs.wrappers import differences, unwrapped
from tests.runs.test_checkpoint import ABOUT

ARGUMENTS = {"C": 2, "num_classes": 10, "layers": 3, "auxiliary": False, "genotype": GENOTYPES["DARTS"],
             "in_channels": 1, "image_size": 8}
OPTIONS = measure.PublishedOptions(init_channels=2, layers=3, dataset="digits")
PUBLISHED = measure.Published("cifar", "cifar10", {})


def network() -> NetworkCIFAR:
    torch.manual_seed(0)
    return NetworkCIFAR(**ARGUMENTS)


def cells_compiled() -> NetworkCIFAR:
    made = network()
    made.cells[0] = torch.compile(made.cells[0])
    made.cells[1]._ops = torch.compile(nn.DataParallel(made.cells[1]._ops))
    return made


class Lightning(nn.Module):
    def __init__(self, name: str, inner: nn.Module):
        super().__init__()
        setattr(self, name, inner)


WRAPPED = {
    "bare": network, "compiled": lambda: torch.compile(network()), "parallel": lambda: nn.DataParallel(network()),
    "compiled parallel": lambda: torch.compile(nn.DataParallel(network())),
    "parallel compiled": lambda: nn.DataParallel(torch.compile(network())),
    "thrice": lambda: torch.compile(nn.DataParallel(nn.DataParallel(torch.compile(network())))),
    "parts": cells_compiled, "whole and parts": lambda: nn.DataParallel(torch.compile(cells_compiled())),
    "average": lambda: AveragedModel(torch.compile(network())),
    **{f"Lightning {name}": lambda name=name: Lightning(name, torch.compile(network()))
       for name in ("model", "net", "network")},
    "compiled Lightning": lambda: torch.compile(Lightning("model", nn.DataParallel(network()))),
}


@pytest.fixture(params=list(WRAPPED))
def state(request) -> OrderedDict:
    """The state_dict of a network that is wrapped in one of many ways."""
    return WRAPPED[request.param]().state_dict()


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("holder", [None, "state_dict", "model_state_dict", "model"])
def test_a_file_of_any_wrapper_is_the_bare_network(tmp_path, state, holder):
    path = tmp_path / "weights.pt"
    torch.save({holder: state, "epoch": 3} if holder else state, path)
    loaded, _, _ = measure.open_published(path, checkpoints.read(path), PUBLISHED, OPTIONS, None)
    assert equal(loaded.state_dict(), network().state_dict())
    assert equal(arch.load_pretrained(str(path)).state, network().state_dict())


def test_a_safetensors_file_of_another_program(tmp_path, state):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    loaded, _, _ = measure.open_published(path, checkpoints.read(path), PUBLISHED, OPTIONS, None)
    assert equal(loaded.state_dict(), network().state_dict())


def test_a_checkpoint_of_ours_with_such_names(tmp_path, state):
    checkpoint = checkpoints.describe(network(), space="cnn_space1", epoch=0, dataset=ABOUT, arguments={"seed": 0},
                                      primitives=["skip_connect"])
    checkpoints.save(tmp_path / "a.pt", checkpoint | {"state": dict(state)})
    found = checkpoints.restore_derived(tmp_path / "a.pt", checkpoints.load(tmp_path / "a.pt"))
    assert equal(found.state_dict(), network().state_dict())


def test_names_of_wrappers_that_are_not_here():
    names = "_fsdp_wrapped_module.cells.0._fsdp_wrapped_module._checkpoint_wrapped_module.x", "module._orig_mod.y"
    assert list(unwrapped("a.pt", dict.fromkeys(names, torch.zeros(1)))) == ["cells.0.x", "y"]
    with pytest.raises(InputError, match=r"a\.pt: has x twice, once as module\.x"):
        unwrapped("a.pt", {"x": torch.zeros(1), "module.x": torch.ones(1)})
    assert list(unwrapped("a.pt", {"model.x": 0, "net.y": 0})) == ["model.x", "net.y"]  # two networks
    rnn = nn.DataParallel(torch.compile(RecurrentNetwork(9, 4, _cell())))
    assert set(unwrapped("a.pt", rnn.state_dict())) == set(RecurrentNetwork(9, 4, _cell()).state_dict())


def _cell():
    from rnn.genotypes import DARTS
    return DARTS


def test_the_first_tensors_that_differ_are_named(tmp_path):
    state = network().state_dict()
    state["stem.0.weight"] = torch.zeros(7, 1, 3, 3)
    del state["classifier.bias"], state["cells.0._ops.0.op.1.weight"]
    for i in range(5):
        state[f"extra.{i}"] = torch.zeros(1)
    text = differences(state, network().state_dict())
    assert "missing: cells.0._ops.0.op.1.weight, classifier.bias;" in text
    assert "unexpected: extra.0, extra.1, extra.2 and 2 more;" in text
    assert "of another shape: stem.0.weight (7x1x3x3 and not 6x1x3x3)" in text
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"missing: cells.0._ops.0.op.1.weight, classifier.bias; unexpected: extra.0"):
        measure.open_published("weights.pt", checkpoints.read(tmp_path / "weights.pt"), PUBLISHED, OPTIONS, None)
    with pytest.raises(InputError, match=r"missing: cells.0._ops.0.op.1.weight; unexpected: extra.0"):
        arch.init_from_pretrained(network(), arch.PretrainedWeights("weights.pt", state, None))
    checkpoint = checkpoints.describe(network(), space="cnn_space1", epoch=0, dataset=ABOUT, arguments={"seed": 0},
                                      primitives=["skip_connect"]) | {"state": state}
    with pytest.raises(InputError, match=r"do not fit its own description .missing: cells.0"):
        checkpoints.restore_derived("a.pt", checkpoint)


def test_names_of_tensors_are_told_in_one_line():
    assert "\n" not in (said := differences({"a\nb": torch.zeros(1)}, {"c": torch.zeros(1)})) and "a" in said
    with pytest.raises(InputError) as error:
        unwrapped("a.pt", {"module.a\nb": torch.zeros(1), "a\nb": torch.ones(1)})
    assert "\n" not in str(error.value) and "twice" in str(error.value)
