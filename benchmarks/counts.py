"""What a piece of work costs that does not depend on the clock: operator calls, FLOPs, and memory at its peak."""
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conas.engine.native.loader import kernels
from conas.engine.native.parts import DEPTHWISE, Sizes

ROOT = Path(__file__).resolve().parent.parent


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(of.alias_info and not of.alias_info.is_write for of in function._schema.returns)
        self.count += not (view or function is torch.ops.aten._unsafe_view.default)
        return function(*args, **(kwargs or {}))


def operator_calls(work: Callable[[], object]) -> int:
    """How many operators of torch `work` calls, forward and backward; views, which compute nothing, are left out."""
    with _Calls() as calls:
        work()
    return calls.count


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of `work`, two for a multiply-add.

    Those of kernels in C are counted where they search and train, by the sizes they are told; what they compute again,
    and evaluation's kernel, are not.
    """
    kernels()  # loaded before: they are compared with torch then, which the counter does not allow
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter, \
            _kernel_flops() as of_kernels:
        work()
    return counter.get_total_flops() + sum(of_kernels)


@contextmanager
def _kernel_flops() -> Iterator[list[int]]:
    """Inside, every call of a kernel with convolutions appends what it computes."""
    found, counted = [], {"unit_forward": _unit_forward, "unit_backward": _unit_backward}

    def counting(kernel: Callable, count: Callable) -> Callable:
        def call(size, *others):
            found.append(count(getattr(size, "_obj", size), *others))
            return kernel(size, *others)
        return call

    library = kernels()
    originals = [(table, name, getattr(table, name)) for table in (library.tables() if library else [])
                 for name in counted]
    for table, name, kernel in originals:
        setattr(table, name, counting(kernel, counted[name]))
    try:
        yield found
    finally:
        for table, name, kernel in originals:
            setattr(table, name, kernel)


def _convolutions(u: Sizes) -> tuple[int, int]:
    """FLOPs of a unit's depthwise and pointwise convolution."""
    pixels = u.N * u.OH * u.OW
    return 2 * pixels * u.C * u.kernel ** 2 * (u.kind == DEPTHWISE), 2 * pixels * u.C * u.K


def _unit_forward(u: Sizes, *_others) -> int:
    return sum(_convolutions(u))


def _unit_backward(u: Sizes, *others) -> int:
    depthwise, pointwise = _convolutions(u)
    of_x, of_weights = (others[i] is not None for i in (13, 17))  # dx and d_pw of unit_backward.c
    return of_x * depthwise + (of_x or depthwise > 0) * pointwise + of_weights * (depthwise + pointwise)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, *settings, out_val=None) -> int:
    """Of aten.convolution_backward: as many as forward for each gradient wanted.

    torch 2.14 takes every convolution for one of a single group when it counts the gradient of a kernel, and so counts
    C times too many of a depthwise one.
    """
    return 2 * grad.numel() * weight[0].numel() * sum(settings[-1][:2])


_backward._get_raw = True  # FlopCounterMode gives tensors instead of shapes


def matmul_peak(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> float:
    """FLOP/s of this machine in the best of ten float32 matrix products, with the threads that torch now has."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return max(2 * size ** 3 / seconds(lambda: a @ b) for _ in range(10))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: of the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would include the parent's
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    import resource  # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
