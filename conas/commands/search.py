"""Search a cell: DARTS' alternation of alpha steps and weight steps, from the first batch to the last checkpoint."""
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conas import distributed
from conas.cli import find_device, parse
from conas.commands.init_arch import initial_cell, lean
from conas.commands.remedies import apply_remedies, find_interval, first_batch
from conas.commands.scoring import validate
from conas.commands.training_data import describe_images, training_images
from conas.commands.weights import weight_optimizer, weight_step
from conas.darts import genotype as genotypes
from conas.darts.architect import Batch, Bilevel
from conas.darts.genotype import rule_in_words
from conas.darts.space import Space
from conas.darts.supernet import Supernet
from conas.data.batches import Stream, stratified_split
from conas.data.images import full_name
from conas.draw.cell import check_pictures, draw_genotype
from conas.draw.tensorboard import Board, summary_writer
from conas.engine.check import check_engine
from conas.engine.cuda_graph import Replayed, graph_fits, on_device
from conas.engine.cuda_streams import at_once
from conas.engine.door import describe, engine_or_reason
from conas.engine.precision import checkpoint_cells, set_tf32, use_bf16
from conas.errors import InputError
from conas.files import write_json
from conas.health.observer import Observer
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.folder import begun_with, folder_name, suffixes_of
from conas.runs.loop import Loop, Skipped
from conas.runs.options import (
    AlphaOptions,
    AugmentOptions,
    DataOptions,
    HealthOptions,
    KeepOptions,
    ProcessOptions,
    RunOptions,
    SpeedOptions,
    SupernetOptions,
    WeightOptions,
)
from conas.runs.preflight import check_data, check_outputs, check_space, committee_notes
from conas.runs.progress import EpochMeter, cosine, log_not_finite, log_skipped
from conas.runs.resume import seed_generators, write_epoch
from conas.runs.scores import Validation

GROUPS = (DataOptions, AugmentOptions, SupernetOptions, WeightOptions, AlphaOptions, HealthOptions, RunOptions,
          KeepOptions, ProcessOptions, SpeedOptions)


class SearchRun(Loop):
    """The search of the space in `folder`, by its flags: what its script train_search.py shows the loop of.

    `network` is the space's supernet, `architect` the update of its alphas; `argv` are the flags, those of the command
    line by default. Raises InputError for what could not be computed or written.
    """

    compared = "weights and alphas"
    network: Supernet
    optimizer: torch.optim.SGD

    def __init__(self, folder: Path, network: type[Supernet], architect: type[Bilevel], description: str = "",
                 argv: list[str] | None = None):
        data, augment, supernet, weights, alphas, health, options, keep, processes, speed = parse(
            description, GROUPS, argv)
        self.space = Space(folder.name, folder, network)
        self.device = find_device(options.device, keep.deterministic)
        self.amp = use_bf16(speed.amp, self.device)
        set_tf32(speed.tf32)
        if alphas.hvp == "exact" and not alphas.unrolled:
            raise InputError("--hvp exact: first order has no such product; leave it or --no-unrolled out")
        if alphas.hvp == "exact" and processes.sync_bn and distributed.size() > 1:
            raise InputError("--hvp exact: cannot differentiate twice through the sums of --sync_bn; leave one of them "
                             "out")
        run_folder, self.code = self.space.search_folder(folder_name(options.save)), code.digests(folder, "search")
        suffixes = suffixes_of(run_folder)
        data = check_data(run_folder, data, suffixes)
        before = begun_with(run_folder)
        augment, supernet = augment.decided(data, before), supernet.decided(data, before)
        alphas, self.init_cell, self.init_words = initial_cell(self.space, alphas, before)
        check_outputs(run_folder)
        check_pictures()
        if options.tensorboard:
            summary_writer()
        groups = (data, augment, supernet, weights, alphas, health, options, keep, processes, speed)
        super().__init__(self.space.name, run_folder, groups, keep, suffixes=suffixes,
                         init_cell=self.init_cell and str(self.init_cell))
        self.lr_scale = processes.lr_scale
        self._read_images(data, augment)
        self._build(architect, supernet, weights, alphas, health, processes, speed)
        self.health = Observer(
            self.architect, first_batch(partial(Stream, self.images, self.halves[1], seed=self.flags.seed,
                                                device=self.device, workers=data.workers), weights.batch_size),
            every=find_interval(health, alphas, weights, processes, self.train.steps), seed=self.flags.seed,
            epochs=weights.epochs, stop_on=health.stop_on, operations=self.space.operations,
            C=supernet.init_channels)
        check_space(run_folder, self.network, weights.epochs)

    def _read_images(self, data: DataOptions, augment: AugmentOptions) -> None:
        flags = self.flags
        self.images = training_images(data, flags.suffixes, data.image_size)
        self.halves = stratified_split(self.images.labels, [augment.train_portion, 1 - augment.train_portion],
                                       augment.split_seed)
        self.train, self.valid = (
            Stream(self.images, half, flags.batch_size, name=name, seed=flags.seed, device=self.device,
                   flip=augment.flip, cutout_length=augment.cutout_length or 0, drop_last=name == "alphas",
                   workers=data.workers)
            for name, half in zip(("weights", "alphas"), self.halves))
        self.dataset_info = describe_images(self.images, data, flags.suffixes, augment.train_portion,
                                            augment.split_seed)

    def _build(self, architect: type[Bilevel], supernet: SupernetOptions, weights: WeightOptions,
               alphas: AlphaOptions, health: HealthOptions, processes: ProcessOptions, speed: SpeedOptions) -> None:
        seed_generators(self.flags.seed)
        info = self.images.info
        self.network = self.space.network(supernet.init_channels, info.num_classes, supernet.layers, info.channels,
                                          supernet.stem)
        if self.init_cell is not None:
            lean(self.network, self.init_cell, alphas.init_share)
        self.network.to(self.device, memory_format=torch.channels_last)
        self.drop_path = apply_remedies(self.network, self.space, health, weights, speed)
        self.engine, self.no_engine = engine_or_reason(self.network, processes.sync_bn, speed.engine)
        self.optimizer = weight_optimizer(self.network, weights)
        self.architect = architect(self.network, self.optimizer, arch_learning_rate=alphas.arch_learning_rate,
                                   arch_weight_decay=alphas.arch_weight_decay, unrolled=alphas.unrolled,
                                   hvp=alphas.hvp)
        self.architect.at_once = at_once

    # What `iterate` calls.

    def alpha_step(self, train: Batch, valid: Batch, lr: Tensor | float) -> None:
        """One step of the alphas, by the space's architect.py; none in the first --alpha_warmup epochs."""
        if self.warming:
            return
        if not self.architect.step(train, valid, lr, self.skip):
            raise Skipped

    def weight_step(self, train: Batch, lr: Tensor | float) -> tuple[Tensor, Tensor]:
        """One step of the weights at the rate `lr`. Returns loss and number of right answers, on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        return weight_step(self.network, self.optimizer, train, self.flags.grad_clip, self.skip, self.amp)

    # What the loop does with it.

    def restore(self, state: dict) -> None:
        self.network.load_state_dict(
            checkpoints.restore(self.checkpointer.path, state, self.name, self.space.network).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.architect.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    def state(self) -> dict:
        return super().state() | {"alpha_optimizer": self.architect.alpha_optimizer.state_dict()}

    def finished_before(self) -> None:
        if not (self.folder / "cells" / "reduce.png").exists():  # it was killed before its last picture
            self.finish()
        super().finished_before()

    def introduce(self, goes_on: str) -> None:
        flags = self.flags
        exact = " (exact Hessian-vector product)" if flags.hvp == "exact" else ""
        self.log(f"{self.name}: {self.space.primitives}")
        self.log(f"second order: the alphas follow the hypergradient through the virtual step{exact}" if flags.unrolled
                 else "first order: the alphas follow the validation gradient at the present weights (--no-unrolled)")
        if self.init_cell is not None:
            self.log(f"alphas begin with a share of {flags.init_share:g} for each operation of {self.init_words}")
        if flags.stem != "cifar":
            self.log(f"stem {flags.stem}: the cells see an eighth of an image's side, not all of it (--stem cifar)")
        self.log(f"{full_name(flags.dataset)}: {len(self.halves[0])} images for weights, {len(self.halves[1])} for "
                 f"alphas, {self.images.info.num_classes} classes; epochs {self.start} to {flags.epochs - 1} on "
                 f"{self.device}{' in bfloat16, alphas in float32' if self.amp else ''}{goes_on}")
        for note in committee_notes(self.folder, self.arguments):
            self.log(note)
        if flags.drop_path_prob:
            self.log(f"drop path: in training an image loses an edge with probability 0 to {flags.drop_path_prob:g}, "
                     "rising by epoch")
        for line in describe(self.network, self.engine, self.no_engine, flags.sync_bn):
            self.log(line)
        for warning in self.train.warnings():
            self.log(warning)
        if flags.checkpoint_cells:
            checkpoint_cells(self.network, self.engine)
        graph = (self.device.type == "cuda" and self.engine is not None if flags.cuda_graph is None
                 else flags.cuda_graph)
        self.graph = graph and graph_fits(self.device, self.skip, self.log)
        self.graphs: dict[tuple[Callable, bool], Replayed] = {}
        for optimizer in (self.optimizer, self.architect.alpha_optimizer):
            on_device(optimizer, self.graph)
        self.board = Board(self.folder) if flags.tensorboard and distributed.rank() == 0 else None
        done = self.start * self.train.steps + self.start_step
        self.batches = [self.stack.enter_context(closing(stream.batches(done))) for stream in (self.train, self.valid)]

    def recorded(self, iterate: Callable) -> Callable:
        key = iterate, self.warming
        if self.graph and key not in self.graphs:
            self.graphs[key] = Replayed(iterate, self.optimizer, self.flags.batch_size, self.device, self.log)
        return self.graphs[key] if self.graph else iterate

    def new_epoch(self, epoch: int, state: dict | None) -> EpochMeter:
        flags = self.flags
        self.lr = self.lr_scale * cosine(*self.run.stretches.place(epoch), flags.learning_rate,
                                         flags.learning_rate_min)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.unchecked = self.engine is not None
        self.warming = epoch < flags.alpha_warmup
        if self.drop_path is not None:
            self.drop_path.prob = self._drop_path_prob(epoch)
        return EpochMeter(f"{self.name} epoch {epoch} of {flags.epochs}", epoch, self.train, flags.report_freq,
                      skip=self.skip, state=state and state["course"])

    def _drop_path_prob(self, epoch: int) -> float:
        return self.run.stretches.risen(epoch, self.flags.drop_path_prob)

    def inputs(self, step: int) -> tuple[Batch, Batch, float]:
        train, valid = (next(batches) for batches in self.batches)
        if self.unchecked:
            check_engine(self.engine, valid)
            self.unchecked = False
        return train, valid, self.lr

    def count(self, result: tuple[Tensor, Tensor], inputs: tuple) -> None:
        self.meter.add(*result, self.train.size(self.meter.step))

    def validate(self) -> Validation:
        if self.drop_path is not None:
            self.drop_path.prob = 0.0  # the curvature is that of all edges
        self.signs = self.health.look(self.meter.epoch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return validate(self.network, self.images, self.halves[1], self.device, self.flags.workers)

    def figures(self, found: Validation) -> tuple[dict, str]:
        meter = self.meter
        lost = {} if self.drop_path is None else {"drop_path_prob": self._drop_path_prob(meter.epoch)}
        return ({"learning_rate": self.lr, "train_loss": meter.loss, "train_top1": meter.top1,
                 "valid_loss": found.loss, "valid_top1": found.top1} | lost | self.signs,
                f"rate {self.lr:.4f}  train {meter.loss:.4f} {meter.top1:6.2f} %  "
                f"valid {found.loss:.4f} {found.top1:6.2f} %")

    def write_epoch(self) -> None:
        if news := self.health.news(self.metrics):
            self.log(news)
        write_epoch(self.checkpointer, self.state() | {"course": None}, rule_in_words(self.flags.max_skips))
        if self.board is not None:
            self.board.epoch(self.metrics[-1], self.network.alphas(), self.space.primitives, self.network.genotype())

    def is_finished(self) -> bool:
        return super().is_finished() or self.health.stop(self.metrics) is not None

    def finish(self) -> None:
        """Print the cells that the search ends with, ready for `genotypes.py`, and draw them."""
        if distributed.rank():
            return
        log_skipped(self.run, self.metrics)
        log_not_finite(self.run, self.metrics)
        genotype, epoch = self.network.genotype(), len(self.metrics) - 1
        if stop := self.health.stop(self.metrics):
            epoch, reason = stop
            self.log(f"stopped after epoch {len(self.metrics) - 1}: {reason}; these are the cells of epoch {epoch}")
            genotype = genotypes.load(self.run.path("genotypes", epoch, ".json"), self.space.operations)
            write_json(self.folder / "genotype.json", genotypes.to_json(genotype) | {
                genotypes.RULE: f"{rule_in_words(self.flags.max_skips)}; of epoch {epoch}, since {reason}"})
        pictures = draw_genotype(genotype, self.folder / "cells")
        self.log(str(genotype))
        self.log(f"pictures of the cells: {', '.join(str(path) for path in pictures)}")
        self.log(self.health.last_line(self.metrics, epoch, self.folder))


def main(folder: Path, network: type[Supernet], architect: type[Bilevel], description: str,
         argv: list[str] | None = None) -> None:
    """The command `python train_search.py` of the space in `folder`, for scripts that do not show the loop."""
    with SearchRun(folder, network, architect, description, argv) as run:

        def iterate(train: Batch, valid: Batch, lr: Tensor | float) -> tuple[Tensor, Tensor]:
            run.alpha_step(train, valid, lr)
            return run.weight_step(train, lr)

        for epoch in run.epochs():
            for train, valid, lr in run.steps(epoch):
                run.do(iterate, train, valid, lr)
            run.end_epoch()
