"""What makes passes faster or smaller and leaves their meaning: number formats, checkpointed cells, a compiler."""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conas.errors import InputError


def find_precision(amp: str, device: torch.device) -> bool:
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


def checkpointed(run_cell: Callable) -> Callable:
    """A Supernet's `run_cell` that keeps nothing of a cell for the backward pass but its input, and computes it again.

    Training of deep neural networks in sublinear memory, arXiv:1604.06174. The numbers are the same, bit for bit.
    """
    def run(cell: nn.Module, *arguments) -> Tensor:
        if not torch.is_grad_enabled():
            return run_cell(cell, *arguments)
        return checkpoint(run_cell, cell, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run
