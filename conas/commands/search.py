"""Search a cell: DARTS' alternation of alpha steps and weight steps, from the first batch to the last checkpoint."""
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.cli import find_device, parse
from conas.commands.scoring import validate
from conas.darts import genotype as genotypes
from conas.darts.architect import Batch, Bilevel, constant_alphas
from conas.darts.space import Space
from conas.darts.supernet import Supernet
from conas.data.batches import Stream, stratified_split
from conas.data.images import full_name, load
from conas.draw.cell import check_pictures, draw_genotype
from conas.draw.tensorboard import Board, summary_writer
from conas.engine.check import check_engine
from conas.engine.cuda_graph import Replayed, graph_fits, on_device
from conas.engine.cuda_streams import at_once
from conas.engine.door import accelerate, why_not
from conas.engine.precision import checkpoint_cells, find_precision, set_tf32
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.folder import Run, begun_with, folder_name, suffixes_of
from conas.runs.options import (
    AlphaOptions,
    AugmentOptions,
    DataOptions,
    KeepOptions,
    ProcessOptions,
    RunOptions,
    SpeedOptions,
    SupernetOptions,
    WeightOptions,
)
from conas.runs.preflight import check_data, check_outputs, check_space, committee_notes
from conas.runs.progress import Course, announce, cosine, descend, resumed, snapshot, tell_not_finite, tell_skipped
from conas.runs.resume import Keeper, seed_generators, write_epoch
from conas.runs.scores import is_right

GROUPS = (DataOptions, AugmentOptions, SupernetOptions, WeightOptions, AlphaOptions, RunOptions, KeepOptions,
          ProcessOptions, SpeedOptions)


def weight_optimizer(network: Supernet, options: WeightOptions) -> torch.optim.SGD:
    """The SGD of the weights; fused, since they are a thousand small tensors."""
    return torch.optim.SGD(network.weights().values(), lr=options.learning_rate, momentum=options.momentum,
                           weight_decay=options.weight_decay, fused=True)


def weight_step(network: Supernet, optimizer: torch.optim.Optimizer, batch: Batch, grad_clip: float,
                skip: bool = False, amp: bool = False) -> tuple[Tensor, Tensor]:
    """One SGD step of the weights. Returns the loss and the number of right answers, on the device.

    Of several processes each has its part of the batch, and the results are those of the whole batch.

    With `amp`, its passes are in bfloat16; master weights and optimizer stay in float32. With `skip`, a loss or
    gradient that is not finite leaves weights and running statistics as they were.
    """
    images, labels = batch
    before = snapshot(network) if skip else None
    w = network.flat().detach().requires_grad_()
    with constant_alphas(network), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = network.with_weights(images, w)
        loss = distributed.weighed(cross_entropy(logits, labels), len(labels))
    loss.backward(inputs=[w])
    weights = network.packing()
    for p, part in zip(weights, w.grad.split([p.numel() for p in weights])):
        part = part.view(p.shape)  # the fused optimizer takes it in the order of memory
        p.grad = part if p.is_contiguous() else torch.empty_like(p).copy_(part)
    hits = is_right(logits, labels).sum()
    loss, hits = distributed.after_backward(network, optimizer, loss, hits, len(labels))
    return descend(optimizer, loss, grad_clip, before), hits


def search(space: Space, architect_class: type[Bilevel], data: DataOptions, augment: AugmentOptions,
           supernet: SupernetOptions, weights: WeightOptions, alphas: AlphaOptions, options: RunOptions,
           keep: KeepOptions, processes: ProcessOptions, speed: SpeedOptions) -> Path:
    """Run or continue one search and return its folder. Several processes call it alike; the first one writes."""
    device = find_device(options.device, keep.deterministic)
    amp = find_precision(speed.amp, device)
    set_tf32(speed.tf32)
    if alphas.hvp == "exact" and not alphas.unrolled:
        raise InputError("--hvp exact: first order has no such product; leave it or --no-unrolled out")
    if alphas.hvp == "exact" and processes.sync_bn and distributed.size() > 1:
        raise InputError("--hvp exact: cannot differentiate twice through the sums of --sync_bn; leave one of them out")
    folder, own_code = space.search_folder(folder_name(options.save)), code.digests(space.folder, "search")
    suffixes = suffixes_of(folder)
    data = check_data(folder, data, suffixes)
    before = begun_with(folder)
    augment, supernet = augment.decided(data, before), supernet.decided(data, before)
    check_outputs(folder)
    check_pictures()
    if options.tensorboard:
        summary_writer()
    groups = (data, augment, supernet, weights, alphas, options, keep, processes, speed)
    arguments = {name: value for group in groups for name, value in asdict(group).items()} | {"suffixes": suffixes}
    images = distributed.in_turn(
        lambda: load(data.dataset, data.data, "train", image_size=data.image_size, subset=data.subset,
                     skip_bad_images=data.skip_bad_images, suffixes=suffixes, resize=data.resize,
                     follow_links=data.follow_links))
    halves = stratified_split(images.labels, [augment.train_portion, 1 - augment.train_portion], augment.split_seed)
    train, valid = (
        Stream(images, half, weights.batch_size, name=name, seed=options.seed, device=device, flip=augment.flip,
               cutout_length=augment.cutout_length or 0, drop_last=name == "alphas", workers=data.workers)
        for name, half in zip(("weights", "alphas"), halves))

    seed_generators(options.seed)
    network = space.network(supernet.init_channels, images.info.num_classes, supernet.layers, images.info.channels,
                            supernet.stem)
    network.to(device, memory_format=torch.channels_last)
    reason = why_not(network) if speed.engine else "--no-engine"
    packed = accelerate(network, processes.sync_bn, wanted=speed.engine)
    optimizer = weight_optimizer(network, weights)
    architect = architect_class(network, optimizer, arch_learning_rate=alphas.arch_learning_rate,
                                arch_weight_decay=alphas.arch_weight_decay, unrolled=alphas.unrolled,
                                hvp=alphas.hvp)
    architect.at_once = at_once
    about = {"name": data.dataset, "root": data.data, "image_size": images.info.image_size, "subset": data.subset,
             "classes": list(images.info.classes), "fingerprint": images.fingerprint,
             "train_portion": augment.train_portion, "split_seed": augment.split_seed,
             "skip_bad_images": data.skip_bad_images, "resize": data.resize, "test_subset": data.test_subset,
             "suffixes": suffixes, "follow_links": data.follow_links}
    check_space(folder, network, weights.epochs)
    if keep.check_only:
        print(f"{folder}: all checks passed; without --check_only, the search begins")
        return folder

    with Run(folder, arguments) as run, Keeper(run, keep.checkpoint_minutes) as keeper:
        board = Board(folder) if options.tensorboard and distributed.rank() == 0 else None
        metrics, unfinished = resume(keeper, space, network, optimizer, architect, about)
        begun = unfinished and unfinished["course"]
        start = len(metrics)
        if start == weights.epochs:
            if not (folder / "cells" / "reduce.png").exists():  # it was killed before its last picture
                finish(run, network.genotype(), metrics)
            run.log(f"{folder}: this search is finished; --save NAME starts another, --extend goes on to more --epochs")
            return folder
        exact = " (exact Hessian-vector product)" if alphas.hvp == "exact" else ""
        order = (f"second order: the alphas follow the hypergradient through the virtual step{exact}" if alphas.unrolled
                 else "first order: the alphas follow the validation gradient at the present weights (--no-unrolled)")
        run.log(f"{space.name}: {', '.join(space.primitives)}")
        run.log(order)
        run.log(f"{full_name(data.dataset)}: {len(halves[0])} images for weights, {len(halves[1])} for alphas, "
                f"{images.info.num_classes} classes; epochs {start} to {weights.epochs - 1} on {device}"
                f"{' in bfloat16, alphas in float32' if amp else ''}{resumed(start, begun)}")
        for note in committee_notes(folder, arguments):
            run.log(note)

        if packed is None:
            run.log(f"the engine is off ({reason}): the whole network runs by its definition, conas/darts/supernet.py")
        for warning in train.warnings():
            run.log(warning)
        skip = keep.on_nan == "skip"

        def iterate(train_batch: Batch, valid_batch: Batch, lr: Tensor | float) -> tuple[Tensor, Tensor] | None:
            if architect.step(train_batch, valid_batch, lr, skip):
                return weight_step(network, optimizer, train_batch, weights.grad_clip, skip, amp)
            return None

        if speed.checkpoint_cells:
            checkpoint_cells(network, packed)
        graph = device.type == "cuda" and packed is not None if speed.cuda_graph is None else speed.cuda_graph
        graph = graph and graph_fits(device, skip, run.log)
        for own in (optimizer, architect.alpha_optimizer):
            on_device(own, graph)
        if graph:
            iterate = Replayed(iterate, optimizer, weights.batch_size, device, run.log)

        done = start * train.steps + (begun["step"] if begun else 0)
        train_batches, valid_batches = train.batches(done), valid.batches(done)
        for epoch in range(start, weights.epochs):
            lr = processes.lr_scale * cosine(*run.stretches.place(epoch), weights.learning_rate,
                                             weights.learning_rate_min)
            optimizer.param_groups[0]["lr"] = lr
            network.train()
            title = f"{space.name} epoch {epoch} of {weights.epochs}"
            course = Course(title, epoch, train, options.report_freq, skip=skip, state=begun)

            def state(epoch=epoch, course=course) -> dict:
                return checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about,
                                            arguments=arguments, code=own_code) | {
                    "optimizer": optimizer.state_dict(), "alpha_optimizer": architect.alpha_optimizer.state_dict(),
                    "metrics": metrics, "course": course.state()}

            unchecked = packed is not None
            for step in course:
                batch, valid_batch = next(train_batches), next(valid_batches)
                if unchecked:
                    check_engine(packed, valid_batch)
                    unchecked = False
                result = iterate(batch, valid_batch, lr)
                if result is None:
                    course.skip_step()
                else:
                    course.add(*result, train.size(step))
                if epoch == start and step == 4:
                    announce(run, course.seconds / 5 * train.steps * (weights.epochs - start))
                if (step + 1) % options.report_freq == 0:
                    distributed.check_network("weights and alphas", network)
                keeper.after_step(state)

            with keeper.calm(state), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                valid = validate(network, images, halves[1], device, data.workers)
            metrics.append({"epoch": epoch, "learning_rate": lr, "train_loss": course.loss, "train_top1": course.top1,
                            "valid_loss": valid.loss, "valid_top1": valid.top1} | course.remarks() | valid.remarks()
                           | run.stretches.remarks(epoch))
            run.log(f"epoch {epoch:3d}  rate {lr:.4f}  train {course.loss:.4f} {course.top1:6.2f} %  "
                    f"valid {valid.loss:.4f} {valid.top1:6.2f} %{valid.remark}  {course.rate:.0f} images/s")
            begun = None
            distributed.check_network("weights and alphas", network)
            write_epoch(keeper, state() | {"course": None})
            if board is not None:
                board.epoch(metrics[-1], network.alphas(), space.primitives, network.genotype())
        finish(run, network.genotype(), metrics)
    return folder


def resume(keeper: Keeper, space: Space, network: nn.Module, optimizer: torch.optim.Optimizer, architect: Bilevel,
           about: dict) -> tuple[list[dict], dict | None]:
    """Put the run's last state into the network and the optimizers; returns what `Keeper.resume` does."""
    def put(state: dict) -> None:
        network.load_state_dict(checkpoints.restore(keeper.path, state, space.name, space.network).state_dict())
        optimizer.load_state_dict(state["optimizer"])
        architect.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    return keeper.resume(about, put)


def finish(run: Run, genotype: genotypes.Genotype, metrics: list[dict]) -> None:
    """Print the cells that the search ends with, ready for `genotypes.py`, and draw them."""
    if distributed.rank():
        return
    tell_skipped(run, metrics)
    tell_not_finite(run, metrics)
    pictures = draw_genotype(genotype, run.folder / "cells")
    run.log(str(genotype))
    run.log(f"pictures of the cells: {', '.join(str(path) for path in pictures)}")


def main(folder: Path, network: type, architect: type[Bilevel], description: str, argv: list[str] | None = None
         ) -> None:
    """The command `python train_search.py` of the space in `folder`."""
    search(Space(folder.name, folder, network), architect, *parse(description, GROUPS, argv))
