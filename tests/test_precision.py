"""What packing may not change: in float32, the hypergradient is as near to float64's as the textbook code's is.

    python -m tests.test_precision 84        # mean and median over 84 batches: about three minutes
"""
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks.search_step import Contestant
from conas.statistics import Statistics
from conas.synced import Pool, batch_norm_
from tests.parity import fill, set_alphas

CHANNELS, LAYERS, BATCH, SIZE = 4, 3, 8, 16
KINK = 1e-4  # errors by rounding alone are a few 1e-6


def hypergradient(name: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of one architect step on weights, alphas and batches that depend on nothing but the seed."""
    contestant = Contestant(name, "cnn_space1", CHANNELS, LAYERS, BATCH, dtype=dtype, image_size=SIZE, seed=seed)
    fill(contestant.network, seed)
    rng = torch.Generator().manual_seed(seed)
    primitives = contestant.network.alphas_normal.shape[1]
    set_alphas(contestant.network, [0.5 * torch.randn(14, primitives, generator=rng, dtype=torch.float64).to(dtype)
                                    for _ in range(2)])
    return contestant.hypergradient().double()


def errors(batches: int) -> dict[str, torch.Tensor]:
    """Relative distances of float32's hypergradients from float64's, of both implementations."""
    found = {"textbook": [], "ours": []}
    for seed in range(batches):
        exact = hypergradient("ours", torch.float64, seed)
        for name, of in found.items():
            of.append(((hypergradient(name, torch.float32, seed) - exact).norm() / exact.norm()).item())
    return {name: torch.tensor(of) for name, of in found.items()}


def test_float32_is_as_near_to_float64_as_the_textbook():
    """Both in rounding and in how often that crosses a kink of ReLU or max pooling, which costs a thousand times more.

    The mean hangs on these few: a dozen batches are enough to count them, but not for a mean.
    """
    found = errors(12)
    assert found["ours"].median() <= 1.5 * found["textbook"].median(), found
    assert (found["ours"] > KINK).sum() <= (found["textbook"] > KINK).sum() + 5, found


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


if __name__ == "__main__":
    for name, of in errors(int(sys.argv[1])).items():
        print(f"{name}: mean {of.mean():.2e}, median {of.median():.2e}, above {KINK}: {(of > KINK).sum()} of {len(of)}")
