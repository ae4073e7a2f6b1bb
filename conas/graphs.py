"""A whole iteration of the search as one CUDA graph: recorded once, then launched at once for every full batch.

A graph repeats the same kernels on the same addresses. So batches are copied into fixed tensors, the learning rate is a
tensor on the device, and the short last batch of an epoch goes on as usual. The first iterations go on as usual too:
they are steps of the search like all others, and leave everything allocated that a recording must find.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from conas import distributed
from conas.architect import Batch
from conas.run import Run

WARM_UP = 3  # iterations

Iterate = Callable[[Batch, Batch, Tensor | float], tuple[Tensor, ...] | None]


class Replayed:
    """An `iterate` (train batch, valid batch, learning rate) that is replayed for batches of `size` images.

    `iterate` must not look at values on the host, and reads the learning rate from its argument and from `optimizer`.
    `capture` takes a function without arguments; it returns what repeats it, and the tensors that then hold its
    results. If it raises RuntimeError, the run's log says so, and iterations go on as usual.
    """

    def __init__(self, iterate: Iterate, optimizer: torch.optim.Optimizer, size: int, device: torch.device, run: Run,
                 capture: Callable | None = None):
        self.iterate, self.optimizer, self.size, self.run = iterate, optimizer, size, run
        self.capture = capture or _capture
        self.rate = torch.zeros((), device=device)
        self.seen, self.inputs, self.replay, self.results = 0, None, None, None

    def __call__(self, train: Batch, valid: Batch, lr: float) -> tuple[Tensor, ...] | None:
        self.rate.fill_(lr)
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.seen += 1
        if self.capture is not None and self.seen <= WARM_UP:
            return _aside(lambda: self.iterate(train, valid, self.rate), self.rate.device)
        if self.capture is None or len(train[1]) < self.size:
            return self.iterate(train, valid, self.rate)
        if self.replay is None:
            self.inputs = [tensor.clone() for tensor in (*train, *valid)]
            try:
                self.replay, self.results = self.capture(
                    lambda: self.iterate(self.inputs[:2], self.inputs[2:], self.rate))
            except RuntimeError as error:
                self.run.log(f"--cuda_graph: the iteration cannot be recorded ({str(error).strip().splitlines()[0]}); "
                             "the search goes on without a graph")
                self.capture = None
                return self.iterate(train, valid, self.rate)
        for own, tensor in zip(self.inputs, (*train, *valid)):
            own.copy_(tensor, non_blocking=True)
        self.replay()
        return self.results


def _aside(function: Callable, device: torch.device):
    """Run `function` on a stream of its own, as a recording will: autograd remembers streams."""
    if device.type != "cuda":
        return function()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        results = function()
    torch.cuda.current_stream(device).wait_stream(stream)
    return results


def _capture(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the kernels of `function`; they do not run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def graph_fits(device: torch.device, waits: bool, run: Run) -> bool:
    """Whether iterations on this device can be recorded, where they `wait` for it or not; else the log says why."""
    reason = (f"CUDA graphs are for CUDA devices, not for {device}" if device.type != "cuda" else
              "--on_nan skip looks at every loss, which a graph cannot" if waits else
              "several processes agree on the host between kernels" if distributed.size() > 1 else None)
    if reason is not None:
        run.log(f"--cuda_graph: {reason}; the search goes on without a graph")
    return reason is None


def on_device(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    """Let an optimizer read its learning rate and count its steps on the device, as a graph needs it, or not."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD):
            group["fused"] = True  # else it looks at the rate on the host; and a thousand weights are slow one by one
        else:
            group["capturable"] = wanted
    for p, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(p.device if wanted else "cpu")
