"""Several processes that compute one run together, started by torchrun. For a process alone, all this is the identity.

Tensors of the computation are summed on their own device: by NCCL on GPUs, by gloo on CPUs. Whatever else processes
have to agree on goes through gloo on the CPU, and never waits for a GPU. Only plain values are exchanged, no objects.

All processes call the same functions in the same order, except `rank`, `size`, `rank_slice`, `tqdm_disable` and
`first_to_report`.
"""
import hashlib
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from conas.errors import InputError, Stopped

T = TypeVar("T")
_stores: list[dist.Store] = []  # torchrun's, once the processes have joined; it outlives them


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Only the first of them has a standard output."""
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, rank, size = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(_name_of_start(store, rank, size), store)
    _stores[:] = [store]
    # one group with two networks: which one serves follows from where a tensor lies
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    try:
        if rank == 0:
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def _name_of_start(store: dist.Store, rank: int, size: int) -> str:
    """A name for the part of the store that belongs to the processes of this start, and to no earlier ones.

    torchrun --max-restarts keeps the store, in which processes would find the addresses of dead ones. So rank 0 answers
    every call in it until all other ranks have confirmed; answers to calls of dead processes are read by nobody.
    """
    name, answered = uuid.uuid4().hex, set()
    if rank:
        store.set(f"call {store.add('calls', 1)}", name)
        name = store.get(f"answer to {name}").decode()
        store.add(f"{name} confirmed", 1)
        return name
    while store.add(f"{name} confirmed", 0) < size - 1:
        for call in {f"call {n + 1}" for n in range(store.add("calls", 0))} - answered:
            if store.check([call]):
                store.set(f"answer to {store.get(call).decode()}", name)
                answered.add(call)
        time.sleep(0.01)
    return name


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. The first one writes and prints."""
    return dist.get_rank() if size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def tqdm_disable() -> bool | None:
    """`disable` for tqdm: a bar if rank 0 writes to a terminal; none in a file or from other ranks."""
    return True if rank() else None


def first_to_report(text: str) -> bool:
    """Return True if no other process has asked this about the same text: what happens to all is reported once."""
    try:
        return not _stores or _stores[0].add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def require_single_process(script: str) -> None:
    """Raise InputError if there are several processes: `script` is for one."""
    if size() > 1:
        raise InputError(f"{script}: is for one process; start it with python instead of torchrun")


# batches

def rank_slice(count: int) -> slice:
    """This process's share of `count` images, as `torch.tensor_split` divides them: sizes differ by at most one."""
    each, more = divmod(count, size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def total(images: int) -> int:
    """The sum over all processes of a number."""
    return _reduced(torch.tensor(images), dist.ReduceOp.SUM).item() if size() > 1 else images


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all processes of tensors of one shape, alike to the last bit on all of them."""
    return _reduced(tensor.detach().clone(memory_format=torch.contiguous_format)) if size() > 1 else tensor


def scaled_by_count(loss: Tensor, images: int) -> Tensor:
    """The mean loss over this process's `images` images times their number: gradients of sums can be added up."""
    return loss * images if size() > 1 else loss


def all_reduce_mean(tensors: Sequence[Tensor], images: int) -> list[Tensor]:
    """Turn sums over this process's `images` images into means over the images of all processes. One all-reduce."""
    if size() == 1:
        return list(tensors)
    sums, count = _sums(tensors, images)
    return [s / count for s in sums]


@torch.no_grad()
def after_backward(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, hits: Tensor, images: int
                   ) -> tuple[Tensor, Tensor]:
    """Replace this process's gradients and running statistics after a step by their means over all images.

    `loss` is `scaled_by_count`, `hits` are the right answers among `images` images. Returns both over all processes,
    the loss as a mean. One all-reduce.
    """
    if size() == 1:
        return loss, hits
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    terms = [*gradients, *torch._foreach_mul(statistics, images), loss, hits.to(loss.dtype)]
    (*sums, loss, hits), count = _sums(terms, images)
    torch._foreach_copy_([*gradients, *statistics], [s / count for s in sums])
    return loss / count, hits


def _sums(tensors: Sequence[Tensor], images: int) -> tuple[list[Tensor], Tensor]:
    flat = _reduced(torch.cat([*(t.detach().reshape(-1) for t in tensors), tensors[0].new_tensor([images])]))
    *parts, count = flat.split([*(t.numel() for t in tensors), 1])
    return [p.view_as(t) for p, t in zip(parts, tensors)], count[0]


# agreement

def all_reduce_max(*numbers: int) -> list[int]:
    """The maximum over all processes of each number."""
    return _reduced(torch.tensor(numbers), dist.ReduceOp.MAX).tolist() if size() > 1 else list(numbers)


def gather(value: T) -> list[T]:
    """The values of all processes, by rank: numbers, text, tensors on the CPU, and lists and dicts of them."""
    if size() == 1:
        return [value]
    own = _packed(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    _checked(dist.all_gather, lengths, torch.tensor([len(own)]))
    longest = max(map(int, lengths))
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    _checked(dist.all_gather, rows, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [_unpacked(row[:length]) for row, length in zip(rows, map(int, lengths))]


def from_rank0(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, the only process that calls it: plain values, as in `gather`.

    Its InputError is raised on all ranks.
    """
    if size() == 1:
        return function()
    value = None
    with raise_on_all_ranks():
        if rank() == 0:
            value = function()
    own = _packed(value)
    length = torch.tensor([len(own)])
    _checked(dist.broadcast, length, 0)
    if rank():
        own = torch.empty(int(length), dtype=torch.uint8)
    _checked(dist.broadcast, own, 0)
    return _unpacked(own)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """For work that may fail on one process: an InputError that leaves the block there leaves it on all ranks."""
    message = ""
    try:
        yield
    except InputError as error:
        if size() == 1:
            raise
        message = str(error)
    for text in filter(None, gather(message)):
        raise InputError(text)


def local_rank0_first(function: Callable[[], T]) -> T:
    """What `function` returns, called by local rank 0 of each machine and then by the others.

    So nothing is downloaded twice. An InputError is raised on all ranks.
    """
    value = None
    for turn in (True, False)[:size()]:  # a process alone has one turn
        with raise_on_all_ranks():
            if (local_rank() == 0) == turn:
                value = function()
    return value


def check_equal(what: str, value) -> None:
    """Raise InputError that names ranks if not all processes have the same plain value of `what`."""
    values = gather(value)
    others = [str(number) for number, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(f"{what} of rank{'s' * (len(others) > 1)} {', '.join(others)} of {len(values)} processes "
                         "differ from those of rank 0; nothing was written since the last checkpoint. Start all "
                         "machines with the same command, data and versions, or look for failing hardware")


def check_network(what: str, network: nn.Module) -> None:
    """`check_equal` of all that is in a network, by its `checksum`. Waits for the device."""
    if size() > 1:
        check_equal(what, checksum(network))


@torch.no_grad()
def checksum(network: nn.Module) -> int:
    """A checksum of the bits of all parameters and floating-point buffers: if one bit differs, so does it."""
    tensors = [t.detach().reshape(-1) for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
    flat = torch.cat(tensors)
    bits = flat.view(torch.int64 if flat.element_size() == 8 else torch.int32).to(torch.int64)
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum().item()  # overflow is intended


def _packed(value) -> Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(content: Tensor):
    return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)


def _reduced(tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    _checked(dist.all_reduce, tensor, operation)
    return tensor


def _checked(function: Callable, *arguments) -> None:
    try:
        function(*arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("pair.cc")[2].partition("] ")[2].partition(". ")[0]
        raise Stopped(f"rank {rank()}: stopped, since it has lost another process of this run ({reason or error}); "
                      "start the same command again to go on from what was kept", 1) from error
