"""Work that a GPU may do at the same time."""
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def at_once(device: torch.device, first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    """The results of two functions, neither of which needs what the other does.

    While a CUDA graph is recorded, they go to streams of their own, and the graph runs them side by side: small kernels
    leave most of a GPU idle. Elsewhere the host gives out the work, one call at a time, and is what takes the time.

    What `first` needs must outlive both: memory that it sets free is reused by `second`.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return first(), second()
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        one = first()
    two = second()
    here.wait_stream(aside)
    return one, two
