"""The search's iteration against a textbook second-order DARTS: time, memory, operator calls, FLOPs, growth.

    python -m benchmarks.search_step                  # batches of 16 and 64, two threads
    python -m benchmarks.search_step --threads 1
    python -m benchmarks.search_step --keep_freed_memory both
    python -m benchmarks.search_step --growth         # time by batch, channels and layers, in the three spaces
    python -m benchmarks.search_step --device cuda

The textbook is benchmarks/textbook.py: a module for every primitive on every edge, a new network for every virtual
step, NCHW. Beside it runs what two lines of any user make of it, channels_last: images and network in that memory
format, and malloc told to keep freed memory. Ours is what train_search.py runs. First the hypergradients are compared
in float64. Then all take turns, each in a process of its own (benchmarks/turns.py), on the same random images of 32x32
pixels in float32: an architect step, a weight step and an evaluation (no gradients, --eval_batch images). Each round
gives one ratio of each; printed are medians and quartiles, by processor time with one thread on a CPU, which other work
on the machine disturbs less, else by the wall clock. On CUDA, ours are graphs, as in train_search.py and test_all.py;
steps by themselves are not. Memory is that of the first iterations, less what imports take; on CUDA, of tensors. Calls
and FLOPs are counted on the CPU only, and not with --times_only: calls of torch's operators, and FLOPs of
convolutions and matrix products, in kernels too, but for what these compute again. Writes
benchmarks/results/search_step-DEVICE.json, which keeps the last result of every setting, and draws
img/search_step.svg, or img/search_step-cuda.svg.
"""
import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.contestant import Contestant
from benchmarks.counts import ROOT, matmul_peak
from benchmarks.machine import RESULTS, machine, several, spread, write
from benchmarks.search_step_figure import draw
from benchmarks.turns import Player, clocks
from conas.cli import find_device

BASELINES = "textbook", "channels_last"
WORKS = "architect", "weights", "evaluation"
GROWTH = {"batch_size": (8, 16, 32, 64), "channels": (8, 16, 32), "layers": (5, 8, 11, 14)}
BASE = {"channels": 8, "layers": 5, "batch_size": 16}  # of --growth
TOLERANCE = 1e-9


def disagreement(space: str, device: torch.device) -> float:
    """The relative distance of the hypergradients in float64, after one iteration, on a small network."""
    contestants = [Contestant(name, space, 4, 3, 4, device=device, dtype=torch.float64, image_size=16)
                   for name in (*BASELINES, "ours")]
    for contestant in contestants:
        contestant.iteration()
    *expected, ours = (contestant.hypergradient() for contestant in contestants)
    return max(((ours - of).norm() / of.norm()).item() for of in expected)


def race(players: list[Player], works: tuple[str, ...], rounds: int) -> dict:
    """Seconds of each work of all players, ours the last, and the ratios, from `rounds` rounds in turn, by clock."""
    taken = {player: {work: [] for work in (*works, "graph") if work in player.works} for player in players}
    for turn in range(-1, rounds):  # the first round warms up
        for player in players if turn % 2 else players[::-1]:
            for work, found in taken[player].items():
                took = player.ask("clocks", work)
                if turn >= 0:
                    found.append(took)
    result = {}
    for clock in took:
        seconds = {player.name: {work: [each[clock] for each in found] for work, found in taken[player].items()}
                   for player in players}
        for of in seconds.values():
            both = [a + w for a, w in zip(of["architect"], of["weights"])]
            of["iteration"] = of.pop("graph", both)
        *baselines, ours = seconds
        result[clock] = {"seconds": {name: {work: spread(values) for work, values in of.items()}
                                     for name, of in seconds.items()}}
        for name in baselines:
            result[clock][f"{name}_over_ours"] = {work: spread([t / o for t, o in zip(values, seconds[ours][work])])
                                                  for work, values in seconds[name].items()}
    return result


def chosen(result: dict, threads: int) -> dict:
    """Of a `race`, the figures by processor time where that says what a user waits for, else by the wall clock."""
    clock = "processor" if threads == 1 and "processor" in result else "wall"
    return result | {"clock": clock} | result[clock]


@contextmanager
def playing(names: tuple[str, ...], sizes: dict, device: torch.device, kept: str) -> Iterator[list[Player]]:
    """Contestants of the same sizes. channels_last keeps freed memory unless none does."""
    with ExitStack() as stack:
        yield [stack.enter_context(Player(name, sizes, device, torch.get_num_threads(), kept in ("both", name) or (
            name == "channels_last" and kept != "none"))) for name in names]


def compare(sizes: dict, rounds: int, device: torch.device, kept: str, times_only: bool) -> dict:
    """All figures of one setting."""
    with playing((*BASELINES, "ours"), sizes, device, kept) as players:
        result = chosen(race(players, WORKS, rounds), torch.get_num_threads())
        result["peak_bytes"] = {player.name: player.peak_bytes for player in players}
        if device.type == "cuda" or times_only:
            return result
        result["operator_calls"] = {player.name: {work: player.ask("operator_calls", work) for work in WORKS}
                                    for player in players}
        result["flops"] = {player.name: {work: player.ask("flops", work) for work in WORKS[:2]} for player in players}
    took = clocks(device)
    peak = matmul_peak(device, lambda work: took(work)[result["clock"]])
    result["matmul_flops_per_second"] = peak
    result["share_of_matmul_peak"] = {
        name: sum(of.values()) / result["seconds"][name]["iteration"]["median"] / peak
        for name, of in result["flops"].items()}
    return result


def grow(space: str, rounds: int, device: torch.device, kept: str) -> list[dict]:
    """Seconds and ratios of an iteration by one size at a time, and exponents of the power laws fitted to medians."""
    results = []
    for varied, values in GROWTH.items():
        medians = {name: [] for name in (*BASELINES, "ours")}
        ratios = {f"{name}_over_ours": [] for name in BASELINES}
        for value in values:
            sizes = {"space": space} | BASE | {varied: value}
            with playing(tuple(medians), sizes, device, kept) as players:
                result = chosen(race(players, WORKS[:2], rounds), torch.get_num_threads())
            for name, of in ratios.items():
                of.append(result[name]["iteration"])
            for name, of in medians.items():
                of.append(result["seconds"][name]["iteration"]["median"])
        exponents = {name: exponent(values, of) for name, of in medians.items()}
        results.append({"space": space, "varied": varied, "values": values, "base": BASE, "seconds": medians,
                        "clock": result["clock"], "exponents": exponents} | ratios)
        print(f"{space}: time grows with {varied} to the power {exponents['ours']:.2f} "
              f"(textbook {exponents['textbook']:.2f})", *(f"{ratio['median']:.2f}" for ratio in
              ratios["channels_last_over_ours"]), "times the speed of channels_last", flush=True)
    return results


def exponent(x: tuple[int, ...], y: list[float]) -> float:
    """The slope of log y over log x, by least squares."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean = sum(u) / len(u)
    return sum((a - mean) * b for a, b in zip(u, v)) / sum((a - mean) ** 2 for a in u)


def report(result: dict) -> str:
    lines = [f"{work}: {value['median']:.2f} times the speed of {name} (quartiles {value['quartiles'][0]:.2f} to "
             f"{value['quartiles'][1]:.2f})" for name in BASELINES
             for work, value in result[f"{name}_over_ours"].items()]
    ours, baseline = result["peak_bytes"]["ours"], result["peak_bytes"]["textbook"]
    lines += [f"peak memory: {ours / 1e9:.2f} GB, {ours / baseline:.2f} of the textbook's"]
    if "operator_calls" not in result:
        iteration = result["seconds"]["ours"]["iteration"]["median"]
        return "\n".join(f"  {line}" for line in [*lines, f"an iteration: {1e3 * iteration:.1f} ms"])
    calls = {name: of["architect"] for name, of in result["operator_calls"].items()}
    lines += [f"operator calls of an architect step: {calls['ours']}, {calls['ours'] / calls['textbook']:.2f} of the "
              "textbook's", "share of the matmul peak: " + ", ".join(
                  f"{name} {share:.0%}" for name, share in result["share_of_matmul_peak"].items())]
    return "\n".join(f"  {line}" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    for name, default in (("channels", 16), ("layers", 8), ("threads", 2), ("eval_batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=several, default=5)
    parser.add_argument("--spaces", nargs="+", default=["cnn_space1"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--times_only", action="store_true")
    parser.add_argument("--keep_freed_memory", choices=["ours", "both", "none"], default="ours",
                        help="who keeps it, as all scripts of ours do (conas/memory.py; default: ours)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    kept = options.keep_freed_memory

    path = RESULTS / f"search_step-{device.type}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": {}, "growth": {}}
    about = machine(device) | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none was at hand",
                               "rounds": options.rounds, "keep_freed_memory": kept}
    for space in options.spaces:
        distance = disagreement(space, device)
        print(f"{space}: hypergradients agree to {distance:.1e} in float64", flush=True)
        if not distance <= TOLERANCE:
            raise SystemExit(f"{space}: the two implementations disagree; there is nothing to compare")
    if options.growth:
        for space in options.spaces:
            others = [curve for curve in results["growth"].get("curves", []) if curve["space"] != space]
            curves = [about | curve for curve in grow(space, options.rounds, device, kept)]
            results["growth"] = {"curves": others + curves}
            write(path.stem, results)
    else:
        for space in options.spaces:
            for batch_size in options.batch_sizes:
                sizes = {"space": space, "channels": options.channels, "layers": options.layers,
                         "batch_size": batch_size, "eval_batch": options.eval_batch}
                threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
                title = (f"{space}, {options.channels} channels, {options.layers} cells, batch {batch_size}, {threads}"
                         f"{'' if kept == 'ours' else f', freed memory kept by {kept}'}")
                found = compare(sizes, options.rounds, device, kept, options.times_only)
                results["settings"][title] = about | sizes | found
                print(f"{title}\n{report(results['settings'][title])}", flush=True)
                write(path.stem, results)  # now: the next setting may take too long, or too much memory
    figure = draw(results, "search_step" if device.type == "cpu" else f"search_step-{device.type}")
    print(f"written: {path.relative_to(ROOT)}, {figure.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
