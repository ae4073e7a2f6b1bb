"""Retraining: what runs leave, flags, cells by name, and runs that go on as they began."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnn_space1 import genotypes as space1
from cnn_space2 import genotypes as space2
from cnn_space3 import genotypes as space3
from conas.commands import cells as arch
from conas.commands import scoring as evaluate
from conas.commands import train
from conas.commands.test_all import ScoredRun, existing_stages, score_checkpoints
from conas.darts import genotype as genotypes
from conas.darts.published import GENOTYPES, named_genotypes
from conas.darts.space import Space
from conas.errors import InputError
from conas.exchange.cells import find_genotype
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import best_checkpoint, list_checkpoints
from conas.runs.options import DataOptions, NetworkOptions, RecipeOptions, TestOptions
from tests.conftest import ROOT

DARTS = GENOTYPES["DARTS"]
SMALL = ["--dataset", "digits", "--subset", "300", "--init_channels", "2", "--layers", "3", "--batch_size", "50",
         "--auxiliary", "--epochs", "3"]


def run(folder, *flags, module=space1) -> Path:
    """`python train.py FLAGS` of a space in `folder`, here. Returns the run's folder."""
    train.main(folder, module, "", argv=[*SMALL, *map(str, flags)])
    save = flags[flags.index("--save") + 1] if "--save" in flags else "EXP"
    return folder / f"train-{save}"


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of spaces; space 1 has a search that found DARTS' cells, and a training of them."""
    root = tmp_path_factory.mktemp("train")
    genotypes.save(root / "cnn_space1" / "search-EXP" / "genotype.json", DARTS)
    run(root / "cnn_space1")
    return root


@pytest.fixture
def space(tmp_path):
    """A space of its own, without a training."""
    genotypes.save(tmp_path / "cnn_space1" / "search-EXP" / "genotype.json", DARTS)
    return tmp_path / "cnn_space1"


def test_a_run_leaves_what_it_promises(root):
    folder = root / "cnn_space1" / "train-EXP"
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[0]["learning_rate"] == 0.025
    assert [row["drop_path_prob"] for row in rows] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    assert list(list_checkpoints(folder)) == [0, 1, 2]
    checkpoint = checkpoints.load(list_checkpoints(folder)[2])
    assert (checkpoint["stage"], checkpoint["space"]) == ("train", "cnn_space1")
    assert checkpoint["network"] == {"kind": "cifar", "C": 2, "num_classes": 10, "layers": 3, "auxiliary": True,
                                     "image_size": 8, "in_channels": 1}
    assert genotypes.from_json(checkpoint["genotype"], "", space1.PRIMITIVES) == DARTS
    best = max(rows, key=lambda row: row["valid_top1"])
    assert checkpoints.load(best_checkpoint(folder))["epoch"] == best["epoch"]
    log = (folder / "log.txt").read_text()
    assert "search-EXP/genotype.json" in log and "270 images to train on, 30 held out" in log


def test_scores_of_both_splits(root):
    """The held-out figures of the run are those of the committee's scores, on images that were not trained on."""
    space, options = Space("cnn_space1", root / "cnn_space1"), TestOptions()
    path = list_checkpoints(space.train_folder("EXP"))[2]
    valid, test = (evaluate.scores_for(space, path, options, split) for split in ("valid", "test"))
    row = metrics(space.train_folder("EXP"))[2]
    assert (valid.top(1), valid.loss()) == pytest.approx((row["valid_top1"], row["valid_loss"]), abs=1e-4)
    assert (len(valid.labels), len(test.labels)) == (30, 450) and valid.stage == test.stage == "train"
    assert evaluate.scores_for(space, path, options).checkpoint_sha256 == checkpoints.sha256(path)
    with pytest.raises(InputError, match=r"written by cnn_space1, not by cnn_space2"):
        evaluate.scores_for(Space("cnn_space2", root / "cnn_space2"), path, replace(options, data="/"))


def test_test_all_covers_both_stages_and_names_them(root):
    space, options, shown = Space("cnn_space1", root / "cnn_space1"), TestOptions(), []
    rows = score_checkpoints(ScoredRun(space, "train", options, shown.append))
    assert [row["epoch"] for row in rows] == [0, 1, 2] and "retrained networks: 3 checkpoints" in shown[3]
    assert "best on held-out images" in shown[4]
    assert (root / "cnn_space1" / "train-EXP" / "test_all.csv").read_text().startswith("epoch,loss,top1,top5\n0,")
    assert existing_stages(space, None, options) == ["search", "train"]
    assert existing_stages(space, "search", options) == ["search"]
    assert existing_stages(space, None, replace(options, save="other")) == ["search"]


@pytest.mark.parametrize("flags, key, value", [
    (["--label_smooth", "0.3"], "train_loss", None),
    (["--auxiliary_weight", "0"], "train_loss", None),
    (["--drop_path_prob", "0.9"], "train_loss", None),
    (["--cutout", "--cutout_length", "6"], "train_loss", None),
    (["--gamma", "0.5"], "learning_rate", 0.00625),
    (["--amp", "bf16"], "train_loss", None),
    (["--seed", "1"], "train_loss", None),
    (["--valid_portion", "0"], "valid_top1", None),
    (["--no-auxiliary"], "train_loss", None),
])
def test_flags_have_their_effect(root, space, flags, key, value):
    rows = metrics(run(space, *flags))
    assert rows[2][key] != metrics(root / "cnn_space1" / "train-EXP")[2][key]
    assert value is None or rows[2][key] == pytest.approx(value)


def test_checkpoint_freq_and_patience(space):
    folder = run(space, "--checkpoint_freq", 2, "--epochs", 5, "--save", "rare")
    assert list(list_checkpoints(folder)) == [1, 3, 4]
    folder = run(space, "--patience", 1, "--epochs", 40, "--learning_rate", 0, "--save", "short")
    assert [row["epoch"] for row in metrics(folder)] == list(range(len(metrics(folder)))) and len(metrics(folder)) < 40
    assert max(list_checkpoints(folder)) == len(metrics(folder)) - 1
    before = (folder / "resume.pt").read_bytes()
    run(space, "--patience", 1, "--epochs", 40, "--learning_rate", 0, "--save", "short")
    assert (folder / "resume.pt").read_bytes() == before and "finished" in (folder / "log.txt").read_text()


def test_killed_and_started_again_it_ends_alike(root, space):
    """Bit for bit, though drop path and the order of images are random."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; torch.set_num_threads(1); " \
           "from pathlib import Path; from tests.commands import test_train; test_train.run(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, space], stdout=subprocess.DEVNULL)
    while not (space / "train-EXP" / "resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(metrics(space / "train-EXP")) if (space / "train-EXP" / "metrics.jsonl").exists() else 0
    assert done < 3
    folder, whole = run(space), root / "cnn_space1" / "train-EXP"
    assert "resumed" in (folder / "log.txt").read_text()
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("epoch_002.pt", "best.pt"):
        ours, expected = (checkpoints.load(f / "checkpoints" / name) for f in (folder, whole))
        assert ours["epoch"] == expected["epoch"]
        assert all(torch.equal(ours["state"][key], expected["state"][key]) for key in expected["state"])


def test_a_run_is_never_overwritten(root):
    space = root / "cnn_space1"
    before = {path: path.read_bytes() for path in (space / "train-EXP").rglob("*.pt")}
    with pytest.raises(InputError, match=r"train-EXP: holds a run with --weight_decay 0.0003 \(now 0.1\)"):
        run(space, "--weight_decay", 0.1)
    genotypes.save(space / "search-new" / "genotype.json", GENOTYPES["DARTS_V1"])
    with pytest.raises(InputError, match="--search EXP"):
        run(space, "--search", "new")
    genotypes.save(space / "search-EXP" / "genotype.json", GENOTYPES["DARTS_V1"])  # the search went on meanwhile
    try:
        with pytest.raises(InputError, match=r"resume\.pt: this run began with other cells"):
            run(space)
    finally:
        genotypes.save(space / "search-EXP" / "genotype.json", DARTS)
    assert {path: path.read_bytes() for path in before} == before


def test_defaults_follow_from_data_and_recipe():
    def filled(**data):
        return arch.resolve_defaults(DataOptions(**data), NetworkOptions(layers=7), RecipeOptions(epochs=3), None)

    for data, recipe, size in (({"dataset": "imagenet"}, "imagenet", 224), ({"dataset": "cifar10"}, "cifar", 32),
                               ({"dataset": "imagenette", "image_size": 128}, "imagenet", 128),
                               ({"dataset": "imagenette"}, "cifar", 32),
                               ({"dataset": "cifar10", "image_size": 224}, "cifar", 224)):
        where, shape, settings = filled(**data)
        assert (shape.recipe, where.image_size, shape.layers, settings.epochs) == (recipe, size, 7, 3)
        assert (shape.init_channels, settings.batch_size) == {"cifar": (36, 96), "imagenet": (48, 128)}[recipe]


def test_photographs_take_the_recipe_for_imagenet(tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        for i in range(15):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (48, 60, 3), dtype=np.uint8) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    flags = ["--dataset", "folder", "--data", tmp_path / "photos", "--batch_size", 8, "--arch", "DARTS"]
    argv = ["--init_channels", "2", "--layers", "3", "--epochs", "2", "--valid_portion", "0.25"]
    folder = tmp_path / "cnn_space1"
    train.main(folder, space1, "", argv=[*map(str, flags), *argv, "--recipe", "imagenet", "--image_size", "35"])
    arguments = json.loads((folder / "train-EXP" / "args.json").read_text())["arguments"]
    assert {name: arguments[name] for name in ("learning_rate", "gamma", "weight_decay", "label_smooth",
                                               "drop_path_prob")} == \
           {"learning_rate": 0.1, "gamma": 0.97, "weight_decay": 3e-5, "label_smooth": 0.1, "drop_path_prob": 0.0}
    path = best_checkpoint(folder / "train-EXP")
    checkpoint = checkpoints.load(path)
    assert checkpoint["network"]["kind"] == "imagenet" and checkpoint["network"]["num_classes"] == 2
    assert (checkpoint["dataset"]["image_size"], checkpoint["dataset"]["crop"]) == (40, 35)
    assert len(evaluate.scores_for(Space("cnn_space1", folder), path, TestOptions()).labels) == 6


# which cells

def test_names_of_cells(tmp_path):
    named = named_genotypes(space1)
    assert find_genotype("DARTS_V1", named) == GENOTYPES["DARTS_V1"]
    genotypes.save(tmp_path / "mine.json", DARTS)
    assert find_genotype(str(tmp_path / "mine.json"), named) == DARTS
    for wrong, near in (("darts_v3", "DARTS_V"), ("amoebanet", "AmoebaNet"), ("nasnt", "NASNet"), ("x", "Amoeb")):
        with pytest.raises(InputError, match=f"--arch {wrong}: unknown; did you mean {near}"):
            find_genotype(wrong, named)
    space = type("module", (), {"PRIMITIVES": space1.PRIMITIVES, "MINE": GENOTYPES["DARTS_V1"]})
    assert find_genotype("MINE", named_genotypes(space)) == GENOTYPES["DARTS_V1"]
    assert find_genotype("cnn_space3/CONAS", GENOTYPES) == space3.CONAS != find_genotype("CONAS", named) == space1.CONAS
    for wrong in ("cnn_space3/CONS", "cnn_space3/conas"):
        with pytest.raises(InputError, match=f"{wrong}: unknown; did you mean CONAS"):
            find_genotype(wrong, GENOTYPES)
    for wrong in ("cnn_space9/CONAS", "../cnn_space1/CONAS", "tests/CONAS", "/CONAS"):
        with pytest.raises(InputError, match="unknown; did you mean"):
            find_genotype(wrong, GENOTYPES)


@pytest.mark.parametrize("change, words", [
    ({"normal": [["sep_conv_9x9", 0], *map(list, DARTS.normal[1:])]}, "normal edge 0 uses 'sep_conv_9x9'"),
    ({"reduce": [["skip_connect", 2], *map(list, DARTS.reduce[1:])]}, "reduce edge 0 comes from state 2"),
    ({"normal_concat": [2, 3, 4, 9]}, "normal_concat"),
])
def test_cells_that_cannot_be(space, change, words):
    path = space / "cells.json"
    path.write_text(json.dumps(genotypes.to_json(DARTS) | change))
    with pytest.raises(InputError, match=rf"cells\.json: {words}"):
        run(space, "--arch", path)
    assert not (space / "train-EXP").exists()


@pytest.mark.parametrize("flags, words", [
    (["--arch", "DRATS"], "--arch DRATS: unknown; did you mean DARTS"),
    (["--arch", "nowhere.json"], "nowhere.json: cannot be read"),
    (["--arch", "NASNet"], "--arch NASNet: uses sep_conv_7x7, which this space does not search over; give --any_ops"),
    (["--search", "none"], r"search-none/genotype\.json: no such file; start train_search\.py"),
    (["--search", "../x"], "--search ../x: use letters"),
    (["--batch_size", "271"], "--batch_size 271: there are only 270 images"),
    (["--patience", "2", "--valid_portion", "0"], "--patience: needs held-out images"),
    (["--valid_portion", "0.001"], "--valid_portion 0.001: is not one of 300 images"),
    (["--recipe", "imagenet"], "--recipe imagenet: is for colour images"),
    (["--dataset", "imagenet", "--data", "/nowhere"], "--data /nowhere: holds no class folders of ImageNet"),
    (["--init_from", "nowhere.pt"], r"nowhere\.pt: no such checkpoint"),
    (["--export", "x"], "--export: unknown flag"),
    (["--learning_rate", "1e30"], "the training loss became"),
])
def test_wrong_flags(space, flags, words):
    with pytest.raises(InputError, match=words) as error:
        run(space, *flags)
    assert "\n" not in str(error.value)
    assert not (space / "train-EXP" / "checkpoints").exists()


def test_images_too_small_for_the_reductions(tmp_path):
    for name in "ab":
        for i in range(20):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(InputError, match="--image_size 14: must be at least 33 for a network that halves"):
        run(tmp_path, "--dataset", "folder", "--data", tmp_path, "--subset", 10, "--batch_size", 4, "--arch", "DARTS",
            "--recipe", "imagenet", "--image_size", 14)


def test_operations_of_other_spaces_by_permission(space):
    with pytest.raises(InputError, match=r"search-EXP/genotype\.json: uses sep_conv_3x3, which this space"):
        train.main(space, type("module", (), {"PRIMITIVES": ("skip_connect", "max_pool_3x3", "dil_conv_3x3")}), "",
                   argv=SMALL)
    run(space, "--arch", "NASNet", "--any_ops", "--epochs", 1, module=space2)
