"""Makes the paper's tables of all results under a folder.

  python -m vocojax.report RESULTS_DIR

Finds what vocojax.evaluate and the benchmarks wrote in any workdir there, and
writes RESULTS_DIR/tables.md and pictures beside the paper's own numbers. Runs
that differ in their seed only are one row, with a 95 % interval. Read next:
evals/tables.py.
"""

from vocojax import cli
from vocojax.core.files import expand_user
from vocojax.errors import UserError, shorten
from vocojax.evals.tables import write_tables


def main(words: list[str]) -> None:
  if len(words) != 1:
    raise UserError(
      "arguments",
      shorten(" ".join(words)) if words else "none",
      "one folder that holds workdirs of vocojax.train",
      "run `python -m vocojax.report RESULTS_DIR`",
    )
  print(f"tables: {write_tables(expand_user(words[0]))}")


if __name__ == "__main__":
  cli.run(main, __doc__, arguments=True)
