"""What packing may not change: in float32, the hypergradient is as near to float64's as the textbook code's is."""
import pytest
import torch
from torch.nn import functional as F

from benchmarks.search_step import Contestant
from conas.statistics import Statistics
from conas.synced import Pool, batch_norm_
from tests.parity import fill, set_alphas

BATCHES, CHANNELS, LAYERS, BATCH, SIZE = 24, 4, 3, 8, 16


def hypergradient(name: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of one architect step on weights, alphas and batches that depend on nothing but the seed."""
    contestant = Contestant(name, "cnn_space1", CHANNELS, LAYERS, BATCH, dtype=dtype, image_size=SIZE, seed=seed)
    fill(contestant.network, seed)
    rng = torch.Generator().manual_seed(seed)
    primitives = contestant.network.alphas_normal.shape[1]
    set_alphas(contestant.network, [0.5 * torch.randn(14, primitives, generator=rng, dtype=torch.float64).to(dtype)
                                    for _ in range(2)])
    return contestant.hypergradient().double()


def test_float32_is_as_near_to_float64_as_the_textbook():
    """Kinks of ReLU and max pooling amplify rounding now and then, so it takes many batches to see a difference."""
    errors = {"textbook": [], "ours": []}
    for seed in range(BATCHES):
        exact = hypergradient("ours", torch.float64, seed)
        for name, of in errors.items():
            of.append(((hypergradient(name, torch.float32, seed) - exact).norm() / exact.norm()).item())
    ours, expected = (torch.tensor(errors[name]) for name in ("ours", "textbook"))
    assert ours.mean() <= 1.3 * expected.mean() and ours.median() <= 2 * expected.median(), errors


def test_batch_norm_of_channels_last_maps_keeps_its_digits():
    """PyTorch's own is a factor of ten away from its contiguous one here."""
    torch.manual_seed(0)
    x = torch.randn(16, 32, 32, 8, dtype=torch.float64) + 0.3
    norms = [torch.nn.BatchNorm2d(8, affine=False)]
    exact, found = (Statistics(batch=True, keep=False).normalise(x.to(dtype).requires_grad_(), norms)
                    for dtype in (torch.float64, torch.float32))
    assert (found - exact).abs().max() < 4e-7 * exact.abs().max()


@pytest.mark.parametrize("maps", [1, 2, 3])
def test_batch_norm_in_place_is_the_library_s(maps):
    """Of the first maps; the others pass through, and so do their gradients."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    parts = [F.batch_norm(m.permute(0, 3, 1, 2), None, None, training=True).permute(0, 2, 3, 1) for m in x[:maps]]
    expected = torch.cat([torch.stack(parts), x[maps:]])
    found, mean, variance = batch_norm_(x * 1, 1e-5, Pool(), maps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean[:, 0], x[:maps].mean((1, 2, 3)))
    torch.testing.assert_close(variance[:, 0], x[:maps].var((1, 2, 3), correction=0))
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
