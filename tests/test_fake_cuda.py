"""An iteration of the search on CUDA, without one: no tensor on another device, and nothing that waits for the device.

Fake tensors have shapes and devices but no numbers. So an operation on two devices fails as it would on a GPU, and so
does what reads a number on the host: that would keep a CUDA graph from being recorded. Numbers need a real GPU.
"""
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conas import depthwise, synced
from conas.config import WeightOptions
from conas.graphs import on_device
from conas.search import weight_optimizer, weight_step


@pytest.fixture
def fake_cuda():
    """Everything is made on a CUDA device that is not there."""
    caches = depthwise._taps, synced.constant
    for cache in caches:  # real tensors have no place inside, nor fake ones outside
        cache.cache_clear()
    with FakeTensorMode(), torch.device("cuda"):
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
def test_an_iteration_stays_on_the_device_and_never_waits_for_it(space, fake_cuda):
    network = import_module(f"{space}.model_search").Network(C=4, layers=3)
    optimizer = weight_optimizer(network, WeightOptions())
    architect = import_module(f"{space}.architect").Architect(network, optimizer)
    on_device(optimizer, True)
    on_device(architect.alpha_optimizer, True)
    rate, results = torch.zeros(()), []
    optimizer.param_groups[0]["lr"] = rate
    batches = [(torch.randn(6, 3, 16, 16), torch.randint(10, (6,))) for _ in range(2)]
    for amp in False, True:  # the second iteration has a velocity
        architect.step(*batches, rate)
        results += weight_step(network, optimizer, batches[0], 5.0, amp=amp)
    states = [value for optimizer in (optimizer, architect.alpha_optimizer) for state in optimizer.state.values()
              for value in state.values()]
    assert len(states) > 100
    for tensor in [*network.state_dict().values(), *results, *states]:
        assert tensor.device.type == "cuda"


def test_reading_a_number_would_be_noticed(fake_cuda):
    with pytest.raises(DataDependentOutputException):
        torch.zeros(()).item()
