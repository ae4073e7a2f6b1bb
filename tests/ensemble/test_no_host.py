"""An iteration of the search on another device than the CPU: all of it is there, and nothing waits for it.

Tensors on "meta" have shapes but no numbers. So an operation with a tensor left on the CPU fails as it would on a GPU,
and so does what reads a number on the host: that would keep a CUDA graph from being recorded.
"""
from importlib import import_module

import pytest
import torch
from torch.nn.functional import cross_entropy

from conas.engine.door import accelerate


@pytest.fixture
def meta():
    """Everything is made on "meta"."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
def test_an_iteration_stays_on_the_device_and_never_waits_for_it(space, meta):
    network = import_module(f"{space}.model_search").Network(C=4, layers=3)
    assert accelerate(network)
    optimizer = torch.optim.SGD(network.weights().values(), 0.025, 0.9, weight_decay=3e-4)
    architect = import_module(f"{space}.architect").Architect(network, optimizer)
    (x, y), *_ = batches = [(torch.randn(6, 3, 16, 16), torch.randint(10, (6,))) for _ in range(2)]
    for _ in range(2):  # the second iteration has a velocity
        architect.step(*batches, torch.zeros(()))
        cross_entropy(network.with_weights(x, network.flat()), y).backward()
        optimizer.step()
    velocity = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(velocity) > 100
    for tensor in [*network.state_dict().values(), *velocity, *(p.grad for p in network.parameters())]:
        assert tensor.device.type == "meta"


def test_reading_a_number_would_be_noticed(meta):
    with pytest.raises(RuntimeError):
        torch.zeros(()).item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3) * torch.zeros(3, device="cpu")
