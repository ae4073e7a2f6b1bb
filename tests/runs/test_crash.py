"""The crash matrix: runs that are killed anywhere end with the same bits. `make torture` kills at every event."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
from tests.helpers.crash import matrix
results, events = matrix(sys.argv[1], Path(sys.argv[2]), kills := int(sys.argv[3]))
assert len({number for number, *_ in results}) == kills and events > 150
for number, name, differ in results:
    assert not differ, f"killed at event {number}, {name}: {differ}"
print("all alike")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind, kills", [("search", 5), ("training", 7)])
def test_killed_anywhere_it_ends_alike(kind, kills, tmp_path):
    # in a process of its own, since forks of this one would inherit the threads of other tests
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind, tmp_path, str(kills)], cwd=ROOT, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0 and "all alike" in done.stdout, done.stderr[-2000:]
