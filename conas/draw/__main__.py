"""`python -m conas.draw`: see `conas/draw/cell.py`."""
import sys

from conas.cli import run
from conas.draw.cell import main

if __name__ == "__main__":
    sys.exit(run(main))
