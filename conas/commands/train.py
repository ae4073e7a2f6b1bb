"""Train found cells from scratch: the derived network, from the first batch to the best checkpoint."""
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.cli import find_device, parse
from conas.commands import cells as arch
from conas.commands.scoring import validate
from conas.darts import genotype as genotypes
from conas.darts.batchnorm import use_exact_sums
from conas.darts.derived import DerivedNetwork, count_parameters
from conas.darts.operations import OPERATIONS
from conas.darts.published import named_genotypes
from conas.darts.space import Space
from conas.data import imagenet_augment as photographs
from conas.data.batches import Stream
from conas.data.images import full_name, load
from conas.data.splits import generator, stratified_split
from conas.engine import batchnorm as synced
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.precision import compiler_works, find_precision
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.best import best_epoch, mend_best, require_best
from conas.runs.folder import Run, begun_with, best_checkpoint, folder_name, suffixes_of
from conas.runs.options import (
    DataOptions,
    HeldOutOptions,
    KeepOptions,
    NetworkOptions,
    ProcessOptions,
    RecipeOptions,
    TrainRunOptions,
)
from conas.runs.preflight import check_data, check_outputs, check_space, committee_notes
from conas.runs.progress import Course, announce, cosine, descend, resumed, snapshot, tell_skipped
from conas.runs.resume import Keeper, seed_generators
from conas.runs.scores import is_right

GROUPS = (DataOptions, NetworkOptions, RecipeOptions, HeldOutOptions, TrainRunOptions, KeepOptions, ProcessOptions)


def train(space: Space, primitives: Sequence[str], named: Mapping[str, object], data: DataOptions,
          shape: NetworkOptions, recipe: RecipeOptions, held_out: HeldOutOptions, options: TrainRunOptions,
          keep: KeepOptions, processes: ProcessOptions) -> Path:
    """Run or continue one training and return its folder. `named` are the genotypes that --arch knows by name.

    Several processes call it alike; the first one writes.
    """
    device = find_device(options.device, keep.deterministic)
    amp = find_precision(options.amp, device)
    if options.compile and processes.sync_bn and distributed.size() > 1:
        raise InputError("--compile: cannot compile what --sync_bn sends between processes; leave one of them out")
    origin = arch.open_origin(shape.init_from, space.operations) if shape.init_from else None
    genotype, where = arch.choose_cells(space, primitives, named, shape, origin)
    data, shape, recipe = arch.fill_in(data, shape, recipe, origin)
    folder, own_code = space.train_folder(folder_name(options.save)), code.digests(space.folder, "train")
    suffixes = suffixes_of(folder)
    data = check_data(folder, data, suffixes)
    recipe = recipe.decided(data, begun_with(folder))
    check_outputs(folder)
    frequency = options.checkpoint_freq or max(1, round(recipe.epochs / 50))
    groups = (data, shape, recipe, held_out, options, keep, processes)
    arguments = {name: value for group in groups for name, value in asdict(group).items()} | {"suffixes": suffixes}

    crop = data.image_size if shape.recipe == "imagenet" else None
    loaded_size = photographs.canvas(crop) if crop else data.image_size
    images = distributed.in_turn(
        lambda: load(data.dataset, data.data, "train", image_size=loaded_size, subset=data.subset,
                     skip_bad_images=data.skip_bad_images, suffixes=suffixes, resize=data.resize,
                     follow_links=data.follow_links))
    parts = split(images.labels, held_out)
    stream = Stream(images, parts[0], recipe.batch_size, name="training", seed=options.seed, device=device, crop=crop,
                    flip=recipe.flip, cutout_length=recipe.cutout_length or 0, drop_last=True, workers=data.workers)

    seed_generators(options.seed)
    network = arch.build(shape.recipe, shape.init_channels, shape.layers, shape.auxiliary, images.info,
                         data.image_size, genotype, space.operations)
    origin_of_weights = arch.begin_from(network, origin) if origin else "all weights initialised at random"
    network.drop_path_images = recipe.batch_size
    use_exact_sums(accelerate_convolutions(network))
    if processes.sync_bn:
        synced.convert(network)
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
                                weight_decay=recipe.weight_decay, fused=True)

    about = {"name": data.dataset, "root": data.data, "image_size": images.info.image_size, "crop": crop,
             "subset": data.subset, "classes": list(images.info.classes), "fingerprint": images.fingerprint,
             "train_portion": 1 - held_out.valid_portion, "split_seed": held_out.split_seed,
             "skip_bad_images": data.skip_bad_images, "resize": data.resize, "test_subset": data.test_subset,
             "suffixes": suffixes, "follow_links": data.follow_links}
    origin_of_weights += arch.seen_before(origin, about)
    check_space(folder, network, -(-recipe.epochs // frequency) + 1)
    if keep.check_only:
        print(f"{folder}: all checks passed; without --check_only, the training begins")
        return folder
    with Run(folder, arguments) as run, Keeper(run, keep.checkpoint_minutes) as keeper:
        metrics, unfinished = resume(keeper, space, network, optimizer, about)
        begun = unfinished and unfinished["course"]
        start = len(metrics)
        mend_best(run, metrics)
        if is_finished(metrics, recipe.epochs, held_out.patience):
            run.log(f"{run.folder}: this training is finished; --save NAME starts another, --extend goes on to more "
                    "--epochs")
            require_best(run, metrics)
            return run.folder
        run.log(f"{space.name}: the cells of {where}, {shape.layers} of them, {shape.init_channels} channels, "
                f"{count_parameters(network):,} parameters; {'resumed' if start or begun else origin_of_weights}")
        run.log(f"{full_name(data.dataset)}: {len(parts[0])} images to train on, {len(parts[1])} held out, "
                f"{images.info.num_classes} classes; epochs {start} to {recipe.epochs - 1} on {device}"
                f"{' in bfloat16' if amp else ''}{resumed(start, begun)}")
        for warning in stream.warnings():
            run.log(warning)
        for note in committee_notes(folder, arguments):
            run.log(note)

        forward = torch.compile(network) if options.compile and compiler_works(device, run.log) else network
        batches = stream.batches(start * stream.steps + (begun["step"] if begun else 0))
        skip = network if keep.on_nan == "skip" else None
        for epoch in range(start, recipe.epochs):
            lr = learning_rate(recipe, epoch, run.stretches.place(epoch)) * processes.lr_scale
            optimizer.param_groups[0]["lr"] = lr
            network.drop_path_prob = run.stretches.risen(epoch, recipe.drop_path_prob)
            network.train()
            title = f"{space.name} epoch {epoch} of {recipe.epochs}"
            course = Course(title, epoch, stream, options.report_freq, skip=skip is not None, state=begun)

            def state(epoch=epoch, course=course) -> dict:
                return checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about, arguments=arguments,
                                            primitives=primitives, code=own_code) | {
                    "optimizer": optimizer.state_dict(), "metrics": metrics, "course": course.state()}

            for step in course:
                batch = next(batches)
                # drop path draws from the global generator: with a seed for each step, a resumed run draws the same
                torch.manual_seed(generator(options.seed, "drop path", epoch, step).initial_seed())
                course.add(*train_step(forward, optimizer, batch, recipe, shape.auxiliary_weight, amp, skip),
                           stream.size(step))
                if epoch == start and step == 4 and not options.compile:  # compiling happens in the first step
                    announce(run, course.seconds / 5 * stream.steps * (recipe.epochs - start))
                if (step + 1) % options.report_freq == 0:
                    distributed.check_network("weights", network)
                keeper.after_step(state)

            row = {"epoch": epoch, "learning_rate": lr, "drop_path_prob": network.drop_path_prob,
                   "train_loss": course.loss, "train_top1": course.top1, "valid_loss": None, "valid_top1": None}
            text = f"epoch {epoch:3d}  rate {lr:.4f}  train {course.loss:.4f} {course.top1:6.2f} %"
            looked_at = parts[1] if len(parts[1]) else parts[0][:256]  # some to see whether predictions are finite
            with keeper.calm(state), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                found = validate(network, images, looked_at, device, data.workers, crop)
            if len(parts[1]):
                row |= {"valid_loss": found.loss, "valid_top1": found.top1}
                text += f"  held out {found.loss:.4f} {found.top1:6.2f} %"
            metrics.append(row | course.remarks() | found.remarks() | run.stretches.remarks(epoch))
            run.log(f"{text}{found.remark}  {course.rate:.0f} images/s")
            begun = None
            last = is_finished(metrics, recipe.epochs, held_out.patience)
            distributed.check_network("weights", network)
            write_epoch(keeper, state() | {"course": None}, last or (epoch + 1) % frequency == 0)
            if last:
                break
        tell_skipped(run, metrics)
        best = require_best(run, metrics)
        if best["valid_top1"] is not None:
            chosen = f"{best['valid_top1']:.2f} % of the held-out images"
        else:
            chosen = "the last" if best is metrics[-1] else "the last whose predictions are finite"
        run.log(f"best network: epoch {best['epoch']}, {chosen}: {best_checkpoint(run.folder)}")
        return run.folder


def train_step(forward: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor],
               recipe: RecipeOptions, auxiliary_weight: float, amp: bool, skip: nn.Module | None = None
               ) -> tuple[Tensor, Tensor]:
    """One step of SGD. Returns the classifier's loss and its number of right answers, on the device.

    Of several processes each has its part of the batch, and the results are those of the whole batch.
    A loss or gradient that is not finite leaves the network `skip` as it was, if that is given.
    """
    images, labels = batch
    before = snapshot(skip) if skip is not None else None
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        outputs = forward(images)
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = total = cross_entropy(logits, labels, label_smoothing=recipe.label_smooth)
        if auxiliary is not None:
            total = loss + auxiliary_weight * cross_entropy(auxiliary, labels, label_smoothing=recipe.label_smooth)
    optimizer.zero_grad(set_to_none=True)
    distributed.weighed(total, len(labels)).backward()
    hits = is_right(logits, labels).sum()
    loss, hits = distributed.after_backward(forward, optimizer, distributed.weighed(loss, len(labels)), hits,
                                            len(labels))
    return descend(optimizer, loss, recipe.grad_clip, before), hits


def learning_rate(recipe: RecipeOptions, epoch: int, place: tuple[int, int] | None = None) -> float:
    """Of an epoch: by steps with --gamma, else along a cosine to 0, at its `place` in the run's stretches."""
    if recipe.gamma is None:
        return cosine(*(place or (epoch, recipe.epochs)), recipe.learning_rate, 0.0)
    return recipe.learning_rate * recipe.gamma ** (epoch // recipe.decay_period)


def split(labels: Tensor, held_out: HeldOutOptions) -> list[Tensor]:
    """Indices of the images to train on and of those held out. Raises InputError if none are, against the flags."""
    train_portion = 1 - held_out.valid_portion
    parts = stratified_split(labels, [train_portion, 1 - train_portion], held_out.split_seed)  # as for a checkpoint
    if held_out.valid_portion and not len(parts[1]):
        raise InputError(f"--valid_portion {held_out.valid_portion}: is not one of {len(labels)} images; give more, or "
                         "0")
    if held_out.patience and not len(parts[1]):
        raise InputError("--patience: needs held-out images to tell the better network; give a --valid_portion above 0")
    return parts


def is_finished(metrics: list[dict], epochs: int, patience: int | None) -> bool:
    """Whether all epochs are done, or `patience` of them since the best; as long as there is none, since the start."""
    best = best_epoch(metrics)
    waited = len(metrics) - (0 if best is None else best + 1)
    return len(metrics) >= epochs or (patience is not None and waited >= patience)


def write_epoch(keeper: Keeper, state: dict, lasting: bool) -> None:
    """Write an epoch to disk. `resume.pt` comes after what it stands for: what it does not know of is done again."""
    run, checkpoint = keeper.run, checkpoints.without_progress(state)
    first = distributed.rank() == 0
    if first and lasting:
        checkpoints.save(run.path("checkpoints", state["epoch"], ".pt"), checkpoint)
    if first and best_epoch(state["metrics"]) == state["epoch"]:
        checkpoints.save(run.folder / "checkpoints" / "best.pt", checkpoint)
    keeper.save(state)
    run.write_metrics(state["metrics"])


def resume(keeper: Keeper, space: Space, network: DerivedNetwork, optimizer: torch.optim.Optimizer, about: dict
           ) -> tuple[list[dict], dict | None]:
    """Put the run's last state into network and optimizer; returns what `Keeper.resume` does."""
    def put(state: dict) -> None:
        if state["genotype"] != genotypes.to_json(network.genotype()):
            raise InputError(f"{keeper.path}: this run began with other cells than those it would train now; restore "
                             "them, or give --save another name")
        network.load_state_dict(checkpoints.restore_derived(keeper.path, state, space.operations).state_dict())
        optimizer.load_state_dict(state["optimizer"])

    return keeper.resume(about, put)


def main(folder: Path, module, description: str, default: str | None = None, argv: list[str] | None = None) -> None:
    """The command `python train.py` of `folder`, whose `genotypes.py` is `module`; `default` replaces its search."""
    data, shape, *rest = parse(description, GROUPS, argv)
    if shape.arch is None and not shape.init_from:
        shape = replace(shape, arch=default)
    primitives = tuple(getattr(module, "PRIMITIVES", OPERATIONS))
    space = Space(folder.name, folder, own_operations=getattr(module, "OPERATIONS", {}))
    train(space, primitives, named_genotypes(module), data, shape, *rest)
