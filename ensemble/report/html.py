"""The committee's result as one HTML file, which needs no network: `test_ensemble.py --report` writes it.

    python -m ensemble.report.html --save NAME        # from what test_ensemble.py wrote before

Every text that is not ours, such as names of classes and files, is escaped, and the page's policy lets no script but
its own run.
"""
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from conas.cli import Parser, run
from conas.data.images import full_name
from conas.errors import InputError
from conas.files import write_text
from conas.runs.folder import folder_name, read_arguments
from conas.runs.scores import load_scores
from ensemble.combine.committee import Committee
from ensemble.combine.fit import FITTED, rule
from ensemble.report.page import Page
from ensemble.report.read_report import read_report
from ensemble.report.search_health import read_health
from ensemble.report.search_history import find_images, read_searches

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).resolve().parent / "templates"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<link rel="icon" href="data:,"><style>{style}</style></head>
<body><header><h1>{title}</h1><nav aria-label="Contents">{links}</nav></header>
<main>{body}</main>
<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>
"""


def write(folder: Path, root: Path, summary: dict, committee: Committee, data: str | None = None) -> Path:
    """Write `folder`/report.html from a report of `ensemble.report` and the committee of its last epoch.

    `root` is what the members' checkpoint paths are relative to, `data` where the test images are if they were moved;
    without them the page has no thumbnails, and says so on the terminal.
    """
    last = summary["epochs"][-1]
    runs = dict.fromkeys((root / member["checkpoint"]).parent.parent for member in last["members"])
    searches = read_searches(list(runs))
    images, names = find_images(root / last["members"][0]["checkpoint"], committee.fingerprint, data)
    found = [run for run in runs if run.name.startswith("search-")]
    health = read_health(found, [search.name for search in searches])
    page = Page(summary, committee, searches, images, names, health)
    path = folder / "report.html"
    write_text(path, assemble(page, {_name(run, root): read_arguments(run) for run in runs}))
    return path


def assemble(page: Page, arguments: dict[str, dict]) -> str:
    """The whole page; `arguments` are the runs' by name."""
    sections = page.sections(arguments)
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return PAGE.format(
        title=escape(f"Committee on {full_name(page.summary['dataset'])}"), style=style, script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        links="".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items()),
        body="".join(f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{title}</h2>{inside}</section>'
                     for key, (title, inside) in sections.items()),
        data=json.dumps(page.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _name(folder: Path, root: Path) -> str:
    return (folder.relative_to(root) if folder.is_relative_to(root) else folder).as_posix()


def stored_committee(root: Path, save: str) -> tuple[dict, Committee]:
    """The report in committee-SAVE and its last committee, from probabilities stored beside the checkpoints.

    Raises InputError if test_ensemble.py has not written them.
    """
    _, summary = read_report(root, save)
    last, combination = summary["epochs"][-1], summary["combination"]
    files = {m["name"]: root / m["checkpoint"] for m in last["members"]}
    numbers = {key: torch.tensor([m[key] for m in last["members"]], dtype=torch.float64)
               for key in ("weight", "temperature")}
    scores = {name: load_scores(file.parent.parent / "probabilities" / f"{file.stem}.npz")
              for name, file in files.items()}
    return summary, Committee(scores, rule(combination), weights=numbers["weight"] if combination in FITTED else None,
                              temperatures=numbers["temperature"], temperature=last["committee"]["temperature"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m ensemble.report.html", description=__doc__.splitlines()[0])
    parser.add_argument("--save", default="EXP", help="name of the committee: its folder is committee-NAME")
    parser.add_argument("--data", help="where the data set is, if it is no longer where the search had it")
    values = parser.parse_args(argv)
    summary, committee = stored_committee(ROOT, folder_name(values.save))
    folder = ROOT / f"committee-{values.save}"
    try:
        print(write(folder, ROOT, summary, committee, values.data))
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what `read_report` does not look at
        raise InputError(f"{folder / 'committee.json'}: damaged; start python test_ensemble.py again") from error


if __name__ == "__main__":
    sys.exit(run(main))
