"""Temperatures against scipy's minimum, and what they must leave alone."""
import pytest
import scipy.optimize
import torch

from ensemble.calibration import RANGE, apply_temperature, fit_temperature, fit_temperatures
from ensemble.metrics import nll, softmax


def case(scale=3.0, N=500, K=5, seed=0):
    """Logits that would be calibrated divided by `scale`, and labels drawn from that."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, K, generator=generator)
    return scale * logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.2, 1, 3, 10])
def test_the_temperature_is_the_minimum_that_scipy_finds(scale):
    logits, labels = case(scale)
    found = scipy.optimize.minimize_scalar(lambda t: nll((logits.double() / t).softmax(dim=1), labels),
                                           bounds=(0.05, 50), method="bounded", options={"xatol": 1e-9})
    ours = fit_temperatures(logits[None], labels).item()
    assert ours == pytest.approx(found.x, rel=1e-4)
    assert ours == pytest.approx(scale, rel=0.2)


def test_members_are_fitted_each_by_itself():
    cases = [case(scale) for scale in (0.5, 4)]
    labels = cases[0][1]
    together = fit_temperatures(torch.stack([logits for logits, _ in cases]), labels)
    alone = [fit_temperatures(logits[None], labels).item() for logits, _ in cases]
    assert together.tolist() == pytest.approx(alone)


def test_probabilities_have_the_temperature_of_their_logits():
    logits, labels = case()
    probabilities = softmax(logits)
    expected = fit_temperatures(logits[None], labels).item()
    assert fit_temperature(probabilities, labels) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(apply_temperature(probabilities, 2.5), (logits.double() / 2.5).softmax(dim=1))


def test_temperature_one_changes_no_bit_and_none_changes_answers():
    probabilities = softmax(case()[0])
    assert torch.equal(apply_temperature(probabilities, 1), probabilities)
    assert torch.equal(apply_temperature(probabilities, 7.0).argmax(dim=1), probabilities.argmax(dim=1))


def test_members_that_are_never_right_end_at_the_bound_and_faultless_ones_stay_as_they_are():
    right = 5 * torch.eye(3)
    faultless, wrong = fit_temperatures(torch.stack([right, -right]), torch.arange(3)).tolist()
    assert faultless == 1
    assert wrong == pytest.approx(RANGE[1], rel=1e-6)


def test_impossible_labels_have_a_temperature():
    assert fit_temperature(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])) == pytest.approx(100, rel=1e-6)
