"""Say of searches whether they are collapsing, by the rule in conas/health/collapse.py.

    python -m conas.health FILE                      # a line for each run: its name, and the verdict
    python -m conas.health cnn_space1/search-EXP     # a search of one's own
    python -m conas.health FILE --table              # how this rule and two others do on runs whose end is known
"""
import sys
from collections.abc import Sequence

from conas.cli import Parser, run
from conas.errors import InputError, one_line
from conas.health.series import read
from conas.health.table import table


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for what cannot be read."""
    parser = Parser(prog="python -m conas.health", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="series of searches as JSON, in the form that docs/health.md shows, or the folder "
                                     "of a search")
    parser.add_argument("--epochs", type=int, help="that the runs of a file were started for, if they ended before "
                                                   "(default: as many as they have skips of)")
    parser.add_argument("--table", action="store_true", help="compare rules on runs that have come to their end")
    values = parser.parse_args(argv)
    if values.epochs is not None and values.epochs < 1:
        raise InputError(f"--epochs {values.epochs}: must be at least 1")
    runs = read(values.file, values.epochs)
    print(table(runs) if values.table else
          "\n".join(f"{one_line(name, 200)} {series.verdict()}" for name, series in runs.items()))


if __name__ == "__main__":
    sys.exit(run(main))
