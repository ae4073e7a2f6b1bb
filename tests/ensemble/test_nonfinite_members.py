"""Members whose predictions are NaN or infinite: refused by name, or left out with a line; no vote in silence."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from conas.errors import InputError
from conas.runs.scores import load_scores, save_scores
from ensemble.combine.calibration import fit_temperature, fit_temperatures
from ensemble.combine.committee import COMBINATIONS, Committee
from ensemble.combine.fit import RULES, SELECTING, fit
from ensemble.combine.network import CommitteeNetwork
from ensemble.combine.selection import OBJECTIVES, beam, convex_weights, greedy
from ensemble.measure.significance import compare
from ensemble.predict import NotFiniteError, predict
from tests.ensemble.test_committee import make_scores, random_logits
from tests.ensemble.test_committee_script import add_run, root, start  # noqa: F401

VALUES = [math.nan, math.inf, -math.inf]


def pool(value, bad=("m1",), images=(3,), split="valid"):
    """Scores of three members, of which some are not finite on some images."""
    found = {}
    for m in range(3):
        logits = random_logits(1, 60, 5, seed=m)[0]
        if f"m{m}" in bad:
            logits[list(images), 2] = value
        found[f"m{m}"] = make_scores(f"m{m}", 7, logits=logits, split=split, fingerprint=split)
    return found


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("combination", RULES)
@pytest.mark.parametrize("images", [(3,), range(60)])
def test_selections_leave_such_candidates_out_and_other_rules_refuse_them(value, combination, images):
    if combination not in SELECTING:
        with pytest.raises(InputError, match=rf"m1, epoch 7: {len(images)} of 60 predictions are not finite on the he"):
            fit(pool(value, images=images), combination)
        return
    spoilt = fit(pool(value, images=images), combination)
    without = fit({name: scores for name, scores in pool(value).items() if name != "m1"}, combination)
    assert list(spoilt.left_out) == ["m1"] and not without.left_out
    assert (spoilt.members, spoilt.best_member, spoilt.about) == (without.members, without.best_member, without.about)
    assert torch.equal(spoilt.weights, without.weights)
    with pytest.raises(InputError, match="m0, epoch 7"):  # all of them
        fit(pool(value, bad=("m0", "m1", "m2")), combination)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("rule", COMBINATIONS)
def test_no_committee_has_such_a_member(value, rule):
    with pytest.raises(InputError, match="m1, epoch 7: 1 of 60 predictions are not finite on the test images; "):
        Committee(pool(value, split="test"), rule)


@pytest.mark.parametrize("value", VALUES)
def test_nothing_is_fitted_or_tested_on_such_predictions(value):
    scores, labels = torch.stack([s.logits for s in pool(value).values()]), torch.arange(60) % 5
    p = scores.softmax(dim=2)
    p[1, 3, 2] = value
    for call in (lambda: fit_temperatures(scores, labels), lambda: convex_weights(p, labels),
                 *(lambda objective=objective: greedy(p, labels, 3, objective) for objective in OBJECTIVES),
                 lambda: beam(p, labels, 3, 2)):
        with pytest.raises(InputError, match="member 2 of 3: 1 of 60 predictions are not finite"):
            call()
    with pytest.raises(InputError, match="member 1 of 1"):
        fit_temperature(p[1], labels)
    with pytest.raises(InputError, match="member 1 of 2"):
        compare(p[1], p[0], labels)


class Member(nn.Module):
    """Logits that are given by the first pixel of an image, a row of a table."""

    def __init__(self, table):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.zeros(1)), torch.tensor(table)

    def forward(self, x):
        return self.table[(x[:, 0, 0, 0] * 0.3081 + 0.1307).mul(255).round().long() // 20]


def committee(tables, combination="mean_softmax") -> CommitteeNetwork:
    network = CommitteeNetwork([Member(table) for table in tables], ["one", "two"],
                               {"name": "digits", "classes": ["a", "b"], "image_size": 8}, combination,
                               weights=[0.5, 0.5], temperatures=[1.0, 1.0], temperature=1.5, crops=[None, None])
    return network


@given(st.lists(st.lists(st.sampled_from([*VALUES, 0.0, 1.0, 2.0]), min_size=2, max_size=2), min_size=8, max_size=8),
       st.sampled_from(sorted(RULES)))
@settings(max_examples=60, deadline=None)
def test_a_network_of_members_answers_nan_for_exactly_such_images(logits, combination):
    logits = torch.tensor(logits).view(2, 4, 2)
    network = committee([[[0.0, 0.0]]] * 2, combination)
    expected = ~logits.isfinite().all(dim=2).all(dim=0)
    answers = network.combine(logits)
    assert answers.isnan().all(dim=1).tolist() == answers.isnan().any(dim=1).tolist() == expected.tolist()


@pytest.mark.parametrize("value", VALUES)
def test_images_without_a_finite_answer_are_complained_of(tmp_path, monkeypatch, value):
    fine, spoilt = [[0.0, 1.0]] * 3, [[0.0, 1.0], [0.0, value], [0.0, 1.0]]
    network, said = committee([fine, spoilt]), []
    monkeypatch.setattr(network, "logits", lambda images: torch.stack(
        [m.table[images[:, 0, 0, 0].long() // 20] for m in network.networks]))
    for i in range(3):
        Image.new("L", (8, 8), 20 * i + 5).save(tmp_path / f"{i}.png")
    rows = list(predict(network, [str(tmp_path / f"{i}.png") for i in range(3)], complain=said.append))
    assert [row["image"] for row in rows] == [str(tmp_path / "0.png"), str(tmp_path / "2.png")]
    (error,) = said
    assert isinstance(error, NotFiniteError)
    assert str(error).startswith(f"{tmp_path / '1.png'}: not answered, since the prediction of two is not finite")


def spoil(root, n, epoch, split, count, value):
    """Make some stored logits of a member `value`."""
    suffix = "" if split == "test" else ".valid"
    path = root / f"cnn_space{n}" / "search-EXP" / "probabilities" / f"epoch_{epoch:03d}{suffix}.npz"
    scores = load_scores(path)
    scores.logits[:count, 1] = value
    save_scores(path, scores)


@pytest.mark.parametrize("split, word", [("test", "the test images"), ("valid", "the held-out images")])
@pytest.mark.parametrize("value", VALUES)
def test_the_script_names_the_file_and_counts(root, monkeypatch, capsys, split, word, value):
    for n in (1, 2, 3):
        add_run(root, n, [0, 1])
    spoil(root, 2, 1, split, 5, value)
    code, _, err = start(monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and not (root / "committee-EXP").exists()
    path = root / "cnn_space2" / "search-EXP" / "checkpoints" / "epoch_001.pt"
    assert err.startswith(f"error: {path}: 5 of 40 predictions are not finite on {word}; leave it out (--spaces and")
    code, out, err = start(monkeypatch, capsys, "--spaces", "cnn_space1", "cnn_space3")
    assert (code, err) == (0, "") and "finite" not in out


def test_an_earlier_epoch_and_a_candidate_are_left_out_with_a_line(root, monkeypatch, capsys):
    for n in (1, 2, 3):
        add_run(root, n, [0, 1, 2])
    spoil(root, 3, 1, "test", 40, math.nan)
    code, out, err = start(monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "cnn_space3, epoch 1: 40 of 40 predictions are not finite on the test images; the epoch is left out" in out
    summary = json.loads((root / "committee-EXP" / "committee.json").read_text())
    assert [entry["epoch"] for entry in summary["epochs"]] == [0, 2]
    assert summary["not_finite"] == [{"name": "cnn_space3", "epoch": 1, "split": "test", "not_finite": 40,
                                      "images": 40}]
    spoil(root, 3, 1, "valid", 2, math.inf)
    code, out, err = start(monkeypatch, capsys, "--combination", "greedy")
    assert (code, err) == (0, "")
    assert "cnn_space3 001, epoch 1: 2 of 40 predictions are not finite on the held-out images; this candidate" in out
    summary = json.loads((root / "committee-EXP" / "committee.json").read_text())
    assert "cnn_space3 001" not in {member["name"] for member in summary["epochs"][-1]["members"]}
    assert summary["held_out"]["pool"] == 8
