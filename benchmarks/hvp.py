"""The central difference of DARTS' equation 8 against the exact Hessian-vector product: how far, and at what cost.

    OMP_NUM_THREADS=1 python -m benchmarks.hvp                     # a minute or two

In float64, for perturbations of norm r: the distance of the two relative to the exact product, for the cell of the
paper and for the same cell with SiLU in place of ReLU and average in place of max pooling. Seconds are of float32,
taken in turns, medians with quartiles. Writes benchmarks/results/hvp.json and img/hvp.svg.
"""
import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, silu
from torch.overrides import TorchFunctionMode

from benchmarks.machine import machine, several, spread, write
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas.draw.cell import defaults, save_figure
from conas.runs.options import ROOT

RADII = [10.0 ** -k for k in range(6)]
SMALL = {"C": 4, "layers": 3}, (6, 3, 12, 12)
LARGE = {"C": 8, "layers": 3}, (8, 3, 16, 16)


class Smooth(TorchFunctionMode):
    """Inside, the supernet has no kinks: SiLU for ReLU, average for max pooling."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.relu, Tensor.relu_):
            return silu(args[0])
        if function is max_pool2d:
            return avg_pool2d(args[0], 3, kwargs["stride"], 1, count_include_pad=False)
        return function(*args, **(kwargs or {}))


def problem(seed: int, size: tuple, dtype: torch.dtype) -> tuple[Architect, list]:
    """The architect of a network with random alphas, a batch for weights and one for alphas."""
    torch.manual_seed(seed)
    arguments, shape = size
    network = Network(**arguments).to(dtype)
    for alpha in network.alphas().values():
        alpha.data.normal_(0, 0.5)
    architect = Architect(network, torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9))
    return architect, [(torch.randn(shape, dtype=dtype), torch.randint(10, shape[:1])) for _ in range(2)]


def distances(seed: int, smooth: bool) -> list[float]:
    """The relative distance at each radius."""
    architect, (train, valid) = problem(seed, SMALL, torch.float64)
    with Smooth() if smooth else nullcontext():
        w = architect.weights()
        d = architect.grad_weights(valid, w)
        exact = architect.exact_product(train, w, d)
        return [((architect.difference_quotient(train, w, d, r) - exact).norm() / exact.norm()).item() for r in RADII]


def products() -> dict[str, Callable[[], Tensor]]:
    """Both ways, on one problem in float32."""
    architect, (train, valid) = problem(0, LARGE, torch.float32)
    w = architect.weights()
    d = architect.grad_weights(valid, w)
    return {"difference": partial(architect.difference_quotient, train, w, d),
            "exact": partial(architect.exact_product, train, w, d)}


def seconds(work: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def draw(result: dict) -> None:
    from matplotlib.figure import Figure
    with defaults():
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, rows), colour in zip(result["distance"].items(), ("#b5442e", "#2b6cb0")):
            for row in rows:
                axes.loglog(RADII, row, color=colour, alpha=0.3, linewidth=0.8)
            axes.loglog(RADII, [median(column) for column in zip(*rows)], "o-", color=colour, label=name)
        axes.axvline(0.01, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("r = |eps d|, the norm of the perturbation (dotted: DARTS' 0.01)")
        axes.set_ylabel("distance / norm of the exact product")
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, ROOT / "img" / "hvp.svg", 200, {
            "Title": "Central difference and exact Hessian-vector product", "Description":
            "Relative distance against the norm of the perturbation, for the cell of DARTS and a smooth one, float64"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="networks and batches for the distances")
    parser.add_argument("--rounds", type=several, default=5, help="for the seconds")
    options = parser.parse_args()
    result = {"radii": RADII, "distance": {
        "ReLU and max pooling, as in DARTS": [distances(seed, smooth=False) for seed in range(options.seeds)],
        "SiLU and average pooling": [distances(seed, smooth=True) for seed in range(options.seeds)]}}
    for name, rows in result["distance"].items():
        print(name)
        for r, column in zip(RADII, zip(*rows)):
            print(f"  r = {r:<8g} {median(column):.1e} ({min(column):.1e} to {max(column):.1e})", flush=True)
    ways = products()
    taken = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, work in ways.items():
            value = seconds(work)
            if turn:  # the first warms up
                taken[name].append(value)
    result |= {
        "seconds": {name: spread(values) for name, values in taken.items()},
        "exact_over_difference": spread([e / d for d, e in zip(taken["difference"], taken["exact"])]),
        "n": {"distance": options.seeds, "seconds": options.rounds},
        "sizes": {"distance": SMALL, "seconds": LARGE}} | machine(torch.device("cpu"))
    ratio = result["exact_over_difference"]
    print(f"seconds, exact / difference: {ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to "
          f"{ratio['quartiles'][1]:.2f})")
    draw(result)
    print(f"written: {write('hvp', result)}, img/hvp.svg")


if __name__ == "__main__":
    main()
