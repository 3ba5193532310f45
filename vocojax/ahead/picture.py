"""A picture of the memory of a chip by use. Read next: measure.py."""

import pathlib
from collections.abc import Sequence

import numpy as np

from vocojax.ahead.measure import Measurement
from vocojax.ahead.topology import GIB, Chip
from vocojax.core import files
from vocojax.evals.plots import new_figure


def draw(
  measured: Sequence[Measurement], chip: Chip, title: str, path: pathlib.Path
) -> None:
  """One bar a program, its parts stacked, against what the chip has.

  Raises:
    UserError: the file cannot be written.
  """
  figure = new_figure(3.0 + 0.5 * len(measured))
  axes = figure.subplots()
  uses = list(dict.fromkeys(use for m in measured for use in m.bytes_by_use))
  left = np.zeros(len(measured))
  names = [m.program.name for m in measured]
  for i, use in enumerate(uses):
    sizes = np.array([m.bytes_by_use.get(use, 0) / GIB for m in measured])
    if not sizes.any():
      continue
    axes.barh(
      names, sizes, 0.6, left, color=f"C{i}", label=f"{use}, {sizes.max():.2f}"
    )
    left += sizes
  axes.axvline(chip.hbm / GIB, color="black", linestyle="--")
  axes.set_xlim(0, 1.05 * max(chip.hbm / GIB, left.max()))
  axes.set_xlabel("GiB per chip at the peak; dashed: what a chip has")
  axes.set_title(title)
  axes.invert_yaxis()
  figure.legend(loc="outside lower center", ncols=2, frameon=False)
  with files.storage(path):
    figure.savefig(path)
