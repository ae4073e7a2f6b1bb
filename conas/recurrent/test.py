"""Test a language model on a text: perplexity, size and speed. Published files are read without running them."""
import time
from pathlib import Path

from conas import distributed
from conas.cli import find_device, parse
from conas.darts.derived import count_parameters
from conas.darts.space import Space
from conas.errors import InputError
from conas.files import check_writable
from conas.places import find_data, remember_data
from conas.recurrent import genotype as genotypes
from conas.recurrent.files import find_cell, named_genotypes, restore
from conas.recurrent.genotype import Genotype
from conas.recurrent.model import LanguageModel, RecurrentNetwork, RecurrentSupernet
from conas.recurrent.options import LanguageTestOptions
from conas.recurrent.pickled import read_pickled
from conas.recurrent.steps import perplexity, validate
from conas.recurrent.text import Corpus, Text, load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs import wrappers
from conas.runs.code import tell_changes
from conas.runs.folder import best_checkpoint, folder_name
from conas.runs.options import ROOT
from conas.runs.scores import remark

PUBLISHED = {"perplexity": 55.68, "parameters": 23e6}  # of ptb_model.pt, arXiv:1806.09055, table 3
PUBLISHED_UNITS = 850


def measure(network: LanguageModel, corpus: Corpus, split: str, bptt: int, device) -> dict[str, float]:
    """loss in nats a word, perplexity, parameters, words_per_second: word after word, one text at a time.

    Also words, and of how many of them the prediction is not_finite; loss and perplexity are NaN if there are any.
    """
    network.to(device).eval()
    text = Text(corpus, split, 1, device)
    began = time.perf_counter()
    found = validate(network, text, bptt)
    seconds = time.perf_counter() - began
    return {"loss": found.loss, "perplexity": perplexity(found.loss), "parameters": count_parameters(network),
            "words_per_second": text.steps / seconds, "words": found.count, "not_finite": found.not_finite}


def open_published(path: Path, cell: Genotype | None) -> RecurrentNetwork:
    """The network in a pickled file of DARTS' code; `cell` is its cell if the file does not say."""
    model = read_pickled(path)
    if model.genotype is not None:
        cell = genotypes.from_object(dict(zip(Genotype._fields, model.genotype)), str(path))
    if cell is None:
        raise InputError(f"{path}: does not say what its cell is; restore DARTS in genotypes.py, which such files have")
    words, units = model.state["encoder.weight"].shape if "encoder.weight" in model.state else (1, 1)
    network = RecurrentNetwork(words, units, cell)
    try:
        network.load_state_dict(model.state)
    except RuntimeError as error:
        wrong = wrappers.differences(model.state, network.state_dict())
        raise InputError(f"{path}: its tensors do not fit a language model with the cell {cell} ({wrong}); copy a good "
                         "one here") from error
    return network


def differences(network: RecurrentNetwork, corpus: Corpus, cell: Genotype | None) -> list[str]:
    """In what a tested network and text are not those of PUBLISHED, a network of `cell`: a phrase each."""
    units, own = network.arguments["units"], network.genotype()
    return [phrase for phrase, same in (
        ("the cell DARTS_V2, not another", cell is not None and (
            list(cell.recurrent), list(cell.concat)) == (list(own.recurrent), list(own.concat))),
        (f"{PUBLISHED_UNITS} units, not {units}", units == PUBLISHED_UNITS),
        ("the Penn Treebank, with its very files", corpus.name == "penn" and corpus.published)) if not same]


def is_pickled(path: Path) -> bool:
    """Return True if a file needs `conas.recurrent.pickled`: torch's safe reader refuses it, or finds no dictionary."""
    if path.suffix == checkpoints.SAFETENSORS or not path.is_file():
        return False
    try:
        return not isinstance(checkpoints.read(path), dict)
    except InputError:
        return True


def main(folder: Path, supernet: type[RecurrentSupernet], module, description: str, argv: list[str] | None = None
         ) -> None:
    """The command `python test.py` of `folder`, whose `genotypes.py` is `module`."""
    distributed.require_single_process("rnn/test.py")
    (options,) = parse(description, [LanguageTestOptions], argv)
    if options.export and options.export.endswith(checkpoints.SAFETENSORS):
        checkpoints.check_export(options.export)
    elif options.export:
        check_writable(options.export)
    device = find_device(options.device)
    named = named_genotypes(module)
    cells = {name: find_cell(name, named) for name in ("DARTS", "DARTS_V2") if name in named}
    path = Path(options.model_path or best_checkpoint(
        Space(folder.name, folder).train_folder(folder_name(options.save))))
    if published := is_pickled(path):
        network = open_published(path, cells.get("DARTS"))
        corpus = load_corpus(options.dataset or "penn", options.data or ROOT / "data")
        checkpoint = None
        print(f"{path}: a pickled file; its tensors were read and nothing in it was run")
    else:
        checkpoint = checkpoints.load(path)
        network = restore(path, checkpoint, supernet)
        tell_changes(folder, path, checkpoint)
        known = checkpoint["dataset"]
        name = options.dataset or known["name"]
        elsewhere = name != known["name"] and options.data is None  # another text is not where the trained one is
        root = ROOT / "data" if elsewhere else find_data(path, known["root"], options.data)
        corpus = load_corpus(name, root)
        print(f"{path}: {checkpoint['space']}, stage {checkpoint['stage']}, epoch {checkpoint['epoch']}")
        if list(corpus.words) != known["classes"]:
            raise InputError(f"{path}: was trained on other words than those of {corpus.folder / 'train.txt'}; name "
                             "its text with --data")
        if options.data and corpus.fingerprint == known["fingerprint"]:
            remember_data(path.absolute().parent.parent, known["root"], corpus.folder)
        checkpoint["dataset"] = known | {"root": str(corpus.folder)}
    if len(corpus.words) != network.arguments["words"]:
        raise InputError(f"{path}: knows {network.arguments['words']} words, but {corpus.folder / 'train.txt'} has "
                         f"{len(corpus.words)}; name its text with --data")
    for note in corpus.notes:
        print(note)
    if options.export:  # while the network is on the CPU
        checkpoint = checkpoint or checkpoints.describe(
            network, space=folder.name, epoch=0, dataset=corpus.dataset_info(), arguments={"seed": 0},
            primitives=module.PRIMITIVES)
    elif published:
        print(f"to have it in a file that is safe to load: --model_path {path} --export {path.stem}-safe.pt")
    print(f"{corpus.name}: {len(corpus.ids['test'])} words of test text, vocabulary of {len(corpus.words)}")
    if published and (unlike := differences(network, corpus, cells.get("DARTS_V2"))):
        published = False
        print(f"the paper's figures are left out, since they are of {'; '.join(unlike)}")
    figures = measure(network, corpus, "test", options.bptt, device)
    print(as_text(figures, published))
    if options.export:
        if bad := remark(figures["not_finite"], figures["words"]):
            raise InputError(f"--export {options.export}: not written, since {bad}; name another network with "
                             "--model_path")
        write = checkpoints.export if options.export.endswith(checkpoints.SAFETENSORS) else checkpoints.save
        write(options.export, checkpoint)
        print(f"written: {options.export}, which nothing is executed of to read it")


def as_text(figures: dict[str, float], published: bool) -> str:
    """The figures of `measure`, one a line, each beside the published one, if there is one.

    First comes the number of predictions that are not finite, if some are not.
    """
    lines = {"perplexity": "perplexity {:.2f}", "parameters": "parameters {:.2f} M", "loss": "loss {:.4f} nats a word",
             "words_per_second": "{:.0f} words per second, one after another"}
    text = []
    if bad := remark(figures["not_finite"], figures["words"]):
        text.append(f"{bad}, so there is no loss")
    for name, line in lines.items():
        scale = 1e-6 if name == "parameters" else 1
        beside = f"published: {line.format(PUBLISHED[name] * scale)}" if published and name in PUBLISHED else ""
        text.append(f"{line.format(figures[name] * scale):40}{beside}".rstrip())
    return "\n".join(text)
