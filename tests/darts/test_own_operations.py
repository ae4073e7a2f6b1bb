"""Operations of a space's own: random ones in a bilevel step and in killed runs, and whether a search chooses those
that earn it."""
import os
from types import ModuleType

import pytest
import torch
from torch import nn

from cnn_space2.architect import Architect
from conas.commands import search, train
from conas.commands.search import weight_optimizer, weight_step
from conas.darts import genotype as genotypes
from conas.darts.architect import Bilevel
from conas.darts.genotype import Genotype
from conas.darts.primitives import SOURCES
from conas.darts.supernet import Supernet
from conas.runs.options import WeightOptions
from tests.helpers.crash import SMALL, differences, everything, in_child
from tests.helpers.searches import no_pictures  # noqa: F401


class Noise(nn.Module):
    """A convolution of the states plus noise from the global generator; from `fixed`, once that is set."""

    fixed: torch.Tensor | None = None
    drawn: torch.Tensor | None = None

    def __init__(self, C, stride, affine):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        x = self.conv(x.tanh())
        self.drawn = torch.randn_like(x) if self.fixed is None else self.fixed
        return self.norm(x + self.drawn)


Noisy = type("Noisy", (Supernet,), {"primitives": ("none", "skip_connect", "noise"), "operations": {"noise": Noise}})


@pytest.mark.parametrize("hvp", ["difference", "exact"])
@pytest.mark.parametrize("unrolled", [True, False])
def test_all_passes_of_an_alpha_step_see_the_same_noise(hvp, unrolled):
    torch.manual_seed(0)
    network = Noisy(C=2, num_classes=3, layers=3).double()
    train, valid = ((torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(2))
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.1, momentum=0.9, weight_decay=0.03)
    architect = Bilevel(network, optimizer, unrolled=unrolled, hvp=hvp)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    torch.manual_seed(1)
    architect.step(train, valid, 0.1)
    random = [alpha.grad.clone() for alpha in network.alphas().values()]
    noises = [module for module in network.modules() if isinstance(module, Noise)]
    assert any(noise.fixed is None and noise.drawn.std() > 0.5 for noise in noises)

    network.load_state_dict(state)
    torch.manual_seed(1)
    with torch.no_grad():
        network(train[0])  # draws what every pass of the step has drawn
    for noise in noises:
        noise.fixed = noise.drawn
    network.load_state_dict(state)
    Bilevel(network, optimizer, unrolled=unrolled, hvp=hvp).step(train, valid, 0.1)
    for alpha, gradient in zip(network.alphas().values(), random):
        torch.testing.assert_close(gradient, alpha.grad, rtol=1e-9, atol=1e-12)


class Product(nn.Module):
    """A pixel times the one five to its right, which is what the classes below differ in."""

    def __init__(self, C, stride, affine):
        super().__init__()
        self.stride, self.norm = stride, nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        return self.norm((x * x.roll(5, 3))[:, :, ::self.stride, ::self.stride])


class Useless(nn.Module):
    """Noise of the scale that other operations have."""

    def __init__(self, C, stride, affine):
        super().__init__()
        self.stride, self.norm = stride, nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        return self.norm(torch.randn_like(x[:, :, ::self.stride, ::self.stride]) + 0 * x.mean())


Planted = type("Planted", (Supernet,), {"primitives": ("useless", "skip_connect", "product"),
                                        "operations": {"product": Product, "useless": Useless}})


def batch(images=32, size=16):
    """Images of random signs, of which the right pixel of each pair five apart is a copy (1) or its opposite (0)."""
    labels = torch.randint(2, (images,))
    signs = torch.randn(images, 3, size, 5).sign()
    columns = [signs]
    for _ in range(size // 5):
        columns.append(columns[-1] * (2 * labels - 1)[:, None, None, None])
    pixels = torch.cat(columns, dim=3)[..., :size]
    return pixels * (torch.rand_like(pixels) - 0.25).sign(), labels  # a quarter of the signs are wrong


def test_an_operation_is_chosen_if_it_is_best_and_not_if_it_is_useless():
    """By means over edges: forty steps decide single edges by chance, and rounding differs between processors."""
    torch.manual_seed(2)
    network = Planted(C=2, num_classes=2, layers=3)
    optimizer = weight_optimizer(network, WeightOptions(learning_rate=0.1))
    architect = Bilevel(network, optimizer, arch_learning_rate=0.1, unrolled=False)
    for _ in range(40):
        train = batch()
        architect.step(train, batch(), 0.1)
        weight_step(network, optimizer, train, grad_clip=5.0)
    of_inputs = [edge for edge, source in enumerate(SOURCES) if source < 2]
    useless, skip, product = network.alphas_normal.softmax(1)[of_inputs].mean(0).tolist()
    assert product > 1.5 * max(skip, useless)
    cells = network.genotype()
    from_inputs = [operation for operation, source in cells.normal if source < 2]
    assert from_inputs.count("product") > len(from_inputs) / 2 > 0
    assert sum(operation == "useless" for operation, _ in [*cells.normal, *cells.reduce]) <= 2  # of 16


class Dropped(nn.Module):
    """Dropout, whose masks come from the global generator."""

    def __init__(self, C, stride, affine):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(C, affine=affine), nn.Dropout(0.3)
        self.stride = stride

    def forward(self, x):
        return self.norm(self.drop(x)[:, :, ::self.stride, ::self.stride])


SPACE = ModuleType("genotypes")
SPACE.PRIMITIVES = ("noise", "dropped", "skip_connect")
SPACE.OPERATIONS = {"noise": Noise, "dropped": Dropped}
Random = type("Random", (Supernet,), {"primitives": SPACE.PRIMITIVES, "operations": SPACE.OPERATIONS})


def run_search(folder):
    search.main(folder, Random, Architect, "", SMALL)
    return folder / "search-EXP"


def run_training(folder):
    edges = [(operation, source) for operation in ("noise", "dropped") for _ in range(2) for source in (0, 1)]
    genotypes.save(folder / "search-EXP" / "genotype.json", Genotype(edges, range(2, 6), edges, range(2, 6)))
    train.main(folder, SPACE, "", argv=[*SMALL, "--valid_portion", "0.2", "--drop_path_prob", "0.3"])
    return folder / "train-EXP"


@pytest.mark.parametrize("run, event", [(run_search, "before hessian_vector"), (run_training, "before validate")])
def test_a_killed_run_ends_with_the_same_bits_though_its_operations_are_random(tmp_path, run, event):
    """Killed at the last of such events, which lies in the second epoch."""
    status, seen = in_child(lambda: run(tmp_path / "whole" / "cnn_space4"))
    assert status == 0
    whole = everything(run_folder := next((tmp_path / "whole" / "cnn_space4").glob("*-EXP/log.txt")).parent)
    folder = tmp_path / "killed" / "cnn_space4"
    status, _ = in_child(lambda: run(folder), len(seen) - 1 - seen[::-1].index(event))
    assert os.WIFSIGNALED(status)
    assert in_child(lambda: run(folder))[0] == 0
    again = folder / run_folder.name
    assert "goes on in epoch 1" in (again / "log.txt").read_text()
    assert not differences(everything(again), whole)
