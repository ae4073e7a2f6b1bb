"""What README and docs/ name is there: files, modules, flags; and their tables are what a command prints."""
import re
import shlex

import pytest

from benchmarks.table import TABLES
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = re.compile(r"(?<![\w-])--(?:no-)?([a-zA-Z_]\w*)(?![\w-])")
OF_OTHERS = {"array", "gpus", "signal", "wrap", "nnodes"}  # of sbatch and torchrun
MADE = ("search-", "train-", "committee-", "data/", "EXP", "DIR", "NAME", "*", "cnn_space4")  # by runs, or by users


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_paths_modules_and_flags_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:conas|ensemble|tests|benchmarks|docs|img|cnn\w*|rnn)/[\w./{}-]*\w)`", text):
        assert any(mark in path for mark in MADE) or (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:conas|ensemble|tests|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    product = [path for folder in ("conas", "ensemble", "benchmarks", "tests/helpers", "cnn", "rnn")
               for path in (ROOT / folder).rglob("*.py")] + [ROOT / "test_ensemble.py"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in product)
    for flag in set(FLAGS.findall(text)) - OF_OTHERS:
        assert re.search(rf'^    {flag}: |"--{flag}"', source, re.MULTILINE) or f'"{flag}"' in source, f"--{flag}"


def test_the_tables_of_the_pages_are_what_the_command_prints():
    shown = set()
    for page in PAGES:
        for command, table in re.findall(r"<!-- python -m benchmarks\.table(.*?) -->\n(.*?)\n<!-- end -->",
                                         page.read_text(encoding="utf-8"), re.DOTALL):
            name = (shlex.split(command) or ["--of", "search_step"])[1]
            assert table == TABLES[name](), f"{page.name}: python -m benchmarks.table{command} prints another table"
            shown.add(name)
    assert shown == set(TABLES)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 125
