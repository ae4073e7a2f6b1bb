"""Search, test and combine with the oldest versions that requirements.txt allows: part of `make acceptance`.

    python -m tests.helpers.oldest                 # in a virtual environment below the folder for temporary files

Installs what `name==version` says for every `name>=version`, from the package index that pip knows. Also run with the
oldest Python that the project allows, this shows that no newer function is used on the way from images to a committee.
"""
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from PIL import Image

from tests.conftest import ROOT, clone

SMALL = ["--dataset", "digits", "--subset", "60", "--test_subset", "60", "--layers", "3", "--batch_size", "20",
         "--epochs", "1", "--init_channels", "2", "--device", "cpu"]
COMMANDS = [*[(f"cnn_space{i}/train_search.py", *SMALL) for i in (1, 2)], ("cnn_space2/test_all.py",),
            ("test_ensemble.py", "--report"), ("-m", "ensemble.predict", "digit.png"),
            ("cnn_space2/train.py", *SMALL, "--auxiliary"), ("cnn_space2/test.py",)]


def oldest(requirements: str) -> list[str]:
    """What pip is to install, of lines `name>=version`. Raises ValueError for another line."""
    found = []
    for line in requirements.split():
        if not (match := re.fullmatch(r"([\w-]+)>=([\d.]+)", line)):
            raise ValueError(f"requirements.txt: {line!r} is not of the form name>=version")
        found.append("==".join(match.groups()))
    return found


def main() -> None:
    packages = oldest((ROOT / "requirements.txt").read_text())
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "Scripts" if sys.platform == "win32" else "bin", "python")
        print(f"Python {sys.version.split()[0]}, {', '.join(packages)}", flush=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
        root = clone(Path(folder, "CoNAS")).root
        Image.new("L", (20, 30), 128).save(root / "digit.png")
        for script, *flags in COMMANDS:
            print(script, *flags[:2], flush=True)
            subprocess.run([python, Path(script).name, *flags], cwd=(root / script).parent, check=True,
                           stdout=subprocess.DEVNULL)
    print("all of it works")


if __name__ == "__main__":
    main()
