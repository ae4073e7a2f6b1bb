"""The loops that the scripts show: the same runs as those of `main`, which former scripts call; loops of one's own."""
import ast
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

import cnn_space2.architect
import cnn_space2.genotypes
import cnn_space2.model_search
import conas.engine.cuda_graph
import conas.recurrent.search
import conas.recurrent.train
import rnn.architect
import rnn.genotypes
import rnn.model_search  # noqa: F401  by its name, below
from conas.commands import search, train
from conas.commands.search import SearchRun
from conas.data.batches import Stream
from conas.engine.cuda_graph import Replayed
from conas.runs.checkpoint import load
from conas.runs.loop import Loop
from tests.conftest import ROOT
from tests.helpers.crash import SMALL, differences, everything
from tests.helpers.searches import no_pictures  # noqa: F401

TEXT = ["--data", "text", "--nhid", "4", "--batch_size", "16", "--bptt", "9", "--epochs", "2", "--device", "cpu"]
ALL_OPS = ["--arch", "DARTS_V2", "--any_ops", "--drop_path_prob", "0.3", "--auxiliary"]
SHORT = [*SMALL, "--checkpoint_minutes", "10"]
LOOPS = {"cnn_space2/train_search.py": (search, [*SHORT, "--no-unrolled"]),
         "cnn_space2/train.py": (train, [*SMALL, *ALL_OPS]),
         "rnn/train_search.py": (conas.recurrent.search, TEXT),
         "rnn/train.py": (conas.recurrent.train, TEXT)}


def shown_loop(script: str, here: Path):
    """The function `main` of a script, as if its folder were `here`; and what its imports are."""
    tree = ast.parse((ROOT / script).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)
                 or (isinstance(node, ast.ImportFrom) and node.module.startswith("conas"))]
    package = sys.modules[script.split("/")[0]]
    names = {"HERE": here, "__doc__": "", "genotypes": package.genotypes, "Network": package.model_search.Network,
              "Architect": package.architect.Architect}
    exec(compile(tree, script, "exec"), names)
    return names["main"], names


@pytest.mark.parametrize("script", LOOPS)
def test_a_script_and_main_are_the_same_run(script, tmp_path, monkeypatch):
    """Bit for bit; scripts of earlier versions, of which users have copies, call `main`."""
    monkeypatch.setattr(conas.recurrent.search, "draw_recurrent", lambda *_: [])
    monkeypatch.setattr(conas.recurrent.train, "should_average", lambda losses, _: len(losses) == 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        lines = (ROOT / "data" / "gospels" / f"{split}.txt").read_text().splitlines()[:60]
        (tmp_path / "text" / f"{split}.txt").write_text("\n".join(lines))
    module, flags = LOOPS[script]
    space, kind = script.split("/")[0], "search" if "search" in script else "train"
    for name in ("shown", "main"):
        here = tmp_path / name / space
        here.mkdir(parents=True)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        main, names = shown_loop(script, here)
        if name == "shown":
            main()
        elif kind == "search":
            module.main(here, names["Network"], names["Architect"], "")
        else:
            module.main(here, names["genotypes"], "")
    folders = [tmp_path / name / space / f"{kind}-EXP" for name in ("shown", "main")]
    assert len(everything(folders[0])) > 3
    assert not differences(*map(everything, folders))


def searching(folder: Path, *flags: str) -> SearchRun:
    return SearchRun(folder / "cnn_space2", cnn_space2.model_search.Network, cnn_space2.architect.Architect, "",
                     [*SHORT, "--no-unrolled", "--epochs", "1", *flags])


def test_mistakes_in_a_loop_are_told(tmp_path):
    with searching(tmp_path / "a") as run:
        with pytest.raises(RuntimeError, match="step 0 of epoch 0 was not taken"):
            for epoch in run.epochs():
                for _ in run.steps(epoch):
                    pass
        with pytest.raises(RuntimeError, match="epoch 0 ends after 0 of 2 steps"):
            run.end_epoch()
    with searching(tmp_path / "b") as run, pytest.raises(RuntimeError, match="epoch 0 has no end"):
        for epoch in run.epochs():
            for train, _, lr in run.steps(epoch):
                run.do(run.weight_step, train, lr)
    with searching(tmp_path / "c") as run, pytest.raises(TypeError, match="forgetful: must return"):
        def forgetful(train, lr):
            run.weight_step(train, lr)

        for epoch in run.epochs():
            for train, _, lr in run.steps(epoch):
                run.do(forgetful, train, lr)


def test_a_loop_is_over_before_its_folder_is_free(tmp_path, monkeypatch):
    """Streams of batches end with the run: none of their workers is left when another process may open the folder."""
    open_streams, batches = set(), Stream.batches

    def watched(self, start=0):
        open_streams.add(self.name)
        try:
            yield from batches(self, start)
        finally:
            open_streams.remove(self.name)

    monkeypatch.setattr(Stream, "batches", watched)
    with searching(tmp_path) as run:
        for epoch in run.epochs():
            for train, _, lr in run.steps(epoch):
                assert open_streams == {"weights", "alphas"}
                run.do(run.weight_step, train, lr)
            run.end_epoch()
    assert not open_streams


def test_the_loop_of_the_page_leaves_the_alphas_alone_at_first(tmp_path, monkeypatch):
    """docs/extending.md; also if a run is stopped between both parts, and with a graph for each kind of step."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n(def main.*?)```", page, re.DOTALL)
    assert "epoch < 15" in code
    names, epochs = {"SearchRun": lambda *_: run, "HERE": None, "Network": None, "Architect": None}, Loop.epochs
    exec(code.replace("epoch < 15", "epoch < 1"), names)

    def states(folder: Path) -> list[dict[str, torch.Tensor]]:
        return [load(path)["state"] for path in sorted((folder / "cnn_space2" / "search-EXP").glob("checkpoints/*"))]

    run = searching(tmp_path / "a", "--epochs", "2")
    names["main"]()
    first, second = (state["alphas_normal"] for state in states(tmp_path / "a"))
    assert first.abs().max() < 0.01  # 1e-3 times a normal number, before Adam's first step
    assert not torch.equal(first, second)

    run = searching(tmp_path / "b", "--epochs", "2")
    monkeypatch.setattr(Loop, "epochs", lambda self: itertools.islice(epochs(self), 1))
    names["main"]()
    monkeypatch.undo()
    run = searching(tmp_path / "b", "--epochs", "2")
    names["main"]()
    assert not differences(states(tmp_path / "b"), states(tmp_path / "a"))


def test_each_kind_of_step_has_a_graph_of_its_own(tmp_path, monkeypatch):
    """Also one that needs one batch. By a stand-in for CUDA's recording, in which results keep their place."""
    recorded = []

    def record(function):
        recorded.append(function)
        results = [torch.zeros(()), torch.zeros((), dtype=torch.int64)]
        return lambda: [own.copy_(value) for own, value in zip(results, function())], results

    monkeypatch.setattr(search, "graph_fits", lambda *_: True)
    monkeypatch.setattr(search, "on_device", lambda *_: None)
    monkeypatch.setattr(search, "Replayed", lambda *arguments: Replayed(*arguments, record=record))
    monkeypatch.setattr(conas.engine.cuda_graph, "WARM_UP", 1)
    states = []
    for flag in "--no-cuda_graph", "--cuda_graph":
        with searching(tmp_path / flag, "--epochs", "3", flag) as run:
            def iterate(train, valid, lr):
                run.alpha_step(train, valid, lr)
                return run.weight_step(train, lr)

            for epoch in run.epochs():
                for step, (train, valid, lr) in enumerate(run.steps(epoch)):
                    run.do(*((iterate, train, valid) if step % 2 else (run.weight_step, train)), lr)
                run.end_epoch()
        states.append(load(run.folder / "checkpoints" / "epoch_002.pt")["state"])
    assert len(recorded) == 2 and not differences(*states)
