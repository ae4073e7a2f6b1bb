"""Counters of other projects on our networks: they look modules up by their exact class, and run them in evaluation."""
import copy
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conas.darts import derived
from conas.darts.batchnorm import use_exact_sums
from conas.darts.derived import NetworkImageNet, count_parameters
from conas.darts.published import GENOTYPES
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.door import accelerate
from conas.engine.inference import prepared
from conas.engine.native.loader import kernels
from conas.engine.native.training import train_by_kernels


def by_thop(network, x):
    return import_module("thop").profile(network, (x,), verbose=False)


def by_ptflops(backend):
    return lambda network, x: import_module("ptflops").get_model_complexity_info(
        network, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend)


def by_torchinfo(network, x):
    found = import_module("torchinfo").summary(network, input_data=x, verbose=0)
    return found.total_mult_adds, found.total_params


COUNTERS = {"thop": by_thop, "ptflops, pytorch": by_ptflops("pytorch"), "ptflops, aten": by_ptflops("aten"),
            "torchinfo": by_torchinfo}


def published(name):
    return NetworkImageNet(8, 10, 5, False, GENOTYPES[name], image_size=64)


def supernet():
    return import_module("cnn_space1.model_search").Network(4, 10, 3)


def as_a_search_has_it():
    network = supernet()
    accelerate(network)
    return network


def as_a_training_has_it():
    network = published("PC_DARTS_cifar")
    if kernels() is not None:
        train_by_kernels(network, kernels())
    use_exact_sums(accelerate_convolutions(network))
    return network


NETWORKS = {
    "DARTS_V2": lambda: published("DARTS_V2").eval(),
    "PC_DARTS_cifar": lambda: published("PC_DARTS_cifar").eval(),  # has average pooling
    "in a committee": lambda: prepared(published("DARTS_V2").eval()),
    "in training": lambda: as_a_training_has_it().train(),
    "supernet": lambda: supernet().eval(),
    "supernet in training": lambda: as_a_search_has_it().train(),
}


@pytest.mark.parametrize("tool", COUNTERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_they_agree_with_ours(name, tool):
    if find_spec(tool.partition(",")[0]) is None:
        pytest.skip(f"needs {tool.partition(',')[0]}")
    network, x = NETWORKS[name](), torch.zeros(1, 3, 64, 64)
    own, as_thop = derived.multiply_adds(network, (3, 64, 64))
    counted, parameters = COUNTERS[tool](copy.deepcopy(network), x)
    alphas = sum(p.numel() for key, p in network.named_parameters() if key.startswith("alphas_"))
    assert parameters in (count_parameters(network), count_parameters(network) - alphas)  # which are of no module
    if tool == "thop":
        assert counted == as_thop
    else:  # the bias of the classifier, BatchNorm once for each weight, or ReLU, pooling and shares too
        assert own <= counted < {"ptflops, pytorch": 1.25 * as_thop, "ptflops, aten": own + 11,
                                 "torchinfo": 1.01 * own}[tool]


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_that_they_look_for_are_torchs_own(name):
    assert not [module for module in NETWORKS[name]().modules()
                if isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d, nn.BatchNorm2d, nn.Linear))
                and type(module).__module__.partition(".")[0] != "torch"]


def test_in_training_torchs_own_counter_and_hooks_see_what_kernels_would_compute():
    network, x = as_a_training_has_it().train(), torch.zeros(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() == 4 * derived.flops(network, (3, 64, 64))  # two images; adds apart
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    network(x)
    assert set(seen) == {module for module in network.modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("make", [as_a_search_has_it, as_a_training_has_it])
def test_a_copy_of_a_network_has_its_own_weights_and_statistics(make):
    network = make().train()
    before, copied = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    logits = [each(x, each.flat()) if hasattr(each, "flat") else each(x) for each in (network, copied)]
    torch.testing.assert_close(*logits)
    after = copied.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)  # the running statistics
    torch.testing.assert_close(network.state_dict(), after)
    with torch.no_grad():
        copied.classifier.weight.zero_()
    assert network.classifier.weight.any() and not torch.equal(logits[0], copied(x))
