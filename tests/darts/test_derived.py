"""The derived networks: parity with the fixtures, sizes, drop path, auxiliary heads, old checkpoints, counts."""
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conas.darts import derived
from conas.darts.derived import Cell, NetworkCIFAR, NetworkImageNet, count_parameters, drop_path_scales, flops
from conas.darts.genotype import Genotype, from_json, to_json
from conas.darts.operations import OPERATIONS
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from tests.helpers.parity import FLOAT32, derived_quantities, fill, read_fixture, relative_error

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("space*_seed0.npz"))
DARTS = GENOTYPES["DARTS_V2"]


def uniform_genotype(operation: str) -> Genotype:
    """One operation everywhere; no node hears another, so that a cell's output is linear in its edges."""
    edges = [(operation, source) for _ in range(4) for source in (0, 1)]
    return Genotype(edges, range(2, 6), edges, range(2, 6))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_networks_reproduce_the_fixture(path, dtype):
    fixture = read_fixture(path)
    least = 0.0 if dtype == torch.float64 else FLOAT32
    errors = {name: (relative_error(ours, fixture[name]), max(tolerance, least))
              for name, ours, tolerance in derived_quantities(fixture, dtype)}
    assert set(errors) == {name for name in fixture if name.startswith(("cifar/", "imagenet/"))}
    assert not {name: error for name, (error, tolerance) in errors.items() if not error <= tolerance}


# Published figures and names.

def test_published_parameter_counts():
    assert count_parameters(NetworkCIFAR(36, 10, 20, True, DARTS)) == 3_349_342
    assert count_parameters(NetworkImageNet(48, 1000, 14, True, DARTS)) == pytest.approx(4.7e6, rel=0.01)


def test_names_outside_cells_are_the_published_ones():
    def names(network):
        return {name.rsplit(".", 1)[0] for name in network.state_dict() if not name.startswith("cells.")}

    heads = {"auxiliary_head.classifier", "classifier"} | {f"auxiliary_head.features.{i}" for i in (2, 3, 5)}
    cifar, imagenet = NetworkCIFAR(4, 10, 3, True, DARTS), NetworkImageNet(4, 10, 3, True, DARTS)
    assert names(cifar) == heads | {"stem.0", "stem.1", "auxiliary_head.features.6"}
    assert names(imagenet) == heads | {"stem0.0", "stem0.1", "stem0.3", "stem0.4", "stem1.1", "stem1.2"}
    assert not any("auxiliary" in name for name in NetworkCIFAR(4, 10, 3, False, DARTS).state_dict())


def test_published_genotypes_are_complete():
    assert {"NASNet", "AmoebaNet", "DARTS_V1", "DARTS_V2", "DARTS"} < set(GENOTYPES)
    assert GENOTYPES["DARTS"] == DARTS
    for name, genotype in GENOTYPES.items():
        assert from_json(to_json(genotype), name, OPERATIONS) == genotype
        network = NetworkCIFAR(4, 10, 6, True, genotype).train()
        logits, auxiliary = network(torch.randn(2, 3, 32, 32))
        assert logits.shape == auxiliary.shape == (2, 10)
        assert network.genotype() == genotype


def test_arguments_rebuild_the_network():
    for network in (NetworkCIFAR(4, 7, 3, True, DARTS, in_channels=1, image_size=28),
                    NetworkImageNet(4, 7, 3, True, DARTS, image_size=96)):
        again = type(network)(genotype=network.genotype(), **network.arguments)
        again.load_state_dict(network.state_dict())


# Input sizes.

@pytest.mark.parametrize("size", [28, 32, 33, 64, 96, 160])
@pytest.mark.parametrize("name", ["AmoebaNet", "DARTS_V2"])
def test_other_sizes_cifar(name, size):
    network = NetworkCIFAR(4, 10, 5, True, GENOTYPES[name], in_channels=1, image_size=size).train()
    logits, auxiliary = network(torch.randn(2, 1, size, size))
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.eval()(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [33, 64, 96, 160, 225])
def test_other_sizes_imagenet(size):
    network = NetworkImageNet(4, 10, 5, True, GENOTYPES["AmoebaNet"], image_size=size).train()
    logits, auxiliary = network(torch.randn(2, 3, size, size))
    assert logits.shape == auxiliary.shape == (2, 10)


@pytest.mark.parametrize("build, auxiliary, smallest", [
    (NetworkCIFAR, True, 5), (NetworkCIFAR, False, 3), (NetworkImageNet, True, 33), (NetworkImageNet, False, 17)])
def test_smallest_size(build, auxiliary, smallest):
    # the features before the last halving, or those of the auxiliary head, are exactly 2x2
    network = build(4, 10, 3, auxiliary, DARTS, image_size=smallest)
    sizes = []
    network.cells[2 if auxiliary else 1].register_forward_hook(lambda _, __, out: sizes.append(out.shape[2:]))
    network(torch.randn(4, 3, smallest, smallest))
    assert sizes == [(2, 2)]
    with pytest.raises(InputError, match=rf"^--image_size {smallest - 1}: must be at least {smallest} "):
        build(4, 10, 3, auxiliary, DARTS, image_size=smallest - 1)


# Auxiliary heads.

def test_auxiliary_logits_only_in_training():
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(NetworkCIFAR(4, 10, 3, True, DARTS).train()(x), tuple)
    assert isinstance(NetworkCIFAR(4, 10, 3, True, DARTS).eval()(x), torch.Tensor)
    assert isinstance(NetworkCIFAR(4, 10, 3, False, DARTS).train()(x), torch.Tensor)


@pytest.mark.parametrize("build, size, stride", [
    (NetworkCIFAR, 32, 3), (NetworkCIFAR, 29, 3), (NetworkImageNet, 224, 2), (NetworkImageNet, 193, 2)])
def test_auxiliary_head_at_published_feature_size(build, size, stride):
    network = build(4, 10, 4, True, DARTS, image_size=size).train()
    taken = []
    network.cells[2 * 4 // 3].register_forward_hook(lambda _, __, out: taken.append(out))
    _, auxiliary = network(torch.randn(3, 3, size, size))
    w = network.auxiliary_head.state_dict()

    def norm(h, index):
        return F.batch_norm(h, None, None, w[f"features.{index}.weight"], w[f"features.{index}.bias"], training=True)

    h = F.avg_pool2d(taken[0].relu(), 5, stride)
    h = norm(F.conv2d(h, w["features.2.weight"]), 3).relu()
    h = F.conv2d(h, w["features.5.weight"])
    h = (norm(h, 6) if build is NetworkCIFAR else h).relu()
    assert h.shape == (3, 768, 1, 1)
    expected = h.flatten(1) @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(auxiliary, expected)


# Drop path.

def test_drop_path_scales():
    scales = drop_path_scales(8, torch.zeros(5000, 1, 1, 1, dtype=torch.float64), 0.3)
    assert scales.shape == (8, 5000, 1, 1, 1) and scales.dtype == torch.float64
    assert set(scales.unique().tolist()) == {0.0, 1 / 0.7}
    # five standard deviations of the mean of 5000 draws of variance 0.3 / 0.7
    per_edge = scales.mean(dim=1).flatten()
    assert (per_edge - 1).abs().max() < 5 * (0.3 / 0.7 / 5000) ** 0.5
    correlation = torch.corrcoef(scales.flatten(1)) - torch.eye(8)
    assert correlation.abs().max() < 5 / 5000 ** 0.5  # every edge has its own draws


def test_drop_path_keeps_the_expectation():
    cell = Cell(uniform_genotype("dil_conv_3x3"), 4, 4, 4, False, False).double().train()
    s0, s1 = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = cell(s0, s1)
        draws = torch.stack([cell(s0, s1, 0.4) for _ in range(2000)])
    error = draws.mean(dim=0) - expected
    assert (error.abs() <= 5 * draws.std(dim=0) / 2000 ** 0.5).all()
    # a node of two edges, each kept with probability 0.6, is silent in 16 % of the draws
    silent = (draws[:, :, :4] == 0).flatten(2).all(dim=2).double()
    assert (silent.mean(dim=0) - 0.16).abs().max() < 5 * (0.16 * 0.84 / 2000) ** 0.5
    between_images = torch.corrcoef(silent.T) - torch.eye(3)
    assert between_images.abs().max() < 5 / 2000 ** 0.5


def test_drop_path_leaves_identities_alone_only():
    def differs(operation, reduction):
        cell = Cell(uniform_genotype(operation), 4, 4, 4, reduction, False).train()
        s0, s1 = torch.randn(2, 4, 4, 6, 6)
        return not torch.equal(cell(s0, s1), cell(s0, s1, 0.9))

    assert not differs("skip_connect", reduction=False)
    assert differs("skip_connect", reduction=True)  # strided, it is a convolution
    assert differs("max_pool_3x3", reduction=False)


@pytest.mark.parametrize("name", ["DARTS_V1", "NASNet"])  # with skips, whose output is a state
def test_drop_path_mutates_nothing(name):
    network = NetworkCIFAR(4, 10, 5, True, GENOTYPES[name]).train()
    network.drop_path_prob = 0.5
    seen = []

    def remember(_, inputs, output):
        tensors = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        seen.extend((t, t.detach().clone()) for t in tensors)

    for module in network.modules():
        if module is not network:
            module.register_forward_hook(remember)
    network(torch.randn(4, 3, 32, 32))
    assert len(seen) > 400
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


def test_drop_path_prob_is_for_training():
    network = NetworkCIFAR(4, 10, 5, False, DARTS)
    x = torch.randn(4, 3, 32, 32)

    def logits(training, drop_path_prob):
        network.drop_path_prob = drop_path_prob
        return network.train(training)(x)

    assert network.drop_path_prob == 0
    for training in (True, False):
        state = {name: entry.clone() for name, entry in network.state_dict().items()}
        without = logits(training, 0.0)
        network.load_state_dict(state)
        assert torch.equal(without, logits(training, 0.5)) == (not training)
    logits(True, 0.5).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


# Checkpoints from before PyTorch 0.4.1, which had no num_batches_tracked.

@pytest.mark.parametrize("build, size", [(NetworkCIFAR, 32), (NetworkImageNet, 64)])
def test_old_state_dict_loads(tmp_path, build, size):
    network = build(4, 10, 3, True, DARTS).eval()
    fill(network, 0)
    old = {name: entry for name, entry in network.state_dict().items() if "num_batches_tracked" not in name}
    assert len(old) < len(network.state_dict())
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    again = build(4, 10, 3, True, DARTS).eval()
    again.load_state_dict(torch.load(tmp_path / "old.pt", weights_only=True))
    x = torch.randn(2, 3, size, size)
    assert torch.equal(network(x), again(x))


# Genotypes that cannot be built.

@pytest.mark.parametrize("change, message", [
    ({"normal": [("sep_conv_9x9", 0)] + DARTS.normal[1:]}, "normal edge 0 uses 'sep_conv_9x9'"),
    ({"reduce": [("skip_connect", 2)] + DARTS.reduce[1:]}, "reduce edge 0 comes from state 2"),
    ({"normal_concat": [2, 3, 4, 6]}, "normal_concat"),
    ({"reduce": DARTS.reduce[:7]}, "reduce has 7 edges"),
])
@pytest.mark.parametrize("build", [NetworkCIFAR, NetworkImageNet])
def test_impossible_genotypes_are_refused(build, change, message):
    with pytest.raises(InputError, match=f"^genotype: {message}"):
        build(4, 10, 3, False, DARTS._replace(**change))


# Multiply-adds.

@pytest.mark.parametrize("build, size", [(NetworkCIFAR, 33), (NetworkImageNet, 64)])
def test_flops_are_multiply_adds(build, size):
    network = build(4, 10, 3, True, GENOTYPES["AmoebaNet"], image_size=size)
    counted = flops(network, (3, size, size))
    assert network.training  # as before
    expected = 0

    def count(module, _, output):  # every output value takes one multiply-add for each weight of its filter
        nonlocal expected
        expected += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network.eval()(torch.randn(1, 3, size, size))
    assert counted == expected


@pytest.mark.parametrize("name, parameters, own, as_thop", [
    ("DARTS_V2", 4_718_752, 529.9, 546.5), ("PDARTS", None, 542.8, 559.3), ("PC_DARTS_cifar", None, 571.1, 588.5),
    ("PC_DARTS_image", None, 581.6, 599.5), ("DrNAS_imagenet", None, 624.4, 644.4)])
def test_both_conventions_give_the_known_figures_of_published_cells(name, parameters, own, as_thop):
    """P-DARTS, PC-DARTS and DrNAS state 557, 586, 597 and 644 M for ImageNet."""
    with torch.device("meta"):
        network = NetworkImageNet(48, 1000, 14, False, GENOTYPES[name])
        found = derived.multiply_adds(network, (3, 224, 224))
    assert count_parameters(network) == (parameters or count_parameters(network))
    assert [value / 1e6 for value in found] == pytest.approx([own, as_thop], abs=0.06)
