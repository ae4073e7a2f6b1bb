"""Two processes against one: the same numbers, one writer, one decision; runs that lose processes, or change them."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.cli import find_device
from conas.darts.derived import drop_path_scales
from conas.data.batches import Stream
from conas.data.images import DATASETS, ImageSet
from conas.engine import batchnorm as synced
from conas.engine.door import accelerate
from conas.errors import InputError
from tests.conftest import ROOT
from tests.helpers import ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with space 1, where one process has run all scripts."""
    root = tmp_path_factory.mktemp("ranks")
    shutil.copytree(ROOT / "cnn_space1", root / "cnn_space1", ignore=shutil.ignore_patterns("search-*", "train-*"))
    return root


@pytest.fixture(scope="module")
def alone(root):
    """What one process finds."""
    found, argv, old = ranks.scripts(root, "one"), sys.argv, ranks.test_ensemble.ROOT
    for stage in ("search", "train"):
        shutil.copytree(root / "cnn_space1" / f"{stage}-one", root / "cnn_space1" / f"{stage}-copy")
    try:
        ranks.tests(root, "one")
    finally:
        sys.argv, ranks.test_ensemble.ROOT = argv, old
    return found


@pytest.fixture(scope="module")
def both(root, alone):
    """What each of two processes finds, and what they print."""
    done = subprocess.run([*TORCHRUN, str(ROOT / "tests/helpers/ranks.py"), str(root)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return [*(torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)), done.stdout]


@pytest.mark.parametrize("images", [16, 15])
@pytest.mark.parametrize("function", [ranks.search, ranks.retrain])
def test_two_processes_compute_what_one_does(both, function, images):
    one, two = function(images, True, ranks.STEPS[images]), both[0][f"{function.__name__} {images}"]
    assert set(one) == set(two)
    for name, value in one.items():
        if value.is_floating_point():
            assert value.dtype == torch.float64
            torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-11, msg=name)
        elif "checksum" not in name:
            assert torch.equal(two[name], value), name


@pytest.mark.parametrize("run", ["search 16", "search 15", "search apart", "retrain 16", "retrain 15", "retrain apart"])
def test_all_ranks_are_equal_after_every_step(both, run):
    first, second = both[0][run], both[1][run]
    assert set(first) == set(second) and any(name.startswith("checksum") for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_two_processes_measure_the_curvature_that_one_does(both):
    assert torch.equal(both[0]["curvature"], both[1]["curvature"])
    torch.testing.assert_close(both[0]["curvature"], ranks.curvature(9), rtol=1e-9, atol=0)


def test_without_sync_bn_each_rank_normalises_by_its_own_images(both):
    """The gradient and the running statistics are means of those of both parts, weighted by their numbers of images."""
    torch.manual_seed(0)
    network, expected = ranks.Everything(C=1, layers=3).double(), {"gradient 0": 0, "loss 0": 0}
    assert accelerate(network)  # for its order of the flat gradient; `network(x)` below is the definition
    before = {name: entry.clone() for name, entry in network.state_dict().items()}
    for own in (slice(0, 8), slice(8, 15)):
        network.load_state_dict(before)
        x, y = ranks.batch(15, 0, own)
        loss = cross_entropy(network(x), y)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, network.packing())])
        running = {name: buffer for name, buffer in network.named_buffers() if "running" in name}
        for name, value in {"gradient 0": gradient, **running}.items():
            expected[name] = expected.get(name, 0) + len(y) / 15 * value.detach()
    found = both[0]["search apart"]
    torch.testing.assert_close(found["gradient 0"], expected["gradient 0"], rtol=1e-9, atol=1e-12)
    whole = both[0]["search 15"]["gradient 0"]
    assert (found["gradient 0"] - whole).norm() > 1e-3 * whole.norm()  # it is not the batch's


def test_synced_batch_norm_is_the_library_s():
    """For a process alone and in its derivatives: by autograd's own numbers."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2, 5), (3,), (3,)))
    scope = synced.BatchScope(4, 4)
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    found, mean, rstd = synced.batch_norm(x, weight, bias, 1e-5, scope)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(synced.unbiased_variance(rstd, 40, 1e-5), x.var((0, 2, 3)))
    g = torch.randn_like(x)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight, bias), g) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_images_are_neither_lost_nor_repeated(both):
    for images in (1, 2, 9):  # of one image, the second process has none
        expected = ranks.logits(images)
        for rank in (0, 1):
            torch.testing.assert_close(both[rank]["logits"][images], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_those_of_tensor_split(monkeypatch, size):
    monkeypatch.setattr(distributed, "size", lambda: size)
    for count in (0, 1, 2, 15, 16):
        for rank, expected in enumerate(torch.arange(count).tensor_split(size)):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            assert torch.equal(torch.arange(count)[distributed.rank_slice(count)], expected)


@pytest.mark.parametrize("crop", [None, 20])
def test_parts_of_a_batch_are_those_of_one_process(monkeypatch, crop):
    """Augmentation is drawn for the whole batch, also for a last one that is short."""
    random = torch.Generator().manual_seed(0)
    info = replace(DATASETS["cifar10"], classes=tuple("abcdefghij"))
    pixels = torch.randint(0, 256, (18, 3, 32, 32), dtype=torch.uint8, generator=random)
    images = ImageSet(info, pixels, torch.arange(18) % 10)

    def batches():
        stream = Stream(images, torch.arange(18), 11, name="weights", seed=1, device="cpu", cutout_length=8, crop=crop)
        return list(islice(stream.batches(1), 3))

    whole, parts = batches(), []
    monkeypatch.setattr(distributed, "size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batches())
    assert [len(y) for _, y in whole] == [7, 11, 7] and [len(y) for _, y in parts[2]] == [2, 3, 2]
    for expected, *found in zip(whole, *parts):
        for i in (0, 1):
            assert torch.equal(torch.cat([part[i] for part in found]), expected[i])


def test_drop_path_draws_for_the_whole_batch(monkeypatch):
    torch.manual_seed(0)
    whole, parts = drop_path_scales(8, torch.zeros(7, 1, 1, 1), 0.5, 7), []
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for rank, images in enumerate((4, 3)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        parts.append(drop_path_scales(8, torch.zeros(images, 1, 1, 1), 0.5, 7))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for count, name, expected in ((2, "auto", "cuda:1"), (2, "cuda", "cuda:1"), (1, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert str(find_device(name)) == expected
    for name, words in (("cuda", "more processes here than the 1 CUDA"), ("cuda:0", "gives each a GPU of its own")):
        with pytest.raises(InputError, match=words):
            find_device(name)


def test_what_processes_tell_each_other(both):
    for rank in (0, 1):
        found = both[rank]["agreement"]
        assert found["gather"] == str([{"rank": 0, "values": []}, {"rank": 1, "values": [0, 1, 2]}])
        assert found["first"] == "done by 0" and found["first fails"] == "rank 0 cannot"
        assert found["one fails"] == found["in turn"] == "rank 1 cannot"
        assert (found["highest"], found["total"], found["said first"]) == ("[1, 7]", "7", "1")
        assert found["sound"] == "none" and "weights of rank 1 of 2 processes differ" in found["broken"]


def test_a_rank_that_strays_is_named_and_stops_the_run(both, root):
    assert both[0]["stray"] == both[1]["stray"] and "weights and alphas of rank 1 of 2" in both[0]["stray"]
    assert not (root / "cnn_space1" / "search-stray" / "checkpoints").exists()


def flat(row: dict) -> dict:
    """A row of metrics.jsonl whose margins, lists by kind of cell, are numbers by name."""
    margins = {f"{kind} {edge}": margin for kind, values in row.get("margins", {}).items()
               for edge, margin in enumerate(values)}
    return {name: value for name, value in row.items() if name != "margins"} | margins


def test_errors_are_those_of_all(both, root):
    assert both[0]["errors"] == both[1]["errors"]
    small, mixed, another = both[0]["errors"]
    assert "--batch_size 7: leaves a batch of 1 of the 50 images" in small and "2 processes need two" in small
    assert "flags of rank 1 of 2 processes differ" in mixed and "holds a run with --sync_bn True (now False)" in another
    assert not (root / "cnn_space1" / "search-mixed").exists()


def test_scripts_have_the_results_of_one_process(root, alone, both):
    for stage in ("search", "train"):
        for ours, theirs in zip(both[0]["scripts"][stage], alone[stage], strict=True):
            assert flat(ours) == pytest.approx(flat(theirs), rel=2e-3, abs=2e-5), stage
    assert both[0]["scripts"]["train"][0]["learning_rate"] == 0.025
    log = (root / "cnn_space1" / "search-two" / "log.txt").read_text().splitlines()
    assert len([line for line in log if line.startswith("epoch   0")]) == 1
    assert "rank 0: exit code 1 without the other" in both[2]
    assert "rank 1" not in both[2] and both[2].count("Genotype(") == 1


def test_tests_have_the_scores_of_one_process(root, both):
    space, names = root / "cnn_space1", 0
    for path in sorted(space.glob("*-one/probabilities/*.npz")):
        with np.load(path) as one, np.load(str(path).replace("-one", "-copy")) as two:
            names += 1
            np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-4, atol=1e-5)
            for key in ("labels", "checkpoint_sha256", "fingerprint", "split"):
                assert np.array_equal(one[key], two[key]), key
    assert names == 7  # two epochs of a search on two splits, two epochs and the best network of a training
    one, two = ((space / f"search-{save}" / "test_all.csv").read_text().splitlines() for save in ("one", "copy"))
    assert len(one) == len(two) == 3
    reports = [json.loads((root / f"committee-{save}" / "committee.json").read_text())["epochs"][-1]["committee"]
               for save in ("one", "copy")]
    assert reports[1]["top1"] == pytest.approx(reports[0]["top1"])


# losing and changing processes

SEARCH = ["train_search.py", *ranks.SEARCH, "--save", "chain", "--checkpoint_minutes", "0"]


def start(root: Path, size: int) -> list[subprocess.Popen]:
    """The search as torchrun starts it, but with exit codes to be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen([sys.executable, *SEARCH], cwd=root / "cnn_space1", stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=os.environ | {
                                 "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(size)]


def wait_for_a_step(root: Path, process: subprocess.Popen, since: int) -> int:
    """Until a state younger than `since` is there; returns its time."""
    path = root / "cnn_space1" / "search-chain" / "resume.pt"
    while not path.exists() or path.stat().st_mtime_ns <= since:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return path.stat().st_mtime_ns


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's children in /proc")
def test_processes_stop_together_change_in_number_and_are_replaced(bare_clone, tmp_path, alone):
    root = tmp_path / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    state, steps = 0, []
    for size, number, code in ((2, signal.SIGTERM, 143), (1, signal.SIGINT, 130)):
        group = start(root, size)
        state = wait_for_a_step(root, group[0], state)
        group[-1].send_signal(number)  # to one only
        outputs = [process.communicate(timeout=60) for process in group]
        assert [process.returncode for process in group] == [code] * size, outputs
        said = [errors for _, errors in outputs if "stopped in epoch" in errors]
        assert len(said) == 1 and "Traceback" not in "".join(errors for _, errors in outputs)
        steps.append(said[0])
        state = (root / "cnn_space1" / "search-chain" / "resume.pt").stat().st_mtime_ns
    assert steps[0] != steps[1]
    command = [*TORCHRUN, "--max-restarts", "1", *SEARCH]
    process = subprocess.Popen(command, cwd=root / "cnn_space1", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    wait_for_a_step(root, process, state)
    children = [int(child) for task in Path(f"/proc/{process.pid}/task").iterdir()
                for child in (task / "children").read_text().split()]
    os.kill(children[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("goes on in epoch") == 2 and output.count("Genotype(") == 1
    text = (root / "cnn_space1" / "search-chain" / "metrics.jsonl").read_text()
    for ours, theirs in zip(map(json.loads, text.splitlines()), alone["search"], strict=True):
        assert flat(ours) == pytest.approx(flat(theirs), rel=2e-3, abs=2e-5)
