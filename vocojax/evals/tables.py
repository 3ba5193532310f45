"""The paper's tables of everything under a folder. Read next: rows.py.

Every number comes from files; nothing is computed by a model here. The paper's
own rows stand beside ours: those of a 7B on other data, so they say what the
method did there and not what a small model should reach here.
"""

import dataclasses
import datetime
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from vocojax.core import files
from vocojax.evals import markdown, other_tables, paper, rows, table_plots
from vocojax.evals.collect import Result, collect
from vocojax.evals.retention import retention
from vocojax.evals.rows import Row

_NOTE = (
  "In a cell stands the score and below it the retention, 100 * (score - "
  "lower) / (upper - lower). ± is half of the 95 % interval over seeds, by "
  "Student's t; one seed has none. Retention is of each seed, between the "
  "bounds of its workdir or else the nearest of the same data set and seed, "
  "and then averaged. Rows marked 'paper' are of the 7B of arXiv 2406.12275."
)
_NO_BOUNDS = (
  "Rows with 'no bounds' lack a result `upper` or `lower` of their data set "
  "and seed: train with `--config.evaluation.bounds`, or evaluate a checkpoint "
  "of compressor `voco_causal`, as it is and with `--compressor=voco`. Those "
  "with 'several bounds' lie as near to one run with bounds as to another: put "
  "each into one folder with its own."
)
_OLD_BOUNDS = (
  "Retention with 'bounds: full' is not the paper's: its upper bound was "
  "trained without VoCo tokens (compressor `full`, LLaVA), and its lower bound "
  "reads a VoCo token that those weights were never shown. Of bounds that are "
  "equally near, the paper's are taken."
)


@dataclasses.dataclass(frozen=True)
class _Line:
  """A row of a table as text; both averages are of retention."""

  label: str
  seeds: str
  cells: Mapping[str, str]
  average: str
  in_paper: str = "-"


def write_tables(folder: pathlib.Path) -> pathlib.Path:
  """Writes FOLDER/tables.md and FOLDER/tables/*.png; returns the former.

  Raises:
    UserError: there is no result, or one of the files cannot be used.
  """
  results = collect(folder)
  measured = other_tables.read_efficiency(folder)
  pictures = folder / "tables"
  with files.storage(pictures):
    pictures.mkdir(exist_ok=True)
  small = _rows(r for r in results if not r.is_benchmark)
  large = _rows(
    r
    for r in results
    if r.is_benchmark and r.data not in paper.VIDEO_BENCHMARKS
  )
  drawn = table_plots.draw(small + large, pictures)
  sections = [
    f"# Tables\n\n{_NOTE}",
    _methods(small, large),
    _sweep(small, large),
    _uses(small, large),
    *(f"![{name}](tables/{name}.png)" for name in drawn),
    _categories(results),
    other_tables.efficiency(measured),
    other_tables.video(results),
    _sources(folder, results),
  ]
  path = folder / "tables.md"
  files.write_atomic(path, "\n\n".join(filter(None, sections)) + "\n")
  return path


def _rows(results: Iterable[Result]) -> list[Row]:
  return rows.make_rows(rows.headlines(results))


def _methods(small: list[Row], large: list[Row]) -> str:
  """Table 1: every method as it was trained."""
  columns = tuple(paper.BENCHMARKS)
  published = {
    method: _published(
      _paper_label(method), columns, scores, paper.AVERAGES.get(method)
    )
    for method, scores in paper.METHODS.items()
  }

  def beside(row: Row) -> _Line | None:
    result = row.result
    alike = result.num_voco_tokens == 1 and not result.distillation[0]
    if alike or result.method in ("upper", "lower"):
      return published.get(result.method)
    return None

  return _both(
    "## Table 1: methods",
    [row for row in small if not row.result.use],
    [row for row in large if not row.result.use],
    published.values(),
    columns,
    beside,
  )


def _sweep(small: list[Row], large: list[Row]) -> str:
  """Table 2: `voco` trained with so many tokens, without distillation."""

  def chosen(found):
    return [r for r in found if r.result.is_plain_voco]

  published = {
    k: _published(f"VoCo-{k}, paper", paper.SWEEP_BENCHMARKS, scores, average)
    for k, (scores, average) in paper.SWEEP.items()
  }
  return _both(
    "## Table 2: number of VoCo tokens",
    chosen(small),
    chosen(large),
    published.values(),
    paper.SWEEP_BENCHMARKS,
    lambda row: published.get(row.result.num_voco_tokens),
  )


def _uses(small: list[Row], large: list[Row]) -> str:
  """Table 4: the same weights, used otherwise than they were trained."""
  trained = paper.CUT_FROM
  published = {
    k: _published(
      f"VoCo-{trained}, cut to {k}, paper", paper.SWEEP_BENCHMARKS, scores, None
    )
    for k, scores in paper.CUT.items()
  }
  return _both(
    "## Table 4: the same weights used otherwise",
    [row for row in small if row.result.use],
    [row for row in large if row.result.use],
    published.values(),
    paper.SWEEP_BENCHMARKS,
    lambda row: published.get(row.result.cut or 0),
  )


def _paper_label(method: str) -> str:
  counted = method in paper.AVERAGES
  return rows.LABELS[method] + ("-1" if counted else "") + ", paper"


def _published(
  name: str,
  columns: Sequence[str],
  scores: Sequence[float],
  average: float | None,
) -> _Line:
  """A row of the paper; where it has no average, that of these columns."""
  cells, kept = {}, []
  for column, score in zip(columns, scores, strict=True):
    i = list(paper.BENCHMARKS).index(column)
    bounds = paper.METHODS["lower"][i], paper.METHODS["upper"][i]
    kept.append(retention(score, *bounds))
    cells[column] = f"{score}<br>{kept[-1]:.1f} %"
  if average is None:
    average = sum(kept) / len(kept)
  return _Line(name, "", cells, f"{average:.1f} %")


def _ours(
  row: Row, columns: Sequence[str], published: _Line | None = None
) -> _Line:
  """A row of results, beside what the paper has for it."""
  cells = {}
  for column in columns:
    if cell := row.cells.get(column):
      kept = cell.why or f"{cell.mean_retention} %{rows.whose(cell.bounds)}"
      cells[column] = f"{cell.score}<br>{kept}"
  average, count = row.average(columns)
  bounds = row.bounds(columns)
  label = row.label
  if row.mean_k is not None:
    label += f", {row.mean_k:.1f} tokens on average"
  text = f"{average} %{rows.whose(bounds)}" if average else "-"
  if average and count < len(columns):
    text += f" of {count}"
  seeds = str(len(row.seeds))
  if published:
    return _Line(label, seeds, cells, text, published.average)
  return _Line(label, seeds, cells, text)


def _table(
  lines: Iterable[_Line],
  columns: Sequence[str],
  titles: Sequence[str],
  beside_paper: bool = False,
) -> str:
  header = ["model", "seeds", *titles, "average retention"]
  if beside_paper:
    header.append("average retention in the paper")
  return markdown.table(
    header,
    [
      [
        line.label,
        line.seeds,
        *(line.cells.get(column, "-") for column in columns),
        line.average,
        *([line.in_paper] if beside_paper else []),
      ]
      for line in lines
    ],
  )


def _both(
  title: str,
  small: list[Row],
  large: list[Row],
  published: Iterable[_Line],
  columns: Sequence[str],
  beside: Callable[[Row], _Line | None],
) -> str:
  """A table of our data sets, and one of benchmarks with the paper's rows."""
  parts = [title]
  if small:
    own = _columns(small)
    lines = [_ours(row, own, beside(row)) for row in small]
    parts.append(_table(lines, own, own, beside_paper=True))
  # What the paper has first, and then what only we have.
  columns = tuple(dict.fromkeys((*columns, *_columns(large))))
  lines = [*published, *(_ours(row, columns) for row in large)]
  titles = [paper.BENCHMARKS.get(column, column) for column in columns]
  parts.append(_table(lines, columns, titles))
  if any(cell.why for row in small + large for cell in row.cells.values()):
    parts.append(_NO_BOUNDS)
  if any(
    cell.bounds - {""} for row in small + large for cell in row.cells.values()
  ):
    parts.append(_OLD_BOUNDS)
  return "\n\n".join(parts)


def _columns(found: Iterable[Row]) -> tuple[str, ...]:
  return tuple(sorted({column for row in found for column in row.cells}))


def _categories(results: Iterable[Result]) -> str:
  """Each data set of ours by kind of question."""
  by_data: dict[str, list[rows.Score]] = {}
  for result in results:
    if not result.is_benchmark:
      by_data.setdefault(result.data, []).extend(
        rows.Score(result, name, value)
        for name, value in result.scores.items()
        if name
      )
  parts = []
  for data, scores in by_data.items():
    columns = tuple(dict.fromkeys(score.column for score in scores))
    lines = [_ours(row, columns) for row in rows.make_rows(scores)]
    parts.append(f"## {data} by kind of question")
    parts.append(_table(lines, columns, columns))
  return "\n\n".join(parts)


def _sources(folder: pathlib.Path, results: Iterable[Result]) -> str:
  lines = [
    (
      result.path.relative_to(folder),
      rows.label(result),
      result.data,
      str(result.seed),
      "/".join(pathlib.PurePath(result.provenance["checkpoint"]).parts[-3:]),
      result.provenance.get("commit", "")[:12],
      result.provenance.get("devices", ""),
    )
    for result in results
  ]
  header = ("file", "model", "data", "seed", "checkpoint", "commit", "devices")
  now = datetime.datetime.now(datetime.UTC)
  return (
    f"## Sources\n\nWritten {now:%Y-%m-%d %H:%M} UTC.\n\n"
    f"{markdown.table(header, lines)}"
  )
