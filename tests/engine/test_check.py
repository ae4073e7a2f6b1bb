"""The engine is compared with the definition at every start of a search: a wrong kernel stops it by name."""
from importlib import import_module

import pytest
import torch

from conas.darts.stems import STEMS
from conas.engine import depthwise, door, forward_eval, forward_train
from conas.engine.check import check_engine
from conas.engine.door import accelerate
from conas.engine.native.library import pointers
from conas.engine.native.loader import kernels
from conas.errors import InputError
from tests.helpers.ranks import Everything
from tests.helpers.searches import no_pictures, run_search  # noqa: F401

BATCH = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)), torch.arange(6)


def packed(space="cnn_space1", stem="cifar", native=False):
    torch.manual_seed(0)
    of_space = Everything if space == "everything" else import_module(f"{space}.model_search").Network
    return accelerate(of_space(C=4, layers=3, stem=stem), native=native)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3", "everything"])
def test_a_right_engine_passes_and_nothing_is_left_behind(space, stem, native):
    engine = packed(space, stem, native)
    network, batch = engine.network, BATCH
    if stem == "imagenet":
        batch = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(0)), BATCH[1]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    for training in True, False:
        network.train(training)
        check_engine(engine, batch)
        assert network.training == training and torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


def smaller(monkeypatch, module, name):
    """Make the result of a function of the engine, or what it writes into its last argument, 20 % too small."""
    right = getattr(module, name)

    def wrong(*arguments):
        result = right(*arguments)
        return arguments[-1].mul_(0.8) if result is None else 0.8 * result

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize("module, name, says", [
    (depthwise, "_weight_gradient", "weights of sep_conv_3x3"),
    (forward_train, "_pool_back", "the gradient w.r.t."),
    (forward_eval, "_plain", "the logits in evaluation"),
])
def test_a_wrong_kernel_is_named(module, name, says, monkeypatch):
    engine = packed()
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    smaller(monkeypatch, module, name)
    with pytest.raises(InputError, match=f"computes other numbers than the definition: .*{says}.*--no-engine"):
        check_engine(engine, BATCH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.network.state_dict().items())


@pytest.mark.skipif(kernels() is None, reason="no kernels")
@pytest.mark.parametrize("name, argument, says", [
    ("unit_backward", 7, "weights of sep_conv_3x3"),  # another record of BatchNorm
    ("pools_backward", 12, "the gradient w.r.t."),    # the gradient goes elsewhere
    ("combine", 6, "the logits in evaluation"),
])
def test_a_wrong_compiled_kernel_is_named(name, argument, says, monkeypatch):
    engine, other = packed(native=True), torch.ones(10**6, dtype=torch.float64)
    for table in engine.library.tables():
        right = getattr(table, name)

        def wrong(*arguments, right=right):
            arguments = list(arguments)
            arguments[argument] = (other.data_ptr() if name != "combine" else
                                   pointers([other.data_ptr()] * arguments[3]))
            return right(*arguments)

        monkeypatch.setattr(table, name, wrong)
    with pytest.raises(InputError, match=f"computes other numbers than the definition: .*{says}.*--no-engine"):
        check_engine(engine, BATCH)


def test_a_search_with_a_wrong_kernel_stops_with_one_line_and_goes_on_without_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "why_no_kernels", lambda: "a test")
    smaller(monkeypatch, depthwise, "_weight_gradient")
    with pytest.raises(InputError, match="--no-engine"):
        run_search(tmp_path)
    assert "no kernels in C (a test)" in (tmp_path / "cnn_space2/search-EXP/log.txt").read_text()
    _, log = run_search(tmp_path, "--no-engine")
    assert "runs by its definition" in log
