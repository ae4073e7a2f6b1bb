"""Rebuild parity fixtures: the numbers that a correct DARTS reproduces in float64.

    python -m tests.helpers.parity tests/fixtures/*_seed0.npz
    python -m tests.helpers.parity --device cuda tests/fixtures/*_seed0.npz

One line for each quantity, with its relative error |ours - expected| / |expected|. Exits 1 if one is above its
tolerance, 2 if a file cannot be read. A fixture holds outputs only; weights and inputs are drawn here, in the
order of the recipe, from NumPy's default_rng.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas.darts.derived import NetworkCIFAR, NetworkImageNet, count_parameters
from conas.darts.genotype import EDGES, Genotype, from_json, to_json
from conas.darts.operations import OPERATIONS
from conas.darts.supernet import frozen_statistics
from conas.recurrent.model import TextBatch

LOGITS, HYPERGRADIENT, FLOAT32 = 1e-7, 1e-6, 1e-3  # tolerances
Quantity = tuple[str, object, float]  # name in the fixture, our value, tolerance


def fill(network: nn.Module, seed: int) -> None:
    """Draw every floating-point entry of the state_dict but the alphas, in sorted name order."""
    rng = np.random.default_rng(seed)
    for name, entry in sorted(network.state_dict().items()):
        if not entry.is_floating_point() or name.startswith("alphas_"):
            continue
        shape = tuple(entry.shape)
        if name.endswith("running_mean"):
            values = rng.uniform(-0.5, 0.5, shape)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            values = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            values = 0.1 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) / sqrt(prod(shape[1:]))
        entry.copy_(torch.from_numpy(np.asarray(values)))


def draw_alphas(rng: np.random.Generator, primitives: int, dtype: torch.dtype) -> list[Tensor]:
    """The normal, then the reduction alphas."""
    return [torch.from_numpy(0.5 * rng.standard_normal((EDGES, primitives))).to(dtype) for _ in range(2)]


def draw_batch(rng: np.random.Generator, fixture: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One batch of images and labels."""
    batch, image = int(fixture["batch"]), int(fixture["image"])
    x = torch.from_numpy(rng.standard_normal((batch, 3, image, image))).to(dtype)
    return x, torch.from_numpy(rng.integers(0, int(fixture["num_classes"]), batch))


def set_alphas(network: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for alpha, value in zip(network.alphas().values(), values):
            alpha.copy_(value)


def search_quantities(fixture: dict, dtype: torch.dtype = torch.float64, device: str = "cpu",
                      accelerate: Callable = lambda network: None) -> Iterator[Quantity]:
    """Steps 1 to 6 of the recipe: the supernet, three architecture and weight steps, genotypes.

    All of it by the definition, or by what `accelerate` puts in its place.
    """
    space, seed = f"cnn_space{int(fixture['space'])}", int(fixture["seed"])
    network = import_module(f"{space}.model_search").Network(
        int(fixture["C"]), int(fixture["num_classes"]), int(fixture["layers"])).to(device, dtype)
    fill(network, seed)
    rng = np.random.default_rng(seed + 1)
    set_alphas(network, draw_alphas(rng, len(network.primitives), dtype))
    batches = [[[t.to(device) for t in draw_batch(rng, fixture, dtype)] for _ in range(2)] for _ in range(3)]
    (x, _), (xv, yv) = batches[0]
    engine = accelerate(network)

    def forward(x: Tensor) -> Tensor:
        return network(x) if engine is None else network.with_weights(x, network.flat())

    with torch.no_grad():
        network.eval()
        yield "logits_eval", forward(x), LOGITS
    network.train()
    alphas = network.alphas()
    with frozen_statistics(network):
        first_order = torch.autograd.grad(cross_entropy(forward(xv), yv), list(alphas.values()))
    yield from ((f"first_order_{kind}", g, HYPERGRADIENT) for kind, g in zip(("normal", "reduce"), first_order))

    weights = list(network.weights().values())
    optimizer = torch.optim.SGD(weights, lr=0.025, momentum=0.9, weight_decay=3e-4)
    architect = import_module(f"{space}.architect").Architect(network, optimizer)
    for i, ((train, valid), lr) in enumerate(zip(batches, fixture["lrs"].tolist())):
        architect.step(train, valid, lr)
        for name, alpha in alphas.items():
            kind = name.removeprefix("alphas_")
            yield f"step{i}/hypergradient_{kind}", alpha.grad, HYPERGRADIENT
            yield f"step{i}/alphas_{kind}", alpha, LOGITS
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        logits = forward(train[0])
        loss = cross_entropy(logits, train[1])
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 5)
        optimizer.step()
        yield f"step{i}/logits", logits, LOGITS
        yield f"step{i}/loss", loss, LOGITS
        yield f"step{i}/weight_norm", torch.cat([w.detach().reshape(-1) for w in weights]).norm(), LOGITS

    genotypes = []
    for _ in range(8):
        set_alphas(network, draw_alphas(rng, len(network.primitives), dtype))
        genotypes.append(to_json(network.genotype()))
    yield "genotypes_json", genotypes, 0.0


def derived_quantities(fixture: dict, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Iterator[Quantity]:
    """Steps 7 and 8 of the recipe: the derived networks for CIFAR and ImageNet."""
    seed, classes, layers = (int(fixture[name]) for name in ("seed", "num_classes", "layers"))
    primitives = len(import_module(f"cnn_space{int(fixture['space'])}.genotypes").PRIMITIVES)
    rng = np.random.default_rng(seed + 1)  # steps 2, 3 and 6 draw from it first
    draw_alphas(rng, primitives, dtype)
    for _ in range(6):
        draw_batch(rng, fixture, dtype)
    for _ in range(8):
        draw_alphas(rng, primitives, dtype)

    network = NetworkCIFAR(int(fixture["C"]), classes, layers, True, last_genotype(fixture)).to(device, dtype)
    fill(network, seed + 2)
    x = torch.from_numpy(rng.standard_normal((3, 3, 32, 32))).to(device, dtype)
    with torch.no_grad():
        yield "cifar/logits_eval", network.eval()(x), LOGITS
        logits, auxiliary = network.train()(x)
    yield "cifar/logits_train", logits, LOGITS
    yield "cifar/logits_auxiliary", auxiliary, LOGITS
    yield "cifar/parameters", torch.tensor(count_parameters(network)), 0.0

    network = NetworkImageNet(8, classes, layers, True, last_genotype(fixture)).to(device, dtype)
    fill(network, seed + 3)
    x = torch.from_numpy(rng.standard_normal((2, 3, 224, 224))).to(device, dtype)
    with torch.no_grad():
        yield "imagenet/logits_eval", network.eval()(x), LOGITS


def recurrent_quantities(fixture: dict, dtype: torch.dtype = torch.float64, device: str = "cpu"
                         ) -> Iterator[Quantity]:
    """The recipe's recurrent fixture: two published cells, one step of the search's alphas, the genotype."""
    seed, T, B, units, words = (int(fixture[name]) for name in ("seed", "T", "batch", "nhid", "ntoken"))
    rng = np.random.default_rng(seed + 1)
    genotypes = import_module("rnn.genotypes")

    def draw_tokens() -> Tensor:
        return torch.from_numpy(rng.integers(0, words, (T, B))).to(device)

    for name in ("DARTS_V1", "DARTS_V2"):
        network = import_module("rnn.model").Network(words, units, getattr(genotypes, name)).to(device, dtype).eval()
        fill(network, seed)
        with torch.no_grad():
            log_prob, hidden = network(draw_tokens(), network.initial(B))
        yield f"{name}/log_prob", log_prob, LOGITS
        yield f"{name}/hidden", hidden[None], LOGITS

    network = import_module("rnn.model_search").Network(words, units).to(device, dtype).train()
    fill(network, seed + 2)
    set_alphas(network, [torch.from_numpy(0.5 * rng.standard_normal((36, 5))).to(dtype)])
    x, y, xv, yv = (draw_tokens() for _ in range(4))
    optimizer = torch.optim.SGD(network.weights().values(), lr=20.0, weight_decay=5e-7)
    architect = import_module("rnn.architect").Architect(network, optimizer)
    architect.step(TextBatch(x, y, network.initial(B)), TextBatch(xv, yv, network.initial(B)), 20.0)
    yield "search/hypergradient", network.alphas_recurrent.grad, HYPERGRADIENT
    yield "search/weights_after", network.alphas_recurrent, LOGITS  # DARTS' code calls these alphas weights
    yield "search/genotype_json", to_json(network.genotype()), 0.0


def relative_error(ours, expected: np.ndarray) -> float:
    """|ours - expected| / |expected| in the 2-norm; 0 or 1 for genotypes."""
    if expected.dtype.kind == "U":
        return float(json.dumps(ours) != json.dumps(json.loads(str(expected))))
    difference = ours.detach().double().cpu().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def read_fixture(path: str) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def last_genotype(fixture: dict) -> Genotype:
    """The genotype that the derived networks of a fixture are built from."""
    return from_json(json.loads(str(fixture["genotypes_json"]))[-1], "fixture", OPERATIONS)


def report(path: str, device: str = "cpu") -> bool:
    """Print a fixture's quantities; True if all are within their tolerances."""
    fixture = read_fixture(path)
    if "nhid" in fixture:
        quantities = recurrent_quantities(fixture, device=device)
    else:
        quantities = chain(search_quantities(fixture, device=device), derived_quantities(fixture, device=device))
    right = True
    for name, ours, tolerance in quantities:
        error = relative_error(ours, fixture[name])
        right &= error <= tolerance
        print(f"{Path(path).name}  {name:30s} {error:9.2e}  {'ok' if error <= tolerance else f'ABOVE {tolerance:g}'}")
    return right


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="fixtures")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        results = [report(path, options.device) for path in options.paths]
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}: name parity fixtures (.npz)", file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
