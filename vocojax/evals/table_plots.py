"""The pictures beside the tables, as PNG files. Read next: tables.py.

Whiskers and bands are 95 % intervals over seeds; dots are single seeds.
"""

import collections
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vocojax.evals import intervals, paper
from vocojax.evals.plots import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save
from vocojax.evals.rows import Row, label, whose

_PURPLE, _DARK = "#7c4dbd", "#374151"
_COLORS = {
  "upper": BLUE,
  "full": GREEN,
  "voco_full": BLUE,
  "voco": ORANGE,
  "avgpool": GREEN,
  "qformer": _PURPLE,
  "blind": _DARK,
  "full_voco": GREY,
  "lower": GREY,
}
_LINES = (ORANGE, BLUE, GREEN, _PURPLE, RED, _DARK)
_BOUNDS = ("upper", "lower", "full", "full_voco")
_PAPER = "VoCo, paper (7B)"

# Points of a line: x, and the row that is there.
_Points = Mapping[float, Row]


def draw(rows: Sequence[Row], folder: pathlib.Path) -> list[str]:
  """Draws what there is data for; returns the names of the pictures."""
  figures = {
    "methods": _methods([row for row in rows if not row.result.use]),
    "sweep": _sweep(rows),
    "distillation": _distillation(rows),
  }
  drawn = {name: figure for name, figure in figures.items() if figure}
  for name, figure in drawn.items():
    save(figure, folder / f"{name}.png")
  return list(drawn)


def _methods(rows: Sequence[Row]) -> Figure | None:
  """Bars of every row, a panel for each data set."""
  if not rows:
    return None
  columns = _columns(rows)
  labels = list(dict.fromkeys(row.label for row in rows))
  figure, axes = _panels(len(columns), 0.7 + 0.32 * len(labels), sharey=True)
  for axis, column in zip(axes, columns, strict=True):
    highest = 0.0
    for row in rows:
      if cell := row.cells.get(column):
        y, score = labels.index(row.label), cell.score
        axis.barh(y, score.value, 0.66, color=_COLORS[row.result.method])
        if score.half_width is not None:
          whisker = {"color": "black", "capsize": 3, "linewidth": 1}
          axis.errorbar(score.value, y, xerr=score.half_width, **whisker)
        seeds = list(cell.seeds.values())
        if len(seeds) > 1:
          axis.plot(seeds, [y] * len(seeds), "o", color="black", markersize=2)
        end = score.value + (score.half_width or 0)
        axis.annotate(
          str(score),
          (end, y),
          (5, 0),
          textcoords="offset points",
          va="center",
          fontsize=9,
        )
        highest = max(highest, end)
    axis.set_title(paper.BENCHMARKS.get(column, column), fontsize=11)
    axis.set_xlim(0, 1.45 * highest or 1)
    if highest <= 110:  # percent, which ends at 100
      axis.set_xticks(range(0, 101, 25))
    axis.grid(visible=False, axis="y")
    axis.set_yticks(range(len(labels)), labels)
  axes[0].invert_yaxis()
  return figure


def _sweep(rows: Sequence[Row]) -> Figure | None:
  """Retention and scores by number of tokens."""

  def tokens(row: Row) -> float:
    return float(row.result.cut or row.result.num_voco_tokens)

  series = _series(rows, tokens, _lines_of_k)
  if not series:
    return None
  # Rows that no line goes through have no panel, but the bounds are shown.
  columns = _columns(row for line in series.values() for row in line.values())
  figure, [mean, *axes] = _panels(1 + len(columns), 3.0)
  for axis in (mean, *axes):
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("VoCo tokens an image")
  for color, (name, points) in zip(_colors(), series.items(), strict=False):
    averages = {x: row.average(columns)[0] for x, row in points.items()}
    _line(mean, averages, name, color)
    for axis, column in zip(axes, columns, strict=True):
      _line(axis, _scores(points, column), name, color)
  published: dict[float, intervals.Mean | None] = {
    float(k): intervals.Mean(a, None, 1) for k, (_, a) in paper.SWEEP.items()
  }
  _line(mean, published, _PAPER, GREY, "--")
  bounds = frozenset[str]().union(
    *(row.bounds(columns) for line in series.values() for row in line.values())
  )
  mean.set_title(f"average retention (%){whose(bounds)}", fontsize=11)
  mean.legend(fontsize=8, frameon=False)
  for axis, column in zip(axes, columns, strict=True):
    axis.set_title(
      f"{paper.BENCHMARKS.get(column, column)}, score", fontsize=11
    )
    for row in rows:
      if row.result.method in _BOUNDS and column in row.cells:
        _bound(axis, row, column)
  return figure


def _bound(axis: Axes, row: Row, column: str) -> None:
  """A level with its name, on the right."""
  value, color = row.cells[column].score.value, _COLORS[row.result.method]
  axis.axhline(value, color=color, linestyle=":", linewidth=1.2)
  place = axis.get_yaxis_transform()
  axis.text(
    1,
    value,
    row.label,
    transform=place,
    ha="right",
    va="bottom",
    fontsize=8,
    color=color,
  )


def _lines_of_k(row: Row) -> Iterator[str]:
  """Lines through a row: that of its kind, and that of its own weights."""
  result = row.result
  if result.method != "voco" or (result.use and not result.cut):
    return
  k = result.num_voco_tokens
  kind = label(result).replace(f"VoCo-{k}", "VoCo")
  if result.cut:
    yield row.label.replace(f", cut to {result.cut}", ", cut")
  else:
    yield f"{kind}, trained with k{row.label.removeprefix(label(result))}"
    yield f"{row.label}, cut"


def _distillation(rows: Sequence[Row]) -> Figure | None:
  """Scores by weight of distillation."""
  teachers = {row.result.distillation[1] for row in rows} - {""}

  def lines(row: Row) -> Iterator[str]:
    result, (weight, teacher) = row.result, row.result.distillation
    if result.method == "voco" and not result.use:
      difference = row.label.removeprefix(label(result))
      kind = f"VoCo-{result.num_voco_tokens}"
      if result.is_elastic:
        kind += " elastic"
      # Without distillation there is no teacher: it begins every line.
      for name in (teacher,) if weight else sorted(teachers) or ("",):
        yield kind + (f", teacher {name}" if name else "") + difference

  series = _series(rows, lambda row: row.result.distillation[0], lines)
  if not series:
    return None
  columns = _columns(row for line in series.values() for row in line.values())
  figure, axes = _panels(len(columns), 3.0)
  for axis, column in zip(axes, columns, strict=True):
    for color, (name, points) in zip(_colors(), series.items(), strict=False):
      _line(axis, _scores(points, column), name, color)
    axis.set_title(
      f"{paper.BENCHMARKS.get(column, column)}, score", fontsize=11
    )
    axis.set_xlabel("weight of distillation")
  axes[0].legend(fontsize=8, frameon=False)
  return figure


def _series(
  rows: Iterable[Row],
  x_of: Callable[[Row], float],
  names_of: Callable[[Row], Iterator[str]],
) -> dict[str, _Points]:
  """Rows by line and x, of the lines that have more than one x."""
  lines: dict[str, dict[float, Row]] = collections.defaultdict(dict)
  for row in rows:
    for name in names_of(row):
      lines[name].setdefault(x_of(row), row)
  return {
    name: dict(sorted(points.items()))
    for name, points in lines.items()
    if len(points) > 1
  }


def _scores(points: _Points, column: str) -> dict[float, intervals.Mean | None]:
  return {
    x: row.cells[column].score if column in row.cells else None
    for x, row in points.items()
  }


def _line(
  axis: Axes,
  means: Mapping[float, intervals.Mean | None],
  name: str,
  color: str,
  style: str = "-",
) -> None:
  """A curve with its band; what is None is left out."""
  points = sorted((x, m) for x, m in means.items() if m is not None)
  if not points:
    return
  xs = [x for x, _ in points]
  values = [m.value for _, m in points]
  widths = [m.half_width or 0 for _, m in points]
  axis.plot(
    xs, values, style, color=color, marker="o", markersize=4, label=name
  )
  low, high = (
    [v + sign * w for v, w in zip(values, widths, strict=True)]
    for sign in (-1, 1)
  )
  axis.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0)


def _panels(
  count: int, height: float, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
  """Axes, two beside each other, each `height` inches high."""
  wide = min(count, 2)
  rows = math.ceil(count / wide)
  figure = new_figure(rows * height)
  axes = figure.subplots(rows, wide, squeeze=False, sharey=sharey).ravel()
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
  for axis in axes[count:]:
    axis.set_axis_off()
  return figure, list(axes[:count])


def _columns(rows: Iterable[Row]) -> list[str]:
  return sorted({column for row in rows for column in row.cells})


def _colors() -> Iterator[str]:
  while True:
    yield from _LINES
