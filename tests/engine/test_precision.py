"""Options of speed and memory: what each must change, and what none may."""
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conas.commands import search
from conas.commands.search import weight_step
from conas.engine.precision import checkpoint_cells
from conas.errors import InputError
from tests.helpers.searches import equal, no_pictures, plain, problem, run_search  # noqa: F401


def saved_bytes(network, x):
    """What a forward pass keeps for its backward pass, each tensor's memory counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network.with_weights(x, network.flat()).sum()
    return loss, sum(storages.values())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("settings", [{"hvp": "difference"}, {"hvp": "exact"}, {"unrolled": False}])
def test_checkpointed_cells_change_no_bit(settings, fast):
    ends = []
    for wrapped in (False, True):
        network, optimizer, architect, batches = problem(fast=fast, **settings)
        if wrapped:
            checkpoint_cells(network, getattr(vars(network).get("with_weights"), "__self__", None))
        for _ in range(2):
            architect.step(*batches, 0.025)
            weight_step(network, optimizer, batches[0], 5.0)
        assert network.cells[0].preprocess1.op[2].num_batches_tracked == 2  # once a step, though computed twice
        ends.append(network.state_dict())
    assert equal(*ends)


def test_checkpointed_cells_keep_less():
    network, _, _, _ = problem()
    packed = network.with_weights.__self__
    x = torch.randn(16, 3, 16, 16)  # enough for maps to take more memory than weights
    loss, all_of_it = saved_bytes(network, x)
    calls = []

    def counted(cell, *arguments):
        calls.append(cell)
        return cell(*arguments)

    packed.run_cell = counted
    checkpoint_cells(network, packed)
    loss, kept = saved_bytes(network, x)
    assert kept < 0.2 * all_of_it
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6
    with torch.inference_mode():
        network.with_weights(x, network.flat())
    assert len(calls) == 9


def test_checkpoint_cells_of_a_search(plain, tmp_path, monkeypatch):
    wrapped = []
    monkeypatch.setattr(search, "checkpoint_cells", lambda *of: wrapped.append(of) or checkpoint_cells(*of))
    state, _ = run_search(tmp_path, "--checkpoint_cells")
    assert wrapped and equal(state, plain[0])


class Convolutions(TorchDispatchMode):
    """Number formats of all convolutions inside, forward and backward."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "conv" in str(function):
            self.dtypes |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
def test_a_weight_step_in_bfloat16(space):
    gradients = []
    for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        network, optimizer, _, batches = problem(space)
        with Convolutions() as seen:
            loss, _ = weight_step(network, optimizer, batches[0], 1e9, amp=amp)
        assert seen.dtypes == {dtype} and loss.dtype == torch.float32
        assert all(entry.dtype != torch.bfloat16 for entry in network.state_dict().values())
        gradients.append(torch.cat([p.grad.reshape(-1) for p in network.weights().values()]))
    assert 0.9 < torch.cosine_similarity(*gradients, dim=0) < 1 - 1e-6


def test_amp_of_a_search_leaves_the_hypergradient_alone(tmp_path):
    """After one iteration the alphas are the same bits; weights and validation are not."""
    one = ["--batch_size", "55"]
    (state, _), (other, log) = run_search(tmp_path / "a", *one), run_search(tmp_path / "b", *one, "--amp", "bf16")
    assert all(torch.equal(state[name], other[name]) for name in ("alphas_normal", "alphas_reduce"))
    assert not torch.equal(state["stem.0.weight"], other["stem.0.weight"])
    torch.testing.assert_close(state["stem.0.weight"], other["stem.0.weight"], rtol=0.05, atol=0.01)
    assert "bfloat16" in log
    losses = [json.loads((tmp_path / name / "cnn_space2" / "search-EXP" / "metrics.jsonl").read_text())["valid_loss"]
              for name in "ab"]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.2


def test_evaluation_in_bfloat16():
    network, _, _, batches = problem("cnn_space1")
    network.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), Convolutions() as seen:
        logits = network.with_weights(batches[0][0], network.flat())
    assert seen.dtypes == {torch.bfloat16} and logits.dtype == torch.float32
    with torch.inference_mode():
        expected = network(batches[0][0])
    assert 0 < (logits - expected).norm() / expected.norm() < 0.1


def test_exact_products_of_a_search(plain, tmp_path):
    state, log = run_search(tmp_path, "--hvp", "exact")
    assert "exact" in log and "exact" not in plain[1]
    assert not torch.equal(state["alphas_normal"], plain[0]["alphas_normal"])


def test_first_order_has_no_exact_product(tmp_path):
    with pytest.raises(InputError, match=r"--hvp exact.*--no-unrolled"):
        run_search(tmp_path, "--hvp", "exact", "--no-unrolled")


def test_tf32_is_off_unless_wanted(tmp_path):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    run_search(tmp_path / "on", "--tf32")
    assert settings() == (True, True)
    run_search(tmp_path / "off")
    assert settings() == (False, False)



def test_the_search_has_no_compiler(tmp_path):
    with pytest.raises(InputError, match=r"^--compile: unknown flag \(--help"):
        run_search(tmp_path, "--compile")
