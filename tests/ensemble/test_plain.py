"""Networks as plain operations: the same logits as their definition, for every space, size of image and rule."""
import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from conas.darts.derived import NetworkCIFAR, NetworkImageNet
from conas.darts.published import GENOTYPES
from conas.darts.supernet import MixedOp, SearchCell, Supernet
from ensemble.combine.committee import COMBINATIONS
from ensemble.combine.network import CommitteeNetwork
from ensemble.deploy.committee import PlainCommittee
from ensemble.deploy.files import export_program
from ensemble.deploy.plain import Halving, OwnCell, PlainCell, plain
from tests.conftest import ROOT

DATASET = {"name": "cifar10", "classes": list("0123456789"), "image_size": 12}


class OwnOperation(nn.Module):
    def __init__(self, C: int, stride: int, affine: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


OWN = {"own": OwnOperation, "wide_pool": lambda C, stride, affine: nn.MaxPool2d(5, stride, 2)}


class OwnSpace(Supernet):
    primitives = "none", "own", "skip_connect", "wide_pool", "sep_conv_3x3"
    operations = OWN


class Doubled(MixedOp):
    def forward(self, x, weights):
        return 2 * super().forward(x, weights)


class OwnCells(Supernet):
    primitives = "skip_connect", "sep_conv_3x3", "avg_pool_3x3"
    cell = type("Cell", (SearchCell,), {"mixed_op": Doubled})


class OwnEdges(Supernet):
    primitives = (("skip_connect", "sep_conv_3x3"), ("max_pool_3x3",), *[("dil_conv_5x5", "none", "skip_connect")] * 12)


class SkipsAlone(Supernet):
    primitives = "none", "skip_connect"


def trained(network: nn.Module, size: int = 12) -> nn.Module:
    """With statistics of BatchNorm, alphas and affine parameters that are no longer those of the start."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("alphas") or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        for _ in range(3):
            network.train()(torch.randn(8, 3, size, size) + 0.5)
    return network.eval()


def supernet(space: str, stem: str = "cifar") -> nn.Module:
    return import_module(f"{space}.model_search").Network(4, 10, 3, 3, stem)


MAKERS = {
    "space 1": (lambda: supernet("cnn_space1"), 12), "space 2, odd": (lambda: supernet("cnn_space2"), 13),
    "space 3": (lambda: supernet("cnn_space3"), 12), "space 1, stem": (lambda: supernet("cnn_space1", "imagenet"), 37),
    "own operation": (lambda: OwnSpace(4, 10, 3, 3), 12), "own cell": (lambda: OwnCells(4, 10, 3, 3), 12),
    "own edges": (lambda: OwnEdges(4, 10, 3, 3), 12), "skips alone": (lambda: SkipsAlone(4, 10, 3, 3), 12),
    "derived": (lambda: NetworkCIFAR(4, 10, 3, True, GENOTYPES["PC_DARTS_cifar"], image_size=13), 13),
    "photographs": (lambda: NetworkImageNet(4, 10, 3, False, GENOTYPES["AmoebaNet"], image_size=37), 37),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MAKERS)
def test_the_logits_are_those_of_the_definition(name):
    torch.manual_seed(1)
    make, size = MAKERS[name]
    network = trained(make(), size)
    state = copy.deepcopy(network.state_dict())
    x = torch.randn(7, 3, size, size)
    made = plain(network)
    expected, found = network(x), made(x)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())  # it stays as it was
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) == (name in ("own operation", "own cell"))  # of pools, and of what has a forward of its own
    if isinstance(network, Supernet):
        assert {type(cell) for cell in made.cells} == {OwnCell if name == "own cell" else PlainCell}


def test_a_hooked_operation_runs_by_its_own_code():
    torch.manual_seed(0)
    network = trained(OwnCells(4, 10, 3, 3))
    network.cells[1].preprocess0.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(plain(network)(x), network(x), atol=1e-5)


@pytest.fixture(scope="module")
def pair() -> tuple[CommitteeNetwork, CommitteeNetwork]:
    """A committee by the engine, and by the definition."""
    torch.manual_seed(3)
    networks = [trained(supernet("cnn_space3")),
                trained(NetworkCIFAR(4, 10, 3, False, GENOTYPES["DARTS"], image_size=12))]
    for network in networks:
        network.classifier.weight.requires_grad_(False).mul_(20)
    return tuple(CommitteeNetwork(copy.deepcopy(networks), list("ab"), DATASET, "mean_softmax", weights=[0.7, 0.3],
                                  temperatures=[1.0, 0.7], temperature=1.3, crops=[None, 10], **how)
                 for how in ({}, {"prepare": lambda network: network}))


@torch.no_grad()
@pytest.mark.parametrize("combination", [*COMBINATIONS, "weights of the members"])
def test_every_rule_gives_the_probabilities_of_the_committee(pair, combination):
    ours, definition = pair
    ours.combination = definition.combination = combination
    network = PlainCommittee(definition)
    images = torch.randint(256, (9, 3, 12, 12), dtype=torch.uint8)
    expected, found = ours(images), network(images)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
    assert torch.equal(network(images.float()), found)
    assert expected.max() > 0.3  # equal probabilities everywhere would hide a rule


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_have_no_answer(pair, value):
    network = PlainCommittee(pair[1])
    images = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8)
    network.members[1].classifier.bias[4] = value
    assert network(images).isnan().all()


@torch.no_grad()
def test_halving_is_one_convolution():
    reduce = trained(supernet("cnn_space2")).cells[2].preprocess0
    x = torch.randn(2, reduce.conv_1.in_channels, 5, 6)
    assert torch.allclose(Halving(reduce)(x), reduce(x), atol=1e-5)
    assert type(reduce).__name__ == "FactorizedReduce"


def test_the_engine_is_no_part_of_an_export():
    for file in (ROOT / "ensemble" / "deploy").glob("*.py"):
        assert "conas.engine" not in file.read_text(encoding="utf-8")


@torch.no_grad()
def test_a_bounded_program_is_traced_at_its_bound(pair):
    """ExecuTorch traces again, and takes what it finds of the size of the example as the limit: 15 where that is 2."""
    committee = PlainCommittee(pair[1])
    program = export_program(committee, (3, 12, 12), max_batch=20)
    size = next(node for node in program.graph.nodes if node.name == "images").meta["val"].shape[0]
    assert size.node.hint == 20
    for batch in 1, 7, 20:
        images = torch.randint(256, (batch, 3, 12, 12), dtype=torch.uint8)
        torch.testing.assert_close(program.module()(images), committee(images), atol=1e-5, rtol=0)
