"""What makes passes faster or smaller and leaves their meaning: number formats, a compiler, checkpointed cells."""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conas.errors import InputError
from conas.run import Run


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
