"""Signs and remedies in whole searches: what the lines hold, that runs resume alike, and where a search stops."""
import json
import re
import shutil
from importlib import import_module

import pytest
import torch

from conas.commands import search, train
from conas.darts.genotype import load, to_json
from conas.draw import cell
from conas.errors import InputError
from conas.health.observer import Observer
from conas.runs.resume import Checkpointer
from tests.helpers.searches import SMALL, no_pictures  # noqa: F401  a fixture

SPACE = import_module("cnn_space2.model_search"), import_module("cnn_space2.architect")


def run(folder, *flags):
    search.main(folder / "cnn_space2", SPACE[0].Network, SPACE[1].Architect, "", [*SMALL, *flags])
    return folder / "cnn_space2" / "search-EXP"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_signs_change_nothing_else_and_are_drawn(tmp_path, capsys):
    plain = rows(run(tmp_path / "plain", "--epochs", "2"))
    folder = run(tmp_path / "looked", "--epochs", "2", "--curvature", "1")
    looked = rows(folder)
    assert [row["curvature"] > 0 for row in looked] == [True, True]
    assert [{k: v for k, v in row.items() if k != "curvature"} for row in looked] == plain
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert f"{looked[1]['skips']} of the 8 edges" in last and "too short to say" in last
    file = json.loads((folder / "genotypes" / "epoch_001.json").read_text())
    assert "two strongest edges" in file["rule"]
    for suffix in ("svg", "png"):
        cell.main([str(folder), "--out", str(tmp_path / f"health.{suffix}")])
    picture = (tmp_path / "health.svg").read_text()
    assert all(f'id="{name}"' in picture for name in ("valid_top1", "skips", "entropy_normal", "curvature"))
    with pytest.raises(InputError, match="DARTS_V2: curves are of searches"):
        cell.main([str(folder), "DARTS_V2", "--out", str(tmp_path / "two.svg")])
    with pytest.raises(InputError, match="--committee"):
        cell.main([str(folder), "--committee", "--out", str(tmp_path / "two.svg")])


def test_searches_of_one_name_have_one_colour_and_their_mean(tmp_path):
    """Read from the file: matplotlib's SVG has the points of each curve in pixels, in which means are means too."""
    values = {"a": [0.1, 0.3, 0.5], "b": [0.3, 0.5, 0.1, 0.7], "c": [0.2, 0.2, 0.2]}
    for name, curvature in values.items():
        (tmp_path / name).mkdir()
        lines = [{"epoch": epoch, "curvature": value} for epoch, value in enumerate(curvature)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "both.svg"
    cell.main([f"plain={tmp_path / 'a'}", f"plain={tmp_path / 'b'}", f"decay={tmp_path / 'c'}", "--out", str(out)])
    paths = dict(re.findall(r'<g id="curvature-(\w+)">\s*<path d="([^"]*)"', out.read_text()))
    assert set(paths) == {"plain", "decay"}
    heights = {group: [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path)] for group, path in paths.items()}
    assert len(heights["plain"]) == len(heights["decay"]) == 3 and len(set(heights["decay"])) == 1
    # mean of a and b in the first three epochs: 0.2, 0.4, 0.3; c is 0.2
    first, second, third = (y - heights["decay"][0] for y in heights["plain"])
    assert abs(first) < 0.01 and second < -1 and abs(third - second / 2) < 0.01


def test_a_run_with_remedies_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    flags = ["--epochs", "3", "--curvature", "2", "--alpha_warmup", "1", "--max_skips", "1",
             "--drop_path_prob", "0.4", "--checkpoint_minutes", "0"]
    whole = run(tmp_path / "whole", *flags)
    first, *others = (torch.load(whole / "checkpoints" / f"epoch_00{epoch}.pt")["state"] for epoch in range(3))
    assert not torch.equal(first["alphas_normal"], others[0]["alphas_normal"])
    cells = [json.loads((whole / "genotypes" / f"epoch_00{epoch}.json").read_text()) for epoch in range(3)]
    assert all(sum(name == "skip_connect" for name, _ in cell["normal"]) <= 1 for cell in cells)
    assert all("--max_skips" in cell["rule"] for cell in cells)
    steps, after_step = [], Checkpointer.maybe_save

    def stop(self, state):
        after_step(self, state)
        steps.append(None)
        if len(steps) == 5:  # within the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "maybe_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *flags)
    cut = run(tmp_path / "cut", *flags)
    assert rows(cut) == rows(whole)
    state = torch.load(cut / "checkpoints" / "epoch_002.pt")["state"]
    assert all(torch.equal(value, others[1][name]) for name, value in state.items())


def test_weights_alone_are_trained_in_the_warm_up(tmp_path):
    folder = run(tmp_path, "--epochs", "3", "--alpha_warmup", "2")
    alphas = [torch.load(folder / "checkpoints" / f"epoch_00{e}.pt")["state"]["alphas_reduce"] for e in range(3)]
    assert torch.equal(alphas[0], alphas[1]) and not torch.equal(alphas[1], alphas[2])


def test_a_search_that_is_stopped_ends_with_its_sound_cell(tmp_path, monkeypatch, capsys):
    def collapsing(self, metrics):
        return 2 if len(metrics) > 2 else None

    look = Observer.look
    monkeypatch.setattr(Observer, "collapsing", collapsing)
    monkeypatch.setattr(Observer, "look", lambda self, epoch: look(self, epoch) | {"skips": [0, 3, 5][epoch]})
    folder = run(tmp_path, "--epochs", "12", "--stop_on", "collapse")
    assert len(rows(folder)) == 3 and not (folder / "checkpoints" / "epoch_003.pt").exists()
    log = (folder / "log.txt").read_text()
    assert "stopped after epoch 2: the search is collapsing from epoch 2 on" in log
    assert log.count("collapsing: from epoch 2 on") == 1 and "the cell of epoch 1 is still sound" in log
    assert log.splitlines()[-1].startswith("this cell is not collapsed: 3 of the 8")
    kept = json.loads((folder / "genotype.json").read_text())
    assert "of epoch 1" in kept.pop("rule") and kept == to_json(load(folder / "genotypes" / "epoch_001.json", None))
    run(tmp_path, "--epochs", "12", "--stop_on", "collapse")
    assert "this search is finished" in capsys.readouterr().out
    for arch in ([], ["--arch", str(folder / "genotypes" / "epoch_001.json")]):
        train.main(tmp_path / "cnn_space2", import_module("cnn_space2.genotypes"), "",
                   argv=["--dataset", "digits", "--check_only", *arch])


@pytest.mark.parametrize("flags, word", [
    (["--stop_on", "curvature"], "--stop_on curvature: .* --curvature K"),
    (["--alpha_warmup", "1"], "--alpha_warmup 1: must be less than --epochs 1"),
    (["--drop_path_prob", "0.2", "--cuda_graph"], "--drop_path_prob: .* leave --cuda_graph out"),
    (["--drop_path_prob", "1"], "--drop_path_prob"),
])
def test_remedies_that_cannot_work_are_refused(flags, word, tmp_path):
    with pytest.raises(InputError, match=word):
        run(tmp_path, *flags)
    assert not (tmp_path / "cnn_space2").exists()


def test_a_run_from_before_these_flags_goes_on(tmp_path):
    folder = run(tmp_path / "a", "--epochs", "2")
    before = rows(folder)
    shutil.copytree(folder.parent, tmp_path / "b" / "cnn_space2")
    old = tmp_path / "b" / "cnn_space2" / "search-EXP"
    arguments = json.loads((old / "args.json").read_text())
    for name in ("curvature", "stop_on", "alpha_warmup", "max_skips", "drop_path_prob"):
        del arguments["arguments"][name]
    (old / "args.json").write_text(json.dumps(arguments))
    state = torch.load(old / "resume.pt")
    for row in state["metrics"]:
        for name in ("skips", "cell_parameters", "margins", "entropy_normal", "entropy_reduce"):
            del row[name]
    torch.save(state, old / "resume.pt")
    run(tmp_path / "b", "--epochs", "3", "--extend")
    assert "skips" not in rows(old)[0] and rows(old)[2]["skips"] >= 0 and len(before) == 2
    assert "unknown" in (old / "log.txt").read_text().splitlines()[-1]
