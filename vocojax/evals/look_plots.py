"""The pictures of `python -m vocojax.look`. Read next: probe.py.

N patches, S pixels a side, n images, L layers.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, UInt8

from vocojax.evals import plots
from vocojax.evals.plots import BLUE, GREY, ORANGE
from vocojax.evals.probe import Score

_KINDS = (
  ("VoCo tokens", ORANGE, lambda score: score.accuracy["voco"]),
  ("mean patch", BLUE, lambda score: score.accuracy["mean_patch"]),
  ("most frequent answer", GREY, lambda score: score.majority),
)


def reading(
  images: UInt8[np.ndarray, "n S S 3"],
  attention: Float32[np.ndarray, "L n N"],
  mixed: Float32[np.ndarray, "n N"],
  path: pathlib.Path,
) -> None:
  """Draws what one VoCo token reads of each image, under the patch grid.

  Args:
    images: the pixels.
    attention: of the token over the patches, in each layer.
    mixed: its roll-up through all layers but the last, whose output no text
      reads.
    path: PNG to write.

  Raises:
    UserError: the patches do not form a square.
  """
  columns = [
    *((f"layer {i + 1}", attention[i]) for i in plots.shown(len(attention))),
    ("roll-up", mixed),
  ]
  plots.heat_maps(images, columns, path, grid=True)


def probe_bars(scores: Mapping[str, Score], path: pathlib.Path) -> None:
  """Draws how well each thing can be told.

  What is asked of cells has a panel for each attribute; what is asked of the
  whole image shares one.
  """
  groups: dict[str, dict[str, Score]] = {}
  for name, score in scores.items():
    attribute, _, place = name.rpartition(", ")
    groups.setdefault(attribute, {})[place] = score
  figure = plots.new_figure(0.4 + 2.7 * len(groups))
  axes = figure.subplots(len(groups), 1, squeeze=False).ravel()
  for axis, (attribute, members) in zip(axes, groups.items(), strict=True):
    width = 0.8 / len(_KINDS)
    for i, (label, color, value_of) in enumerate(_KINDS):
      x = np.arange(len(members)) + (i - 1) * width
      parts = np.array([value_of(score) for score in members.values()])
      numbers = np.array([score.num_test for score in members.values()])
      bars = axis.bar(x, 100 * parts, width, color=color, label=label)
      error = 196 * np.sqrt(parts * (1 - parts) / numbers)
      axis.errorbar(
        x, 100 * parts, error, fmt="none", color="black", linewidth=1
      )
      if len(members) <= 4:
        texts = [f"{100 * part:.1f}" for part in parts]
        axis.bar_label(bars, texts, padding=6, fontsize=9)
    axis.set_xticks(range(len(members)), [_place(p) for p in members])
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 25))
    axis.set_ylabel("right (%)")
    what = f"{attribute} by row, column" if attribute else "the object"
    axis.set_title(f"{what}, told by a linear probe", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=len(_KINDS),
    frameon=False,
  )
  plots.save(figure, path)


def _place(text: str) -> str:
  """'row 1 column 2' in short."""
  if match := re.fullmatch(r"row (\d+) column (\d+)", text):
    return f"{match[1]}, {match[2]}"
  return text
