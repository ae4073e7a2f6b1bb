"""A committee fitted on held-out images: what is fitted, on what, and what is left alone."""
import dataclasses

import pytest
import torch

from conas.errors import InputError
from ensemble.combine.committee import COMBINATIONS, Committee, weighted_mean
from ensemble.combine.fit import FITTED, RULES, fit
from ensemble.combine.selection import convex_weights, weights_gap
from ensemble.measure.metrics import nll, softmax
from ensemble.report.report import evaluate
from tests.ensemble.test_committee import make_scores, random_logits


def pool(split="valid", members=4, seed=0):
    """Scores of members of unlike quality."""
    logits = random_logits(members, 300, 5, seed=seed + (split == "test"))
    labels = torch.arange(300) % 5
    for quality, member in enumerate(logits):
        member[torch.arange(300), labels] += 1 + quality
    return {f"m{i}": make_scores(f"m{i}", 7, logits=member, labels=labels, split=split, fingerprint=split)
            for i, member in enumerate(logits)}


@pytest.mark.parametrize("combination", FITTED)
def test_a_fitted_committee_has_no_higher_nll_on_held_out_images_than_its_best_member(combination):
    valid = pool()
    fitted = fit(valid, combination)
    ours = nll(fitted.committee(valid).probabilities, valid["m0"].labels)
    assert ours < min(scores.loss() for scores in valid.values()) + 1e-5
    assert fitted.weights.sum().item() == pytest.approx(1)
    assert (fitted.weights > 0).all() or combination == "weighted"


@pytest.mark.parametrize("combination", RULES)
def test_test_images_change_nothing_that_is_fitted(combination):
    fitted = fit(pool(), combination, temperatures=["members", "committee"])
    test = pool("test")
    committee = fitted.committee(test)
    other = fitted.committee(pool("test", seed=5))
    for name in ("weights", "temperatures", "temperature"):
        assert str(getattr(committee, name)) == str(getattr(other, name))
    assert list(committee.members) == fitted.members
    assert committee.fingerprint == "test"
    assert committee.probabilities.sum(dim=1).tolist() == pytest.approx([1] * 300)


def test_scores_of_test_images_are_refused():
    with pytest.raises(InputError, match="'test' fit nothing"):
        fit(pool("test"), "greedy")


def test_a_reordered_member_of_the_pool_is_refused():
    valid = pool()
    valid["m2"] = dataclasses.replace(valid["m2"], labels=valid["m2"].labels.flip(0))
    with pytest.raises(InputError, match=r"m0 .*m2 .*labels"):
        fit(valid, "greedy")


def test_the_best_member_is_the_best_on_held_out_images():
    assert fit(pool(), "mean_softmax").best_member == "m3"
    valid = pool()
    unsure = {name: dataclasses.replace(valid["m1"], logits=valid["m1"].logits * scale)
              for name, scale in (("timid", 0.01), ("apt", 0.8), ("rash", 20))}
    lowest = min(unsure, key=lambda name: unsure[name].loss())  # all are right on the same images
    assert fit(unsure, "mean_softmax").best_member == lowest != max(unsure, key=lambda name: unsure[name].loss())


@pytest.mark.parametrize("combination", RULES)
def test_the_order_of_the_pool_decides_nothing(combination):
    """Of two members that are twins, the first by name is taken, wherever they stand."""
    valid = pool()
    valid["twin"] = dataclasses.replace(valid["m3"])
    for temperatures in ([], ["members", "committee"]):
        fits = [fit({name: valid[name] for name in order}, combination, size=5, temperatures=temperatures)
                for order in (list(valid), list(valid)[::-1], ["m1", "twin", "m0", "m3", "m2"])]
        assert {f.best_member for f in fits} == {"m3"}
        for f in fits:
            assert dict(zip(f.members, (f.weights if f.weights is not None else torch.ones(5)).tolist())) == dict(
                zip(fits[0].members, (fits[0].weights if fits[0].weights is not None else torch.ones(5)).tolist()))
            assert torch.equal(f.committee(valid).probabilities, fits[0].committee(valid).probabilities)


def test_plain_rules_take_the_whole_pool_and_fit_nothing_but_figures():
    valid = pool()
    for combination in COMBINATIONS:
        fitted = fit(valid, combination)
        assert fitted.members == list(valid)
        assert (fitted.weights, fitted.temperatures, fitted.temperature) == (None, None, 1)
        logits = torch.stack([scores.logits for scores in valid.values()])
        assert torch.equal(fitted.committee(valid).probabilities, COMBINATIONS[combination](logits))
        assert fitted.about["used_for"] == ["the choice of the best member"]


def test_temperatures_do_what_they_say():
    valid = pool()
    plain, both = fit(valid, "mean_softmax"), fit(valid, "mean_softmax", temperatures=["members", "committee"])
    assert plain.own_temperatures.tolist() == both.temperatures.tolist()
    scaled = torch.stack([s.logits.double() / t for s, t in zip(valid.values(), both.temperatures.tolist())])
    raw = Committee(valid, temperatures=both.temperatures)
    torch.testing.assert_close(raw.probabilities, scaled.softmax(dim=2).mean(dim=0))
    labels = valid["m0"].labels
    assert nll(both.committee(valid).probabilities, labels) <= nll(raw.probabilities, labels)
    entry = evaluate(both.committee(valid), dict.fromkeys(valid, ""), both)
    assert entry["committee"]["calibrated"]["loss"] == entry["committee"]["loss"]  # it is applied already
    assert entry["members"][0]["calibrated"]["loss"] < entry["members"][0]["loss"]
    assert entry["members"][0]["temperature"] == both.temperatures[0].item()


def test_weights_are_fitted_on_calibrated_members():
    valid = pool()
    fitted = fit(valid, "weighted", temperatures=["members"])
    scaled = torch.stack([s.logits.double() / t for s, t in zip(valid.values(), fitted.temperatures.tolist())])
    torch.testing.assert_close(fitted.weights, convex_weights(scaled.softmax(dim=2), valid["m0"].labels), atol=1e-5,
                               rtol=0)


def test_weights_that_did_not_converge_are_called_so():
    base, labels = pool()["m0"].logits, pool()["m0"].labels
    noise = 0.01 * random_logits(3, 300, 5)
    alike = {f"m{i}": make_scores(f"m{i}", 7, logits=base + n, labels=labels, split="valid", fingerprint="valid")
             for i, n in enumerate(noise)}
    probabilities = softmax(torch.stack([s.logits for s in alike.values()])).float()
    weights = convex_weights(probabilities, labels)
    longer = convex_weights(probabilities, labels, steps=200_000)
    gap, rest = (weights_gap(w, probabilities, labels) for w in (weights, longer))
    losses = [nll(weighted_mean(torch.stack([s.logits for s in alike.values()]), w), labels) for w in (weights, longer)]
    assert gap > 1e-5 > rest and 0 < losses[0] - losses[1] <= gap
    (said,) = (text for text in fit(alike, "weighted").about["used_for"] if "weights" in text)
    assert said.startswith(f"3 weights (at most {gap:.1g} nats above the lowest loss")
    assert "3 weights" not in fit(pool(members=3), "weighted").about["used_for"][0]
    assert fit(pool(members=3), "weighted").about["used_for"][1] == "3 weights"


def test_weights_of_equal_members_are_that_member_exactly_and_in_any_order():
    logits, weights = random_logits(4), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    one = logits[:1].expand(4, -1, -1)
    assert torch.equal(weighted_mean(one, weights), weighted_mean(one[:1], torch.ones(1)))
    expected = weighted_mean(logits, weights)
    for order in ([3, 1, 0, 2], [1, 0, 3, 2]):
        assert torch.equal(weighted_mean(logits[order], weights[order]), expected)
    torch.testing.assert_close(expected, torch.einsum("m,mbc->bc", weights, logits.double().softmax(dim=2)))


def test_float32_sums_of_a_hundred_members_stay_within_a_millionth():
    logits = random_logits(100)
    weights = torch.full((100,), 0.01, dtype=torch.float64)
    expected = logits.double().softmax(dim=2).mean(dim=0)
    assert (weighted_mean(logits, weights) - expected).abs().max() < 1e-6
    assert (logits.softmax(dim=2).mean(dim=0) - expected).abs().max() < 1e-6  # what an exported committee computes
