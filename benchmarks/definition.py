"""What a space pays for code of its own: iterations of second-order search, by turns, in one process.

    python -m benchmarks.definition
    python -m benchmarks.definition --spaces cnn_space3 --channels 8 --layers 5 --rounds 9

`own operation` has skip connections of a class that the kernels do not know, `own cell` a cell with a `forward` of its
own, and `definition` is --no-engine. All compute the same numbers as `engine`. Printed is the processor time of each,
over that of `engine` in the same round: median and quartiles. Writes benchmarks/results/definition.json, which keeps
the last result of every setting.
"""
import argparse
import time
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.machine import RESULTS, machine, several, spread, stored, write
from conas.commands.search import weight_optimizer, weight_step
from conas.darts.operations import OPERATIONS
from conas.darts.supernet import SearchCell, Supernet
from conas.engine.door import accelerate
from conas.memory import keep_freed_memory
from conas.runs.options import WeightOptions

RECIPE = WeightOptions()


class OwnSkip(nn.Module):
    """A skip connection in a class of its own."""

    def __init__(self, C: int, stride: int, affine: bool):
        super().__init__()
        self.skip = OPERATIONS["skip_connect"](C, stride, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)


class OwnCell(SearchCell):
    """A cell that computes what its class does, by a `forward` of its own."""

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        return super().forward(s0, s1, weights)


def forms(network: type[Supernet]) -> dict[str, type[Supernet]]:
    """The space of `network`, and what a user might have made of it."""
    return {"engine": network, "definition": network,
            "own operation": type("Network", (network,), {"operations": {"skip_connect": OwnSkip}}),
            "own cell": type("Network", (network,), {"cell": OwnCell})}


def iteration(network: Supernet, architect: type, batch_size: int, wanted: bool):
    """What takes an iteration of the search, on random images."""
    network.to(memory_format=torch.channels_last)
    accelerate(network, wanted=wanted)
    optimizer = weight_optimizer(network, RECIPE)
    bilevel = architect(network, optimizer)
    torch.manual_seed(1)
    train, valid = ((torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last),
                     torch.randint(10, (batch_size,))) for _ in range(2))

    def iterate() -> None:
        bilevel.step(train, valid, RECIPE.learning_rate)
        weight_step(network, optimizer, train, RECIPE.grad_clip)

    return iterate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=["cnn_space1", "cnn_space2", "cnn_space3"])
    for name, default in (("channels", 16), ("layers", 8), ("batch_size", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=several, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    path = RESULTS / "definition.json"
    results = stored(path)
    for space in options.spaces:
        architect = import_module(f"{space}.architect").Architect
        iterations = {}
        for name, network in forms(import_module(f"{space}.model_search").Network).items():
            torch.manual_seed(0)
            iterations[name] = iteration(network(options.channels, 10, options.layers), architect, options.batch_size,
                                         name != "definition")
            iterations[name]()
        taken = {name: [] for name in iterations}
        for turn in range(options.rounds):
            for name in list(iterations)[::1 if turn % 2 else -1]:
                began = time.process_time()
                iterations[name]()
                taken[name].append(time.process_time() - began)
        ratios = {name: spread([a / b for a, b in zip(of, taken["engine"])]) for name, of in taken.items()
                  if name != "engine"}
        title = (f"{space}, {options.channels} channels, {options.layers} cells, batch {options.batch_size}, "
                 f"{options.threads} thread{'s' * (options.threads > 1)}")
        results[title] = machine(torch.device("cpu")) | {
            "rounds": options.rounds, "processor_seconds": {name: spread(of) for name, of in taken.items()},
            "ratio": ratios}
        write(path.stem, results)
        print(f"{title}, n = {options.rounds}: " + "; ".join(
            f"{name} {ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"
            for name, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
