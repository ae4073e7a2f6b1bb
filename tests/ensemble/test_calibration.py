"""Temperatures against scipy's minimum, and what they must leave alone."""
import pytest
import scipy.optimize
import torch

from ensemble.combine.calibration import RANGE, apply_temperature, bound, fit_temperature, fit_temperatures
from ensemble.measure.metrics import nll, softmax


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
    assert wrong == RANGE[1] and bound(wrong) == "upper"


def test_impossible_labels_have_a_temperature():
    assert fit_temperature(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])) == 100


LABELS = torch.arange(60) % 4
NOISE = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("logits, labels", [
    (torch.zeros(60, 4), LABELS),
    (torch.full((60, 4), -7.3), LABELS),
    (torch.full((60, 4), 0.3) + 1e-6 * NOISE, LABELS),           # equal but for the rounding of float32
    (1000 * NOISE[:, :1].expand(-1, 4), LABELS),                 # equal but for a constant by image
    (1000 * NOISE[:, :1] + 1e-4 * NOISE.round(), LABELS),        # likewise, rounded as float32 is there
    (torch.full((60, 4), 0.3), torch.full((60,), 3)),            # all labels alike, and not the first class
    (torch.zeros(1, 4), torch.tensor([2])),                      # one image
    (NOISE[:, :1], torch.zeros(60, dtype=torch.int64)),          # one class
    (torch.tensor([[2.0, 2.0, 0.0]] * 2), torch.tensor([0, 1])),  # right or tied for best: falls for ever towards 0
    (torch.cat([NOISE[:5] + 9 * torch.eye(4)[LABELS[:5]], torch.zeros(55, 4)]), LABELS),  # right, or no answer
])
def test_where_nothing_is_to_be_learned_the_temperature_is_one(logits, labels):
    assert fit_temperatures(logits[None], labels).item() == 1
    assert bound(1) is None


def test_equal_logits_of_some_images_leave_the_temperature_to_the_others():
    logits, labels = case()
    dead = torch.full((300, 5), 0.3)
    both = fit_temperatures(torch.cat([logits, dead])[None], torch.cat([labels, torch.arange(300) % 5])).item()
    assert both == pytest.approx(fit_temperatures(logits[None], labels).item(), rel=1e-6)


@pytest.mark.parametrize("scale, end", [(1 / 400, "lower"), (1 / 50, None), (1, None), (70, None), (630, "upper"),
                                        (-1, "upper")])
def test_temperatures_are_the_best_of_a_grid_and_say_where_that_is_a_bound(scale, end):
    logits, labels = case(scale)
    grid = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    losses = [nll(softmax(logits / t), labels) for t in grid]
    ours = fit_temperatures(logits[None], labels).item()
    assert ours == pytest.approx(grid[int(torch.tensor(losses).argmin())].item(), rel=3e-3)
    assert nll(softmax(logits / ours), labels) <= min(losses) + 1e-12
    assert bound(ours) == end and (end is None or ours == {"lower": 0.01, "upper": 100.0}[end])
