"""What the benchmark of the search step counts, operator calls and FLOPs, and a short run of that of an epoch."""
import json
from functools import partial

import pytest
import torch
from torch.nn.functional import conv2d

from benchmarks.contestant import Contestant
from benchmarks.counts import flops, operator_calls
from benchmarks.turns import Player
from conas.darts.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.engine.native.functions import run_operation
from conas.engine.native.loader import kernels
from conas.engine.native.parts import read
from tests.conftest import clone


def test_an_architect_step_calls_a_fraction_of_the_textbooks_operators():
    calls = {}
    for name in "textbook", "ours":
        contestant = Contestant(name, "cnn_space1", 2, 3, 2, image_size=16)
        contestant.iteration()
        calls[name] = operator_calls(contestant.works["architect"])
    assert calls["ours"] <= 0.40 * calls["textbook"], calls


def test_depthwise_backward_counts_as_its_three_convolutions():
    """2 * k*k for each output pixel and channel: once forward, once for each of the two gradients."""
    x, weight = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(6, 1, 3, 3, requires_grad=True)
    once = 2 * 9 * (2 * 6 * 8 * 8)
    assert flops(lambda: conv2d(x, weight, padding=1, groups=6)) == once
    assert flops(lambda: conv2d(x, weight, padding=1, groups=6).sum().backward()) == 3 * once


@pytest.mark.skipif(kernels() is None, reason="no kernels here")
@pytest.mark.parametrize("module", [SepConv(8, 5, 1, False), SepConv(8, 3, 2, False), DilConv(8, 3, 1, False),
                                    ReLUConvBN(6, 8, 1, 1, 0, False), FactorizedReduce(8, 8, False)])
def test_kernels_count_as_the_convolutions_that_they_compute(module):
    x, passes = torch.randn(2, 6 if isinstance(module, ReLUConvBN) else 8, 16, 16), (1, 2, 3)
    def work(run, wanted):
        for parameter in module.parameters():
            parameter.requires_grad_(wanted > 2)
        y = run(x.clone().requires_grad_(wanted > 1))
        if wanted > 1:
            y.sum().backward()
    by_kernels = partial(run_operation, kernels(), read(module), weights=list(module.parameters()), training=True)
    found = [flops(partial(work, by_kernels, wanted)) for wanted in passes]
    assert found == [flops(partial(work, module, wanted)) for wanted in passes]
    assert found == [found[0], 2 * found[0], 3 * found[0]]
    assert flops(lambda: None) == 0


def test_the_textbook_in_channels_last_computes_the_same_in_that_format():
    gradients, formats = {}, {}
    for name in "textbook", "channels_last":
        contestant = Contestant(name, "cnn_space2", 2, 3, 2, dtype=torch.float64, image_size=16)
        found = formats[name] = set()
        for module in contestant.network.modules():
            if type(module) is torch.nn.Conv2d:
                module.register_forward_hook(lambda _, inputs, y, found=found: found.add(
                    y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()))
        gradients[name] = contestant.hypergradient()
    torch.testing.assert_close(gradients["channels_last"], gradients["textbook"], rtol=1e-9, atol=1e-12)
    assert formats == {"textbook": {False}, "channels_last": {True}}


def test_a_player_does_what_a_contestant_of_this_process_does_and_says_so_if_it_cannot():
    sizes = {"space": "cnn_space2", "channels": 2, "layers": 3, "batch_size": 2, "eval_batch": 2}
    here = Contestant("ours", **sizes)
    here.iteration()
    with Player("ours", sizes, torch.device("cpu"), 1, True) as player:
        assert player.ask("operator_calls", "evaluation") == operator_calls(here.works["evaluation"])
        assert 0 < player.ask("seconds", "weights") < 60 and player.peak_bytes > 0
        assert all(0 < seconds < 60 for seconds in player.ask("clocks", "weights").values())
        for _ in range(2):  # while it is asked, and after
            with pytest.raises(SystemExit, match="ours: its process ended"):
                player.ask("seconds", "nothing of the kind")


def test_the_benchmark_of_an_epoch_runs(tmp_path):
    copy = clone(tmp_path / "CoNAS")
    flags = ["--init_channels", "2", "--layers", "3", "--batch_size", "4", "--images", "40",
             "--steps", "2", "--device", "cpu"]
    done = copy.run("-m", "benchmarks.search_epoch", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((copy.root / "benchmarks/results/search_epoch-cpu.json").read_text())["C=2 layers=3 steps=2"]
    assert 0 < found["seconds"]["alpha steps"] < found["seconds"]["all"]
    assert 0 < found["outside_the_model_in_steps"] < 100
