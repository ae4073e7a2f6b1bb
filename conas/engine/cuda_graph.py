"""A whole iteration of the search, or a pass of evaluation, as one CUDA graph: recorded once, then launched at once for
every full batch.

A graph repeats the same kernels on the same addresses. So batches are copied into fixed tensors, the learning rate is a
tensor on the device, and the short last batch of an epoch goes on as usual. The first iterations go on as usual too:
they are steps of the search like all others, and leave everything allocated that a recording must find.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from conas import distributed
from conas.darts.architect import Batch

WARM_UP = 3  # iterations

Iterate = Callable[..., tuple[Tensor, ...] | None]  # of batches and the learning rate


class Replayed:
    """An `iterate` (batches, then the learning rate) that is replayed for batches of `size` images.

    `iterate` must not look at values on the host, and reads the learning rate from its argument and from `optimizer`.
    Iterations go on as usual, and a line to `log` says so, if they draw random numbers on the device: all passes of a
    step have to share them, and a graph draws anew in each; or if `record`, which stands in for `capture`, raises
    RuntimeError.
    """

    def __init__(self, iterate: Iterate, optimizer: torch.optim.Optimizer, size: int, device: torch.device,
                 log: Callable[[str], None], record: Callable | None = None):
        self.iterate, self.optimizer, self.size, self.log = iterate, optimizer, size, log
        self.record = record or capture
        self.rate = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seen, self.inputs, self.replay, self.results = 0, None, None, None

    def __call__(self, *inputs: Batch | float) -> tuple[Tensor, ...] | None:
        *batches, lr = inputs
        self.rate.fill_(lr)
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.seen += 1
        if self.record is not None and self.seen <= WARM_UP:
            before = random_state(self.rate.device)
            results = _aside(lambda: self.iterate(*batches, self.rate), self.stream)
            if not torch.equal(random_state(self.rate.device), before):
                self._give_up("draws random numbers, which passes of a step share")
            return results
        if self.record is None or any(len(labels) < self.size for _, labels in batches):
            return self.iterate(*batches, self.rate)
        if self.replay is None:
            self.inputs = [tuple(tensor.clone() for tensor in batch) for batch in batches]
            try:
                self.replay, self.results = self.record(lambda: self.iterate(*self.inputs, self.rate))
            except RuntimeError as error:
                self._give_up(f"cannot be recorded ({str(error).strip().splitlines()[0]})")
                return self.iterate(*batches, self.rate)
        for own, batch in zip(self.inputs, batches):
            for kept, tensor in zip(own, batch):
                kept.copy_(tensor, non_blocking=True)
        self.replay()
        return self.results

    def _give_up(self, reason: str) -> None:
        self.log(f"--cuda_graph: the iteration {reason}; the search goes on without a graph")
        self.record = None


class ReplayedForward:
    """A network for many batches of images in evaluation mode, and without gradients, on a CUDA device.

    From the second batch of the first one's shape on, a graph is replayed. A network that cannot be recorded goes on
    as usual. `record` stands in for `capture`.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], device: torch.device, record: Callable | None = None):
        self.network, self.record = network, record or capture
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.images, self.replay, self.results = None, None, None

    def __call__(self, images: Tensor) -> Tensor:
        if self.images is None:
            self.images = images.clone()
            return _aside(lambda: self.network(images), self.stream)
        if self.record is None or images.shape != self.images.shape:
            return self.network(images)
        self.images.copy_(images, non_blocking=True)
        if self.replay is None:
            try:
                self.replay, self.results = self.record(lambda: self.network(self.images))
            except RuntimeError:
                self.record = None
                return self.network(images)
        self.replay()
        return self.results.clone()


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that operations on a device draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _aside(function: Callable, stream: "torch.cuda.Stream | None"):
    """Run `function` on another stream, as a recording will: autograd remembers streams."""
    if stream is None:
        return function()
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        results = function()
    here.wait_stream(stream)
    return results


def capture(function: Callable, pool: tuple | None = None) -> tuple[Callable[[], None], tuple[Tensor, ...] | Tensor]:
    """Record the kernels of `function`; they do not run yet. Graphs that take turns can share a memory pool.

    Returns what repeats them, and the tensors that then hold the results.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may load images
        results = function()
    return graph.replay, results


def graph_fits(device: torch.device, waits: bool, log: Callable[[str], None]) -> bool:
    """Return True if iterations on this device can be recorded; else a line to `log` says why not.

    `waits` says that iterations read values on the host.
    """
    reason = (f"CUDA graphs are for CUDA devices, not for {device}" if device.type != "cuda" else
              "--on_nan skip looks at every loss, which a graph cannot" if waits else
              "several processes agree on the host between kernels" if distributed.size() > 1 else None)
    if reason is not None:
        log(f"--cuda_graph: {reason}; the search goes on without a graph")
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
