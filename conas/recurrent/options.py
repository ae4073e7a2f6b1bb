"""The flags of the scripts in `rnn/`, by group. Names and defaults are those of DARTS' code."""
from dataclasses import dataclass

from conas.cli import option
from conas.errors import InputError
from conas.recurrent.text import CORPORA
from conas.runs.options import ROOT, KeepOptions


@dataclass
class TextOptions:
    """text"""

    dataset: str = option("penn", "the corpus: a folder in --data; gospels comes with the project",
                          choices=list(CORPORA))
    data: str = option(str(ROOT / "data"), "where corpora are, or the folder of one: train.txt, valid.txt, test.txt",
                       path="")
    bptt: int = option(35, "words between two steps; now and then half as many", low=1, high=10_000)


@dataclass
class UnitOptions:
    """network: one cell"""

    nhid: int = option(300, "units of the cell, and of the words' vectors", low=1, high=10_000)
    emsize: int | None = option(None, "must equal --nhid, if given")
    nhidlast: int | None = option(None, "must equal --nhid, if given")


@dataclass
class TrainUnitOptions(UnitOptions):
    """network: one cell"""

    nhid: int = option(850, "units of the cell, and of the words' vectors", low=1, high=10_000)
    arch: str | None = option(None, "the cell: a name in genotypes.py, or a file NAME.json (default: what the last "
                              "search found; without one, DARTS)", path=".json")
    search: str = option("EXP", "name of the search whose cell is trained")


@dataclass
class DropoutOptions:
    """dropout: probabilities, with one mask for all time steps of a sequence"""

    dropout: float = option(0.75, "of the cell's output", low=0.0, high=0.99)
    dropouth: float = option(0.25, "of the states inside the cell", low=0.0, high=0.99)
    dropoutx: float = option(0.75, "of the words' vectors in the cell", low=0.0, high=0.99)
    dropouti: float = option(0.2, "of the words' vectors before the cell", low=0.0, high=0.99)
    dropoute: float = option(0.0, "of whole words in the embedding", low=0.0, high=0.99)


@dataclass
class TrainDropoutOptions(DropoutOptions):
    """dropout: probabilities, with one mask for all time steps of a sequence"""

    dropoute: float = option(0.1, "of whole words in the embedding", low=0.0, high=0.99)


@dataclass
class SgdOptions:
    """weights: SGD; a step's rate scales with its length"""

    epochs: int = option(50, "passes over the training text", low=1)
    batch_size: int = option(256, "columns of the training text, and of the text for the alphas", low=2)
    lr: float = option(20.0, "learning rate", low=0.0)
    wdecay: float = option(5e-7, "weight decay", low=0.0)
    clip: float = option(0.25, "largest 2-norm of the weights' gradient", low=0.0)
    alpha: float = option(0.0, "weight of the mean square of the dropped outputs", low=0.0)
    beta: float = option(1e-3, "weight of the outputs' mean squared change from word to word", low=0.0)


@dataclass
class TrainSgdOptions(SgdOptions):
    """weights: SGD, averaged (ASGD) once the validation loss stops to fall; a step's rate scales with its length"""

    epochs: int = option(8000, "passes over the training text", low=1)
    batch_size: int = option(64, "columns of the training text", low=1)
    wdecay: float = option(8e-7, "weight decay", low=0.0)
    nonmono: int = option(5, "averaging begins when an epoch is worse than the best up to so many epochs before", low=1)


@dataclass
class RecurrentAlphaOptions:
    """alphas: Adam on the hypergradient, of the validation text"""

    unrolled: bool = option(True, "second order, through the virtual step; --no-unrolled is first order")
    arch_lr: float = option(3e-3, "learning rate of the alphas", low=0.0)
    arch_wdecay: float = option(1e-3, "weight decay of the alphas", low=0.0)


@dataclass
class LanguageRunOptions:
    """run"""

    save: str = option("EXP", "name of the run: everything goes to the folder search-NAME or train-NAME beside the "
                       "script")
    seed: int = option(3, "of initial weights, dropout and lengths of pieces", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    report_freq: int = option(50, "steps between two looks at the loss", low=1)


@dataclass
class LanguageTestOptions:
    """which network, on which text"""

    model_path: str | None = option(None, "checkpoint, .safetensors file, or the published ptb_model.pt (default: the "
                                    "best network of the run)", path="")
    save: str = option("EXP", "name of the run: its folder is train-NAME")
    dataset: str | None = option(None, "the corpus (default: the one it was trained on; penn for a published file)",
                                 choices=list(CORPORA))
    data: str | None = option(None, "where corpora are, or the folder of one, if not where training had it", path="")
    bptt: int = option(35, "words at a time; changes memory and not the result", low=1, high=10_000)
    export: str | None = option(None, "write the network to this file, NAME.pt or NAME.safetensors, which nothing is "
                                "executed of to read it", path="")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


HINT = "--dataset gospels with few --epochs and a small --nhid is a matter of minutes"
SEARCH_GROUPS = (TextOptions, UnitOptions, DropoutOptions, SgdOptions, RecurrentAlphaOptions, LanguageRunOptions,
                 KeepOptions)
TRAIN_GROUPS = (TextOptions, TrainUnitOptions, TrainDropoutOptions, TrainSgdOptions, LanguageRunOptions, KeepOptions)


def check_units(options: UnitOptions) -> None:
    """Raise InputError for sizes that a tied decoder cannot have."""
    for flag in ("emsize", "nhidlast"):
        if getattr(options, flag) not in (None, options.nhid):
            raise InputError(f"--{flag} {getattr(options, flag)}: must equal --nhid {options.nhid}, since the decoder "
                             "shares the embedding's matrix; leave it out")
