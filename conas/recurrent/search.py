"""Search a recurrent cell: DARTS' alternation of alpha steps and weight steps over a text, to the last checkpoint."""
from dataclasses import asdict
from pathlib import Path

import torch

from conas import distributed
from conas.cli import find_device, parse
from conas.darts.space import Space
from conas.draw.cell import check_pictures
from conas.recurrent.draw import draw_recurrent
from conas.recurrent.files import restore
from conas.recurrent.genotype import Genotype
from conas.recurrent.model import RecurrentSupernet
from conas.recurrent.options import (
    HINT,
    SEARCH_GROUPS,
    DropoutOptions,
    LanguageRunOptions,
    RecurrentAlphaOptions,
    SgdOptions,
    TextOptions,
    UnitOptions,
    check_units,
)
from conas.recurrent.steps import (
    LanguageBilevel,
    Reader,
    Schedule,
    TextCourse,
    perplexity,
    validate,
    validation_text,
    weight_optimizer,
    weight_step,
)
from conas.recurrent.text import Text, load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.folder import Run, folder_name
from conas.runs.options import KeepOptions
from conas.runs.preflight import check_outputs, check_space
from conas.runs.progress import announce, resumed, tell_not_finite, tell_skipped
from conas.runs.resume import Keeper, seed_generators, write_epoch


def search(space: Space, architect_class: type[LanguageBilevel], text: TextOptions, units: UnitOptions,
           rates: DropoutOptions, sgd: SgdOptions, alphas: RecurrentAlphaOptions, options: LanguageRunOptions,
           keep: KeepOptions) -> Path:
    """Run or continue one search and return its folder."""
    check_units(units)
    folder, own_code = space.search_folder(folder_name(options.save)), code.digests(space.folder, "search")
    check_outputs(folder)
    check_pictures()
    device = find_device(options.device, keep.deterministic)
    groups = (text, units, rates, sgd, alphas, options, keep)
    arguments = {name: value for group in groups for name, value in asdict(group).items()}
    corpus = load_corpus(text.dataset, text.data)
    train, for_alphas = (Text(corpus, split, sgd.batch_size, device) for split in ("train", "valid"))
    valid = validation_text(corpus, device)
    schedule = Schedule(train, text.bptt, 0.0, rates, options.seed)

    seed_generators(options.seed)
    network = space.network(len(corpus.words), units.nhid).to(device)
    optimizer = weight_optimizer(network, sgd.lr, sgd.wdecay)
    architect = architect_class(network, optimizer, arch_learning_rate=alphas.arch_lr,
                                arch_weight_decay=alphas.arch_wdecay, unrolled=alphas.unrolled, grad_clip=sgd.clip)
    about, skip = corpus.about(), keep.on_nan == "skip"
    check_space(folder, network, sgd.epochs)
    if keep.check_only:
        print(f"{folder}: all checks passed; without --check_only, the search begins")
        return folder
    with Run(folder, arguments) as run, Keeper(run, keep.checkpoint_minutes) as keeper:
        metrics, begun = resume(keeper, network, optimizer, architect, about)
        start = len(metrics)
        if start == sgd.epochs:
            if not (folder / "cells" / "recurrent.png").exists():  # it was killed before its last picture
                finish(run, network.genotype(), metrics)
            run.log(f"{folder}: this search is finished; --save NAME starts another, --extend goes on to more "
                    "--epochs")
            return folder
        for note in corpus.notes:
            run.log(note)
        run.log(f"{space.name}: {', '.join(space.primitives)}; {'second' if alphas.unrolled else 'first'} order")
        run.log(f"{corpus.name}: {len(corpus.words)} words of vocabulary, {train.columns.numel()} of text for weights, "
                f"{for_alphas.columns.numel()} for alphas; epochs {start} to {sgd.epochs - 1} on {device}"
                f"{resumed(start, begun and begun['course'])}")

        for epoch in range(start, sgd.epochs):
            readers = {name: Reader(words, network, begun and begun["readers"][name])
                       for name, words in (("weights", train), ("alphas", for_alphas))}
            course = TextCourse(f"{space.name} epoch {epoch} of {sgd.epochs}", epoch, schedule, options.report_freq,
                                skip=skip, state=begun and begun["course"])
            begun = None
            network.train()

            def state(epoch=epoch, course=course, readers=readers) -> dict:
                return checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about,
                                            arguments=arguments, code=own_code) | {
                    "optimizer": optimizer.state_dict(), "alpha_optimizer": architect.alpha_optimizer.state_dict(),
                    "metrics": metrics, "course": course.state(),
                    "readers": {name: reader.state() for name, reader in readers.items()}}

            for step in course:
                length = course.lengths[step]
                batch, valid_batch = (reader.next(length, schedule.masks(name, network, epoch, step))
                                      for name, reader in readers.items())
                optimizer.param_groups[0]["lr"] = rate = sgd.lr * length / text.bptt
                if architect.step(batch, valid_batch, rate, skip):
                    course.add(weight_step(network, optimizer, batch, grad_clip=sgd.clip, slowness=sgd.beta,
                                           activity=sgd.alpha, skip=skip), batch)
                else:
                    course.skip_step()
                if epoch == start and step == 4:
                    announce(run, course.seconds / 5 * course.steps * (sgd.epochs - start), HINT)
                keeper.after_step(state)

            with keeper.calm(state):
                found = validate(network, valid, text.bptt)
            metrics.append({"epoch": epoch, "learning_rate": sgd.lr, "train_loss": course.loss,
                            "valid_loss": found.loss} | course.remarks() | found.remarks()
                           | run.stretches.remarks(epoch))
            run.log(f"epoch {epoch:3d}  train {course.loss:.4f} perplexity {perplexity(course.loss):.2f}  "
                    f"valid {found.loss:.4f} perplexity {perplexity(found.loss):.2f}{found.remark}  "
                    f"{course.rate:.0f} words/s")
            write_epoch(keeper, state() | {"course": None})
        finish(run, network.genotype(), metrics)
    return folder


def resume(keeper: Keeper, network: RecurrentSupernet, optimizer: torch.optim.Optimizer, architect: LanguageBilevel,
           about: dict) -> tuple[list[dict], dict | None]:
    """Put the run's last state into the network and the optimizers; returns what `Keeper.resume` does."""
    def put(state: dict) -> None:
        network.load_state_dict(restore(keeper.path, state, type(network)).state_dict())
        optimizer.load_state_dict(state["optimizer"])
        architect.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    return keeper.resume(about, put)


def finish(run: Run, genotype: Genotype, metrics: list[dict]) -> None:
    """Print the cell that the search ends with, ready for `genotypes.py`, and draw it."""
    tell_skipped(run, metrics)
    tell_not_finite(run, metrics, "the validation text", "--lr")
    pictures = draw_recurrent(genotype, run.folder / "cells")
    run.log(str(genotype))
    run.log(f"pictures of the cell: {', '.join(str(path) for path in pictures)}")


def main(folder: Path, network: type[RecurrentSupernet], architect: type[LanguageBilevel], description: str,
         argv: list[str] | None = None) -> None:
    """The command `python train_search.py` of `folder`."""
    distributed.refuse("rnn/train_search.py")
    search(Space(folder.name, folder, network), architect, *parse(description, SEARCH_GROUPS, argv))
