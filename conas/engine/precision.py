"""What makes passes faster or smaller and leaves their meaning: number formats, checkpointed cells, a compiler."""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from conas.darts.supernet import Supernet
from conas.engine.door import Engine
from conas.engine.native.swap import NativePass
from conas.errors import InputError


def use_bf16(amp: str, device: torch.device) -> bool:
    """Return True if passes are in bfloat16. Raises InputError if the device cannot compute in it."""
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not able:
        raise InputError(f"--amp bf16: {device} has no bfloat16; use --amp auto or off")
    return amp == "bf16" or (amp == "auto" and device.type == "cuda" and able)


def set_tf32(wanted: bool) -> None:
    """Set whether float32 products and convolutions on CUDA round their factors to TF32's 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted


def compiler_works(device: torch.device, log: Callable[[str], None]) -> bool:
    """Return True if torch.compile can compile anything here; else a line to `log` says why not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        log(f"--compile: no compiler works here ({reason}); training goes on without one")
        return False
    return True


def checkpoint_cells(network: Supernet, engine: Engine | None) -> None:
    """Let a supernet keep nothing of a cell for the backward pass but its inputs, and compute it again.

    Training of deep neural networks in sublinear memory, arXiv:1604.06174. The numbers are the same, bit for bit:
    random numbers are drawn again, and running statistics follow the first time only. `engine` is the network's,
    if it has one.
    """
    engines = [engine]
    if isinstance(engine, NativePass):
        engine.let_cells_be_repeated()
        engines.append(engine.packed)
    for each in filter(None, engines):
        each.run_cell = partial(_checkpointed, each.run_cell)
    for cell in network.cells:  # for passes that need the definition
        cell.forward = _Checkpointed(cell, cell.forward)


def _checkpointed(run_cell: Callable, *arguments) -> Tensor:
    if not torch.is_grad_enabled():
        return run_cell(*arguments)
    return checkpoint(run_cell, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Checkpointed:
    """A cell's forward that is computed again for its gradient."""

    same_numbers = True  # see conas/engine/door.py

    def __init__(self, cell: nn.Module, forward: Callable):
        self.cell, self.forward = cell, forward

    def __call__(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(s0, s1, weights)
        parameters = dict(self.cell.named_parameters())  # of this pass: `functional_call` takes them away after it
        buffers: dict[str, Tensor] = {}  # the first time the cell's own, whose running statistics follow

        def run(s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
            state = {f"cell.{name}": tensor for name, tensor in (parameters | buffers).items()}
            buffers.update((name, buffer.clone()) for name, buffer in self.cell.named_buffers())
            return functional_call(_Forward(self.cell, self.forward), state, (s0, s1, weights))

        return checkpoint(run, s0, s1, weights, use_reentrant=False)


class _Forward(nn.Module):
    """A cell by a forward that is not its present one."""

    def __init__(self, cell: nn.Module, forward: Callable):
        super().__init__()
        self.cell, self.of_cell = cell, forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.of_cell(*inputs)
