"""Search a cell: DARTS' alternation of alpha steps and weight steps, from the first batch to the last checkpoint."""
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas import checkpoint as checkpoints
from conas import distributed
from conas import genotype as genotypes
from conas.architect import Batch, Bilevel
from conas.board import Board
from conas.cli import find_device, parse
from conas.config import (
    AlphaOptions,
    AugmentOptions,
    DataOptions,
    KeepOptions,
    ProcessOptions,
    RunOptions,
    SupernetOptions,
    WeightOptions,
)
from conas.data import load
from conas.draw import draw_genotype
from conas.evaluate import validate
from conas.files import write_json
from conas.keeper import Keeper
from conas.progress import Course, announce, cosine, descend, resumed, snapshot, tell_skipped
from conas.run import Run, folder_name
from conas.spaces import Space
from conas.streams import Stream, stratified_split

GROUPS = (DataOptions, AugmentOptions, SupernetOptions, WeightOptions, AlphaOptions, RunOptions, KeepOptions,
          ProcessOptions)


def weight_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, grad_clip: float,
                skip: bool = False) -> tuple[Tensor, Tensor]:
    """One SGD step of the weights. Returns the loss and the number of right answers, on the device.

    Of several processes each has its part of the batch, and the results are those of the whole batch.

    With `skip`, a loss or gradient that is not finite leaves weights and running statistics as they were.
    """
    images, labels = batch
    weights = optimizer.param_groups[0]["params"]
    before = snapshot(network) if skip else None
    optimizer.zero_grad(set_to_none=True)
    logits = network(images)
    loss = distributed.weighed(cross_entropy(logits, labels), len(labels))
    loss.backward(inputs=weights)  # the alphas' gradients are not wanted here
    hits = (logits.argmax(dim=1) == labels).sum()
    loss, hits = distributed.after_backward(network, optimizer, loss, hits, len(labels))
    return descend(optimizer, loss, grad_clip, before), hits


def search(space: Space, architect_class: type[Bilevel], data: DataOptions, augment: AugmentOptions,
           supernet: SupernetOptions, weights: WeightOptions, alphas: AlphaOptions, options: RunOptions,
           keep: KeepOptions, processes: ProcessOptions) -> Path:
    """Run or continue one search and return its folder. Several processes call it alike; the first one writes."""
    device = find_device(options.device, keep.deterministic)
    groups = (data, augment, supernet, weights, alphas, options, keep, processes)
    arguments = {name: value for group in groups for name, value in asdict(group).items()}
    images = distributed.in_turn(
        lambda: load(data.dataset, data.data, "train", image_size=data.image_size, subset=data.subset))
    halves = stratified_split(images.labels, [augment.train_portion, 1 - augment.train_portion], augment.split_seed)
    cutout = augment.cutout_length if augment.cutout else 0
    train, valid = (
        Stream(images, half, weights.batch_size, name=name, seed=options.seed, device=device, cutout_length=cutout,
               drop_last=name == "alphas", workers=data.workers) for name, half in zip(("weights", "alphas"), halves))

    torch.manual_seed(options.seed)
    network = space.network(supernet.init_channels, images.info.num_classes, supernet.layers, images.info.channels)
    network.synced = processes.sync_bn
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.weights().values(), lr=weights.learning_rate, momentum=weights.momentum,
                                weight_decay=weights.weight_decay)
    architect = architect_class(network, optimizer, arch_learning_rate=alphas.arch_learning_rate,
                                arch_weight_decay=alphas.arch_weight_decay, unrolled=alphas.unrolled)
    about = {"name": data.dataset, "root": data.data, "image_size": images.info.image_size, "subset": data.subset,
             "classes": list(images.info.classes), "fingerprint": images.fingerprint,
             "train_portion": augment.train_portion, "split_seed": augment.split_seed}

    folder = space.search_folder(folder_name(options.save))
    with Run(folder, arguments) as run, Keeper(run, keep.checkpoint_minutes) as keeper:
        board = Board(folder) if options.tensorboard and distributed.rank() == 0 else None
        metrics, begun = resume(keeper, space, network, optimizer, architect, about)
        start = len(metrics)
        if start == weights.epochs:
            if not (folder / "cells" / "reduce.png").exists():  # it was killed before its last picture
                finish(run, network.genotype(), metrics)
            run.log(f"{folder}: this search is finished; --save NAME starts another")
            return folder
        order = ("second order: the alphas follow the hypergradient through the virtual step" if alphas.unrolled else
                 "first order: the alphas follow the validation gradient at the present weights (--no-unrolled)")
        run.log(f"{space.name}: {', '.join(space.primitives)}")
        run.log(order)
        run.log(f"{data.dataset}: {len(halves[0])} images for weights, {len(halves[1])} for alphas, "
                f"{images.info.num_classes} classes; epochs {start} to {weights.epochs - 1} on {device}"
                f"{resumed(start, begun)}")

        done = start * train.steps + (begun["step"] if begun else 0)
        train_batches, valid_batches, skip = train.batches(done), valid.batches(done), keep.on_nan == "skip"
        for epoch in range(start, weights.epochs):
            lr = cosine(epoch, weights.epochs, weights.learning_rate, weights.learning_rate_min) * processes.lr_scale
            optimizer.param_groups[0]["lr"] = lr
            network.train()
            title = f"{space.name} epoch {epoch} of {weights.epochs}"
            course = Course(title, epoch, train, options.report_freq, skip=skip, state=begun)

            def state(epoch=epoch, course=course) -> dict:
                return checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about,
                                            arguments=arguments) | {
                    "optimizer": optimizer.state_dict(), "alpha_optimizer": architect.alpha_optimizer.state_dict(),
                    "metrics": metrics, "course": course.state()}

            for step in course:
                batch, valid_batch = next(train_batches), next(valid_batches)
                if architect.step(batch, valid_batch, lr, skip):
                    course.add(*weight_step(network, optimizer, batch, weights.grad_clip, skip), train.size(step))
                else:
                    course.skip_step()
                if epoch == start and step == 4:
                    announce(run, course.seconds / 5 * train.steps * (weights.epochs - start))
                if (step + 1) % options.report_freq == 0:
                    distributed.check_network("weights and alphas", network)
                keeper.after_step(state)

            with keeper.calm(state):
                valid_loss, valid_accuracy = validate(network, images, halves[1], device, data.workers)
            metrics.append({"epoch": epoch, "learning_rate": lr, "train_loss": course.loss, "train_top1": course.top1,
                            "valid_loss": valid_loss, "valid_top1": valid_accuracy} | course.remarks())
            run.log(f"epoch {epoch:3d}  rate {lr:.4f}  train {course.loss:.4f} {course.top1:6.2f} %  "
                    f"valid {valid_loss:.4f} {valid_accuracy:6.2f} %  {course.rate:.0f} images/s")
            begun = None
            distributed.check_network("weights and alphas", network)
            write_epoch(keeper, state() | {"course": None})
            if board is not None:
                board.epoch(metrics[-1], network.alphas(), space.primitives, network.genotype())
        finish(run, network.genotype(), metrics)
    return folder


def write_epoch(keeper: Keeper, state: dict) -> None:
    """Write an epoch to disk. `resume.pt` comes after what it stands for: what it does not know of is done again."""
    run, epoch = keeper.run, state["epoch"]
    if distributed.rank() == 0:
        checkpoints.save(run.path("checkpoints", epoch, ".pt"), {name: state[name] for name in checkpoints.FIELDS})
        write_json(run.path("genotypes", epoch, ".json"), state["genotype"])
        write_json(run.folder / "genotype.json", state["genotype"])
    keeper.save(state)
    run.write_metrics(state["metrics"])


def resume(keeper: Keeper, space: Space, network: nn.Module, optimizer: torch.optim.Optimizer, architect: Bilevel,
           about: dict) -> tuple[list[dict], dict | None]:
    """Put the run's last state into the network and the optimizers.

    Returns the metrics of the epochs that are done, and the state of the course of the one that is not.
    """
    state = keeper.load(about)
    if state is None:
        return [], None
    network.load_state_dict(checkpoints.restore(keeper.path, state, space.name, space.network).state_dict())
    optimizer.load_state_dict(state["optimizer"])
    architect.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
    keeper.run.write_metrics(state["metrics"])
    return state["metrics"], state["course"]


def finish(run: Run, genotype: genotypes.Genotype, metrics: list[dict]) -> None:
    """Print the cells that the search ends with, ready for `genotypes.py`, and draw them."""
    if distributed.rank():
        return
    tell_skipped(run, metrics)
    pictures = draw_genotype(genotype, run.folder / "cells")
    run.log(str(genotype))
    run.log(f"pictures of the cells: {', '.join(str(path) for path in pictures)}")


def main(folder: Path, network: type, architect: type[Bilevel], description: str, argv: list[str] | None = None
         ) -> None:
    """The command `python train_search.py` of the space in `folder`."""
    search(Space(folder.name, folder, network), architect, *parse(description, GROUPS, argv))
