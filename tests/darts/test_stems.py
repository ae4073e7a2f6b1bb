"""The stem for large images: the right numbers and gradients, recorded, and chosen by the images' size."""
import json

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas.commands import search
from conas.commands.scoring import scores_for
from conas.darts.space import Space
from conas.darts.stems import STEMS, stems
from conas.darts.supernet import constant_alphas
from conas.data.images import load
from conas.engine.door import accelerate, why_not
from conas.engine.inference import prepared
from conas.engine.packed import PackedPass
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.options import DataOptions, SupernetOptions, TestOptions


def run(root, *flags):
    search.main(root / "cnn_space2", Network, Architect, "", [
        "--dataset", "digits", "--subset", "24", "--init_channels", "2", "--layers", "3", "--batch_size", "12",
        "--epochs", "1", "--device", "cpu", *map(str, flags)])
    return root / "cnn_space2" / "search-EXP"


@pytest.mark.parametrize("training", [True, False])
def test_the_first_cell_sees_a_quarter_and_an_eighth_of_the_side_by_plain_modules(training):
    """Its inputs are those of the stem's modules, called one after the other by torch."""
    torch.manual_seed(0)
    network, seen = Network(4, 7, 3, 3, "imagenet").double().train(training), []
    packed, x = PackedPass(network), torch.randn(3, 3, 64, 64, dtype=torch.float64)

    def look(cell, *inputs):
        seen.extend(inputs[:2])
        return cell(*inputs)

    packed.run_cell = look
    w = torch.cat([network.get_parameter(name).flatten() for name in packed.order])
    torch.testing.assert_close(packed.logits(x, w), network(x))  # the engine's and the definition's
    s0 = network.stem0(x)
    s1 = network.stem1(s0)
    assert s0.shape[2:] == (16, 16) and s1.shape[2:] == (8, 8)
    torch.testing.assert_close(seen[0].permute(0, 3, 1, 2), s0.relu())
    torch.testing.assert_close(seen[1].permute(0, 3, 1, 2), s1.relu())


@pytest.mark.parametrize("engine", [True, False])
def test_gradients_of_the_stem_are_those_of_differences(engine):
    torch.manual_seed(0)
    network = Network(2, 3, 3, 3, "imagenet").double().eval()
    assert (accelerate(network, wanted=engine) is not None) == engine
    x, y, w = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2]), network.flat().detach()
    with constant_alphas(network):
        w.requires_grad_()
        gradient, = torch.autograd.grad(cross_entropy(network(x, w), y), w)
        for place in (0, 5, 100):  # in the first convolution
            step = torch.zeros_like(w)
            step[place] = 1e-6
            above, below = (cross_entropy(network(x, w + sign * step), y) for sign in (1, -1))
            assert ((above - below) / 2e-6).item() == pytest.approx(gradient[place].item(), rel=1e-4, abs=1e-8)
    assert functional_call(network, dict(network.named_parameters()), (x,)).shape == (2, 3)


def test_the_engine_leaves_every_other_stem_to_the_definition():
    def why(change, kind):
        network = Network(2, 3, 3, 3, kind)
        change(network)
        return why_not(network)

    def put(name, place, module):
        return lambda network: network.get_submodule(name).__setitem__(place, module)

    nothing = [why(lambda network: None, kind) for kind in STEMS]
    assert nothing == [None, None]
    for kind, change in (("cifar", put("stem", 0, torch.nn.Conv2d(3, 6, 3, 2, 1, bias=False))),
                         ("cifar", put("stem", 0, torch.nn.Conv2d(3, 6, 5, 1, 2, bias=False))),
                         ("imagenet", put("stem0", 2, torch.nn.GELU())),
                         ("imagenet", put("stem1", 1, torch.nn.Conv2d(6, 6, 3, 1, 1, bias=False))),
                         ("imagenet", lambda network: network.stem1.append(torch.nn.Identity())),
                         ("imagenet", lambda network: network.add_module("stem2", torch.nn.Identity()))):
        assert why(change, kind) == "its stem is another"


def test_evaluation_with_folded_weights_is_the_same():
    torch.manual_seed(0)
    network = Network(4, 7, 3, 3, "imagenet").double()
    x = torch.randn(6, 3, 96, 96, dtype=torch.float64)
    network.train()(x)  # running statistics of its own
    with torch.no_grad():
        expected = network.eval()(x)
        torch.testing.assert_close(prepared(network)(x), expected)


@pytest.mark.parametrize("data, given, before, stem", [
    ({"dataset": "cifar10"}, None, {}, "cifar"), ({"dataset": "imagenet"}, None, {}, "imagenet"),
    ({"dataset": "imagenet", "image_size": 64}, None, {}, "imagenet"),
    ({"dataset": "folder", "image_size": 95}, None, {}, "cifar"),
    ({"dataset": "folder", "image_size": 96}, None, {}, "imagenet"),
    ({"dataset": "folder", "image_size": 224}, "cifar", {}, "cifar"),
    ({"dataset": "folder", "image_size": 224}, None, {"stem": "cifar"}, "cifar"),  # an old run goes on as it began
    ({"dataset": "cifar10"}, "imagenet", {"stem": "cifar"}, "imagenet")])
def test_the_stem_follows_the_images(data, given, before, stem):
    assert SupernetOptions(stem=given).decided(DataOptions(**data), before).stem == stem


def test_the_cifar_stem_has_the_published_names():
    assert {name for name in Network(2, 3, 3).state_dict() if name.startswith("stem")} == {
        "stem.0.weight", *(f"stem.1.{name}" for name in ("weight", "bias", "running_mean", "running_var",
                                                         "num_batches_tracked"))}
    assert list(stems("imagenet", 3, 6)) == ["stem0", "stem1"]


def test_a_search_records_its_stem_and_goes_on_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "draw_genotype", lambda *_: [])
    folder = run(tmp_path, "--image_size", 32, "--stem", "imagenet")
    path = folder / "checkpoints" / "epoch_000.pt"
    checkpoint = checkpoints.load(path)
    assert checkpoint["network"]["stem"] == checkpoint["arguments"]["stem"] == "imagenet"
    network = checkpoints.restore(path, checkpoint, "cnn_space2", Network)
    assert torch.equal(network.stem1[1].weight, checkpoint["state"]["stem1.1.weight"])
    run(tmp_path, "--image_size", 32)
    assert "finished" in (folder / "log.txt").read_text()
    with pytest.raises(InputError, match=r"--stem imagenet \(now cifar\)"):
        run(tmp_path, "--image_size", 32, "--stem", "cifar")
    with pytest.raises(InputError, match="'stem' is missing or out of range"):
        checkpoints.check(path, checkpoint | {"network": checkpoint["network"] | {"stem": "other"}})


def test_large_images_are_searched_and_tested_behind_the_large_stem(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "draw_genotype", lambda *_: [])
    folder = run(tmp_path, "--image_size", 96, "--test_subset", 20)
    assert "stem imagenet: the cells see an eighth of an image's side" in (folder / "log.txt").read_text()
    scores = scores_for(Space("cnn_space2", tmp_path / "cnn_space2", Network), folder / "checkpoints" / "epoch_000.pt",
                        TestOptions(device="cpu"))
    state = checkpoints.load(folder / "checkpoints" / "epoch_000.pt")
    network = Network(2, 10, 3, 1, "imagenet")
    network.load_state_dict(state["state"])
    images = load("digits", state["dataset"]["root"], "test", 96, 20)
    with torch.no_grad():
        x, _ = next(images.batches(20, "cpu"))
        torch.testing.assert_close(scores.logits, network.eval()(x), rtol=1e-4, atol=1e-4)


def test_checkpoints_and_runs_from_before_the_flag_have_the_stem_of_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "draw_genotype", lambda *_: [])
    folder = run(tmp_path)
    path = folder / "checkpoints" / "epoch_000.pt"
    checkpoint = checkpoints.load(path)
    del checkpoint["network"]["stem"], checkpoint["arguments"]["stem"]
    checkpoints.save(path, checkpoint)
    assert hasattr(checkpoints.restore(path, checkpoints.load(path), "cnn_space2", Network), "stem")
    content = json.loads((folder / "args.json").read_text())
    assert content["arguments"].pop("stem") == "cifar"
    (folder / "args.json").write_text(json.dumps(content))
    run(tmp_path)
    assert "finished" in (folder / "log.txt").read_text()
