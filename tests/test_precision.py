"""What packing may and may not change: rounding in float32 no more than the textbook's, operator calls far fewer."""
import torch
from torch.nn.functional import conv2d

from benchmarks.counts import flops, operator_calls
from benchmarks.search_step import Contestant
from tests.parity import fill, set_alphas

BATCHES, CHANNELS, LAYERS, BATCH, SIZE = 8, 4, 3, 8, 16


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
    """ReLU and max pooling amplify rounding, for both alike; a fold that loses digits would show here."""
    errors = {"textbook": [], "ours": []}
    for seed in range(BATCHES):
        exact = hypergradient("ours", torch.float64, seed)
        for name, of in errors.items():
            of.append(((hypergradient(name, torch.float32, seed) - exact).norm() / exact.norm()).item())
    ours, expected = (sum(errors[name]) / BATCHES for name in ("ours", "textbook"))
    assert ours <= 1.3 * expected, errors


def test_an_architect_step_calls_a_fraction_of_the_textbooks_operators():
    calls = {}
    for name in "textbook", "ours":
        contestant = Contestant(name, "cnn_space1", 2, 3, 2, image_size=16)
        contestant.iteration()
        calls[name] = operator_calls(contestant.works["architect"])
    assert calls["ours"] <= 0.30 * calls["textbook"], calls


def test_depthwise_backward_counts_as_its_three_convolutions():
    """2 * k*k for each output pixel and channel: once forward, once for each of the two gradients."""
    x, weight = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(6, 1, 3, 3, requires_grad=True)
    once = 2 * 9 * (2 * 6 * 8 * 8)
    assert flops(lambda: conv2d(x, weight, padding=1, groups=6)) == once
    assert flops(lambda: conv2d(x, weight, padding=1, groups=6).sum().backward()) == 3 * once
