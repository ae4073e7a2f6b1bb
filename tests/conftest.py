"""Shared by all tests: one thread for each process, since the networks here are small, and a bare clone to run in."""
import gc
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import start

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that the tests start
# Thousands of tests keep millions of objects, which a collection goes through: by default a tenth of the suite's time.
gc.set_threshold(20_000, 20, 50)


class Clone:
    """A copy of the repository, as `git clone` would lay it, and a way to run its scripts."""

    def __init__(self, root: Path):
        self.root = root

    def run(self, script: str, *arguments: object, cwd: Path | str | None = None, **settings
            ) -> subprocess.CompletedProcess:
        """Run a script, by default from its own folder, as the README says, or `-m` and a module, from the root.

        `settings` are those of tests/helpers/launch.py.
        """
        path = self.root / script
        cwd = path.parent if cwd is None else cwd
        name = path.name if Path(cwd) == path.parent else str(path)
        return start(name, *arguments, cwd=cwd, **settings)


def clone(target: Path) -> Clone:
    """Copy what belongs to the repository: neither runs nor environments nor downloaded data."""
    ignore = shutil.ignore_patterns(".git", ".venv", "search-*", "train-*", "committee-*", "__pycache__", ".*_cache",
                                    "tests", "img", "docs")
    shutil.copytree(ROOT, target, ignore=ignore)
    for entry in (target / "data").iterdir():
        if entry.name not in ("README.md", "digits.npz", "gospels"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return Clone(target)


@pytest.fixture(scope="session")
def bare_clone(tmp_path_factory) -> Clone:
    """A clone without runs; tests that write into it take a copy of their own."""
    return clone(tmp_path_factory.mktemp("clone") / "CoNAS")
