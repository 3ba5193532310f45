"""Makes the paper's tables of all results under a folder.

  python -m vocojax.report RESULTS_DIR

Finds what vocojax.evaluate and the benchmarks wrote in any workdir there, and
writes RESULTS_DIR/tables.md and pictures beside the paper's own numbers. Runs
that differ in their seed only are one row, with a 95 % interval. Read next:
evals/tables.py.
"""

import pathlib

from vocojax import cli
from vocojax.errors import UserError
from vocojax.evals.tables import write_tables


def main(words: list[str]) -> None:
  if len(words) != 1:
    raise UserError(
      f"{' '.join(words) or 'no folder'}: expected one folder that holds "
      "workdirs of vocojax.train"
    )
  print(f"tables: {write_tables(pathlib.Path(words[0]).expanduser())}")


if __name__ == "__main__":
  cli.run(main, __doc__, arguments=True)
