"""Predictions on files: the very answers that the test of the committee gave for the same images."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conas.darts.derived import NetworkCIFAR
from conas.darts.published import GENOTYPES
from conas.data.images import load
from conas.errors import InputError
from conas.runs.code import digests
from ensemble.combine.network import CommitteeNetwork, load_committee
from ensemble.predict import find_images, predict, read_image
from tests.helpers.untrained import committee_clone  # noqa: F401


def start(clone, *arguments):
    return clone.run("-m", "ensemble.predict", *arguments)


@pytest.fixture
def digits(tmp_path):
    """Ten test images as files, in the order of the test split."""
    images = load("digits", "data", "test", subset=200).images
    for i in range(10):
        Image.fromarray(images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    return tmp_path


def stored(clone):
    """The committee's and the members' softmax on the test images, by numpy from what test_all stores."""
    members = []
    for path in sorted(clone.root.glob("cnn_space*/search-EXP/probabilities/epoch_001.npz")):
        logits = np.load(path)["logits"].astype(np.float64)
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        members.append(e / e.sum(axis=1, keepdims=True))
    return np.mean(members, axis=0), np.stack(members)


def test_files_get_the_answers_of_the_test(committee_clone, digits):
    done = start(committee_clone, digits, "--top_k", 3, "--json", digits / "a.json", "--csv", digits / "a.csv")
    assert done.returncode == 0, done.stderr
    answers = json.loads((digits / "a.json").read_text())
    committee, members = stored(committee_clone)
    entropy = -(committee * np.log(committee)).sum(axis=1)
    within = -(members * np.log(members)).sum(axis=2).mean(axis=0)
    for i, row in enumerate(answers["images"]):
        assert row["image"] == str(digits / f"{i}.png")
        best = np.argsort(-committee[i])[:3]
        assert [t["class"] for t in row["top"]] == [str(b) for b in best] and row["class"] == str(best[0])
        assert [t["probability"] for t in row["top"]] == pytest.approx(committee[i][best], abs=1e-5)
        assert row["entropy"] == pytest.approx(entropy[i], abs=1e-5)
        assert row["mutual_information"] == pytest.approx(entropy[i] - within[i], abs=1e-5)
        assert [v["class"] for v in row["votes"].values()] == [str(m[i].argmax()) for m in members]
        assert list(row["votes"]) == ["cnn_space1", "cnn_space2", "cnn_space3"]
    table = list(csv.DictReader((digits / "a.csv").open()))
    assert [line["class"] for line in table] == [row["class"] for row in answers["images"]]
    assert float(table[3]["probability_2"]) == pytest.approx(answers["images"][3]["top"][1]["probability"], abs=1e-5)
    assert "10 images; " in done.stdout and "images per second" in done.stdout


def test_bad_images_are_told_and_the_rest_goes_on(committee_clone, digits):
    (digits / "bad.jpg").write_text("no image")
    (digits / "cut.png").write_bytes((digits / "0.png").read_bytes()[:60])
    done = start(committee_clone, digits, digits / "nowhere.png")
    assert done.returncode == 0
    assert "10 images, 3 could not be read" in done.stdout
    assert [name in done.stderr for name in ("bad.jpg", "cut.png", "nowhere.png", "Traceback")] == [True] * 3 + [False]
    done = start(committee_clone, digits / "bad.jpg", digits / "nowhere.png", "--csv", digits / "none.csv")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: none of 2 images could be read"
    assert not (digits / "none.csv").exists()


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("RGBA", "png"), ("P", "gif"), ("L", "webp"), ("1", "bmp"), ("I;16", "png"), ("CMYK", "tiff"),
    ("LA", "png")])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_format_and_size(tmp_path, mode, suffix, channels):
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((41, 67), 40000, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (67, 41), (200, 200, 200)).convert(mode).save(path)
    image = read_image(str(path), 16, channels)
    assert image.shape == (channels, 16, 16) and image.dtype == torch.uint8
    assert (image.float().std() < 2 and image.float().mean() > 100) or mode == "1"


def test_memory_order_and_batches_change_nothing(committee_clone, digits):
    network, paths = load_committee(committee_clone.root, "EXP"), [str(digits / f"{i}.png") for i in range(10)]
    whole, single = (list(predict(network, paths, batch_size=size)) for size in (64, 3))
    assert [row["probability"] for row in whole] == pytest.approx([row["probability"] for row in single], abs=1e-5)
    assert [row["image"] for row in whole] == [row["image"] for row in single] == paths


def test_folders_are_searched_for_images(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.PNG", "inner/a.jp2", "inner/notes.txt", ".hidden.png"):
        (tmp_path / name).write_text("")
    assert find_images([str(tmp_path), "x.odd"]) == [str(tmp_path / "b.PNG"), str(tmp_path / "inner/a.jp2"), "x.odd"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no images"):
        find_images([str(tmp_path / "empty")])


def test_a_committee_must_be_there_and_unchanged(committee_clone, tmp_path):
    with pytest.raises(InputError, match=r"committee-other/committee\.json: no such committee.*--save other"):
        load_committee(committee_clone.root, "other")
    done = start(committee_clone, "x.png", "--save", "other")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "test_ensemble.py" in done.stderr
    checkpoints = committee_clone.root / "cnn_space2" / "search-EXP" / "checkpoints"
    good = (checkpoints / "epoch_001.pt").read_bytes()
    try:
        (checkpoints / "epoch_001.pt").write_bytes((checkpoints / "epoch_000.pt").read_bytes())
        with pytest.raises(InputError, match=r"epoch_001\.pt: has changed"):
            load_committee(committee_clone.root, "EXP")
    finally:
        (checkpoints / "epoch_001.pt").write_bytes(good)


def test_the_fitted_committee_is_the_one_that_answers(committee_clone, digits):
    """Weights and temperatures that held-out images decided are those of the predictions."""
    done = committee_clone.run("test_ensemble.py", "--combination", "weighted", "--temperatures", "members",
                               "committee")
    assert done.returncode == 0, done.stderr
    folder = committee_clone.root / "committee-EXP"
    try:
        rows = list(csv.DictReader((folder / "images.csv").open()))[:10]
        network = load_committee(committee_clone.root, "EXP")
        assert network.temperature != 1 and len(set(network.weights.tolist())) > 1
        for row, expected in zip(predict(network, [str(digits / f"{i}.png") for i in range(10)]), rows):
            assert row["class"] == expected["answer"]
            assert row["probability"] == pytest.approx(float(expected["probability"]), abs=1e-5)
            assert row["mutual_information"] == pytest.approx(float(expected["mutual_information"]), abs=1e-5)
    finally:
        assert committee_clone.run("test_ensemble.py").returncode == 0


@torch.inference_mode()
def test_members_look_at_their_central_squares():
    """Members that were trained on crops of photographs beside one that looks at the whole image."""
    torch.manual_seed(0)
    members = [NetworkCIFAR(4, 3, 3, False, GENOTYPES["DARTS"]).eval() for _ in range(2)]
    about = {"name": "folder", "classes": ["a", "b", "c"], "image_size": 40}
    network = CommitteeNetwork(members, ["whole", "crop"], about, "mean_softmax", weights=[0.5, 0.5],
                               temperatures=[1.0, 1.0], temperature=1.0, crops=[None, 32])
    images = torch.randint(256, (5, 3, 40, 40), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (images / 255 - mean) / std
    expected = (members[0](x).softmax(1) + members[1](x[:, :, 4:36, 4:36]).softmax(1)) / 2
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(members[1](x).softmax(1), members[1](x[:, :, 4:36, 4:36]).softmax(1), atol=1e-4)


def test_members_whose_code_has_changed_are_told(committee_clone, tmp_path, capsys):
    root = shutil.copytree(committee_clone.root, tmp_path / "CoNAS", ignore=shutil.ignore_patterns("data"))
    load_committee(root, "EXP")
    assert not capsys.readouterr().err
    with open(root / "cnn_space2" / "genotypes.py", "a", encoding="utf-8") as file:
        file.write("OPERATIONS = {}\n")
    digests.cache_clear()
    for _ in range(2):
        load_committee(root, "EXP")
    line, = capsys.readouterr().err.splitlines()
    assert "genotypes.py of cnn_space2 changed" in line and "epoch_001.pt" in line
