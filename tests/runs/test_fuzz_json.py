"""Fuzzed JSON: whatever its text, reading it ends in the right result or in one line that names the file."""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from conas.commands.scoring import scores_for
from conas.darts import genotype as genotypes
from conas.darts.derived import NetworkCIFAR
from conas.darts.operations import OPERATIONS
from conas.darts.published import GENOTYPES
from conas.darts.space import Space, discover
from conas.errors import InputError
from conas.files import write_json
from conas.runs.folder import read_arguments
from conas.runs.options import TestOptions
from ensemble import study, study_runs
from ensemble.combine.committee import Committee
from ensemble.combine.network import load_committee
from ensemble.report import html, report
from tests.helpers.hostile import TEXTS, examples, fuzz, hostile_json, refused
from tests.helpers.untrained import write_runs

GENOTYPE = genotypes.to_json(GENOTYPES["DARTS_V2"])
PLAN = study.plan(study.PlanOptions(seeds=3))


def builds(genotype) -> bool:
    with torch.device("meta"):
        return NetworkCIFAR(2, 10, 3, False, genotype).arguments["C"] == 2


def only_starts_our_scripts(plan) -> bool:
    names = {space.name for space in discover(study.ROOT)}
    return all(run["space"] in names and command[0] in ("train_search.py", "train.py")
               for run in plan["runs"] for command in run["commands"])


@pytest.mark.parametrize("name, good, read, right", [
    ("genotype.json", GENOTYPE, lambda path: genotypes.load(path, OPERATIONS), builds),
    ("args.json", {"version": "0", "arguments": {"seed": 2, "epochs": 3}}, lambda path: read_arguments(path.parent),
     lambda arguments: isinstance(arguments, dict)),
    ("study.json", PLAN, study.read_plan, only_starts_our_scripts),
    ("seconds.json", {"seconds": 1.5}, lambda path: study_runs.read_seconds(path.parent), lambda seconds: seconds >= 0),
])
@examples(40, 150)
def test_any_json_is_right_or_refused_by_name(tmp_path, name, good, read, right, examples):
    path = tmp_path / name
    write_json(path, good)
    assert right(read(path))

    @settings(fuzz, max_examples=examples)
    @given(content=hostile_json(good))
    def check(content):
        path.write_bytes(content)
        found = refused(path, lambda: read(path), name)
        assert found is None or right(found)
    check()


@pytest.mark.parametrize("change", [
    {"space": "../../tmp"}, {"commands": [["/bin/sh", "-c", "true"]]}, {"commands": [["../train.py"]]},
    {"save": "../x"}, {"commands": [[]]}, {"commands": "train.py"}])
def test_a_plan_starts_nothing_but_our_scripts(tmp_path, change):
    path = tmp_path / "study.json"
    runs = [PLAN["runs"][0] | change, *PLAN["runs"][1:]]
    write_json(path, PLAN | {"runs": runs, "spaces": [*PLAN["spaces"][:2], runs[0]["space"]]})
    with pytest.raises(InputError, match=r"study\.json: is no plan"):
        study.read_plan(path)


def test_odd_texts_survive_json(tmp_path):
    """Names of files need not be text, and must not stop the writing of what is said of them."""
    @fuzz
    @given(text=TEXTS)
    def check(text):
        write_json(tmp_path / "text.json", {"name": text})
        assert json.loads((tmp_path / "text.json").read_text()) == {"name": text}
    check()


@pytest.fixture(scope="module")
def committee(tmp_path_factory) -> tuple[Path, dict]:
    """A root with a committee of three untrained supernets, and its report."""
    root = tmp_path_factory.mktemp("root")
    write_runs(root, "digits", "data", None, 60, 1)
    spaces = discover(study.ROOT)
    scores, files = {}, {}
    for space in spaces:
        (root / space.name / "model_search.py").touch()
        here = Space(space.name, root / space.name, space.network)
        path = here.search_folder("EXP") / "checkpoints" / "epoch_000.pt"
        scores[space.name] = scores_for(here, path, TestOptions(device="cpu"))
        files[space.name] = path.relative_to(root).as_posix()
    last = Committee(scores)
    summary = report.assemble([report.evaluate(last, files)], last, {})
    report.write(root / "committee-EXP", summary, last)
    return root, json.loads((root / "committee-EXP" / "committee.json").read_text())


@examples(8, 50)
def test_any_report_gives_a_committee_or_an_input_error(committee, monkeypatch, examples):
    root, good = committee
    path = root / "committee-EXP" / "committee.json"
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert load_committee(root, "EXP")(images).shape == (2, 10)
    monkeypatch.setattr(html, "ROOT", root)
    html.main([])
    assert "Committee on digits" in (root / "committee-EXP" / "report.html").read_text()

    @settings(fuzz, max_examples=examples)
    @given(content=hostile_json(good))
    def check(content):
        path.write_bytes(content)
        found = refused(path, lambda: load_committee(root, "EXP"))
        assert found is None or found(images).sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
        try:
            html.main([])
        except InputError as error:
            assert "\n" not in str(error)
        assert "<script>alert" not in (root / "committee-EXP" / "report.html").read_text()
    check()
