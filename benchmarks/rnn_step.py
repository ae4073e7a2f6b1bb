"""The step of a recurrent search and of a recurrent training, against a textbook loop over time steps.

    OMP_NUM_THREADS=1 python -m benchmarks.rnn_step                           # small enough for a CPU
    OMP_NUM_THREADS=1 python -m benchmarks.rnn_step --size darts --bptt 10    # with all 35 words, 16 GB of memory
    python -m benchmarks.rnn_step --device cuda --size darts

Both have the same sizes, batch and dropout rates. The textbook (`benchmarks/textbook_rnn.py`) draws masks where it uses
them and lets autograd record every operation of every time step; it takes the same four passes for the alphas.
`search` is an alpha step of second order and a weight step, `train` a weight step with DARTS_V2, `cell` forward and
backward of the supernet's cell alone. They take turns in one process, and each round gives one ratio, of processor time
with one thread on a CPU, else of elapsed time. Prints medians with the quartiles, and writes
benchmarks/results/rnn_step-DEVICE.json, or rnn_step_darts-DEVICE.json.
"""
import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import textbook_rnn
from benchmarks.machine import machine, several, spread, write
from conas.cli import find_device
from conas.recurrent.model import RecurrentNetwork, TextBatch
from conas.recurrent.options import DropoutOptions
from conas.recurrent.steps import draw_masks, weight_optimizer, weight_step
from rnn.architect import Architect
from rnn.genotypes import DARTS_V2, PRIMITIVES
from rnn.model_search import Network

RATE, DECAY, CLIP, SLOWNESS = 20.0, 5e-7, 0.25, 1e-3
RATES = DropoutOptions()
SMALL = {"nhid": 64, "batch_size": 32, "words": 2000, "bptt": 35}
DARTS_SEARCH = {"nhid": 300, "batch_size": 256, "words": 10_000, "bptt": 35}
SIZES = {"small": {"train": SMALL, "search": SMALL, "cell": SMALL},
         "darts": {"train": DARTS_SEARCH | {"nhid": 850, "batch_size": 64}, "search": DARTS_SEARCH,
                   "cell": DARTS_SEARCH}}


def textbook_loss(network: textbook_rnn.Network, batch: TextBatch, slowness: float = 0.0) -> torch.Tensor:
    log_prob, _, outputs = network(batch.tokens, batch.hidden)
    loss = nn.functional.nll_loss(log_prob.flatten(0, 1), batch.targets.flatten())
    return loss + slowness * (outputs[1:] - outputs[:-1]).pow(2).mean() if slowness else loss


def textbook_alpha_step(network: textbook_rnn.Network, adam: torch.optim.Adam, train: TextBatch, valid: TextBatch
                        ) -> None:
    weights = [p for p in network.parameters() if p is not network.alphas]
    gradients = torch.autograd.grad(textbook_loss(network, train), weights)
    before = [w.detach().clone() for w in weights]
    k = min(1.0, CLIP / (nn.utils.get_total_norm(gradients).item() + 1e-6))
    with torch.no_grad():
        for w, g in zip(weights, gradients):
            w -= RATE * (k * g + DECAY * w)
    first, *d = torch.autograd.grad(textbook_loss(network, valid), [network.alphas, *weights])
    length = nn.utils.get_total_norm(d).item()
    shorter = min(1.0, CLIP / (length + 1e-6))
    eps = 0.01 / (shorter * length)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, old, part in zip(weights, before, d):
                w.copy_(old + sign * eps * shorter * part)
        sides.append(torch.autograd.grad(textbook_loss(network, train), [network.alphas])[0])
    with torch.no_grad():
        for w, old in zip(weights, before):
            w.copy_(old)
    network.alphas.grad = first - RATE * k * (sides[0] - sides[1]) / (2 * eps)
    adam.step()


def textbook_weight_step(network: textbook_rnn.Network, sgd: torch.optim.SGD, batch: TextBatch) -> None:
    sgd.zero_grad()
    textbook_loss(network, batch, SLOWNESS).backward()
    nn.utils.clip_grad_norm_(sgd.param_groups[0]["params"], CLIP)
    sgd.step()


def tasks(size: dict[str, int], device: torch.device) -> dict[str, dict[str, Callable[[], None]]]:
    """For each task, a step of ours and one of the textbook."""
    words, units, B, T = size["words"], size["nhid"], size["batch_size"], size["bptt"]
    generator = torch.Generator(device).manual_seed(0)
    rates = {name: getattr(RATES, name) for name in ("dropout", "dropouth", "dropoutx", "dropouti", "dropoute")}
    torch.manual_seed(0)
    supernet = Network(words, units).to(device)
    book = textbook_rnn.Network(words, units, primitives=PRIMITIVES, **rates)
    network = RecurrentNetwork(words, units, DARTS_V2).to(device)
    plain = textbook_rnn.Network(words, units, recurrent=DARTS_V2.recurrent, **rates)
    book, plain = book.to(device), plain.to(device)

    ours_sgd, network_sgd = (weight_optimizer(of, RATE, DECAY) for of in (supernet, network))
    book_sgd, plain_sgd = (torch.optim.SGD([p for name, p in of.named_parameters() if name != "alphas"], lr=RATE,
                                           weight_decay=DECAY) for of in (book, plain))
    architect, adam = Architect(supernet, ours_sgd), torch.optim.Adam([book.alphas], lr=3e-3, weight_decay=1e-3)
    tokens = torch.randint(words, (4, T, B), device=device)

    def batches(of: nn.Module | None) -> list[TextBatch]:
        hidden = torch.zeros(B, units, device=device)
        pairs = (tokens[0], tokens[1]), (tokens[2], tokens[3])
        return [TextBatch(*pair, hidden, *([draw_masks(RATES, B, of, generator)] if of else [])) for pair in pairs]

    def ours_search() -> None:
        train, valid = batches(supernet)
        architect.step(train, valid, RATE)
        weight_step(supernet, ours_sgd, train, grad_clip=CLIP, slowness=SLOWNESS)

    def book_search() -> None:
        train, valid = batches(None)
        textbook_alpha_step(book, adam, train, valid)
        textbook_weight_step(book, book_sgd, train)

    x = torch.randn(T, B, 2 * units, device=device, requires_grad=True)

    def ours_cell() -> None:
        mask = draw_masks(RATES, B, supernet, generator).hidden
        W0, Ws = supernet.rnns[0]._W0, list(supernet.rnns[0]._Ws)
        supernet.run(x, x.new_zeros(B, units), W0[units:], Ws, mask).sum().backward()

    def book_cell() -> None:
        hidden, outputs = x.new_zeros(B, units), []
        for t in range(T):
            mask = book.mask(x, (B, units), RATES.dropouth)
            c, h = (x[t] + (hidden * mask) @ book.rnns[0]._W0[units:]).chunk(2, dim=1)
            hidden = book.search_step(hidden + c.sigmoid() * (h.tanh() - hidden), mask)
            outputs.append(hidden)
        torch.stack(outputs).sum().backward()

    return {"search": {"ours": ours_search, "textbook": book_search},
            "train": {"ours": lambda: weight_step(network, network_sgd, batches(network)[0], grad_clip=CLIP,
                                                  slowness=SLOWNESS),
                      "textbook": lambda: textbook_weight_step(plain, plain_sgd, batches(None)[0])},
            "cell": {"ours": ours_cell, "textbook": book_cell}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, help="in place of that of --size")
    parser.add_argument("--tasks", nargs="+", choices=list(SIZES["small"]), default=list(SIZES["small"]))
    parser.add_argument("--rounds", type=several, default=9)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = find_device(options.device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    given = {name: value for name in SMALL if (value := getattr(options, name)) is not None}
    result = {}
    for task in options.tasks:
        size = SIZES[options.size][task] | given
        steps = tasks(size, device)[task]  # what other tasks need is freed
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-1, options.rounds):  # the first turn pays for what is done once
            for name in sorted(steps, reverse=turn % 2 == 1):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = clock()
                steps[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 0:
                    taken[name].append(clock() - began)
        result[task] = {"textbook_over_ours": spread([t / o for o, t in zip(taken["ours"], taken["textbook"])]),
                        "milliseconds": {name: spread([1000 * s for s in seconds]) for name, seconds in taken.items()},
                        "size": size}
        low, high = result[task]["textbook_over_ours"]["quartiles"]
        milliseconds = {name: value["median"] for name, value in result[task]["milliseconds"].items()}
        print(f"{task:6}  {result[task]['textbook_over_ours']['median']:.2f} times as fast as the textbook (quartiles "
              f"{low:.2f} to {high:.2f}, n = {options.rounds}); {milliseconds['ours']:.0f} ms against "
              f"{milliseconds['textbook']:.0f} ms", flush=True)
    result |= {"n": options.rounds, "clock": clock.__name__} | machine(device)
    name = "rnn_step" if options.size == "small" else f"rnn_step_{options.size}"
    print(f"written: {write(f'{name}-{device.type}', result)}")


if __name__ == "__main__":
    main()
