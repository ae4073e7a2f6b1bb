"""The committee: rules by which members are combined, and when they may be."""
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conas.errors import InputError
from conas.runs.scores import Scores
from ensemble.combine.committee import COMBINATIONS, Committee, check_same_images, common_epochs, mean_softmax, span


def random_logits(members=3, images=200, classes=10, seed=0):
    return 4 * torch.randn(members, images, classes, generator=torch.Generator().manual_seed(seed))


def make_scores(space="cnn_space1", epoch=0, logits=None, **changes):
    logits = random_logits(1)[0] if logits is None else logits
    labels = torch.arange(len(logits)) % logits.shape[1]
    scores = Scores(logits=logits, labels=labels, space=space, stage="search", epoch=epoch, seed=0, split="test",
                    checkpoint_sha256="0" * 64, dataset="digits", fingerprint="images",
                    classes=[f"class {k}" for k in range(logits.shape[1])])
    return dataclasses.replace(scores, **changes)


@pytest.mark.parametrize("members", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("rule", sorted(COMBINATIONS.keys() - {"logit_sum", "majority_vote"}))
def test_identical_members_are_the_member_exactly(rule, members):
    one = random_logits(1)
    many = COMBINATIONS[rule](one.expand(members, -1, -1))
    assert torch.equal(many, COMBINATIONS[rule](one))
    torch.testing.assert_close(many, one[0].double().softmax(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_identical_members_answer_as_the_member(rule):
    one = random_logits(1)
    answers = COMBINATIONS[rule](one.expand(3, -1, -1)).argsort(dim=1)
    assert torch.equal(answers, one[0].argsort(dim=1))


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_order_of_members_changes_nothing(rule):
    logits = random_logits(4)
    expected = COMBINATIONS[rule](logits)
    for order in itertools.permutations(range(4)):
        assert torch.equal(COMBINATIONS[rule](logits[list(order)]), expected)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_answers_are_probabilities_even_of_huge_logits(rule):
    logits = torch.stack([random_logits(3), 1e4 * random_logits(3), -1e4 * random_logits(3).abs()]).flatten(0, 1)
    probabilities = COMBINATIONS[rule](logits)
    assert probabilities.dtype == torch.float64
    assert probabilities.isfinite().all()
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(200, dtype=torch.float64))


def test_a_hundred_members_stay_exact():
    logits = random_logits(100)
    expected = sum(member.double().exp() / member.double().exp().sum(dim=1, keepdim=True) for member in logits) / 100
    torch.testing.assert_close(mean_softmax(logits), expected, rtol=0, atol=1e-14)


def test_mean_softmax_and_logit_sum_by_hand():
    # One member shouts for class 0; two prefer class 1 clearly, but quietly.
    logits = torch.tensor([[[10.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    # mean softmax: class 0 has (0.99995 + 2 * 0.04743) / 3; logit sum: 10 against 6
    assert COMBINATIONS["mean_softmax"](logits)[0, 0].item() == pytest.approx(0.364936, abs=1e-6)
    assert COMBINATIONS["logit_sum"](logits)[0, 0].item() == pytest.approx(0.982014, abs=1e-6)     # 1 / (1 + e^-4)
    assert COMBINATIONS["logit_mean"](logits)[0, 0].item() == pytest.approx(0.791391, abs=1e-6)    # 1 / (1 + e^-4/3)
    assert [rule for rule in COMBINATIONS if COMBINATIONS[rule](logits).argmax() == 1] == ["mean_softmax",
                                                                                          "majority_vote"]


def test_geometric_mean_is_the_normalised_root_of_the_product():
    logits = random_logits(3)
    root = logits.double().softmax(dim=2).prod(dim=0) ** (1 / 3)
    expected = root / root.sum(dim=1, keepdim=True)
    torch.testing.assert_close(COMBINATIONS["geometric_mean"](logits), expected)
    torch.testing.assert_close(COMBINATIONS["logit_mean"](logits), expected)


def test_logit_sum_answers_as_logit_mean():
    logits = random_logits(5)
    by_sum, by_mean = (COMBINATIONS[rule](logits).argmax(dim=1) for rule in ("logit_sum", "logit_mean"))
    assert torch.equal(by_sum, by_mean)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_majority_vote_overturns_no_majority_and_breaks_ties_by_mean_softmax(votes, seed):
    logits = random_logits(len(votes), 1, 4, seed)
    for member, vote in zip(logits, votes):
        member[0, vote] = member.max() + 0.1
    winner = COMBINATIONS["majority_vote"](logits).argmax().item()
    counts = [votes.count(k) for k in range(4)]
    tied = [k for k in range(4) if counts[k] == max(counts)]
    assert winner == max(tied, key=lambda k: mean_softmax(logits)[0, k].item())


def test_committee_combines_what_its_members_say():
    logits = random_logits(2)
    committee = Committee({"a": make_scores(logits=logits[0]), "b": make_scores(logits=logits[1])}, "logit_sum")
    assert torch.equal(committee.probabilities, COMBINATIONS["logit_sum"](logits))
    assert committee.labels.tolist() == make_scores().labels.tolist()


@pytest.mark.parametrize("change, complaint", [
    ({"fingerprint": "the same images in another order"}, "another order"),
    ({"labels": make_scores().labels.flip(0)}, "labels"),
    ({"classes": [f"class {9 - k}" for k in range(10)]}, "classes"),
    ({"dataset": "cifar10"}, r"digits and cifar10"),
    ({"logits": random_logits(1)[0, :150], "labels": make_scores().labels[:150]}, r"200 and 150"),
])
def test_members_that_saw_other_images_are_refused_by_name(change, complaint):
    members = {"cnn_space1": make_scores(epoch=3), "cnn_space2": make_scores(epoch=3),
               "cnn_space3": make_scores(epoch=3, **change)}
    with pytest.raises(InputError, match=rf"cnn_space1 .*cnn_space3 .*{complaint}"):
        Committee(members)
    del members["cnn_space3"]
    check_same_images(members)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_without_finite_logits_is_refused_by_name(value):
    logits = random_logits(1)[0]
    logits[7, 2] = value
    with pytest.raises(InputError, match="cnn_space2, epoch 4"):
        Committee({"cnn_space1": make_scores(epoch=4), "cnn_space2": make_scores(epoch=4, logits=logits)})


def test_common_epochs_leaves_out_what_not_all_have():
    members = {"a": range(10), "b": [0, 2, 4, 6], "c": [4, 2, 0, 11]}
    assert common_epochs(members) == ([0, 2, 4], {"a": [1, 3, 5, 6, 7, 8, 9], "b": [6], "c": [11]})
    assert common_epochs({"a": range(3), "b": range(3)}) == ([0, 1, 2], {})


def test_members_without_a_common_epoch_are_refused():
    with pytest.raises(InputError, match=r"a: 0 to 1, b: 5"):
        common_epochs({"a": [0, 1], "b": [5]})


def test_span():
    assert [span([4]), span([0, 1, 2]), span([0, 2, 9])] == ["4", "0 to 2", "0 to 9, 3 of them"]
