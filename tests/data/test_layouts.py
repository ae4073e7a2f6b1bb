"""Folders as people have them are read, or what is not read is said in one line."""
from pathlib import Path

import pytest
from PIL import Image

from conas.commands.scoring import load_images
from conas.data.images import load, survey
from conas.data.sources import is_split_here
from conas.errors import InputError
from ensemble.predict import find_images

CLASSES = "n01", "n02", "n03"


def save(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (40 * colour, 0, 0)).save(path)


def class_folders(root: Path, count: int = 5, below: str = "") -> None:
    for label, name in enumerate(CLASSES):
        for i in range(count):
            save(root / name / below / f"{name}_{i}.png", label)


def flat(folder: Path, count: int = 6) -> list[tuple[str, str]]:
    """Images in an order that is not that of their classes; returns names and classes."""
    rows = []
    for i in range(count):
        save(folder / f"val_{i}.png", (2 * i + 1) % 3)
        rows.append((f"val_{i}.png", CLASSES[(2 * i + 1) % 3]))
    return rows


def write(path: Path, rows: list, between: str = "\t", more: str = "") -> None:
    path.write_text("".join(f"{between.join(row)}{more}\n" for row in rows))


def check(root: Path, dataset: str = "folder", count: int = 6) -> None:
    """That the test images have the labels that their colours tell."""
    part = load(dataset, root, "test", image_size=8)
    assert part.info.classes == CLASSES and len(part) == count and len(load(dataset, root, "train", image_size=8)) == 15
    assert [x // 40 for x in part.images[:, 0, 4, 4].tolist()] == part.labels.tolist()
    assert not is_split_here("folder", root)


def test_tiny_imagenet(tmp_path, capsys):
    class_folders(tmp_path / "train", below="images")
    for name in CLASSES:
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("x.JPEG\t0\t0\t63\t63\n")
    write(tmp_path / "val" / "val_annotations.txt", flat(tmp_path / "val" / "images"), more="\t0\t32\t44\t62")
    for i in range(7):
        save(tmp_path / "test" / "images" / f"test_{i}.png")
    check(tmp_path)
    assert capsys.readouterr().err == (
        f"--data {tmp_path}: test/ is not read, since it has no labels for its 7 images; left out 3 files that are not "
        "images: .txt (3)\n")
    assert survey("folder", tmp_path, "test") == (CLASSES, 6)


@pytest.mark.parametrize("name, between, more, header, stems", [
    ("val/labels.txt", " ", "", None, False), ("val.csv", ",", "", ("file", "label"), False),
    ("val_labels.tsv", "\t", "", None, True), ("LOC_val_solution.csv", ",", " 85 1 499 272", ("ImageId", "x"), True),
    ("val/list.csv", ";", ";1", None, False)])
@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_a_flat_validation_folder_with_a_list(tmp_path, name, between, more, header, stems, dataset):
    class_folders(tmp_path / "train")
    rows = flat(tmp_path / "val")
    if stems:
        rows = [(Path(image).stem, label) for image, label in rows]
    write(tmp_path / name, [*([header] if header else []), *rows], between, more)
    check(tmp_path, dataset)


@pytest.mark.parametrize("name", ["labels.csv", "val/labels.csv"])
@pytest.mark.parametrize("turned", [False, True])
def test_one_list_for_all_parts_and_lines_that_begin_with_the_class(tmp_path, name, turned):
    """Such a list also names training images, some of them as images of the validation folder are called."""
    class_folders(tmp_path / "train")
    rows = [(f"val/{image}", label) for image, label in flat(tmp_path / "val")]
    for label in CLASSES:
        save(tmp_path / "train" / label / "val_0.png", CLASSES.index(label))
        (tmp_path / "train" / label / f"{label}_0.png").unlink()
        rows.append((f"train/{label}/val_0.png", label))
    write(tmp_path / name, [row[::-1] for row in rows] if turned else rows, ",")
    check(tmp_path)


@pytest.mark.parametrize("listed", ["val_0.png", "train/n01/val_0.png"])
def test_a_list_of_other_parts_labels_nothing(tmp_path, listed):
    class_folders(tmp_path / "train")
    save(tmp_path / "val" / "val_0.png")
    write(tmp_path / "labels.csv", [(listed, "n01")], ",")
    (tmp_path / "README.txt").write_bytes(b"Gr\xfc\xdfe, n01")  # in Latin-1
    assert len(load("folder", tmp_path, "train")) == 12  # of 15: val/ is not read


def test_a_link_to_itself_beside_the_parts_does_no_harm(tmp_path):
    class_folders(tmp_path / "train")
    write(tmp_path / "val.txt", flat(tmp_path / "val"))
    (tmp_path / "val_loop.txt").symlink_to("val_loop.txt")
    (tmp_path / "loop").symlink_to("loop")
    check(tmp_path)


def test_names_with_blanks_and_folders(tmp_path):
    class_folders(tmp_path / "train")
    rows = [(f"my photo {i}.png", CLASSES[i]) for i in range(3)]
    for i, (name, _) in enumerate(rows):
        save(tmp_path / "val" / name, i)
    write(tmp_path / "val.csv", [(f"val/{name}", label) for name, label in rows], ",")
    check(tmp_path, count=3)


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[1:], "names 5 of 6 images"),
    (lambda rows: [(name, CLASSES.index(label)) for name, label in rows],
     "names classes that have no folder in the training images .0, 1, 2."),
    (lambda rows: [*rows, (rows[0][0], "n01")], "gives two classes to val/val_0.png")])
def test_a_list_that_is_not_of_all_images_and_classes_is_refused(tmp_path, change, words):
    class_folders(tmp_path / "train")
    rows = [tuple(map(str, row)) for row in change(flat(tmp_path / "val"))]
    write(tmp_path / "val.txt", rows, " ")
    with pytest.raises(InputError, match=f"val.txt: {words}; every image of .*val needs one line NAME CLASS"):
        load("folder", tmp_path, "train")


def test_lists_that_differ_are_refused_and_equal_ones_are_not(tmp_path):
    class_folders(tmp_path / "train")
    rows = flat(tmp_path / "val")
    write(tmp_path / "val.txt", rows)
    write(tmp_path / "val" / "a.txt", rows)
    check(tmp_path)
    write(tmp_path / "val" / "a.txt", [(name, "n01") for name, _ in rows])
    with pytest.raises(InputError, match="gives other labels than another list"):
        load("folder", tmp_path, "train")


def test_an_unlabelled_test_folder_hides_nothing(tmp_path, capsys):
    class_folders(tmp_path / "train")
    save(tmp_path / "test" / "x.png")
    train, test = (load("folder", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 3) and is_split_here("folder", tmp_path)
    assert capsys.readouterr().err == (f"--data {tmp_path}: test/ is not read, since it has no labels for its 1 image; "
                                       "a fifth of every class in train/ is the test split\n")
    class_folders(tmp_path / "val", 2)
    check(tmp_path)
    assert "test/ is not read" in capsys.readouterr().err


def test_a_second_labelled_part_and_other_folders_are_named(tmp_path, capsys):
    class_folders(tmp_path / "train")
    for name in ("test", "val", "extra"):
        class_folders(tmp_path / name, 2)
    check(tmp_path)
    assert capsys.readouterr().err == (
        f"--data {tmp_path}: val/ is not read, since test/ is the test split; extra/ beside train/ not read (test "
        "images lie in test/ or val/)\n")


@pytest.mark.parametrize("names", [("val", "test"), ("training set", "val"), ("Valid", "TEST")])
def test_parts_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        class_folders(tmp_path / name)
    with pytest.raises(InputError, match="but no train/ with a folder for each of two or more classes"):
        load("folder", tmp_path, "train")


def test_flat_parts_are_not_taken_for_classes_but_a_class_may_be_called_train(tmp_path):
    for i in range(5):
        save(tmp_path / "train" / f"{i}.png")
        save(tmp_path / "test" / f"{i}.png")
    with pytest.raises(InputError, match="holds test/, train/, but no train/ with"):
        load("folder", tmp_path, "train")
    for i in range(5):
        save(tmp_path / "bus" / f"{i}.png")
        save(tmp_path / "car" / f"{i}.png")
    (tmp_path / "test").rename(tmp_path / "ship")
    assert load("folder", tmp_path, "train").info.classes == ("bus", "car", "ship", "train")


def test_imagenet_without_labels_says_what_to_do(tmp_path):
    class_folders(tmp_path / "train")
    flat(tmp_path / "val")
    with pytest.raises(InputError, match="val: has neither a folder for each class nor a list of labels; sort its"):
        load("imagenet", tmp_path, "test")


def test_predictions_count_links_to_folders(tmp_path, capsys):
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "images" / "link").symlink_to("../elsewhere")
    assert find_images([str(tmp_path / "images")]) == [str(tmp_path / "images" / "a.png")]
    assert "left out 1 link to folders (--follow_links reads them)" in capsys.readouterr().err
    (tmp_path / "elsewhere" / "back").symlink_to("../images")
    found = find_images([str(tmp_path / "images")], follow_links=True)
    assert [Path(name).name for name in found] == ["a.png", "b.png"]


def linked(root: Path) -> Path:
    """A data folder of links: to class folders, to a part, and to an image."""
    class_folders(root / "store", 6)
    flat(root / "flat")
    (root / "data" / "train").mkdir(parents=True)
    for name in CLASSES:
        (root / "data" / "train" / name).symlink_to(f"../../store/{name}")
    (root / "data" / "val").symlink_to("../flat")
    write(root / "data" / "val.txt", [(f"val_{i}.png", CLASSES[(2 * i + 1) % 3]) for i in range(6)])
    return root / "data"


def test_links_are_followed_by_a_switch_in_training_and_tests(tmp_path):
    root = linked(tmp_path)
    with pytest.raises(InputError, match=r"n01: is a link to a folder, .*; give --follow_links, put a copy"):
        load("folder", root, "train")
    train, test = (load("folder", root, split, image_size=8, follow_links=True) for split in ("train", "test"))
    assert len(train) == 18 and [x // 40 for x in test.images[:, 0, 4, 4].tolist()] == test.labels.tolist()
    says = {"name": "folder", "root": str(root), "image_size": 8, "subset": None, "classes": list(CLASSES),
            "fingerprint": train.fingerprint, "suffixes": [".png"], "follow_links": True}
    assert len(load_images(Path("best.pt"), says, None, "train")) == 18
    assert len(load_images(Path("best.pt"), says, None, "test")) == 6


@pytest.mark.parametrize("link, target", [("train/n01/x", "."), ("train/n04", "n01"), ("train/n02/y", "../n01")])
def test_a_folder_that_links_lead_to_twice_is_refused(tmp_path, link, target):
    class_folders(tmp_path / "train", 6)
    (tmp_path / link).symlink_to(target)
    with pytest.raises(InputError, match=r"leads to a folder that is read already, .*n01; take the link away"):
        load("folder", tmp_path, "train", follow_links=True)
