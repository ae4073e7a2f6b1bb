"""What each process of tests/commands/test_distributed.py computes, alone or under torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/helpers/ranks.py FOLDER
"""
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import conas.commands.search
import test_ensemble
from cnn_space1 import genotypes
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas import distributed, files
from conas.commands import test_all, train
from conas.commands.scoring import predict
from conas.commands.search import weight_step
from conas.darts.architect import Batch, Bilevel
from conas.darts.derived import NetworkCIFAR
from conas.darts.operations import OPERATIONS
from conas.darts.published import GENOTYPES
from conas.darts.supernet import Supernet
from conas.data.images import load
from conas.engine import batchnorm as synced
from conas.engine.door import accelerate
from conas.errors import InputError, Stopped
from conas.health.curvature import Curvature
from conas.runs.options import RecipeOptions
from tests.darts.test_architect import Smooth

XI = 0.1
STEPS = {16: 2, 15: 1}  # by size of batch; 15 images are 8 and 7
SMALL = ["--dataset", "digits", "--subset", "100", "--init_channels", "2", "--layers", "3", "--epochs", "2"]
# Adam's first step moves an alpha by the rate whatever its gradient is, so that one rounded to the other side of zero
# would set two float32 searches apart; the alphas' own steps are compared in float64
ALPHAS = ["--batch_size", "17", "--arch_learning_rate", "1e-6"]
SEARCH = [*SMALL, "--sync_bn", *ALPHAS]
RECIPE = RecipeOptions(grad_clip=1.0, label_smooth=0.1)


class Everything(Supernet):
    """A space of all operations."""

    primitives = tuple(OPERATIONS)


def batch(images: int, step: int, own: slice | None = None) -> Batch:
    """This process's part of a batch in float64, or that of the slice `own`."""
    random = torch.Generator().manual_seed(step)
    x = torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=random)
    y = torch.randint(10, (images,), generator=random)
    own = distributed.rank_slice(images) if own is None else own
    return x[own], y[own]


def search(images: int, sync_bn: bool, steps: int) -> dict[str, Tensor]:
    """Steps over all operations: hypergradients, losses, and all that the network is in the end."""
    torch.manual_seed(0)
    network = Everything(C=1, layers=3).double()
    accelerate(network, sync_bn)
    optimizer = torch.optim.SGD(network.weights().values(), lr=XI, momentum=0.9, weight_decay=3e-4)
    architect, found = Architect(network, optimizer, arch_learning_rate=0.01), {}
    for step in range(steps):
        train, valid = batch(images, 2 * step), batch(images, 2 * step + 1)
        found[f"gradient {step}"] = architect.grad_weights(train, architect.weights())
        architect.step(train, valid, XI)
        found[f"hypergradient {step}"] = torch.cat([a.grad.reshape(-1) for a in network.alphas().values()])
        loss, hits = weight_step(network, optimizer, train, 5.0)
        found[f"loss {step}"], found[f"hits {step}"] = loss, hits.double()
        found[f"checksum {step}"] = torch.tensor(distributed.checksum(network))
        found[f"genotype {step}"] = torch.tensor(list(str(network.genotype()).encode()))
    return found | {name: t.clone() for name, t in network.state_dict().items()}


def retrain(images: int, sync_bn: bool, steps: int) -> dict[str, Tensor]:
    """Steps of retraining, with auxiliary head and drop path."""
    torch.manual_seed(0)
    network = NetworkCIFAR(4, 10, 3, True, GENOTYPES["DARTS"], image_size=8).double().train()
    network.drop_path_prob, network.drop_path_images = 0.3, images
    if sync_bn:
        synced.convert(network)
    optimizer, found = torch.optim.SGD(network.parameters(), lr=XI, momentum=0.9), {}
    for step in range(steps):
        torch.manual_seed(step)
        loss, hits = train.train_step(network, optimizer, batch(images, step), RECIPE, 0.4, amp=False)
        found[f"loss {step}"], found[f"hits {step}"] = loss, hits.double()
        found[f"checksum {step}"] = torch.tensor(distributed.checksum(network))
    return found | {name: t.clone() for name, t in network.state_dict().items()}


def curvature(images: int) -> Tensor:
    """Of a network without BatchNorm, which depends on what else is in a process's part."""
    torch.manual_seed(0)
    network, own = Smooth().double(), distributed.rank_slice(images)
    x, y = torch.randn(images, 5, dtype=torch.float64), torch.randint(3, (images,))
    architect = Bilevel(network, torch.optim.SGD(network.parameters(), lr=XI, momentum=0.9))
    return torch.tensor(Curvature(architect, (x[own], y[own])).measure())


def logits(images: int) -> Tensor:
    """Of the first digits, by a network of random weights."""
    torch.manual_seed(0)
    network = Everything(C=2, layers=3, in_channels=1).eval()
    digits = load("digits", Path(__file__).resolve().parents[2] / "data", "test")
    return predict(network, digits, 4, torch.device("cpu"), torch.arange(images))


def complaint(function) -> str:
    """The text of the InputError that `function` raises."""
    try:
        function()
    except InputError as error:
        return str(error)
    return "none"


def agreement() -> dict[str, str]:
    """What processes tell each other, as text."""
    rank = distributed.rank()

    def failing(on: int):
        if rank == on:
            raise InputError(f"rank {on} cannot")
        return f"done by {rank}"

    def one_fails():
        with distributed.raise_on_all_ranks():
            failing(1)

    torch.manual_seed(0)
    network = Everything(C=2, layers=3)
    sound = complaint(lambda: distributed.check_network("weights", network))
    if rank == 1:  # a single bit
        weight = network.cells[1].preprocess1.op[1].weight.data
        weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
    broken = complaint(lambda: distributed.check_network("weights", network))
    return {
        "gather": str(distributed.gather({"rank": rank, "values": torch.arange(rank * 3).tolist()})),
        "first": distributed.from_rank0(lambda: failing(5)), "first fails": complaint(
            lambda: distributed.from_rank0(lambda: failing(0))), "one fails": complaint(one_fails),
        "in turn": complaint(lambda: distributed.local_rank0_first(lambda: failing(1))),
        "highest": str(distributed.all_reduce_max(rank, 7 - rank)), "total": str(distributed.total(rank + 3)),
        "said first": str(sum(distributed.gather(distributed.first_to_report("a")))),
        "sound": sound, "broken": broken,
    }


def scripts(root: Path, save: str) -> dict[str, list[dict]]:
    """A search and a training with the results of one process in any number, in the spaces of `root`. Their metrics."""
    folder, flags = root / "cnn_space1", [*SMALL, "--save", save, "--sync_bn"]
    conas.commands.search.main(folder, Network, Architect, "", argv=[*SEARCH, "--save", save])
    # the learning rate of one process, from half of it
    rate = str(0.025 / distributed.size())
    train.main(folder, genotypes, "", argv=[*flags, "--batch_size", "15", "--arch", "DARTS", "--auxiliary",
                                            "--scale_lr", "--learning_rate", rate])
    texts = {stage: (folder / f"{stage}-{save}" / "metrics.jsonl").read_text() for stage in ("search", "train")}
    return {stage: [json.loads(line) for line in text.splitlines()] for stage, text in texts.items()}


def tests(root: Path, save: str) -> None:
    """test_all.py and test_ensemble.py."""
    test_all.main(root / "cnn_space1", Network, "", argv=["--save", save])
    test_ensemble.ROOT = root
    sys.argv = ["", "--save", save, "--members", str(root / "cnn_space1" / f"search-{save}" / "checkpoints" / "*.pt")]
    test_ensemble.main()


def strays(root: Path) -> str:
    """What a search says, one of whose processes computes another step than the others."""
    step = conas.commands.search.weight_step

    def stray(network, *rest):
        found = step(network, *rest)
        if distributed.rank() == 1:
            network.classifier.bias.data[0] += 1e-6
        return found

    conas.commands.search.weight_step = stray
    try:
        return complaint(lambda: conas.commands.search.main(root / "cnn_space1", Network, Architect, "", argv=[
            *SMALL, "--no-unrolled", "--save", "stray", "--batch_size", "25", "--report_freq", "2"]))
    finally:
        conas.commands.search.weight_step = step


def errors(root: Path) -> list[str]:
    """Of a batch that is too small for two processes, of flags of one process only, and of a run that is another."""
    def search(*flags: str) -> str:
        return complaint(lambda: conas.commands.search.main(root / "cnn_space1", Network, Architect, "",
                                                            argv=[*SMALL, *flags]))

    return [search("--save", "small", "--batch_size", "7"),  # 50 images end in a batch of one
            search("--save", "mixed", "--batch_size", "25", "--seed", str(distributed.rank())),
            search("--save", "one", *ALPHAS)]


def forbidden(*_) -> None:
    raise AssertionError(f"rank {distributed.rank()} writes")


def main(folder: Path) -> None:
    if distributed.rank():
        files.os.replace = forbidden
    found = {"agreement": agreement(), "logits": {n: logits(n) for n in (1, 2, 9)}, "curvature": curvature(9)}
    for function in (search, retrain):
        found |= {f"{function.__name__} {images}": function(images, True, STEPS[images]) for images in STEPS}
        found |= {f"{function.__name__} apart": function(15, False, 1)}
    found |= {"scripts": scripts(folder, "two"), "stray": strays(folder), "errors": errors(folder)}
    tests(folder, "copy")
    torch.save(found, folder / f"rank{distributed.rank()}.pt")
    print(f"rank {distributed.rank()} is done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert int(os.environ["WORLD_SIZE"]) == 2
    with distributed.processes():
        main(Path(sys.argv[1]))
        if distributed.rank() == 0:  # the other one leaves here
            try:
                distributed.gather("anybody?")
            except Stopped as stop:
                print(f"rank 0: exit code {stop.code} without the other")
