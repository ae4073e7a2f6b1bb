"""Does the engine compute what the definition says? A search asks at its start and once an epoch."""
import re

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conas.darts.architect import Batch
from conas.darts.passes import by_definition
from conas.darts.supernet import Supernet
from conas.engine.door import Engine
from conas.errors import InputError

IMAGES = 4  # of the batch
TRIES = 3   # with other numbers; only what differs in all of them does so for another reason than rounding
# Relative errors. In float32 rounding moves a ReLU or a maximum to its other side here and there, where gradients jump.
TOLERANCES = {"logits": 1e-3, "statistics": 1e-3, "gradient": 0.05}


@torch.no_grad()
def check_engine(engine: Engine, batch: Batch) -> None:
    """Compare an engine with the definition of its network on a few images, in training and in evaluation.

    With weights, alphas and running statistics perturbed, so that what starts at 0 or 1 hides nothing: logits,
    gradients w.r.t. w and the alphas by operation, and what the pass leaves in the running statistics. Each process
    compares by its own images. Network and random generators are left as they were. Raises InputError that names what
    differs.
    """
    network, synced, engine.synced = engine.network, engine.synced, False
    images, labels = batch[0][:IMAGES].detach().float(), batch[1][:IMAGES]
    state = [*network.alphas().values(), *network.buffers()]
    before, training = [tensor.clone() for tensor in state], network.training
    wrong: set[str] = set()
    try:
        for number in range(TRIES):
            numbers = torch.Generator().manual_seed(number)
            w = _perturbed(network.flat(), numbers)
            for tensor, was in zip(state, before):
                tensor.copy_(_perturbed(was, numbers) if tensor.is_floating_point() else was)
            found = _differences(network, images, labels, w)
            wrong = found if number == 0 else wrong & found
            if not wrong:
                return
    finally:
        engine.synced = synced
        network.train(training)
        for tensor, was in zip(state, before):
            tensor.copy_(was)
    raise InputError(f"the engine computes other numbers than the definition: {', '.join(sorted(wrong))}; start again "
                     "with --no-engine, which is slower and right, to go on, and report this")


def _perturbed(tensor: Tensor, numbers: torch.Generator) -> Tensor:
    """Every value moved by some percent, and by a hundredth; what is positive stays so."""
    noise = torch.rand(2, *tensor.shape, generator=numbers).to(tensor)
    return tensor * (1 + 0.1 * noise[0]) + 0.01 * noise[1]


def _differences(network: Supernet, images: Tensor, labels: Tensor, w: Tensor) -> set[str]:
    """Say in words in what the engine differs."""
    statistics = [buffer.clone() for buffer in network.buffers()]
    with torch.random.fork_rng(devices=[]):  # operations of a space's own may draw random numbers
        random = torch.get_rng_state()
        engine = _quantities(network, images, labels, w)
        for buffer, was in zip(network.buffers(), statistics):
            buffer.copy_(was)
        torch.set_rng_state(random)
        with by_definition(network):
            definition = _quantities(network, images, labels, w)
    scale = {kind: max((expected.norm() for (of, _), expected in definition.items() if of == kind), default=0)
             for kind in TOLERANCES}
    wrong = set()
    for (kind, what), expected in definition.items():
        error = (engine[kind, what] - expected).norm()
        # a search that has diverged ends for its own reasons
        if expected.isfinite().all() and not error <= TOLERANCES[kind] * max(expected.norm(), 0.02 * scale[kind]):
            wrong.add(what)
    return wrong


def _quantities(network: Supernet, images: Tensor, labels: Tensor, w: Tensor) -> dict[tuple[str, str], Tensor]:
    """What passes in training and in evaluation give, by kind and name: vectors, on the CPU in float64."""
    alphas = network.alphas()
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        logits = network.train().with_weights(images, w)
        *of_alphas, of_w = torch.autograd.grad(cross_entropy(logits, labels), [*alphas.values(), w],
                                                  allow_unused=True, materialize_grads=True)
    found = {("logits", "the logits in training"): [logits.detach()],
             ("logits", "the logits in evaluation"): [network.eval().with_weights(images, w.detach())],
             ("statistics", "the running statistics"): [b for b in network.buffers() if b.is_floating_point()]}
    for alpha, gradient in zip(alphas, of_alphas):
        of_operations = gradient.dim() == 2 and gradient.shape[1] == len(network.primitives)
        for name, part in zip(network.primitives, gradient.unbind(1)) if of_operations else [(alpha, gradient)]:
            found.setdefault(("gradient", f"the gradient w.r.t. the alphas of {name}"), []).append(part)
    order = network.flat_order()
    for name, part in zip(order, of_w.split([p.numel() for p in order.values()])):
        operation = re.match(r"cells\.\d+\._ops\.\d+\._ops\.(\d+)\.", name)
        of = network.primitives[int(operation[1])] if operation else "stem, preprocessing and classifier"
        found.setdefault(("gradient", f"the gradient w.r.t. the weights of {of}"), []).append(part)
    return {key: torch.cat([part.flatten().double().cpu() for part in parts]) for key, parts in found.items()}
