"""The rule that says when a search collapses: on published searches, by hand, and on what it cannot judge."""
import json
import math

import pytest

from conas.errors import InputError
from conas.health.__main__ import main
from conas.health.collapse import collapsing_from, projected_skips, sound_epoch
from conas.health.series import EIGENVALUES, SKIPS, read
from conas.health.table import Judged, counting, published
from tests.conftest import ROOT

FACTS = ROOT / "conas" / "health" / "robust_darts_s1_cifar10.json"
COLLAPSED = [f"0.0_{decay}/{seed}" for decay in ("0.0003", "0.0009", "0.0027") for seed in (1, 2, 3)]


def verdicts(path, capsys, *flags) -> dict[str, str]:
    main([str(path), *flags])
    return dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())


def test_published_searches_are_stopped_in_time_and_sound_ones_are_left_alone(capsys):
    runs = json.loads(FACTS.read_text())["runs"]
    said = verdicts(FACTS, capsys)
    assert list(said) == list(runs)
    stopped = {name: int(text.rpartition(" ")[2]) for name, text in said.items() if text != "sound"}
    assert all(said[name] == f"collapsing from epoch {epoch}" for name, epoch in stopped.items())
    sound = [name for name, run in runs.items() if name not in COLLAPSED and max(run[SKIPS][10:]) <= 3]
    assert (len(COLLAPSED), len(sound)) == (9, 17)
    assert sum(runs[name][SKIPS][stopped[name]] <= 3 for name in COLLAPSED if name in stopped) >= 7
    assert sum(name in stopped for name in sound) <= 1


def test_the_other_rules_do_what_is_known_of_them():
    runs = read(FACTS)
    judged = Judged(published, runs)
    assert (judged.in_time, judged.late) == (4, 5)
    assert sorted(published(runs[name]) for name in ("0.0_0.0027/2", "0.0_0.0027/3")) == [34, 40]
    assert Judged(counting, runs).in_time == 0


def test_the_table_chooses_each_gain_on_the_other_seeds(tmp_path, capsys):
    runs = json.loads(FACTS.read_text())["runs"]
    main([str(FACTS), "--table"])
    table = capsys.readouterr().out.splitlines()
    assert "\n".join(table[:-2]) in (ROOT / "docs" / "health.md").read_text(encoding="utf-8")
    assert "| 7 of 9 |" in table[-3] and "each seed left out once" in table[-3]
    for name in runs:  # a seed's own runs have no part in its gain
        if name.endswith("/2"):
            runs[name][SKIPS] = [8] * 50
    (tmp_path / "other.json").write_text(json.dumps({"runs": runs}))
    main([str(tmp_path / "other.json"), "--table"])
    assert capsys.readouterr().out.splitlines()[6].split("|")[1] == table[6].split("|")[1]
    assert "seed 2, gain 0.65" in table[6]


def test_the_projection_by_hand():
    curvature = {0: 0.1, 1: 0.1, 2: -0.1, 3: math.nan, 4: math.inf, 5: 0.0, 10: 0.2, 12: 0.4, 13: 0.1}
    skips = [5, 5, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3]
    projected = projected_skips(skips, curvature, 20)
    assert all(map(math.isnan, projected[:4])) and not any(map(math.isnan, projected[4:]))
    growth = math.log(0.2 * 0.4 * 0.1) / 3 - math.log(0.1)  # of epochs 10, 12 and 13 over 0, 1 and 2
    assert projected[13] == pytest.approx(3 + 0.6 * 6 / 20 * (2 + 3 * growth), rel=1e-12)
    assert projected[12] == pytest.approx(3 + 0.6 * 7 / 20 * 2, rel=1e-12)  # two values of the last four epochs


def test_scale_and_length_of_a_search_do_not_matter():
    for name, series in read(FACTS).items():
        whole = collapsing_from(series.skips, series.curvature, 50)
        large = {epoch: -1e4 * value for epoch, value in series.curvature.items()}
        assert collapsing_from(series.skips, large, 50) == whole, name
        twice = [skips for skips in series.skips for _ in range(2)]
        longer = collapsing_from(twice, {2 * epoch + 1: value for epoch, value in series.curvature.items()}, 100)
        assert (longer is None) == (whole is None) and (whole is None or abs(longer - 2 * whole) <= 2), name


def test_the_cell_to_take_instead():
    assert sound_epoch([0, 1, 3, 2, 3, 4, 5], 6) == 4
    assert sound_epoch([0, 1, 3], 2) == 2
    assert sound_epoch([4, 5, 6], 2) is None


def test_what_is_missing_is_said(tmp_path, capsys):
    run = json.loads(FACTS.read_text())["runs"]["0.0_0.0003/1"]
    nan = [math.nan if i == 3 else value for i, value in enumerate(run[EIGENVALUES])]
    runs = {"skips": {SKIPS: run[SKIPS]}, "eigenvalues": {"epochs": run["epochs"], EIGENVALUES: run[EIGENVALUES]},
            "nan": run | {EIGENVALUES: nan}, "null": run | {SKIPS: [None, *run[SKIPS][1:]]}, "nothing": {},
            "short": {SKIPS: [0, 1, 2]}, "half": run | {SKIPS: run[SKIPS][:14]},
            "few": run | {"epochs": [0, 10, 20], EIGENVALUES: [0.1, 0.2, 0.3]},
            "infinite": run | {SKIPS: [math.inf] * 20}}
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    said = verdicts(tmp_path / "runs.json", capsys)
    assert said["skips"] == "collapsing from epoch 15 (by skips alone: no eigenvalues)"
    assert said["eigenvalues"] == f"not judged: no {SKIPS}" == said["nothing"]
    assert said["nan"].startswith("collapsing from epoch 14 (without 1 of 26 eigenvalues")
    assert said["null"] == "not judged: the skips of epoch 0 are nan"
    assert said["infinite"].startswith("not judged")
    assert said["short"] == "not judged: 3 epochs; the rule needs 10 or more"
    assert "fewer than 3 eigenvalues in the first fifth" in said["few"]
    assert "eigenvalues of 19 epochs after the last skips" in said["half"]
    assert verdicts(tmp_path / "runs.json", capsys, "--epochs", "50")["half"].endswith("after 14 of 50 epochs)")


@pytest.mark.parametrize("content, word", [
    ("", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read"), ('{"runs": {}}', "at least one run"),
    ('{"runs": [1]}', "at least one run"), ('{"runs": {"a": 3}}', "run a is no object"),
    ('{"runs": {"a": {"epochs": [0, 1], "dominant_eigenvalue": [0.1]}}}', "1 of dominant_eigenvalue, but 2 epochs"),
    ('{"runs": {"a": {"skips_in_normal_cell_by_epoch": "1"}}}', "must be a list of numbers"),
    ('{"runs": {"a": {"skips_in_normal_cell_by_epoch": [0, "1"]}}}', "its item 1 is '1'"),
    ('{"runs": {"a": {"skips_in_normal_cell_by_epoch": [-1]}}}', "must not be negative"),
    ('{"runs": {"a": {"epochs": [0, 0], "dominant_eigenvalue": [1, 2]}}}', "distinct whole numbers"),
    ('{"runs": {"a": {"epochs": [NaN], "dominant_eigenvalue": [1]}}}', "distinct whole numbers"),
    ('{"runs": {"a": {"skips_in_normal_cell_by_epoch": [1e999, 1' + "0" * 400 + "]}}}", "its item 1"),
])
def test_a_bad_file_is_one_line_that_names_it(content, word, tmp_path, capsys):
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(InputError, match=word) as error:
        main([str(path)])
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not capsys.readouterr().out
