"""What makes passes faster or smaller and leaves their meaning: number formats, a compiler, checkpointed cells."""
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from conas.darts.supernet import Supernet, frozen_statistics
from conas.engine.manual_grad import is_twice_differentiable
from conas.errors import InputError
from conas.runs.folder import Run

TOLERANCE = 0.01  # of a gradient: ReLU and max pooling amplify the rounding of float32


def find_precision(amp: str, device: torch.device) -> bool:
    """Whether passes are in bfloat16. Raises InputError if they cannot be."""
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not able:
        raise InputError(f"--amp bf16: {device} has no bfloat16; use --amp auto or off")
    return amp == "bf16" or (amp == "auto" and device.type == "cuda" and able)


def set_tf32(wanted: bool) -> None:
    """Let products and convolutions of float32 on CUDA round their factors to TF32's 10 bits, or let none."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted


def compiler_works(device: torch.device, run: Run) -> bool:
    """Whether torch.compile can compile anything here; a line in the run's log says so if it cannot."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        run.log(f"--compile: no compiler works here ({reason}); training goes on without one")
        return False
    return True


def checkpointed(run_cell: Callable) -> Callable:
    """A Supernet's `run_cell` that keeps nothing of a cell for the backward pass but its input, and computes it again.

    Training of deep neural networks in sublinear memory, arXiv:1604.06174. The numbers are the same, bit for bit.
    """
    def run(cell: nn.Module, *arguments) -> Tensor:
        if not torch.is_grad_enabled():
            return run_cell(cell, *arguments)
        return checkpoint(run_cell, cell, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run


def compile_cells(network: Supernet, shape: Sequence[int], run: Run) -> None:
    """Let torch.compile compile the cells for training on batches of this shape, (N, C, H, W).

    They stay compiled if a loss of random images and its gradients are those of the plain cells, up to TOLERANCE, and
    come sooner; else a line in the run's log says why not.
    """
    plain, device = network.run_cell, network.alphas_normal.device
    if not compiler_works(device, run):
        return
    if device.type == "cpu":
        run.log("--compile: on a CPU, compiling a supernet takes many minutes, and no gain was ever measured")
    numbers = torch.Generator().manual_seed(0)  # the global one belongs to the search
    x = torch.randn(*shape, generator=numbers).to(device)
    y = torch.randint(network.classifier.out_features, shape[:1], generator=numbers).to(device)
    expected, plain_seconds = _trial(network, x, y)
    network.run_cell = compiled(len(network.cells))
    try:
        found, seconds = _trial(network, x, y)
        error = ((found - expected).norm() / expected.norm()).item()
        text = f"a gradient takes {seconds:.3f} s instead of {plain_seconds:.3f} s"
        reason = "" if error < TOLERANCE and seconds < plain_seconds else f"{text}, and differs by {error:.1e} of it"
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
    if reason:
        network.run_cell = plain
        run.log(f"--compile: compiled cells are not kept: {reason}; the search goes on without them")
    else:
        run.log(f"--compile: {text}")


def compiled(cells: int, backend: str = "inductor") -> Callable:
    """A Supernet's `run_cell` by torch.compile, for passes that are differentiated once; no others can be compiled."""
    # each cell holds modules of its own, and is one graph in the weight step, in the virtual step, and in eq. 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * cells)
    fast = torch.compile(lambda cell, *arguments: cell(*arguments), dynamic=False, backend=backend)

    def run(cell: nn.Module, *arguments) -> Tensor:
        plain = is_twice_differentiable() or not torch.is_grad_enabled()
        return cell(*arguments) if plain else fast(cell, *arguments)

    return run


def _trial(network: Supernet, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The gradient of the loss by alphas and weights, one flat vector, and the least seconds that it took."""
    seconds = []
    w = torch.cat([p.detach().reshape(-1) for p in network.packing()]).requires_grad_()
    with frozen_statistics(network.train()):
        for _ in range(4):
            began = time.perf_counter()
            loss = cross_entropy(network.with_weights(x, w), y)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*network.alphas().values(), w])])
            gradient[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return gradient, min(seconds)
