"""Write a cell in the form of another project.

    python -m conas.exchange DARTS_V2 --to nasbench301
    python -m conas.exchange genotypes.py:PC_DARTS_cifar --to nni3 --out cell.json

CELL is a published name, SPACE/NAME as cnn_space1/CONAS, a file, as FILE or FILE:NAME, or the text of a cell, in any of
the forms below. A form that would lose something of the cell is not written.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conas.cli import Parser, run
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from conas.exchange.cells import FORMS, find_cell
from conas.files import check_writable, write_text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for what is no cell, and for a form that cannot say all of it."""
    forms = "\n".join(f"  {form.name:12} {form.title}{'' if form.write else ', read only'}" for form in FORMS.values())
    parser = Parser(prog="python -m conas.exchange", description=f"{__doc__}\nforms:\n{forms}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", metavar="CELL", help="what is read")
    parser.add_argument("--to", required=True,
                        choices=[name for name, form in FORMS.items() if form.write],
                        help="the form to write")
    parser.add_argument("--out", metavar="FILE", help="write this file (default: standard output)")
    values = parser.parse_args(argv)
    if values.out is not None:
        check_writable(values.out)
    cell, form = find_cell(values.cell, GENOTYPES, "", None), FORMS[values.to]
    text = form.write(cell.genotype)
    if values.out is not None and Path(values.out).suffix in (".json", ".yaml", ".yml") and text[0] not in "[{":
        raise InputError(f"--out {values.out}: --to {form.name} is written as Python has it; name a .py or .txt, or "
                         "give --to json")
    print(f"read: {cell.origin}" + (f"; {form.note}" if form.note else ""), file=sys.stderr)
    if values.out is None:
        print(text)
    else:
        write_text(values.out, text + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
