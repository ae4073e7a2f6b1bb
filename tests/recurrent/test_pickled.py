"""Published pickled models: files of that shape are read, and nothing in any file is run."""
import collections
import hashlib
import os
import pickle
import struct
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from conas.errors import InputError
from conas.recurrent.model import RecurrentNetwork, RecurrentSupernet
from conas.recurrent.pickled import MAGIC, read_pickled
from conas.recurrent.test import differences, is_pickled, main, open_published
from conas.recurrent.text import CORPORA, Corpus, load_corpus
from rnn import genotypes
from tests.conftest import ROOT

WORDS, UNITS = 11, 6
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source", "ignore:TypedStorage")


@pytest.fixture
def darts(monkeypatch):
    """Modules of the names that the published code had, while a file is written."""
    def module(name: str, **classes):
        made = types.ModuleType(name)
        for key, value in classes.items():
            value.__module__ = name
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    found = module("genotypes", Genotype=collections.namedtuple("Genotype", "recurrent concat"))
    dropout = module("locked_dropout", LockedDropout=type("LockedDropout", (nn.Module,), {}))
    model = module("model", DARTSCell=type("DARTSCell", (nn.Module,), {}), RNNModel=type("RNNModel", (nn.Module,), {}))

    def build(ours: RecurrentNetwork) -> nn.Module:
        cell = model.DARTSCell()
        cell.nhid, cell.dropouth = UNITS, 0.25
        cell.genotype = found.Genotype(*ours.genotype())
        cell._W0, cell._Ws = ours.rnns[0]._W0, ours.rnns[0]._Ws
        network = model.RNNModel()
        network.lockdrop, network.encoder = dropout.LockedDropout(), ours.encoder
        network.rnns, network.decoder = nn.ModuleList([cell]), ours.decoder
        network.ninp, network.ntoken = UNITS, WORDS
        return network

    yield build


@pytest.fixture
def network():
    torch.manual_seed(0)
    ours = RecurrentNetwork(WORDS, UNITS, genotypes.DARTS_V1)
    nn.init.normal_(ours.decoder.bias)
    return ours


def save_old(model: nn.Module, path) -> None:
    """As torch 0.3 wrote it: classes with their source, Parameters rebuilt by a call and a state, cuda storages."""
    class Old(pickle.Pickler):
        def __init__(self, file):
            super().__init__(file, protocol=2)
            self.storages, self.classes = {}, set()

        def persistent_id(self, thing):
            if isinstance(thing, type) and issubclass(thing, nn.Module) and thing not in self.classes:
                self.classes.add(thing)
                return "module", Named(thing.__module__, thing.__name__), "model.py", "class RNNModel: ..."
            if isinstance(thing, torch.UntypedStorage):
                self.storages[str(thing.data_ptr())] = thing
                return "storage", Named("torch.cuda", "FloatStorage"), str(thing.data_ptr()), "cuda:0", \
                    thing.nbytes() // 4, None
            return None

        def reducer_override(self, thing):
            if isinstance(thing, nn.Parameter):
                return Named("torch.nn.parameter", "Parameter"), (thing.detach(),), (True, False, {})
            if type(thing) is torch.Tensor:
                return Named("torch._utils", "_rebuild_tensor"), (
                    thing.untyped_storage(), thing.storage_offset(), tuple(thing.shape), thing.stride())
            return NotImplemented

    with open(path, "wb") as file:
        for head in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}):
            pickle.dump(head, file, protocol=2)
        pickler = Old(file)
        pickler.dump(model)
        pickle.dump(list(pickler.storages), file, protocol=2)
        for storage in pickler.storages.values():
            file.write(struct.pack("<q", storage.nbytes() // 4) + bytes(storage.tolist()))


def Named(module: str, name: str):
    """A function that pickles as the name module.name, whatever that is."""
    made = types.ModuleType(module) if module not in sys.modules else sys.modules[module]
    sys.modules.setdefault(module, made)
    value = getattr(made, name, None)
    if value is None:
        def value(*_):
            raise AssertionError
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        setattr(made, name, value)
    return value


@pytest.mark.parametrize("layout", ["torch 0.3", "before 1.6", "zip"])
def test_a_published_file_is_read(network, darts, tmp_path, layout, monkeypatch):
    path = tmp_path / "ptb_model.pt"
    if layout == "torch 0.3":
        save_old(darts(network), path)
    else:
        torch.save(darts(network), path, _use_new_zipfile_serialization=layout == "zip")
    for name in ("model", "genotypes", "locked_dropout"):
        monkeypatch.delitem(sys.modules, name)
    assert is_pickled(path)
    opened = open_published(path, genotypes.DARTS_V2)
    assert opened.genotype() == genotypes.DARTS_V1  # the file's own
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(opened.state_dict()[name], tensor)
    assert opened.decoder.weight is opened.encoder.weight
    with pytest.raises(InputError, match="do not fit"):
        broken = read_pickled(path)
        monkeypatch.setattr("conas.recurrent.test.read_pickled",
                            lambda _: broken._replace(genotype=(genotypes.ENAS.recurrent, [2])))
        open_published(path, genotypes.DARTS_V2)


@pytest.mark.parametrize("words, units, cell, name, published, missing", [
    (10_000, 850, "DARTS_V2", "penn", True, None),
    (10_000, 850, "DARTS_V1", "penn", True, "the cell DARTS_V2"),
    (10_000, 300, "DARTS_V2", "penn", True, "850 units, not 300"),
    (10_000, 850, "DARTS_V2", "penn", False, "the Penn Treebank"),
    (1596, 850, "DARTS_V2", "gospels", False, "the Penn Treebank"),
])
def test_published_figures_are_of_one_network_on_one_text(words, units, cell, name, published, missing):
    with torch.device("meta"):
        network = RecurrentNetwork(words, units, getattr(genotypes, cell))
    corpus = Corpus(name, ROOT, tuple(map(str, range(words))), {}, published=published)
    found = differences(network, corpus, genotypes.DARTS_V2)
    assert bool(found) == bool(missing) and (not missing or missing in "; ".join(found))


def test_a_text_is_the_published_one_only_if_its_files_are(tmp_path, monkeypatch):
    for split in "train", "valid", "test":
        (tmp_path / "penn").mkdir(exist_ok=True)
        (tmp_path / "penn" / f"{split}.txt").write_text("a b\n")
    assert not load_corpus("penn", tmp_path).published
    right = {split: (4, hashlib.md5(b"a b\n").hexdigest()) for split in ("train", "valid", "test")}
    monkeypatch.setitem(CORPORA, "penn", CORPORA["penn"]._replace(files=right))
    assert load_corpus("penn", tmp_path).published
    assert not load_corpus("gospels", ROOT / "data").published  # of which no figures were published


def test_figures_of_another_network_stand_alone(network, darts, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for split in "train", "valid", "test":
        (text / f"{split}.txt").write_text(" ".join(map(str, range(WORDS - 1))) + "\n")
    torch.save(darts(network), tmp_path / "ptb_model.pt")
    for name in ("model", "genotypes", "locked_dropout"):
        monkeypatch.delitem(sys.modules, name)
    main(ROOT / "rnn", RecurrentSupernet, genotypes, "",
         ["--model_path", str(tmp_path / "ptb_model.pt"), "--data", str(text), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "the paper's figures are left out, since they are of the cell DARTS_V2" in printed
    assert "perplexity" in printed and "published" not in printed and "55.68" not in printed


class Payload:
    """Runs a command when a common unpickler reads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("layout", ["before 1.6", "zip"])
@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__, torch.load], ids=lambda f: f.__name__)
def test_a_payload_does_not_run(network, darts, tmp_path, layout, function):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    argument = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    model = darts(network)
    model.extra = Payload(function, argument)
    torch.save(model, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(InputError, match=r"refused.*names"):
        read_pickled(path)
    assert not mark.exists()
    if function is os.system:  # the payload is a real one
        torch.load(path, weights_only=False)
        assert mark.exists()


def pickled(body: bytes, path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", body)
        archive.writestr("m/data/0", b"\0" * 8)


@pytest.mark.parametrize("body, why", [
    (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    (b"cmodel\nRNNModel.__init__\n.", "RNNModel.__init__"),
    (b"ctorch._utils\n_rebuild_tensor\n(N}S'_function'\nNs\x86b.", ""),      # state for a function
    (b"cbuiltins\nrange\n(J\xff\xff\xff\x7ftR.", "range"),
    (b"]q\x00h\x00a.", ""),                                                      # a list that holds itself
    (b"N.", ""), (b"", ""), (b"\x80\x05.", ""),
])
def test_hand_made_pickles_are_refused(tmp_path, body, why):
    path = tmp_path / "model.pt"
    pickled(body, path)
    with pytest.raises(InputError, match=f"model.pt: refused.*{why}"):
        read_pickled(path)


def test_compressed_archives_and_pipes_are_refused(network, darts, tmp_path):
    path, packed, pipe = tmp_path / "model.pt", tmp_path / "packed.pt", tmp_path / "pipe.pt"
    torch.save(darts(network), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(InputError, match="compressed"):
        read_pickled(packed)
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"refused.*pipe"):
        read_pickled(pipe)


def test_tensors_stay_within_their_storage(network, darts, tmp_path):
    model = darts(network)
    path = tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (0, 1, 40, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="refused"):
            read_pickled(path)
    model.encoder._parameters["weight"] = Payload(
        torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 0, (10**12,), (0,), False, collections.OrderedDict())
    torch.save(model, path)
    with pytest.raises(InputError, match="beyond its storage"):
        read_pickled(path)


def test_a_checkpoint_of_ours_is_not_pickled(tmp_path):
    torch.save({"format": "conas-checkpoint"}, tmp_path / "ours.pt")
    assert not is_pickled(tmp_path / "ours.pt")
    assert not is_pickled(tmp_path / "missing.pt")
