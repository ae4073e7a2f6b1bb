"""Search a cell: DARTS' alternation of alpha steps and weight steps, from the first batch to the last checkpoint."""
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas import checkpoint as checkpoints
from conas import genotype as genotypes
from conas.architect import Batch, Bilevel
from conas.board import Board
from conas.cli import find_device, parse
from conas.config import AlphaOptions, AugmentOptions, DataOptions, RunOptions, SupernetOptions, WeightOptions
from conas.data import load
from conas.draw import draw_genotype
from conas.evaluate import validate
from conas.files import write_json
from conas.memory import keep_freed_memory
from conas.progress import Course, announce, cosine
from conas.run import Run, folder_name
from conas.spaces import Space
from conas.streams import Stream, stratified_split

GROUPS = (DataOptions, AugmentOptions, SupernetOptions, WeightOptions, AlphaOptions, RunOptions)


def weight_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, grad_clip: float
                ) -> tuple[Tensor, Tensor]:
    """One SGD step of the weights. Returns the loss and the number of right answers, on the device."""
    images, labels = batch
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=True)
    logits = network(images)
    loss = cross_entropy(logits, labels)
    loss.backward(inputs=weights)  # the alphas' gradients are not wanted here
    nn.utils.clip_grad_norm_(weights, grad_clip)
    optimizer.step()
    return loss.detach(), (logits.argmax(dim=1) == labels).sum()


def search(space: Space, architect_class: type[Bilevel], data: DataOptions, augment: AugmentOptions,
           supernet: SupernetOptions, weights: WeightOptions, alphas: AlphaOptions, options: RunOptions) -> Path:
    """Run or continue one search and return its folder."""
    device = find_device(options.device)
    keep_freed_memory()
    groups = (data, augment, supernet, weights, alphas, options)
    arguments = {name: value for group in groups for name, value in asdict(group).items()}
    images = load(data.dataset, data.data, "train", image_size=data.image_size, subset=data.subset)
    halves = stratified_split(images.labels, [augment.train_portion, 1 - augment.train_portion], augment.split_seed)
    cutout = augment.cutout_length if augment.cutout else 0
    train, valid = (
        Stream(images, half, weights.batch_size, name=name, seed=options.seed, device=device, cutout_length=cutout,
               drop_last=name == "alphas", workers=data.workers) for name, half in zip(("weights", "alphas"), halves))

    torch.manual_seed(options.seed)
    network = space.network(supernet.init_channels, images.info.num_classes, supernet.layers, images.info.channels)
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.weights().values(), lr=weights.learning_rate, momentum=weights.momentum,
                                weight_decay=weights.weight_decay)
    architect = architect_class(network, optimizer, arch_learning_rate=alphas.arch_learning_rate,
                                arch_weight_decay=alphas.arch_weight_decay, unrolled=alphas.unrolled)

    run = Run(space.search_folder(folder_name(options.save)), arguments)
    about = {"name": data.dataset, "root": data.data, "image_size": images.info.image_size, "subset": data.subset,
             "classes": list(images.info.classes), "fingerprint": images.fingerprint,
             "train_portion": augment.train_portion, "split_seed": augment.split_seed}
    board = Board(run.folder) if options.tensorboard else None
    metrics = resume(run, space, network, optimizer, architect, about)
    start = len(metrics)
    if start == weights.epochs:
        run.log(f"{run.folder}: this search is finished; --save NAME starts another")
        return run.folder
    order = ("second order: the alphas follow the hypergradient through the virtual step" if alphas.unrolled else
             "first order: the alphas follow the validation gradient at the present weights (--no-unrolled)")
    run.log(f"{space.name}: {', '.join(space.primitives)}")
    run.log(order)
    run.log(f"{data.dataset}: {len(halves[0])} images for weights, {len(halves[1])} for alphas, "
            f"{images.info.num_classes} classes; epochs {start} to {weights.epochs - 1} on {device}")

    train_batches, valid_batches = train.batches(start * train.steps), valid.batches(start * train.steps)
    for epoch in range(start, weights.epochs):
        lr = cosine(epoch, weights.epochs, weights.learning_rate, weights.learning_rate_min)
        optimizer.param_groups[0]["lr"] = lr
        network.train()
        title = f"{space.name} epoch {epoch} of {weights.epochs}"
        course = Course(title, epoch, train.steps, options.report_freq, device)
        for step in course:
            batch = next(train_batches)
            architect.step(batch, next(valid_batches), lr)
            course.add(*weight_step(network, optimizer, batch, weights.grad_clip), len(batch[1]))
            if epoch == start and step == 4:
                announce(run, course.seconds / 5 * train.steps * (weights.epochs - start))

        valid_loss, valid_accuracy = validate(network, images, halves[1], device, data.workers)
        metrics.append({"epoch": epoch, "learning_rate": lr, "train_loss": course.loss, "train_top1": course.top1,
                        "valid_loss": valid_loss, "valid_top1": valid_accuracy})
        run.log(f"epoch {epoch:3d}  rate {lr:.4f}  train {course.loss:.4f} {course.top1:6.2f} %  "
                f"valid {valid_loss:.4f} {valid_accuracy:6.2f} %  {course.rate:.0f} images/s")
        checkpoint = checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about, arguments=arguments)
        keep(run, checkpoint, optimizer, architect, metrics)
        if board is not None:
            board.epoch(metrics[-1], network.alphas(), space.primitives, network.genotype())
    finish(run, network.genotype())
    return run.folder


def keep(run: Run, checkpoint: dict, optimizer: torch.optim.Optimizer, architect: Bilevel, metrics: list[dict]) -> None:
    """Write an epoch to disk. `resume.pt` comes last: what it does not know of is done again."""
    epoch = checkpoint["epoch"]
    checkpoints.save(run.path("checkpoints", epoch, ".pt"), checkpoint)
    write_json(run.path("genotypes", epoch, ".json"), checkpoint["genotype"])
    write_json(run.folder / "genotype.json", checkpoint["genotype"])
    checkpoints.save(run.folder / "resume.pt", checkpoint | {
        "optimizer": optimizer.state_dict(), "alpha_optimizer": architect.alpha_optimizer.state_dict(),
        "metrics": metrics})
    run.write_metrics(metrics)


def resume(run: Run, space: Space, network: nn.Module, optimizer: torch.optim.Optimizer, architect: Bilevel,
           about: dict) -> list[dict]:
    """Put the state after the run's last epoch into the network and the optimizers. Returns the metrics so far."""
    checkpoint = checkpoints.load_resume(run.folder, about)
    if checkpoint is None:
        return []
    path = run.folder / "resume.pt"
    network.load_state_dict(checkpoints.restore(path, checkpoint, space.name, space.network).state_dict())
    optimizer.load_state_dict(checkpoint["optimizer"])
    architect.alpha_optimizer.load_state_dict(checkpoint["alpha_optimizer"])
    run.write_metrics(checkpoint["metrics"])
    return checkpoint["metrics"]


def finish(run: Run, genotype: genotypes.Genotype) -> None:
    """Print the cells that the search ends with, ready for `genotypes.py`, and draw them."""
    pictures = draw_genotype(genotype, run.folder / "cells")
    run.log(str(genotype))
    run.log(f"pictures of the cells: {', '.join(str(path) for path in pictures)}")


def main(folder: Path, network: type, architect: type[Bilevel], description: str, argv: list[str] | None = None
         ) -> None:
    """The command `python train_search.py` of the space in `folder`."""
    search(Space(folder.name, folder, network), architect, *parse(description, GROUPS, argv))
