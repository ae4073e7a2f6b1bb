"""Iterations and evaluation as CUDA graphs: the same numbers, and nothing that waits for the device."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conas.commands import search
from conas.commands.search import weight_step
from conas.engine.cuda_graph import WARM_UP, Replayed, ReplayedForward, graph_fits, on_device
from conas.runs.checkpoint import load
from tests.helpers.searches import GPU, Log, equal, no_pictures, plain, problem, run_search  # noqa: F401


def pretend(function):
    """As a recording of CUDA: the results are where they were, and replaying changes their values."""
    results = [torch.zeros(()), torch.zeros((), dtype=torch.int64)]

    def replay():
        for own, value in zip(results, function()):
            own.copy_(value)

    return replay, results


def test_replayed_iterations_are_the_same(plain, tmp_path, monkeypatch):
    """With a short last batch, over two epochs of different learning rates."""
    captures = []

    def capture(function):
        captures.append(function)
        return pretend(function)

    class OnCPU(Replayed):
        def __init__(self, *arguments):
            super().__init__(*arguments, record=capture)
            assert WARM_UP == 3
            self.seen = 2  # so that a replay comes before the short batch, the third of an epoch

    monkeypatch.setattr(search, "graph_fits", lambda *_: True)
    monkeypatch.setattr(search, "on_device", lambda *_: None)
    flags = ["--epochs", "2", "--learning_rate", "0.5"]
    expected, _ = run_search(tmp_path / "a", *flags)
    monkeypatch.setattr(search, "Replayed", OnCPU)
    state, _ = run_search(tmp_path / "b", *flags, "--cuda_graph")
    assert len(captures) == 1 and equal(state, expected)
    ends = [load(tmp_path / name / "cnn_space2" / "search-EXP" / "checkpoints" / "epoch_001.pt")["state"]
            for name in "ab"]
    assert equal(*ends)


def test_graphs_elsewhere_and_graphs_that_fail(plain, tmp_path):
    state, log = run_search(tmp_path, "--cuda_graph")
    assert "--cuda_graph: CUDA graphs are for CUDA devices, not for cpu" in log and equal(state, plain[0])
    run = Log()
    assert not graph_fits(torch.device("cuda"), True, run.log) and "--on_nan" in run.lines[0]

    def capture(function):
        raise RuntimeError("operation not permitted\nmore")

    _, optimizer, _, batches = problem()
    iterate = Replayed(lambda train, valid, lr: (lr.clone(), len(train[1])), optimizer, 6, torch.device("cpu"), run.log,
                       capture)
    results = [iterate(*batches, 0.5 * i) for i in range(WARM_UP + 3)]
    assert [float(lr) for lr, _ in results] == [0.5 * i for i in range(WARM_UP + 3)]
    assert len(run.lines) == 2 and "operation not permitted" in run.lines[1]


def test_iterations_that_draw_random_numbers_are_not_recorded():
    _, optimizer, _, batches = problem()
    for draw, recorded in (torch.rand, False), (torch.zeros, True):
        run, records = Log(), []
        iterate = Replayed(lambda train, valid, lr, draw=draw: (draw(()) + lr, len(train[1])), optimizer, 6,
                           torch.device("cpu"), run.log, lambda function, records=records: records.append(1) or
                           pretend(function))
        for _ in range(WARM_UP + 2):
            iterate(*batches, 0.5)
        assert bool(records) == recorded
        assert [("draws random numbers" in line) for line in run.lines] == ([] if recorded else [True])


def recording(function):
    """A stand-in for a graph: each replay computes again, into the same memory."""
    results = function().clone()
    return lambda: results.copy_(function()), results


def refusing(function):
    raise RuntimeError("operation not permitted")


@pytest.mark.parametrize("record", [recording, refusing])
def test_evaluation_by_a_graph(record):
    network, *_ = problem()
    network.eval()
    with torch.inference_mode():
        forward = ReplayedForward(network, torch.device("cpu"), record)
        batches = [torch.randn(n, 3, 8, 8) for n in (4, 4, 4, 3, 4)]
        outputs = [forward(x) for x in batches]
        for x, y in zip(batches, outputs):
            torch.testing.assert_close(y, network(x))
    assert (forward.replay is None) == (record is refusing)


def test_nothing_in_an_iteration_waits_for_the_device():
    """Every `.item()`, and every branch on a tensor's value, is a call of one operator."""
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                                       torch.ops.aten.is_nonzero.default)
            return function(*args, **(kwargs or {}))

    network, optimizer, architect, (train, valid) = problem()
    with Waits() as waits:
        architect.hypergradient(train, valid, torch.tensor(0.025))
        weight_step(network, optimizer, train, 5.0)
        assert waits.count == 0
        assert torch.ones(()) and waits.count == 1  # it does see them


def test_optimizers_on_the_device_and_back():
    network, optimizer, architect, batches = problem()
    architect.step(*batches, 0.025)
    weight_step(network, optimizer, batches[0], 5.0)
    for own in (optimizer, architect.alpha_optimizer):
        on_device(own, True)
    assert optimizer.param_groups[0]["fused"] and architect.alpha_optimizer.param_groups[0]["capturable"]
    for own in (optimizer, architect.alpha_optimizer):
        on_device(own, False)
    architect.step(*batches, 0.025)
    weight_step(network, optimizer, batches[0], 5.0)


@GPU
def test_a_cuda_graph_gives_the_numbers_of_the_iteration(tmp_path):
    cuda = ["--device", "cuda", "--epochs", "3", "--deterministic"]
    expected, _ = run_search(tmp_path / "a", *cuda, "--no-cuda_graph")
    state, log = run_search(tmp_path / "b", *cuda)
    assert "--cuda_graph" not in log
    for name, entry in expected.items():
        torch.testing.assert_close(state[name], entry, rtol=1e-3, atol=1e-4, msg=name)


@GPU
@torch.inference_mode()
def test_evaluation_by_a_graph_on_cuda():
    network, *_ = problem()
    device = torch.device("cuda")
    network.to(device, memory_format=torch.channels_last).eval()
    forward = ReplayedForward(network, device)
    batches = [torch.randn(n, 3, 8, 8, device=device) for n in (4, 4, 4, 3, 4)]
    outputs = [forward(x) for x in batches]
    assert forward.replay is not None
    for x, y in zip(batches, outputs):
        torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)
