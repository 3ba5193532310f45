"""The pictures of a report, as PNG files. Read next: report.py, their caller.

Figures are made without pyplot, which keeps global state and may want a
screen. They are 9 inches wide: their text is readable at 900 pixels.
Letters: K VoCo tokens, N patches, L layers, H heads, S image side, n images.
"""

import dataclasses
import io
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vocojax.core.files import write_atomic
from vocojax.errors import UserError

WIDTH = 9.0  # inches
DPI = 150
GREEN, RED, GREY = "#1a7f37", "#c0261f", "#6b7280"
BLUE, ORANGE = "#2563a8", "#d9730d"
_LOSSES = ("loss", "validation_loss")
MAX_LAYERS = 5  # panels of single layers in an attention picture


@dataclasses.dataclass(frozen=True)
class Sample:
  """One panel of `sample_grid`."""

  image: UInt8[np.ndarray, "S S 3"]
  question: str
  answer: str
  prediction: str
  correct: bool


def new_figure(height: float, gap: float = 0.02) -> Figure:
  """An empty figure, `height` inches high, that lays itself out.

  `gap` is the space between rows of panels, as a part of a panel's height.
  """
  layout = ConstrainedLayoutEngine(hspace=gap)
  return Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG, whole or not at all.

  Raises:
    UserError: there is no room for it, or it cannot be written there.
  """
  content = io.BytesIO()
  figure.savefig(content, format="png")
  write_atomic(path, content.getvalue())


def curves(phases: Mapping[str, Sequence[Mapping]], path: pathlib.Path) -> None:
  """Draws loss and token/answer accuracy over the steps of each phase.

  Those of validation are drawn over them.

  Args:
    phases: lines of metrics.jsonl by name of phase, of training and of
      validation; phases stand side by side.
    path: PNG to write.
  """
  figure = new_figure(5.4)
  axes = figure.subplots(
    2, len(phases), squeeze=False, sharex="col", sharey="row"
  )
  for column, (name, lines) in enumerate(phases.items()):
    loss, accuracy = axes[:, column]

    def draw(axis, key, color, scale=1, lines=lines, **style):
      points = [(x["step"], scale * x[key]) for x in lines if key in x]
      if points:
        # A short run has few points, and a single one makes no line.
        marker = "o" if len(points) < 20 else ""
        style = {"label": key.replace("_", " "), "marker": marker} | style
        axis.plot(*zip(*points, strict=True), color=color, **style)

    draw(loss, "loss", BLUE, label="training")
    draw(loss, "validation_loss", ORANGE, label="validation")
    draw(accuracy, "token_accuracy", GREY, 100)
    draw(accuracy, "answer_accuracy", GREEN, 100)
    draw(accuracy, "validation_token_accuracy", GREY, 100, linestyle="--")
    draw(accuracy, "validation_answer_accuracy", GREEN, 100, linestyle="--")
    loss.set_title(f"phase {name}", parse_math=False)
    accuracy.set_xlabel("step")
    accuracy.set_ylim(-2, 102)
    for axis in (loss, accuracy):
      axis.grid(alpha=0.3)
      axis.spines[["top", "right"]].set_visible(False)
  every = [line for lines in phases.values() for line in lines]
  if all(x.get(key, 1) > 0 for x in every for key in _LOSSES):
    axes[0, 0].set_yscale("log")
  validated = [
    column
    for column, lines in enumerate(phases.values())
    if any("validation_loss" in line for line in lines)
  ]
  last = validated[-1] if validated else -1  # its legend has all there is
  if validated:
    axes[0, last].legend(loc="upper right", frameon=False)
  axes[0, 0].set_ylabel("loss (nats a token)")
  axes[1, 0].set_ylabel("accuracy (%)")
  figure.legend(
    *axes[1, last].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    frameon=False,
  )
  save(figure, path)


def sample_grid(samples: Sequence[Sample], path: pathlib.Path) -> None:
  """Draws images with question, generated answer and, if wrong, the truth.

  Right answers are green with a tick, wrong ones red with a cross.
  """
  columns = min(4, len(samples))
  rows = math.ceil(len(samples) / columns)
  # Long questions cost height, of the images of the same row only.
  questions = [_wrap(sample.question, 26) for sample in samples]
  answers = [_verdict(sample) for sample in samples]
  lines = max(
    q.count("\n") + a.count("\n") + 2
    for q, a in zip(questions, answers, strict=True)
  )
  figure = new_figure(rows * (1.85 + 0.19 * lines), gap=0.09)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes:
    axis.set_axis_off()
  for axis, sample, question, answer in zip(
    axes, samples, questions, answers, strict=False
  ):
    axis.imshow(sample.image, interpolation="nearest")
    axis.set_title(question, fontsize=10, parse_math=False)
    axis.text(
      0.5,
      -0.05,
      answer,
      transform=axis.transAxes,
      ha="center",
      va="top",
      fontsize=11,
      fontweight="bold",
      color=GREEN if sample.correct else RED,
      parse_math=False,
    )
  save(figure, path)


def attention_maps(
  images: UInt8[np.ndarray, "n S S 3"],
  attention: Float32[np.ndarray, "n L H K N"],
  path: pathlib.Path,
) -> None:
  """Draws where the first VoCo token looks, one row an image.

  Beside the image: its attention over the patches, mean over heads, of each
  layer (of `MAX_LAYERS` spread over the depth, if there are more) and of the
  mean over all layers. The reddest patch of a panel is the most attended
  one of that panel; the number above is the share of the attention that falls
  on patches at all, the rest being BOS, separators and VoCo tokens.

  Raises:
    UserError: the patches do not form a square.
  """
  by_layer = attention[:, :, :, 0].mean(axis=2)  # [n, L, N]
  columns = [
    (f"layer {i + 1}", by_layer[:, i]) for i in shown(attention.shape[1])
  ]
  columns.append(("all layers", by_layer.mean(axis=1)))
  heat_maps(images, columns, path)


def shown(num_layers: int) -> Sequence[int]:
  """Layers to draw: all, or `MAX_LAYERS` spread over the depth."""
  count = min(num_layers, MAX_LAYERS)
  return np.linspace(0, num_layers - 1, count).round().astype(int).tolist()


def heat_maps(
  images: UInt8[np.ndarray, "n S S 3"],
  columns: Sequence[tuple[str, Float32[np.ndarray, "n N"]]],
  path: pathlib.Path,
  grid: bool = False,
) -> None:
  """Draws maps over images, one row an image, beside the image itself.

  Args:
    images: the pixels.
    columns: title and weights of the patches; the number above each panel is
      their sum.
    path: PNG to write.
    grid: whether to draw the edges of the patches.

  Raises:
    UserError: the patches do not form a square.
  """
  num_patches = columns[0][1].shape[1]
  side = math.isqrt(num_patches)
  if side * side != num_patches:
    raise UserError(
      "attention map",
      f"{num_patches} patches",
      "a square number",
      "evaluate again to rewrite attention.npz",
    )
  n, width = len(images), len(columns) + 1
  figure = new_figure(n * (WIDTH / width + 0.3) + 0.2)
  axes = figure.subplots(n, width, squeeze=False)
  for row, image in enumerate(images):
    axes[row, 0].imshow(image)
    axes[row, 0].set_title("image" if row == 0 else "", fontsize=10)
    for axis, (name, maps) in zip(axes[row, 1:], columns, strict=True):
      heat = maps[row].reshape(side, side)
      extent = (0, image.shape[1], image.shape[0], 0)
      # Underneath, the image in pale grey: colour is left to attention, which
      # covers the more the stronger it is.
      grey = 255 - 0.6 * (255 - image.mean(axis=-1))
      axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
      strength = heat / max(float(heat.max()), 1e-9)
      axis.imshow(
        strength,
        cmap="YlOrRd",
        vmin=0,
        vmax=1,
        alpha=0.85 * strength,
        extent=extent,
        interpolation="nearest",
      )
      if grid:
        edges = np.linspace(0, image.shape[0], side + 1)
        ends = (0, image.shape[0])
        style = {"colors": GREY, "linewidth": 0.4, "alpha": 0.6}
        axis.hlines(edges, *ends, **style)
        axis.vlines(edges, *ends, **style)
      share = f"{100 * heat.sum():.0f} %"
      title = f"{name}\n{share}" if row == 0 else share
      axis.set_title(title, fontsize=10)
  for axis in axes.ravel():
    axis.set_axis_off()
  save(figure, path)


def score_bars(
  bars: Sequence[tuple[str, float, str]],
  kept: float | None,
  path: pathlib.Path,
) -> None:
  """Draws accuracies as horizontal bars, the first on top.

  Args:
    bars: (label, accuracy from 0 to 1, colour) of each.
    kept: retention in percent, or None where it is not defined.
    path: PNG to write.
  """
  figure = new_figure(0.9 + 0.6 * len(bars))
  axis = figure.subplots()
  labels, accuracies, colors = zip(*bars, strict=True)
  values = [100 * accuracy for accuracy in accuracies]
  drawn = axis.barh(range(len(bars)), values, color=colors, height=0.62)
  axis.bar_label(drawn, [f"{v:.2f} %" for v in values], padding=5, fontsize=11)
  axis.set_yticks(range(len(bars)), labels)
  axis.invert_yaxis()
  axis.set_xlim(0, 118)
  axis.set_xticks(range(0, 101, 20))
  axis.set_xlabel("accuracy (%)")
  axis.spines[["top", "right"]].set_visible(False)
  if kept is not None:
    axis.set_title(f"retention {kept:.1f} %", fontweight="bold")
  save(figure, path)


def _verdict(sample: Sample) -> str:
  # A model early in training may answer with nothing at all.
  prediction = sample.prediction or "(empty)"
  if sample.correct:
    return _wrap(f"✓ {prediction}", 24)
  return (
    f"{_wrap(f'✗ {prediction}', 24)}\n{_wrap(f'truth: {sample.answer}', 24)}"
  )


def _wrap(text: str, width: int) -> str:
  return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" ..."))
