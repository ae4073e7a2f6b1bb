"""Data folders from anywhere: bad images, odd names, links, and folders that change between training and test."""
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import conas.data.images
from conas import cli
from conas.commands.scoring import _load, load_images
from conas.data.images import load
from conas.errors import InputError
from ensemble.predict import find_images, read_image

CUT = "cut.png", "zero.png", "text.jpg", "dangling.png", "loop.png", "pipe.png"


def fill(root: Path, counts: dict[str, int]) -> None:
    """Class folders of images, each of one colour that tells class and number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (9, 9), (label, i, 7)).save(root / name / f"{i:02}.png")


def told(part) -> list[tuple[int, int]]:
    """Class and number of all images of a part, in order, from their pixels; the labels must agree."""
    pixels = torch.cat([x for x, _ in part.gather(torch.arange(len(part)).split(3), "cpu")])[:, :2, 0, 0]
    assert pixels[:, 0].tolist() == part.labels.tolist()
    return [tuple(p) for p in pixels.tolist()]


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """A folder of 12 + 12 good images and 6 bad ones, all in class b."""
    root = tmp_path / "data"
    fill(root, {"a": 12, "b": 12})
    whole = (root / "b" / "00.png").read_bytes()
    (root / "b" / "cut.png").write_bytes(whole[:len(whole) // 2])
    (root / "b" / "zero.png").touch()
    (root / "b" / "text.jpg").write_text("no image")
    (root / "b" / "dangling.png").symlink_to("nowhere.png")
    (root / "b" / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "b" / "pipe.png")
    return root


@pytest.mark.parametrize("lazy", [False, True])
def test_bad_images_are_skipped_counted_and_listed(spoilt, monkeypatch, capsys, lazy):
    if lazy:
        monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    found, lines = [], []
    for split in ("train", "test"):
        part = load("folder", spoilt, split, skip_bad_images=True)
        assert isinstance(part.images, torch.Tensor) != lazy and len(part.names) == len(part)
        assert [name.split("/")[0] for name in part.names] == ["ab"[y] for y in part.labels]
        assert told(part) == sorted(told(part))  # the order is that of the names
        found += told(part)
        head, *rest = capsys.readouterr().err.splitlines()
        assert head == (f"--skip_bad_images: {len(rest)} of {len(part) + len(rest)} images of the {split} split are "
                        "left out:")
        lines += rest
    assert sorted(found) == [(label, i) for label in (0, 1) for i in range(12)]
    assert sorted(line.split("/b/")[1].split(":")[0] for line in lines) == sorted(CUT)


def test_skipping_moves_no_other_image_to_the_other_split(spoilt):
    before = [told(load("folder", spoilt, split, skip_bad_images=True)) for split in ("train", "test")]
    os.unlink(spoilt / "b" / "zero.png")
    (spoilt / "b" / "zero.png").write_bytes((spoilt / "a" / "00.png").read_bytes())  # repaired, as it were
    part = load("folder", spoilt, "train", skip_bad_images=True), load("folder", spoilt, "test", skip_bad_images=True)
    names = [set(p.names) - {"b/zero.png"} for p in part]
    assert [len(n) for n in names] == [len(b) for b in before]


@pytest.mark.parametrize("lazy", [False, True])
def test_without_the_flag_the_first_bad_image_stops_the_run_by_name(spoilt, monkeypatch, capsys, lazy):
    if lazy:
        monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    assert cli.run(lambda: told(load("folder", spoilt, "train"))) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "/b/" in errors[0]
    assert any(f"/b/{name}: cannot be read as an image" in errors[0] for name in CUT)


def test_a_class_without_a_good_image_is_named(tmp_path):
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "test", {"a": 3, "b": 3})
    for i in range(3):
        (tmp_path / "test" / "b" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(InputError, match="leaves no image of b in the test split"):
        load("folder", tmp_path, "test", skip_bad_images=True)


def test_hidden_files_other_files_and_odd_names(tmp_path):
    names = ["é.png", "日本.png", "a b'\"\\.png", "x" * 251 + ".png", "new\nline.png", "UPPER.PNG"]
    fill(tmp_path, {"a": 5, "b": 5})
    source = (tmp_path / "a" / "00.png").read_bytes()
    for name in names:
        (tmp_path / "a" / name).write_bytes(source)
    odd = os.fsencode(tmp_path / "a") + b"/latin1-\xe9.png"
    with open(odd, "wb") as file:
        file.write(source)
    deep = tmp_path / "b" / "/".join(["long" * 50] * 4)
    deep.mkdir(parents=True)
    (deep / "deep.png").write_bytes(source)
    for other in ("a/.hidden.png", "a/notes.txt", "a/Thumbs.db", "b/.cache/x.png", ".git/c/x.png", "README.png"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(b"no image")
    (tmp_path / "b" / "folder.png").mkdir()
    parts = [load("folder", tmp_path, split) for split in ("train", "test")]
    found = [name for part in parts for name in part.names]
    assert sum(name.startswith("a/") for name in found) == 5 + len(names) + 1
    assert sum(name.startswith("b/") for name in found) == 5 + 1
    assert set(names) <= {Path(name).name for name in found}


def test_fingerprints_of_lazy_images_with_names_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    fill(tmp_path, {"a": 5, "b": 5})
    for name in (tmp_path / "a").iterdir():
        os.rename(name, os.fsencode(name).replace(b".png", b"\xe9.png"))
    part = load("folder", tmp_path, "train")
    assert len(part.fingerprint) == 64 and len(told(part)) == 8


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\x1b[2J", b"a\nb"])
def test_a_class_whose_name_is_no_text_is_refused(tmp_path, name, capsys):
    fill(tmp_path, {"a": 5, "b": 5})
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/" + name)
    assert cli.run(lambda: load("folder", tmp_path, "train")) == 2
    error = capsys.readouterr().err
    assert "the name of this class is no text; rename it" in error and error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize("link, target, words", [
    ("a/x.png", "../../secret/s.png", "a file out of the data folder"),
    ("a/x.png", "../../secret/none.png", "nothing"),
    ("a/x", "../../secret", "a folder"), ("a/x", ".", "a folder"), ("a/x", "../b", "a folder"),
    ("c", "../secret", "a folder"), ("c", "a", "a folder"), ("c", "nowhere", "nothing")])
@pytest.mark.parametrize("skip", [False, True])
def test_links_are_refused_by_name(tmp_path, link, target, words, skip):
    root, secret = tmp_path / "data", tmp_path / "secret"
    fill(root, {"a": 5, "b": 5})
    secret.mkdir()
    Image.new("RGB", (9, 9), "red").save(secret / "s.png")
    (root / link).symlink_to(target)
    with pytest.raises(InputError, match=rf"{root / link}: is a link to {words}, .*take it away"):
        load("folder", root, "train", skip_bad_images=skip)


def test_links_that_the_user_gives_or_that_stay_inside_are_followed(tmp_path):
    fill(tmp_path / "there" / "one", {"a": 3, "b": 3})
    (tmp_path / "there" / "one" / "a" / "again.png").symlink_to("00.png")
    (tmp_path / "there" / "one" / "a" / "notes.txt").symlink_to("/etc/hostname")
    data = tmp_path / "there" / "data"
    data.mkdir()
    for part in ("train", "test"):
        (data / part).symlink_to("../one")
    (tmp_path / "data").symlink_to(data)
    assert told(load("folder", tmp_path / "data", "train")) == [(0, 0), (0, 1), (0, 2), (0, 0), (1, 0), (1, 1), (1, 2)]


def test_predictions_skip_pipes_and_take_odd_names(tmp_path):
    fill(tmp_path, {"a": 1})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "a" / "00.png")]
    assert isinstance(read_image(str(tmp_path / "a" / "pipe.png"), 8, 3), InputError)


# a folder that changes between training and test

def about(root: Path, **more) -> dict:
    train = load("folder", root, "train", image_size=8, **more)
    return {"name": "folder", "root": str(root), "image_size": 8, "subset": None, "classes": list(train.info.classes),
            "fingerprint": train.fingerprint, **more}


@pytest.mark.parametrize("change", ["pixels", "another image", "one fewer"])
def test_training_images_that_have_changed_are_refused(tmp_path, change):
    path = Path("run/best.pt")
    fill(tmp_path / "split", {"a": 9, "b": 9})
    for part in ("train", "test"):
        fill(tmp_path / "parts" / part, {"a": 9, "b": 9})
    both = [tmp_path / "split", tmp_path / "parts"]
    described = [about(root) for root in both]
    for root, says in zip(both, described):
        assert [len(load_images(path, says, None, split)) for split in ("train", "test")]
        folder = root / "a" if root.name == "split" else root / "train" / "a"
        if change == "one fewer":
            (folder / "00.png").unlink()
        else:
            for i in range(9):  # one of them may be in the test split
                name = f"{i:02}.png" if change == "pixels" else f"{20 + i}.png"
                Image.new("RGB", (9, 9), (99, 99, 99)).save(folder / name)
    _load.cache_clear()
    for says in described:
        with pytest.raises(InputError, match=r"its training images have changed since run/best\.pt was trained"):
            load_images(path, says, None, "train")
    with pytest.raises(InputError, match="training images have changed"):  # what was trained on may now be in the test
        load_images(path, described[0], None, "test")
    assert len(load_images(path, described[1], None, "test")) == 18  # the test images are others, and still there


def test_a_run_that_skipped_bad_images_is_tested_alike(spoilt):
    says = about(spoilt, skip_bad_images=True)
    assert sum(len(load_images(Path("best.pt"), says, None, split)) for split in ("train", "test")) == 24


def test_a_data_folder_that_is_gone_is_named_and_not_made(tmp_path):
    says = {"name": "cifar10", "root": str(tmp_path / "gone"), "image_size": 32, "subset": None, "classes": ["a"]}
    with pytest.raises(InputError, match=r"best\.pt: its data were in .*gone, and there is no such folder.*--data"):
        load_images(Path("best.pt"), says, None, "test")
    assert not (tmp_path / "gone").exists()
