"""The study: plans, resuming, and what it says of runs whose truth is known."""
import itertools
import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch

from conas import cli
from conas.errors import InputError
from ensemble import study
from ensemble.combine.committee import Committee
from ensemble.measure.metrics import nll, topk_accuracy
from ensemble.study_statistics import MIXED, as_text, compare_groups, members_of
from tests.commands.test_own_operation import OWN
from tests.conftest import Clone
from tests.ensemble.test_committee import make_scores

SPACES = ["cnn_space1", "cnn_space2", "cnn_space3"]
COSTS = {space: {"parameters": 10.0 * n, "flops": 1.0, "seconds": None} for n, space in enumerate(SPACES, 1)}
TINY = "--dataset digits --subset 100 --init_channels 2 --layers 3 --batch_size 50 --epochs 1"


def runs(seeds=4, shared=0.0, images=300):
    """Scores by (space, seed), of which the part `shared` of the noise is equal within a space."""
    generator = torch.Generator().manual_seed(0)
    labels, scores = torch.arange(images) % 4, {}
    for space in SPACES:
        own = torch.randn(images, 4, generator=generator)
        for seed in range(1, seeds + 1):
            noise = shared * own + (1 - shared) * torch.randn(images, 4, generator=generator)
            logits = noise + torch.nn.functional.one_hot(labels, 4)
            scores[space, seed] = make_scores(space, 0, logits=logits, labels=labels, seed=seed)
    return scores


def test_members_of_are_all_committees():
    assert len(members_of(SPACES, range(5), 3)) == 125
    alone = members_of(SPACES[:1], range(5), 3)
    assert sorted(alone) == sorted(tuple((SPACES[0], s) for s in c) for c in itertools.combinations(range(5), 3))
    assert members_of(SPACES[:1], range(2), 3) == []


def test_groups_are_the_means_over_their_committees():
    scores = runs()
    summary = compare_groups(scores, 3, COSTS)
    labels = scores["cnn_space1", 1].labels
    losses = {}
    mixed = [tuple(zip(SPACES, seeds)) for seeds in itertools.product(range(1, 5), repeat=3)]
    alone = [tuple(("cnn_space2", s) for s in seeds) for seeds in itertools.combinations(range(1, 5), 3)]
    for group, committees in ((MIXED, mixed), ("cnn_space2 alone", alone)):
        found = [Committee({str(m): scores[m] for m in members}).probabilities for members in committees]
        losses[group] = np.mean([nll(p, labels) for p in found])
        figures = summary["groups"][group]["figures"]
        assert summary["groups"][group]["committees"] == len(committees)
        assert figures["loss"]["mean"] == pytest.approx(losses[group])
        assert figures["top1"]["mean"] == pytest.approx(100 * np.mean([topk_accuracy(p, labels) for p in found]))
    difference = summary["differences"]["cnn_space2 alone"]["loss"]["mean"]
    assert difference == pytest.approx(losses[MIXED] - losses["cnn_space2 alone"])
    means = [summary["groups"][f"{space} alone"]["figures"]["ece"]["mean"] for space in SPACES]
    assert summary["differences"]["mean of the spaces alone"]["ece"]["mean"] == pytest.approx(
        summary["groups"][MIXED]["figures"]["ece"]["mean"] - sum(means) / 3)
    assert summary["groups"][MIXED]["compute"] == {"parameters": 60, "flops": 3, "seconds": None}
    assert summary["groups"]["cnn_space3 alone"]["compute"]["parameters"] == 90


def test_intervals_of_single_members_are_students():
    """With committees of the size of one seed each, the mean over members is a plain mean."""
    scores = runs(5)
    figures = compare_groups(scores, 3, COSTS)["groups"]["cnn_space1 alone"]["figures"]["member_top1"]
    accuracies = [scores["cnn_space1", seed].top(1) for seed in range(1, 6)]
    expected = scipy.stats.t.interval(0.95, 4, np.mean(accuracies), scipy.stats.sem(accuracies))
    assert (figures["low"], figures["high"]) == pytest.approx(expected)


def test_the_answer_finds_a_difference_where_there_is_one_and_none_where_not():
    alike = compare_groups(runs(6), 3, COSTS)
    differ = compare_groups(runs(6, shared=0.8), 3, COSTS)
    assert "top-1 %: mixed spaces are better" in as_text(differ)
    assert "loss: mixed spaces are better" in as_text(differ)
    assert "top-1 %: no difference can be told" in as_text(alike)
    disagreement = differ["differences"]["mean of the spaces alone"]["disagreement"]
    assert disagreement["low"] > 0  # different spaces err on different images
    json.dumps(differ, allow_nan=False)


def test_three_seeds_have_means_but_no_intervals():
    summary = compare_groups(runs(3), 3, COSTS)
    assert summary["groups"]["cnn_space1 alone"]["figures"]["top1"]["low"] is None
    assert "no interval" in as_text(summary)


def test_runs_on_other_images_are_refused():
    scores = runs()
    scores["cnn_space2", 3] = make_scores("cnn_space2", logits=scores["cnn_space2", 3].logits, fingerprint="others")
    with pytest.raises(InputError, match="cnn_space2, seed 3"):
        compare_groups(scores, 3, COSTS)


def test_a_plan_lists_ordinary_commands(tmp_path):
    content = study.plan(study.PlanOptions(seeds=5))
    assert len(content["runs"]) == 15
    assert content["runs"][4] == {"space": "cnn_space2", "seed": 2, "save": "study-2", "commands": [
        ["train_search.py", *study.DIGITS.split(), "--save", "study-2", "--seed", "2"]]}
    trained = study.plan(study.PlanOptions(seeds=3, stage="train"))["runs"][0]["commands"]
    assert [command[0] for command in trained] == ["train_search.py", "train.py"]
    assert trained[1][-6:] == ["--search", "study-1", "--save", "study-1", "--seed", "1"]
    study.write_plan(tmp_path / "p.json", content)
    assert study.read_plan(tmp_path / "p.json") == content
    study.write_plan(tmp_path / "p.json", content)
    with pytest.raises(InputError, match="another plan"):
        study.write_plan(tmp_path / "p.json", content | {"size": 6})


@pytest.mark.parametrize("options, word", [
    ({"size": 4}, "--size 4"), ({"size": 6}, "as many --seeds"), ({"spaces": ("cnn_space9",)}, "cnn_space9")])
def test_plans_that_cannot_be_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        study.plan(study.PlanOptions(**options))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "conas-study"}'])
def test_files_that_are_no_plans_are_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError, match=r"p\.json: is no plan"):
        study.read_plan(tmp_path / "p.json")
    with pytest.raises(InputError, match="no such plan"):
        study.read_plan(tmp_path / "q.json")


@pytest.mark.parametrize("words", [[], ["plan"], ["go", "x.json"], ["run", "--part"],
                                   ["plan", "x.json", "--sead", "1"]])
def test_wrong_words_get_one_line(words, capsys):
    assert cli.run(lambda: study.main(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_study_in_a_bare_clone_resumes_and_reports(bare_clone, tmp_path):
    """One of its spaces has an operation of its own."""
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    clone = Clone(tmp_path / "CoNAS")
    shutil.copytree(clone.root / "cnn_space3", clone.root / "cnn_space4")
    (clone.root / "cnn_space4" / "genotypes.py").write_text(OWN)

    def command(*words):
        return clone.run("-m", "ensemble.study", *words)

    assert command("plan", "p.json", "--seeds", "2", "--save", "s", "--size", "2", "--spaces", "cnn_space1",
                   "cnn_space4", f"--flags={TINY}").returncode == 0
    early = command("report", "p.json")
    assert early.returncode == 2 and "4 of 4 runs are not finished" in early.stderr
    half = command("run", "p.json", "--part", "1/2")
    assert half.returncode == 0 and half.stdout.count("train_search.py") == 2, half.stderr
    rest = command("run", "p.json")
    assert rest.returncode == 0 and rest.stdout.count("train_search.py") == 2, rest.stderr
    assert command("run", "p.json").stdout == "4 runs are done\n"
    done = command("report", "p.json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((clone.root / "p-report.json").read_text())
    assert summary["groups"][MIXED]["committees"] == 4 and summary["stage"] == "search"
    assert summary["groups"]["cnn_space1 alone"]["committees"] == 1
    compute = summary["groups"][MIXED]["compute"]
    assert compute["seconds"] > 0 and compute["parameters"] > 1000 and compute["flops"] > 1000

    # what is kept needs no networks, is run no more, and says the same but for float16
    assert "4 runs are new in kept" in command("keep", "p.json", "--to", "kept", "--note", "a note").stdout
    moved = clone.root / "cnn_space1" / "search-s-1"
    moved.rename(clone.root / "away")
    assert command("report", "p.json").returncode == 2
    kept = command("report", "kept/p.json")
    assert kept.returncode == 0, kept.stderr
    again = json.loads((clone.root / "kept" / "p-report.json").read_text())
    for group, before in summary["groups"].items():
        assert again["groups"][group]["compute"] == before["compute"]
        for name in ("top1", "loss", "brier"):  # an ECE may jump where a confidence is near the edge of a bin
            assert again["groups"][group]["figures"][name]["mean"] == pytest.approx(before["figures"][name]["mean"],
                                                                                    rel=1e-3)
    assert command("run", "kept/p.json").stdout.splitlines() == [
        "1 of 4 runs were kept in kept, and are not run again", "3 runs are done"]
    text = b"".join(path.read_bytes() for path in (clone.root / "kept").rglob("*.json"))
    assert str(clone.root).encode() not in text and b"a note" in text

    # one seed of the two is not enough, two of three are
    shutil.rmtree(clone.root / "kept" / "cnn_space1" / "search-s-1")
    assert "1 of 4 runs are not finished" in command("report", "kept/p.json", "--partial").stderr
    plan = json.loads((clone.root / "p.json").read_text())
    plan["seeds"] = [1, 2, 3]
    plan["runs"] += [json.loads(json.dumps(run).replace("s-1", "s-3")) | {"seed": 3} for run in plan["runs"][:2]]
    (clone.root / "q.json").write_text(json.dumps(plan))
    (clone.root / "away").rename(moved)
    some = command("report", "q.json", "--partial")
    assert some.returncode == 0 and "1 of 3 seeds are left out (3)" in some.stdout, some.stderr

    arguments = clone.root / "cnn_space4" / "search-s-2" / "args.json"
    arguments.write_text(arguments.read_text().replace('"momentum": 0.9', '"momentum": 0.8'))
    other = command("report", "p.json")
    assert other.returncode == 2 and "--momentum" in other.stderr


def test_a_run_that_fails_is_named_and_the_others_go_on(bare_clone, tmp_path):
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    clone = Clone(tmp_path / "CoNAS")
    content = study.plan(study.PlanOptions(seeds=2, size=2, spaces=("cnn_space1",), flags=TINY))
    content["runs"][0]["commands"][0] += ["--layers", "2"]
    study.write_plan(clone.root / "p.json", content)
    done = clone.run("-m", "ensemble.study", "run", "p.json")
    assert done.returncode == 2
    assert "1 of 2 runs failed" in done.stderr and "--layers 2" in done.stderr
    assert study.finished(clone.root / "cnn_space1" / "search-study-2")
