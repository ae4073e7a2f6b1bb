"""Which files count as images: the same for training and prediction, and every other file is counted."""
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from conas import cli
from conas.commands.scoring import _load, load_images
from conas.data.images import load
from conas.data.listing import EARLIER, FORMATS, Listing, formats, readable_suffixes
from conas.errors import InputError
from conas.files import read_json, write_json
from conas.runs import checkpoint
from conas.runs.folder import suffixes_of
from ensemble.predict import find_images
from tests.helpers.searches import no_pictures, run_search  # noqa: F401

WRITABLE = [suffix for suffix in readable_suffixes() if suffix not in (".j2c", ".jpc", ".pfm")
            and Image.registered_extensions().get(suffix) in Image.SAVE]


def save(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (number, 10 * number, 99)).save(path)


def class_folders(root: Path, suffix: str = ".png", count: int = 5) -> None:
    for name in "ab":
        for i in range(count):
            save(root / name / f"{i}{suffix}", i)


def names_of(root: Path) -> set[str]:
    return {name for split in ("train", "test") for name in load("folder", root, split, image_size=8).names}


def test_the_list_has_every_suffix_that_pillow_knows_for_its_formats():
    Image.init()
    known = {suffix: name for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    assert known.items() <= {suffix: name for name, of_one in FORMATS.items() for suffix in of_one}.items()
    assert set(EARLIER) < set(readable_suffixes()) and len(formats()) >= 7


def test_training_and_prediction_read_every_format_in_any_case(tmp_path):
    class_folders(tmp_path)
    for i, suffix in enumerate(WRITABLE):
        save(tmp_path / "a" / f"x{i}{suffix}", i)
        (tmp_path / "a" / f"x{i}{suffix}").rename(tmp_path / "a" / f"x{i}{suffix.upper()}")
    assert {".jp2", ".jfif", ".png"} <= set(WRITABLE) and (".avif" in WRITABLE) == features.check("avif")
    expected = {f"a/x{i}{suffix.upper()}" for i, suffix in enumerate(WRITABLE)} | \
        {f"{name}/{i}.png" for name in "ab" for i in range(5)}
    assert names_of(tmp_path) == expected
    assert set(find_images([str(tmp_path)])) == {str(tmp_path / name) for name in expected}


def test_what_is_left_out_is_counted_by_suffix_in_one_line(tmp_path, capsys):
    class_folders(tmp_path)
    for name in ("a/1.txt", "a/2.TXT", "b/deep/er/3.txt", "a/table.csv", "b/README", "b/photo.HEIC", "a/v1.2 draft",
                 ".DS_Store", "a/.DS_Store", "a/._0.png", "b/.cache/x.png", "a/new\nline.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    save(tmp_path / "stray.jpg")
    load("folder", tmp_path, "train")
    load("folder", tmp_path, "test")
    line = (": left out {}7 files that are not images: .txt (3), .csv (2), no suffix (2); 1 image of formats that "
            "cannot be read here (convert it to .png or .jpg): .heic (1)\n")
    assert capsys.readouterr().err == \
        f"--data {tmp_path}" + line.format("1 image outside the class folders: .jpg (1); ")
    assert len(find_images([str(tmp_path)])) == 11
    assert capsys.readouterr().err == f"{tmp_path}" + line.format("")


def test_a_folder_of_images_alone_is_read_without_a_word(tmp_path, capsys):
    class_folders(tmp_path)
    (tmp_path / ".DS_Store").write_text("x")
    load("folder", tmp_path, "train")
    find_images([str(tmp_path)])
    assert capsys.readouterr().err == ""


def test_of_many_suffixes_the_most_frequent_are_named():
    listing = Listing()
    for i in range(30):
        for _ in range(i + 1):
            listing.takes(f"x.s{i:02}")
    text = str(listing)
    assert text.startswith("465 files that are not images: .s29 (30), .s28 (29)") and text.endswith("others (171)")


@pytest.mark.parametrize("names, words", [
    ("x.heic y.HEIF", "only 2 images of formats that cannot be read here .*.heic .1., .heif .1."),
    ("x.txt y", "only 2 files that are not images: .txt .1., no suffix .1."),
    ("x.csv", "only 1 file that is not an image: .csv .1."),
    (".DS_Store", r"which are files with the suffixes .*\.jpg")])
def test_a_folder_in_which_all_is_left_out_is_refused_with_what_was_found(tmp_path, names, words):
    class_folders(tmp_path)
    (tmp_path / "c").mkdir()
    for name in names.split():
        (tmp_path / "c" / name).write_text("x")
    with pytest.raises(InputError, match=f"c: no images in this class folder, {words}"):
        load("folder", tmp_path, "train")
    with pytest.raises(InputError, match=f"c: no images in this folder, {words}"):
        find_images([str(tmp_path / "c")])


def test_images_without_class_folders_are_named(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.jpg")
    with pytest.raises(InputError, match=r"holds 0 folders and 3 images outside the class folders: \.jpg \(3\), but"):
        load("folder", tmp_path, "train")


def test_a_format_that_this_pillow_cannot_decode_is_counted(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path)
    (tmp_path / "a" / "x.avif").write_bytes(b"x")
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "AVIF"})
    for cached in (formats, readable_suffixes):
        cached.cache_clear()
    try:
        assert len(names_of(tmp_path)) == 10
        assert "1 image of formats that cannot be read here (convert it to .png or .jpg): .avif (1)" in \
            capsys.readouterr().err
    finally:
        monkeypatch.undo()
        for cached in (formats, readable_suffixes):
            cached.cache_clear()


def test_a_pipe_is_counted_by_predictions(tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "a.png")]
    assert "left out 1 pipe, device or link to nothing: .png (1)" in capsys.readouterr().err


# runs that began before there was one list

def test_a_checkpoint_that_names_no_suffixes_reads_those_that_were_read_then(tmp_path, capsys):
    class_folders(tmp_path)
    before = load("folder", tmp_path, "train", image_size=8)
    says = {"name": "folder", "root": str(tmp_path), "image_size": 8, "subset": None, "classes": ["a", "b"],
            "fingerprint": before.fingerprint}
    class_folders(tmp_path, ".jp2")
    _load.cache_clear()
    assert load_images(Path("best.pt"), says, None, "train").names == before.names
    assert "left out 10 images of formats that this run was begun without: .jp2 (10)" in capsys.readouterr().err
    now = load("folder", tmp_path, "train", image_size=8)
    says |= {"fingerprint": now.fingerprint, "suffixes": list(readable_suffixes())}
    assert len(now) == 16 and torch.equal(load_images(Path("best.pt"), says, None, "train").labels, now.labels)


def test_an_old_search_goes_on_with_the_images_that_it_began_with(tmp_path):
    """As 662cc92 left it: neither arguments nor state say which suffixes were read."""
    class_folders(tmp_path / "data", count=10)
    flags = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--image_size", "8", "--subset", "16",
             "--batch_size", "4"]
    run_search(tmp_path, *flags)
    folder = tmp_path / "cnn_space2" / "search-EXP"
    assert suffixes_of(folder) == list(readable_suffixes())
    args = read_json(folder / "args.json")
    args["arguments"].pop("suffixes")
    write_json(folder / "args.json", args)
    state = checkpoint.load(folder / "resume.pt")
    state["dataset"].pop("suffixes")
    checkpoint.save(folder / "resume.pt", state)
    class_folders(tmp_path / "data", ".jp2", count=10)
    assert suffixes_of(folder) == list(EARLIER)
    run_search(tmp_path, *flags)  # of other images it would be refused
    args["arguments"]["suffixes"] = [5]
    write_json(folder / "args.json", args)
    assert cli.run(lambda: suffixes_of(folder)) == 2
