"""The two drawings of the README. Read next: ../models/masks.py.

`draw_mask` draws any two-stage mask it is given; `draw_two_streams` is the
same idea as blocks: what is computed once an image and what once a question.
To draw them again: python -m vocojax.evals.diagrams docs/images
"""

import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from vocojax.evals.plots import new_figure, save
from vocojax.models import masks

_Number = int | float
IMAGE, VOCO, TEXT = "#8fb8de", "#f0a04b", "#93c58b"
# Colour and legend of a visible pair, by stream of the row and of the column.
_SEEN = {
  ("image", "image"): (IMAGE, "image stream reads image stream"),
  ("voco", "image"): ("#d9730d", "VoCo reads image stream"),
  ("voco", "voco"): ("#f7cd9b", "VoCo reads VoCo"),
  ("text", "voco"): ("#2f8f4e", "text reads VoCo"),
  ("text", "text"): ("#b5dcae", "text reads text"),
}
# The tokens of the README's small example, as `draw_mask` wants them.
TOY_ROLES = (
  ("BOS", "image"),
  *((f"I{i}", "image") for i in range(6)),
  ("_", "image"),
  ("\\n", "image"),
  ("VoCo1", "voco"),
  ("VoCo2", "voco"),
  ("\\n", "text"),
  *((f"t{i}", "text") for i in range(5)),
)
_FUTURE = ("#f1f1f1", "hidden: later token")
_CUT = ("#ffffff", "hidden: the image, from text")


def toy_mask() -> Bool[np.ndarray, "S S"]:
  """The two-stage mask of `TOY_ROLES`, as the model computes it."""
  streams = np.array([[stream for _, stream in TOY_ROLES]])
  is_text = jnp.asarray(streams == "text")
  mask = masks.two_stage_mask(
    jnp.where(is_text, 0, 1),
    jnp.where(is_text, 1, 0),
    jnp.ones(is_text.shape, int),
    jnp.asarray(streams == "voco"),
  )
  return np.array(mask[0])


def draw_mask(
  mask: Bool[np.ndarray, "S S"],
  roles: Sequence[tuple[str, str]],
  path: pathlib.Path,
) -> None:
  """Draws a mask as a labelled matrix coloured by who reads what.

  Args:
    mask: True where the token of the row sees the token of the column.
    roles: (label, stream) of each token; stream is 'image' (BOS and separator
      included), 'voco' or 'text'.
    path: PNG to write.

  Raises:
    ValueError: text sees the image, or the image sees what comes after it.
  """
  size = len(roles)
  labels = [label for label, _ in roles]
  figure = new_figure(5.1)
  axis = figure.subplots()
  used = {}
  for i in range(size):
    for j in range(size):
      pair = (roles[i][1], roles[j][1])
      if mask[i, j] and pair not in _SEEN:
        raise ValueError(
          f"{labels[i]} sees {labels[j]}: {pair[0]} to {pair[1]}"
        )
      color, legend = _SEEN[pair] if mask[i, j] else _FUTURE if j > i else _CUT
      cut = legend == _CUT[1]
      used[legend] = cell = {
        "facecolor": color,
        "edgecolor": "#c9c9c9" if cut else "white",
        "hatch": "////" if cut else None,
      }
      axis.add_patch(Rectangle((j, i), 1, 1, linewidth=1, **cell))
  axis.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
  middle = np.arange(size) + 0.5
  axis.set_xticks(middle, labels, rotation=90, parse_math=False)
  axis.set_yticks(middle, labels, parse_math=False)
  axis.xaxis.tick_top()
  axis.tick_params(length=0, labelsize=11)
  axis.spines[:].set_visible(False)
  inks = {"image": "#1f5b94", "voco": "#a85504", "text": "#2b6b36"}
  ticks = (axis.get_xticklabels(), axis.get_yticklabels())
  for tick_labels in ticks:
    for tick, (_, stream) in zip(tick_labels, roles, strict=True):
      tick.set_color(inks[stream])
  order = [legend for _, legend in (*_SEEN.values(), _CUT, _FUTURE)]
  figure.legend(
    handles=[Patch(**used[x], label=x) for x in order if x in used],
    loc="outside right center",
    title="A row's token reads a column's",
    title_fontsize=11,
    alignment="left",
    frameon=False,
    fontsize=11,
    handleheight=1.4,
  )
  save(figure, path)


def draw_two_streams(path: pathlib.Path) -> None:
  """Draws the image stream, the cached keys and values, and the text stream."""
  figure = new_figure(4.6)
  axis = figure.subplots()
  axis.set(xlim=(0, 95.5), ylim=(0, 54))
  axis.set_axis_off()

  axis.text(1, 52, "stage 1: compress, once an image", **_heading)
  _box(axis, 1, 40, 11, 8, "image", "#e5e7eb")
  _box(axis, 17, 40, 11, 8, "ViT", "#e5e7eb")
  _box(axis, 33, 40, 13, 8, "projector", "#e5e7eb")
  for start, end in ((12, 17), (28, 33), (46, 51)):
    _arrow(axis, (start, 44), (end, 44))
  tokens = (("BOS", 6), ("V1", 5), ("V2", 5), ("...", 5), ("VN", 5), ("_", 4))
  end = _tokens(axis, 51, 40, (*tokens, ("\\n", 4)), IMAGE)
  end = _tokens(axis, end, 40, (("VoCo", 9),), VOCO)
  _note(axis, (51 + end) / 2, 49.6, "image stream: plain causal")

  _box(axis, 51, 30, end - 51, 6, "L layers", "#f3f4f6")
  _arrow(axis, (72, 40), (72, 36))
  _box(axis, 63, 20, end - 63, 6, "K, V of VoCo, every layer", VOCO)
  _arrow(axis, (end - 4.5, 30), (end - 4.5, 26))
  _note(axis, 61.5, 23, "cache of the image", "right")

  axis.text(1, 17, "stage 2: answer, once a question", **_heading)
  _box(axis, 1, 5, 15, 8, "question", "#e5e7eb")
  _arrow(axis, (16, 9), (21, 9))
  words = (("\\n", 5), ("t0", 5), ("t1", 5), ("t2", 5), ("...", 5))
  text_end = _tokens(axis, 21, 5, words, TEXT)
  _note(axis, (21 + text_end) / 2, 2.2, "text stream: causal")
  _arrow(axis, (text_end, 9), (51, 9))
  _box(axis, 51, 5, 27, 8, "the same L layers", "#f3f4f6")
  _arrow(axis, (72, 20), (72, 13))
  _note(axis, 73.5, 16.5, "all that text sees of it", "left")
  _arrow(axis, (78, 9), (end - 12, 9))
  _box(axis, end - 12, 5, 12, 8, "answer", "#e5e7eb")
  save(figure, path)


_heading = {"fontsize": 12, "fontweight": "bold", "va": "center"}


def _box(
  axis: Axes,
  x: int,
  y: int,
  width: int,
  height: int,
  text: str,
  color: str,
) -> None:
  style = "round,pad=0,rounding_size=1"
  axis.add_patch(
    FancyBboxPatch(
      (x, y), width, height, style, facecolor=color, edgecolor="#4b5563"
    )
  )
  middle = (x + width / 2, y + height / 2)
  axis.text(*middle, text, ha="center", va="center", fontsize=11)


def _tokens(
  axis: Axes, x: int, y: int, tokens: Sequence[tuple[str, int]], color: str
) -> int:
  """Draws (text, width) cells from `x` on; returns where they end."""
  for text, width in tokens:
    axis.add_patch(
      Rectangle((x, y), width, 8, facecolor=color, edgecolor="#4b5563")
    )
    axis.text(x + width / 2, y + 4, text, ha="center", va="center", fontsize=11)
    x += width
  return x


def _note(
  axis: Axes, x: _Number, y: _Number, text: str, align: str = "center"
) -> None:
  axis.text(x, y, text, ha=align, va="center", fontsize=11, color="#374151")


def _arrow(
  axis: Axes, start: tuple[_Number, _Number], end: tuple[_Number, _Number]
) -> None:
  axis.add_patch(
    FancyArrowPatch(
      start,
      end,
      arrowstyle="-|>",
      mutation_scale=14,
      color="#4b5563",
      shrinkA=0,
      shrinkB=0,
    )
  )


if __name__ == "__main__":
  folder = pathlib.Path(sys.argv[1])
  draw_mask(toy_mask(), TOY_ROLES, folder / "mask.png")
  draw_two_streams(folder / "two_streams.png")
