"""From results to rows of a table: seeds joined, retention. Next: tables.py.

Runs that differ in nothing but their seed are one row. Where two runs have the
same method but differ in another setting, each is a row that names it, but for
the one that has it as most results do.
"""

import collections
import dataclasses
import os
import pathlib
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from vocojax.evals import intervals
from vocojax.evals.collect import Result
from vocojax.evals.retention import retention

# Methods in the order of rows, as tables call them.
LABELS = {
  "upper": "upper bound",
  "full": "LLaVA, all patches",
  "voco_full": "VoCo weights, all patches",
  "voco": "VoCo",
  "avgpool": "avg-pool",
  "qformer": "Q-Former",
  "blind": "blind, no image",
  "full_voco": "LLaVA's weights under the VoCo mask",
  "lower": "lower bound",
}
# Lower and upper bound: the paper's, and, under their label, what was taken for
# them before there was the compressor `voco_causal`.
BOUNDS = {"": ("lower", "upper"), "full": ("full_voco", "full")}
NO_BOUNDS = "no bounds"
MANY_BOUNDS = "several bounds"
NO_ROOM = "upper bound not above lower"


@dataclasses.dataclass(frozen=True)
class Score:
  """One number: what a result has in a column."""

  result: Result
  column: str
  value: float


@dataclasses.dataclass(frozen=True)
class Cell:
  """What a row has in a column.

  Attributes:
    score: mean over seeds.
    seeds: the score of each seed.
    retention: in percent, of each seed that has both bounds.
    why: why there is no retention; '' where there is.
    bounds: labels of the `BOUNDS` that retention is of.
  """

  score: intervals.Mean
  seeds: Mapping[int, float]
  retention: Mapping[int, float]
  why: str = ""
  bounds: frozenset[str] = frozenset()

  @property
  def mean_retention(self) -> intervals.Mean:
    return intervals.mean(list(self.retention.values()))


@dataclasses.dataclass(frozen=True)
class Row:
  """One model, trained with some seeds.

  Attributes:
    label: how tables and pictures call it.
    result: one of its results, which tells method, k and so on.
    cells: by column.
    mean_k: of its results, where tokens were read as needed.
  """

  label: str
  result: Result
  cells: Mapping[str, Cell]
  mean_k: float | None = None

  @property
  def seeds(self) -> set[int]:
    return {seed for cell in self.cells.values() for seed in cell.seeds}

  def average(
    self, columns: Iterable[str]
  ) -> tuple[intervals.Mean | None, int]:
    """Mean retention over columns, for each seed, then over the seeds.

    Returns:
      It, of the seeds that have all columns in which the row has any retention,
      and the number of these columns; None and 0 if there is none.
    """
    kept = [self.cells[c].retention for c in columns if c in self.cells]
    kept = [by_seed for by_seed in kept if by_seed]
    seeds = set.intersection(*map(set, kept)) if kept else set()
    if not seeds:
      return None, 0
    means = [statistics.fmean(x[seed] for x in kept) for seed in sorted(seeds)]
    return intervals.mean(means), len(kept)

  def bounds(self, columns: Iterable[str]) -> frozenset[str]:
    """Labels of the `BOUNDS` of all columns together."""
    cells = [self.cells[c] for c in columns if c in self.cells]
    return frozenset().union(*(cell.bounds for cell in cells))


def whose(bounds: Collection[str]) -> str:
  """What stands behind a retention that is not between the paper's bounds."""
  names = ", ".join(sorted(filter(None, bounds)))
  part = " in part" if "" in bounds else ""
  return f" (bounds: {names}{part})" if names else ""


def headlines(results: Iterable[Result]) -> list[Score]:
  """Of each result its main score, in a column of its data set."""
  return [Score(r, r.data, r.scores[""]) for r in results if "" in r.scores]


def label(result: Result) -> str:
  """Method, k, how it was trained and how it was used."""
  text, k = LABELS[result.method], result.num_voco_tokens
  if result.method in ("voco", "avgpool", "qformer"):
    text += f"-{k}"
  elif result.method in ("upper", "lower", "full_voco") and k != 1:
    text += f", k = {k}"
  if result.method == "voco" and result.is_elastic:
    text += " elastic"
  weight, teacher = result.distillation
  if weight:
    text += f", distilled {weight:g}" + (f" from {teacher}" if teacher else "")
  if result.cut:
    return f"{text}, cut to {result.cut}"
  return f"{text}, {result.use}" if result.use else text


def make_rows(scores: Sequence[Score]) -> list[Row]:
  """The rows of a table, in the order of `LABELS`."""
  bounds = _Bounds(scores)
  usual = _usual(scores)
  found: dict[str, list[Score]] = collections.defaultdict(list)
  for score in scores:
    found[label(score.result)].append(score)
  made = []
  for name, members in found.items():
    for difference, columns in _apart(members, usual).items():
      cells = {column: _cell(x, bounds) for column, x in columns.items()}
      results = [
        score.result for scores in columns.values() for score in scores
      ]
      read = [r.mean_k for r in results if r.mean_k is not None]
      mean_k = statistics.fmean(read) if read else None
      made.append(Row(name + difference, results[0], cells, mean_k))
  return sorted(made, key=_order)


def _order(row: Row):
  r = row.result
  method = list(LABELS).index(r.method)
  trained = r.num_voco_tokens, r.is_elastic, r.distillation
  return method, trained, bool(r.use), -(r.cut or 0), row.label


def _usual(scores: Iterable[Score]) -> dict[str, str]:
  """By key the value that most results have, if there is one.

  The key of a phase that a result is of has no phase: those are compared with
  one another.
  """
  results = {score.result.path: score.result for score in scores}.values()
  counts: dict[str, collections.Counter] = collections.defaultdict(
    collections.Counter
  )
  for result in results:
    for key, value in result.settings.items():
      counts[_short(key, result)][value] += 1
  most = {key: count.most_common(1)[0] for key, count in counts.items()}
  return {
    key: value
    for key, (value, number) in most.items()
    if 2 * number > counts[key].total()
  }


def _short(key: str, result: Result) -> str:
  return key.removeprefix(f"{result.config['name']}.")


def _apart(
  members: list[Score], usual: Mapping[str, str]
) -> dict[str, dict[str, list[Score]]]:
  """Scores with equal settings, by a few that tell them apart and by column.

  What differs between columns only, such as the data set, is no difference.
  """
  by_column: dict[str, list[Score]] = collections.defaultdict(list)
  for score in members:
    by_column[score.column].append(score)
  telling: dict[str, None] = {}  # keys, in order
  for column in by_column.values():
    every = {tuple(sorted(s.result.settings.items())) for s in column}
    settings = [dict(one) for one in sorted(every)]
    told = [()] * len(settings)
    for key in sorted({key for one in settings for key in one}):
      values = [one.get(key) for one in settings]
      if len(set(told)) < len(told) and len(set(values)) > 1:
        told = [(*t, v) for t, v in zip(told, values, strict=True)]
        telling[key] = None
  found: dict[str, dict[str, list[Score]]] = {}
  for column, scores in by_column.items():
    for score in scores:
      text = "".join(
        f", {key}={score.result.settings.get(key, '(none)')}"
        for key in telling
        if score.result.settings.get(key)
        != usual.get(_short(key, score.result))
      )
      found.setdefault(text, {}).setdefault(column, []).append(score)
  return found


def _cell(group: list[Score], bounds: "_Bounds") -> Cell:
  values = collections.defaultdict(list)
  kept = collections.defaultdict(list)
  why, labels = "", set()
  for score in group:
    values[score.result.seed].append(score.value)
    whose, lowers, uppers = bounds.of(score)
    if not lowers or not uppers:
      why = NO_BOUNDS
      continue
    if len(lowers) > 1 or len(uppers) > 1:
      why = MANY_BOUNDS
      continue
    [lower], [upper] = lowers, uppers
    if upper <= lower:
      why = NO_ROOM
    else:
      kept[score.result.seed].append(retention(score.value, lower, upper))
      labels.add(whose)
  # Runs with the same seed as well are one run that was made again.
  seeds = {seed: statistics.fmean(x) for seed, x in sorted(values.items())}
  by_seed = {seed: statistics.fmean(x) for seed, x in sorted(kept.items())}
  mean = intervals.mean(list(seeds.values()))
  return Cell(mean, seeds, by_seed, "" if by_seed else why, frozenset(labels))


class _Bounds:
  """Bounds of a score: of its workdir, or else the nearest with its seed.

  Of those that are equally near, the paper's.
  """

  def __init__(self, scores: Iterable[Score]):
    self._known: dict[tuple, list[Score]] = collections.defaultdict(list)
    for score in scores:
      if not score.result.use:
        key = score.result.method, score.column, score.result.seed
        self._known[key].append(score)

  def of(self, score: Score) -> tuple[str, set[float], set[float]]:
    """Label of the bounds, and what may be the lower and the upper one."""
    best, chosen = -1, ("", set[float](), set[float]())
    for name, (lower, upper) in BOUNDS.items():
      near_lower, lowers = self._one(lower, score)
      near_upper, uppers = self._one(upper, score)
      if lowers and uppers and min(near_lower, near_upper) > best:
        best, chosen = min(near_lower, near_upper), (name, lowers, uppers)
    return chosen

  def _one(self, method: str, score: Score) -> tuple[int, set[float]]:
    """How near the nearest are, and their scores."""
    one = score.result
    found = self._known.get((method, score.column, one.seed), [])

    def shared(other: Score) -> int:
      """How many folders both lie in."""
      both = os.path.commonpath([one.workdir, other.result.workdir])
      return len(pathlib.PurePath(both).parts)

    nearest = max(map(shared, found), default=0)
    found = [s for s in found if shared(s) == nearest]
    alike = [
      s for s in found if s.result.num_voco_tokens == one.num_voco_tokens
    ]
    return nearest, {s.value for s in alike or found}
