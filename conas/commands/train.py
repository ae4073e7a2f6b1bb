"""Train found cells from scratch: the derived network, from the first batch to the best checkpoint."""
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.cli import find_device, parse
from conas.commands import cells, compiling
from conas.commands.scoring import validate
from conas.commands.training_data import describe_images, training_images
from conas.darts import genotype as genotypes
from conas.darts.architect import Batch
from conas.darts.batchnorm import use_exact_sums
from conas.darts.derived import DerivedNetwork, count_parameters
from conas.darts.genotype import Genotype
from conas.darts.operations import OPERATIONS
from conas.darts.primitives import Primitives
from conas.darts.published import named_genotypes
from conas.darts.space import Space
from conas.data import imagenet_augment
from conas.data.batches import Stream
from conas.data.images import full_name
from conas.data.splits import generator, stratified_split
from conas.engine import batchnorm
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.native.loader import kernels
from conas.engine.native.training import train_by_kernels
from conas.engine.precision import compiler_works, use_bf16
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.best import best_epoch, repair_best, require_best
from conas.runs.folder import begun_with, best_checkpoint, folder_name, suffixes_of
from conas.runs.loop import Loop
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
from conas.runs.progress import EpochMeter, clip_and_step, cosine, log_skipped, snapshot
from conas.runs.resume import Checkpointer, seed_generators
from conas.runs.scores import Validation, is_right

GROUPS = (DataOptions, NetworkOptions, RecipeOptions, HeldOutOptions, TrainRunOptions, KeepOptions, ProcessOptions)


class TrainRun(Loop):
    """The training of found cells in `folder`, by its flags: what its script train.py shows the loop of.

    `module` is the folder's genotypes.py, `default` the name of the cells to train if no flag says which (default: what
    the folder's search found); `argv` are the flags, those of the command line by default. Raises InputError for what
    could not be computed or written.
    """

    kind = "training"
    network: DerivedNetwork
    optimizer: torch.optim.SGD

    def __init__(self, folder: Path, module: ModuleType, description: str = "", argv: list[str] | None = None, *,
                 default: str | None = None):
        data, shape, recipe, held_out, options, keep, processes = parse(description, GROUPS, argv)
        if shape.arch is None and not shape.init_from:
            shape = replace(shape, arch=default)
        self.primitives = Primitives(getattr(module, "PRIMITIVES", tuple(OPERATIONS)))
        self.space = Space(folder.name, folder, own_operations=getattr(module, "OPERATIONS", {}))
        self.device = find_device(options.device, keep.deterministic)
        self.amp = use_bf16(options.amp, self.device)
        if options.compile == "on" and processes.sync_bn and distributed.size() > 1:
            raise InputError("--compile: cannot compile what --sync_bn sends between processes; leave one of them out")
        pretrained = cells.load_pretrained(shape.init_from, self.space.operations) if shape.init_from else None
        genotype, self.where = cells.choose_cells(self.space, self.primitives, named_genotypes(module), shape,
                                                  pretrained)
        data, shape, recipe = cells.resolve_defaults(data, shape, recipe, pretrained)
        run_folder, self.code = self.space.train_folder(folder_name(options.save)), code.digests(folder, "train")
        suffixes = suffixes_of(run_folder)
        data = check_data(run_folder, data, suffixes)
        recipe = recipe.decided(data, begun_with(run_folder))
        check_outputs(run_folder)
        groups = (data, shape, recipe, held_out, options, keep, processes)
        super().__init__(self.space.name, run_folder, groups, keep, suffixes=suffixes)
        self.recipe, self.lr_scale = recipe, processes.lr_scale
        self.compiled = compiling.asked(options.compile, run_folder)
        self.frequency = options.checkpoint_freq or max(1, round(recipe.epochs / 50))
        self._read_images(data, shape, held_out)
        self._build(shape, genotype, pretrained, processes)
        check_space(run_folder, self.network, -(-recipe.epochs // self.frequency) + 1)

    def _read_images(self, data: DataOptions, shape: NetworkOptions, held_out: HeldOutOptions) -> None:
        flags = self.flags
        self.crop = data.image_size if shape.recipe == "imagenet" else None
        self.images = training_images(data, flags.suffixes, imagenet_augment.canvas(self.crop) if self.crop else
                                      data.image_size)
        self.parts = split(self.images.labels, held_out)
        self.stream = Stream(self.images, self.parts[0], flags.batch_size, name="training", seed=flags.seed,
                             device=self.device, crop=self.crop, flip=flags.flip,
                             cutout_length=flags.cutout_length or 0, drop_last=True, workers=data.workers)
        self.dataset_info = describe_images(self.images, data, flags.suffixes, 1 - held_out.valid_portion,
                                            held_out.split_seed) | {"crop": self.crop}

    def _build(self, shape: NetworkOptions, genotype: Genotype, pretrained: cells.PretrainedWeights | None,
               processes: ProcessOptions) -> None:
        flags = self.flags
        seed_generators(flags.seed)
        network = cells.build(shape.recipe, shape.init_channels, shape.layers, shape.auxiliary, self.images.info,
                              flags.image_size, genotype, self.space.operations)
        self.initial = (cells.init_from_pretrained(network, pretrained) if pretrained else
                        "all weights initialised at random")
        self.initial += cells.leakage_warning(pretrained, self.dataset_info)
        network.drop_path_images = flags.batch_size
        able = self.device.type == "cpu" and not (self.amp or self.compiled or processes.sync_bn)
        library = kernels() if able else None
        # before the line below, which changes modules: it leaves these alone
        self.by_kernels = library is not None and train_by_kernels(network, library) > 0
        use_exact_sums(accelerate_convolutions(network))
        if processes.sync_bn:
            batchnorm.convert(network)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=flags.learning_rate, momentum=flags.momentum,
                                         weight_decay=flags.weight_decay, fused=True)

    # What `iterate` calls.

    def weight_step(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
        """One step of the weights at the rate `lr`. Returns loss and number of right answers, on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        return train_step(self.forward, self.optimizer, batch, self.recipe, self.flags.auxiliary_weight, self.amp,
                          self.network if self.skip else None)

    # What the loop does with it.

    def restore(self, state: dict) -> None:
        path = self.checkpointer.path
        if state["genotype"] != genotypes.to_json(self.network.genotype()):
            raise InputError(f"{path}: this run began with other cells than those it would train now; restore them, or "
                             "give --save another name")
        self.network.load_state_dict(checkpoints.restore_derived(path, state, self.space.operations).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])

    def resume(self) -> None:
        super().resume()
        repair_best(self.run, self.metrics)

    def is_finished(self) -> bool:
        return is_finished(self.metrics, self.flags.epochs, self.flags.patience)

    def finished_before(self) -> None:
        super().finished_before()
        require_best(self.run, self.metrics)

    def introduce(self, goes_on: str) -> None:
        flags = self.flags
        self.log(f"{self.name}: the cells of {self.where}, {flags.layers} of them, {flags.init_channels} channels, "
                 f"{count_parameters(self.network):,} parameters; {'resumed' if goes_on else self.initial}")
        self.log(f"{full_name(flags.dataset)}: {len(self.parts[0])} images to train on, {len(self.parts[1])} held out, "
                 f"{self.images.info.num_classes} classes; epochs {self.start} to {flags.epochs - 1} on {self.device}"
                 f"{' in bfloat16' if self.amp else ''}{goes_on}")
        for warning in self.stream.warnings():
            self.log(warning)
        for note in committee_notes(self.folder, self.arguments):
            self.log(note)
        left = (flags.epochs - self.start) * self.stream.steps - self.start_step
        compiled = compiling.settled(self, left) and compiler_works(self.device, self.log)
        self.forward, self.tells_time = torch.compile(self.network) if compiled else self.network, not compiled
        done = self.start * self.stream.steps + self.start_step
        self.batches = self.stack.enter_context(closing(self.stream.batches(done)))

    def new_epoch(self, epoch: int, state: dict | None) -> EpochMeter:
        stretches, flags = self.run.stretches, self.flags
        self.lr = learning_rate(self.recipe, epoch, stretches.place(epoch)) * self.lr_scale
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.network.drop_path_prob = stretches.risen(epoch, flags.drop_path_prob)
        return EpochMeter(f"{self.name} epoch {epoch} of {flags.epochs}", epoch, self.stream, flags.report_freq,
                      skip=self.skip, state=state and state["course"])

    def inputs(self, step: int) -> tuple[Batch, float]:
        batch = next(self.batches)
        # drop path draws from the global generator: with a seed for each step, a resumed run draws the same
        torch.manual_seed(generator(self.flags.seed, "drop path", self.meter.epoch, step).initial_seed())
        return batch, self.lr

    def count(self, result: tuple[Tensor, Tensor], inputs: tuple) -> None:
        self.meter.add(*result, self.stream.size(self.meter.step))

    def validate(self) -> Validation:
        shown = self.parts[1] if len(self.parts[1]) else self.parts[0][:256]  # some, to see if predictions are finite
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return validate(self.network, self.images, shown, self.device, self.flags.workers, self.crop)

    def figures(self, found: Validation) -> tuple[dict, str]:
        meter = self.meter
        row = {"learning_rate": self.lr, "drop_path_prob": self.network.drop_path_prob, "train_loss": meter.loss,
               "train_top1": meter.top1, "valid_loss": None, "valid_top1": None}
        text = f"rate {self.lr:.4f}  train {meter.loss:.4f} {meter.top1:6.2f} %"
        if len(self.parts[1]):
            row |= {"valid_loss": found.loss, "valid_top1": found.top1}
            text += f"  held out {found.loss:.4f} {found.top1:6.2f} %"
        return row, text

    def write_epoch(self) -> None:
        lasting = self.is_finished() or len(self.metrics) % self.frequency == 0
        write_epoch(self.checkpointer, self.state() | {"course": None}, lasting)

    def finish(self) -> None:
        log_skipped(self.run, self.metrics)
        best = require_best(self.run, self.metrics)
        if best["valid_top1"] is not None:
            chosen = f"{best['valid_top1']:.2f} % of the held-out images"
        else:
            chosen = "the last" if best is self.metrics[-1] else "the last whose predictions are finite"
        self.log(f"best network: epoch {best['epoch']}, {chosen}: {best_checkpoint(self.folder)}")


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
    distributed.scaled_by_count(total, len(labels)).backward()
    hits = is_right(logits, labels).sum()
    loss, hits = distributed.after_backward(forward, optimizer, distributed.scaled_by_count(loss, len(labels)), hits,
                                            len(labels))
    return clip_and_step(optimizer, loss, recipe.grad_clip, before), hits


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
    """Return True if all epochs are done, or `patience` of them since the best one, or since the start without one."""
    best = best_epoch(metrics)
    waited = len(metrics) - (0 if best is None else best + 1)
    return len(metrics) >= epochs or (patience is not None and waited >= patience)


def write_epoch(checkpointer: Checkpointer, state: dict, lasting: bool) -> None:
    """Write an epoch to disk. `resume.pt` comes last: what it does not know of is repeated."""
    run, checkpoint = checkpointer.run, checkpoints.without_progress(state)
    first = distributed.rank() == 0
    if first and lasting:
        checkpoints.save(run.path("checkpoints", state["epoch"], ".pt"), checkpoint)
    if first and best_epoch(state["metrics"]) == state["epoch"]:
        checkpoints.save(run.folder / "checkpoints" / "best.pt", checkpoint)
    checkpointer.save(state)
    run.write_metrics(state["metrics"])


def main(folder: Path, module: ModuleType, description: str, default: str | None = None, argv: list[str] | None = None
         ) -> None:
    """The command `python train.py` of `folder`, for scripts that do not show the loop."""
    with TrainRun(folder, module, description, argv, default=default) as run:

        def iterate(batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
            return run.weight_step(batch, lr)

        for epoch in run.epochs():
            for batch, lr in run.steps(epoch):
                run.do(iterate, batch, lr)
            run.end_epoch()
