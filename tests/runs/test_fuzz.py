"""Fuzzed files: whatever their bytes, reading one ends in the right result or in one line that names the file."""
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conas.commands.scoring import scores_for
from conas.darts.space import Space
from conas.data.images import load
from conas.errors import InputError
from conas.files import check_zip
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import Run
from conas.runs.options import TestOptions
from conas.runs.resume import Checkpointer
from conas.runs.scores import Scores, load_scores, save_scores
from tests.ensemble.test_committee import make_scores
from tests.helpers.hostile import VALUES, changed, damaged, examples, fuzz, refused
from tests.runs.test_checkpoint import ABOUT, Tiny, tiny, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def equal(one, two) -> bool:
    """Whether two checkpoints are equal in all fields, bit for bit."""
    return ({**one, "state": 0} == {**two, "state": 0} and one["state"].keys() == two["state"].keys()
            and all(torch.equal(one["state"][name], two["state"][name]) for name in one["state"]))


# bits

@pytest.fixture(scope="module")
def whole(folder) -> tuple[dict, dict[str, bytes]]:
    """A checkpoint, and the bytes of its file by suffix."""
    path = written(folder / "good.pt")
    content = checkpoints.load(path)
    checkpoints.export(folder / "good.safetensors", content)
    return content, {suffix: (folder / f"good{suffix}").read_bytes() for suffix in (".pt", ".safetensors")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_flipped_bit_of_a_tensor_is_found(folder, whole, suffix):
    _, files = whole
    path, content, wanted = folder / f"flip{suffix}", bytearray(files[suffix]), whole[0]["state"]["classifier.weight"]
    start = bytes(content).index(wanted.numpy().tobytes())
    for at in range(start, start + wanted.nbytes, 37):
        content[at] ^= 4
        path.write_bytes(content)
        content[at] ^= 4
        with pytest.raises(InputError, match=rf"flip\{suffix}: damaged .*(CRC|checksum)"):
            checkpoints.load(path)
    path.write_bytes(content)
    assert equal(checkpoints.load(path), whole[0])


def test_a_record_that_one_bit_makes_a_folder_is_found(folder, whole):
    """PyTorch gives whatever is in memory for the tensor of such a record."""
    content = bytearray(whole[1][".pt"])
    content[content.rindex(b"PK\1\2", 0, content.index(b"archive/data/9", content.index(b"PK\1\2"))) + 38] ^= 16
    path = folder / "folder.pt"
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match=r"folder\.pt: damaged .*archive/data/9 is marked as a folder"):
        checkpoints.load(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_checkpoint_is_refused_or_unharmed(folder, whole, suffix):
    good, files = whole

    @fuzz
    @given(content=damaged(files[suffix]))
    def check(content):
        path = folder / f"bits{suffix}"
        path.write_bytes(content)
        found = refused(path, lambda: checkpoints.load(path), path.name)
        assert found is None or equal(found, good)
    check()


def test_a_damaged_resume_file_is_refused_or_unharmed(folder, whole):
    good = whole[0] | {"metrics": [{"epoch": 0}], "optimizer": {"state": {}}, "random": {}, "course": None}
    run = folder / "search-resume"
    run.mkdir()
    checkpoints.save(run / "resume.pt", good)
    content = (run / "resume.pt").read_bytes()

    @fuzz
    @given(content=damaged(content))
    def check(content):
        (run / "resume.pt").write_bytes(content)
        found = refused(run / "resume.pt", lambda: Checkpointer(Run(run, {}), 1).load(ABOUT), "resume.pt")
        assert found is None or equal(found, good)
    check()


def test_damaged_probabilities_are_refused_or_unharmed(folder):
    good, path = make_scores(logits=torch.randn(30, 10)), folder / "epoch_000.npz"
    save_scores(path, good)

    @fuzz
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        found = refused(path, lambda: load_scores(path), path.name)
        assert found is None or (torch.equal(found.logits, good.logits) and torch.equal(found.labels, good.labels)
                                 and {**vars(found), "logits": 0, "labels": 0} ==
                                 {**vars(good), "logits": 0, "labels": 0})
    check()


def test_probabilities_that_claim_fewer_images_are_found(folder):
    """NumPy compares no checksum of a record that it does not read to the end."""
    path = folder / "short.npz"
    save_scores(path, make_scores(logits=torch.randn(3000, 10)))
    path.write_bytes(path.read_bytes().replace(b"(3000,", b"(1000,"))
    with np.load(path) as file:
        assert len(file["logits"]) == len(file["labels"]) == 1000
    with pytest.raises(InputError, match=r"short\.npz"):
        load_scores(path)


def test_a_compressed_record_is_refused(folder):
    path = folder / "bomb.npz"
    np.savez_compressed(path, logits=np.zeros((1000, 1000)))
    with pytest.raises(ValueError, match="compressed"):
        check_zip(path)
    with pytest.raises(InputError, match=r"bomb\.npz.*compressed"):
        load_scores(path)


# well-formed files with other contents

ODD_TENSORS = st.sampled_from([
    torch.zeros(()), torch.zeros(3), torch.tensor([1j]), torch.full((2, 2), torch.nan), torch.zeros(0),
    torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 2).to_sparse(), torch.zeros(4, dtype=torch.int8),
    torch.nn.Parameter(torch.zeros(4)), torch.zeros(4, dtype=torch.bfloat16)])


@pytest.fixture(scope="module")
def space(folder) -> Space:
    return Space("cnn_space7", folder / "cnn_space7", Tiny)


@pytest.fixture(scope="module")
def described() -> dict:
    dataset_info = ABOUT | {"subset": 20, "train_portion": 0.5, "split_seed": 0, "crop": None,
                            "fingerprint": load("digits", "", "train", subset=20).fingerprint}
    return checkpoints.describe(tiny(), space="cnn_space7", epoch=0, dataset=dataset_info,
                                arguments={"seed": 2, "epochs": 1})


@examples(30, 200)
def test_any_contents_of_a_checkpoint_give_scores_or_an_input_error(space, described, examples):
    @settings(fuzz, max_examples=examples)
    @given(data=st.data())
    def check(data):
        fields = {name: value for name, value in described.items() if name != "state"}
        if data.draw(st.integers(0, 3)):
            content = data.draw(changed(fields))
            content = content | {"state": described["state"]} if isinstance(content, dict) else content
        else:
            content = described | {"state": data.draw(changed(dict(described["state"]), ODD_TENSORS | VALUES))}
        path = space.search_folder("EXP") / "checkpoints" / "epoch_000.pt"
        checkpoints.save(path, content)
        for split in ("test", "valid"):
            for stored in path.parent.parent.glob("probabilities/*"):
                stored.unlink()
            scores = refused(path, lambda split=split: scores_for(space, path, TestOptions(device="cpu"), split))
            assert scores is None or (isinstance(scores, Scores) and scores.logits.shape == (len(scores.labels), 10))
    check()


def test_the_unchanged_checkpoint_gives_scores(space, described):
    path = space.search_folder("good") / "checkpoints" / "epoch_000.pt"
    checkpoints.save(path, described)
    assert len(scores_for(space, path, TestOptions(device="cpu")).labels) == 20


@pytest.mark.parametrize("change", [{"C": 10**6}, {"layers": 10**9}, {"num_classes": 10**6}, {"C": 2.5}])
def test_a_checkpoint_cannot_claim_more_memory_than_it_has(space, described, change):
    """Built as it says, the first would take terabytes and the second would not end."""
    path = space.folder / "big.pt"
    checkpoints.save(path, described | {"network": described["network"] | change})
    with pytest.raises(InputError, match=r"big\.pt"):
        checkpoints.restore(path, checkpoints.load(path), "cnn_space7", Tiny)


def test_lists_that_spell_endless_values_are_refused(folder, described):
    bomb = [0]
    for _ in range(60):
        bomb = [bomb, bomb]
    checkpoints.save(folder / "bomb.pt", described | {"arguments": {"seed": 2, "x": bomb}})
    with pytest.raises(InputError, match=r"bomb\.pt: its field 'arguments'"):
        checkpoints.load(folder / "bomb.pt")


ARRAYS = st.sampled_from([np.zeros(0), np.zeros((3, 3), np.float32), np.array("x"), np.array(-1), np.array(2.5),
                          np.array(np.nan), np.array([1, 2]), np.full(30, 99), np.full(30, -1), np.zeros((30, 10)),
                          np.array(["a", "b"]), np.array(b"x"), np.zeros(30, dtype="M8[s]"), np.array(10**18)])


@fuzz
@given(data=st.data())
def test_any_arrays_of_probabilities_give_scores_or_an_input_error(folder, data):
    scores, path = make_scores(logits=torch.randn(30, 10)), folder / "arrays.npz"
    arrays = {name: np.asarray(value) for name, value in vars(scores).items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    np.savez(path, **(arrays | {name: data.draw(ARRAYS)}))
    found = refused(path, lambda: load_scores(path), path.name)
    assert found is None or (found.logits.shape == (len(found.labels), len(found.classes)) and 0 <= found.top(5) <= 100)


@pytest.mark.parametrize("shape", ["(1000000000000000,)", f"({10**30},)", "(-1,)", "((2,),)", "(" * 300])
def test_an_array_cannot_claim_more_memory_than_it_has(folder, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(501).encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)
    path = folder / "claim.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", content)
    with pytest.raises(InputError, match=r"claim\.npz: cannot be read as probabilities"):
        load_scores(path)
