"""What several processes send in one step of the search, and how much faster they may be than one.

    python -m benchmarks.scaling                              # bytes; the step here, in one process and in two
    python -m benchmarks.scaling --sync_bn                    # with BatchNorm over all processes
    python -m benchmarks.scaling --bandwidth 40 --latency 15  # of another network: Gbit/s, microseconds
    python -m benchmarks.scaling --device cuda                # the step on one GPU; two processes need two

Bytes are counted and not modelled: one process takes a step and notes what it would send to a second one. The step is
then timed with the whole batch, and with the part of it that each of N processes has. The efficiency on N is

    time of the whole / (N (time of a part + time of the messages))

where an all-reduce of b bytes takes 2 (N - 1)/N b / bandwidth, as a ring does, and the latency log2(N) times. Two
processes are then timed here, over the loopback device, and set beside the time of a part. On a CPU, times of steps are
CPU time of one thread, which other work on the machine does not lengthen; it counts what a process does to send and
receive, and not for how long it waits. Bandwidth and latency are by the clock.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.machine import processor
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas import distributed
from conas.cli import find_device
from conas.commands.search import weight_step
from conas.engine.door import accelerate

XI = 0.025


def make_step(options: argparse.Namespace, images: int) -> Callable[[], None]:
    """A second-order step of the alphas and the weights of space 1 on `images` images."""
    torch.manual_seed(0)
    device = find_device(options.device)
    network = Network(C=options.init_channels, layers=options.layers).to(device)
    accelerate(network, options.sync_bn)
    optimizer = torch.optim.SGD(network.weights().values(), lr=XI, momentum=0.9, weight_decay=3e-4)
    architect = Architect(network, optimizer)
    shape = images, 3, options.image_size, options.image_size
    train, valid = ((torch.randn(shape, device=device), torch.arange(images, device=device) % 10) for _ in range(2))

    def step() -> None:
        architect.step(train, valid, XI)
        loss, _ = weight_step(network, optimizer, train, 5.0)
        loss.item()  # waits for the device

    return step


def count(options: argparse.Namespace) -> list[int]:
    """The bytes of every all-reduce of a step; they do not depend on the batch."""
    sent = []

    def note(_, tensor: torch.Tensor, *__) -> None:
        sent.append(tensor.numel() * tensor.element_size())
        tensor.mul_(2)  # the second process has the same

    step = make_step(options, 2)
    with mock.patch.object(distributed, "size", lambda: 2), mock.patch.object(distributed, "_checked", note):
        step()
    return sent


def seconds(step: Callable[[], None], rounds: int, clock: Callable[[], float]) -> float:
    """The least of `rounds` repetitions, after one that is not counted: other work on the machine can only add."""
    taken = []
    for _ in range(rounds + 1):
        began = clock()
        step()
        taken.append(clock() - began)
    return min(taken[1:])


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.device == "cpu" else time.perf_counter


def messages(sent: list[int], processes: int, bandwidth: float, latency: float) -> float:
    """Seconds for all-reduces of these bytes; bandwidth in bytes a second, latency in seconds."""
    return sum(2 * (processes - 1) / processes * b / bandwidth + math.log2(processes) * latency for b in sent)


def worker(options: argparse.Namespace) -> None:
    """One of two processes: seconds of a step, bytes a second and seconds of latency."""
    with distributed.processes():
        share = distributed.rank_slice(options.batch_size)
        step = seconds(make_step(options, share.stop - share.start), options.rounds, clock_of(options))
        device = find_device(options.device)
        large, small = torch.zeros(2_000_000, device=device), torch.zeros(1, device=device)

        def reduce(tensor: torch.Tensor) -> None:
            dist.all_reduce(tensor)
            tensor[0].item()

        latency = seconds(lambda: reduce(small), 200, time.perf_counter)
        bandwidth = large.numel() * large.element_size() / (
            seconds(lambda: reduce(large), 10, time.perf_counter) - latency)
        print(json.dumps({"step": step, "bandwidth": bandwidth, "latency": latency}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("init_channels", 16), ("layers", 8), ("batch_size", 64), ("image_size", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bandwidth", type=float, default=100, help="between processes, Gbit/s (default: 100)")
    parser.add_argument("--latency", type=float, default=10, help="of a message, microseconds (default: 10)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--sync_bn", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        return worker(options)

    sent = count(options)
    print(f"space 1, {options.init_channels} channels, {options.layers} cells, {options.image_size} pixels, batch "
          f"{options.batch_size}{', --sync_bn' if options.sync_bn else ''}: {len(sent)} all-reduces of "
          f"{sum(sent) / 1e6:.2f} MB a step, the largest of {max(sent) / 1e6:.2f} MB")
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores of {processor()}"
    print(f"{name}, one thread a process, torch {torch.__version__}, least of n = {options.rounds}")
    times = {}
    for processes in (1, 2, 8, 64):
        images = -(-options.batch_size // processes)
        times[processes] = seconds(make_step(options, images), options.rounds, clock_of(options))
        waits = messages(sent, processes, options.bandwidth * 1e9 / 8, options.latency * 1e-6)
        efficiency = times[1] / (processes * (times[processes] + waits))
        print(f"{processes:3} processes: {images:3} images each, {times[processes]:7.3f} s, messages {waits:.4f} s: "
              f"efficiency {100 * efficiency:5.1f} %")
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "benchmarks.scaling", "--worker", *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    waits = messages(sent, 2, found["bandwidth"], found["latency"])
    print(f"two processes here: {found['step']:.3f} s a step, {times[2]:.3f} s alone with as many images; messages "
          f"{waits:.4f} s by {found['bandwidth'] / 1e6:.0f} MB/s and {found['latency'] * 1e6:.0f} microseconds: "
          f"efficiency {100 * times[1] / (2 * (found['step'] + waits)):.1f} %")


if __name__ == "__main__":
    main()
