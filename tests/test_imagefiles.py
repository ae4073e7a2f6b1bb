"""Image folders from anywhere: every kind of image becomes the right pixels, or is named; and what is not followed."""
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

import conas.data
from conas import cli
from conas.data import load
from conas.errors import InputError
from conas.evaluate import _load, load_images
from conas.imagefiles import ImageFiles
from ensemble.predict import find_images, read_image
from tests.hostile import damaged, refused
from tests.test_fuzz import fuzz

CUT = "cut.png", "zero.png", "text.jpg", "dangling.png", "loop.png", "pipe.png"


def decode(path: Path, side: int = 8) -> np.ndarray:
    """(side, side, 3)"""
    return ImageFiles(path.parent, [path.name]).decode(0, side).permute(1, 2, 0).numpy()


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


# one image

@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_any_size(tmp_path, size, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", size, (200, 100, 0)).save(path)
    assert np.abs(decode(path).astype(int) - (200, 100, 0)).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
            2: Image.Transpose.FLIP_LEFT_RIGHT}
    for orientation, transpose in back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(transpose).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(upright)), orientation
    upright.save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffnonsense")
    assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_picture_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - (200, 0, 0)).max() < 12


@pytest.mark.parametrize("mode, suffix, value, grey", [
    ("L", "png", 100, 100), ("LA", "png", (100, 0), 100), ("RGBA", "png", (100, 100, 100, 0), 100),
    ("CMYK", "jpg", (0, 0, 0, 155), 100), ("CMYK", "tiff", (0, 0, 0, 155), 100), ("1", "png", 1, 255),
    ("I;16", "png", 100 * 256 + 255, 100), ("I", "tiff", 100 * 256, 100), ("I", "tiff", 10**8, 255),
    ("I", "tiff", -5000, 0), ("F", "tiff", 100.0, 100), ("YCbCr", "jpg", (100, 128, 128), 100)])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, value, grey):
    Image.new(mode, (8, 8), value).save(tmp_path / f"a.{suffix}")
    assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - grey).max() <= 2


@pytest.mark.filterwarnings("ignore:Palette")
def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for transparency in (1, bytes([0, 128])):
        image.save(tmp_path / "a.png", transparency=transparency)
        assert (decode(tmp_path / "a.png") == (10, 20, 30)).all()


def png(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims a size."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (10**9, 1), (0, 5)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_claims_an_enormous_size_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=r"bomb\.png: cannot be read as an image .*; repair it or take it away"):
        decode(tmp_path / "bomb.png")


def test_fifty_megapixels(tmp_path):
    Image.new("L", (10_000, 5_000), 77).save(tmp_path / "a.png", compress_level=1)
    assert (decode(tmp_path / "a.png") == 77).all()


def test_a_file_that_would_start_ghostscript_is_no_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").close()  # Pillow looks at the contents, not at the name
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        decode(tmp_path / "a.png")
    assert isinstance(read_image(str(tmp_path / "a.png"), 8, 3), InputError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif", "ppm", "jp2", "avif"])
def test_a_damaged_image_is_read_or_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if path.suffix not in Image.registered_extensions():
        pytest.skip("this build of Pillow does not write it")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    assert decode(path).shape == (8, 8, 3)

    @fuzz
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        found = refused(path, lambda: decode(path), path.name)
        assert found is None or found.shape == (8, 8, 3)
    check()


# folders

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
        monkeypatch.setattr(conas.data, "MEMORY_LIMIT", 0)
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
        monkeypatch.setattr(conas.data, "MEMORY_LIMIT", 0)
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
    monkeypatch.setattr(conas.data, "MEMORY_LIMIT", 0)
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
    with pytest.raises(InputError, match=r"best\.pt: its images were in .*gone, and there is no such folder.*--data"):
        load_images(Path("best.pt"), says, None, "test")
    assert not (tmp_path / "gone").exists()
