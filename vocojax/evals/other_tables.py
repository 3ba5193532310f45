"""Tables 7 and 8 of the paper: efficiency, and questions about videos.

Read next: tables.py, which puts them beside the others.
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vocojax.core import files
from vocojax.errors import UserError
from vocojax.evals import markdown, paper, rows
from vocojax.evals.collect import Result

_WAYS = {"none": "no cache", "full": "full cache", "voco": "VoCo cache"}
_EFFICIENCY = {
  "size": str,
  "way": str,
  "text_length": int,
  "answer_length": int,
  "cached_tokens": int,
  "cached_bytes": float,
  "operations": float,
}
_REMEDY = "run `python -m benchmarks.efficiency --json=FILE` again"


def read_efficiency(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of every efficiency.json under a folder, as the benchmark wrote them.

  Raises:
    UserError: one of them cannot be used.
  """
  found = []
  with files.remedy(_REMEDY):
    for path in sorted(folder.glob("**/efficiency.json")):
      content = files.read_json(path, dict, UserError)
      listed = files.get_field(content, "rows", list, path, UserError)
      optional = {"seconds": (float, type(None))}
      found += [
        files.check_fields(
          row, f"{path}: rows[{i}]", _EFFICIENCY, UserError, optional
        )
        for i, row in enumerate(listed)
      ]
  return found


def efficiency(measured: list[dict[str, Any]]) -> str:
  """Table 7: what a question costs when its image was seen before."""
  published: dict[str, tuple] = {
    way: (tokens, megabytes, milliseconds, 1e12 * tera)
    for way, (tokens, megabytes, milliseconds, tera) in paper.EFFICIENCY.items()
  }
  groups: dict[str, dict[str, tuple]] = {"7B, paper": published}
  for row in measured:
    tokens = f"{row['text_length']} + {row['answer_length']} tokens"
    name = f"{row['size']}, text of {tokens}"
    seconds = row.get("seconds")
    groups.setdefault(name, {})[row["way"]] = (
      row["cached_tokens"],
      row["cached_bytes"] / 1e6,
      None if seconds is None else 1e3 * seconds,
      row["operations"],
    )
  for name, ways in groups.items():
    if lacking := [way for way in _WAYS if way not in ways]:
      raise UserError(
        f"efficiency.json: {name}",
        f"no row of way {lacking[0]!r}",
        f"one of each of {', '.join(_WAYS)}",
        _REMEDY,
      )
  lines = [line for name, ways in groups.items() for line in _costs(name, ways)]
  header = ("model", "way", "cached tokens", "cache, MB", "ms", "TFLOP")
  text = (
    "## Table 7: efficiency\n\nA question about an image whose cache was kept; "
    "without a cache the image is read again. In brackets what is saved: of "
    "the full cache's memory, and of time and work without a cache. The paper "
    "does not say how long its texts were.\n\n"
    f"{markdown.table(header, lines)}"
  )
  if not measured:
    text += (
      "\n\nNo measurement of ours: `python -m benchmarks.efficiency "
      "--json=efficiency.json`, put into this folder, makes one."
    )
  return text


def _costs(name: str, ways: Mapping[str, tuple]) -> Iterator[tuple]:
  for way, title in _WAYS.items():
    tokens, megabytes, milliseconds, operations = ways[way]
    _, whole, _, _ = ways["full"]
    _, _, slowest, most = ways["none"]
    yield (
      name,
      title,
      tokens,
      f"{megabytes:.3g}" + (_saved(megabytes, whole) if way == "voco" else ""),
      "-"
      if milliseconds is None
      else f"{milliseconds:.1f}" + _saved(milliseconds, slowest),
      f"{operations / 1e12:.3g}" + _saved(operations, most),
    )


def _saved(part: float, whole: float) -> str:
  return f" ({100 * (1 - part / whole):.1f} %)" if 0 <= part < whole else ""


def video(results: Iterable[Result]) -> str:
  """Table 8: accuracy and score of a judge, and string match without one."""
  scores = [
    rows.Score(result, f"{result.data} {name}", result.scores[name])
    for result in results
    if result.data in paper.VIDEO_BENCHMARKS
    for name in ("judge_accuracy", "judge_score", "match")
    if name in result.scores
  ]
  lines = []
  for (side, tokens), pairs in paper.VIDEO.items():
    cells = [f"{accuracy} / {score}" for accuracy, score in pairs]
    lines.append(("VoCo, paper", side, tokens, "", *cells))
  for row in rows.make_rows(scores):
    cells = [_judged(row, name) for name in paper.VIDEO_BENCHMARKS]
    side = row.result.config["model"]["vision"]["image_size"]
    tokens = row.result.cut or row.result.num_voco_tokens
    lines.append((row.label, side, tokens, str(len(row.seeds)), *cells))
  header = ("model", "pixels", "tokens a frame", "seeds")
  text = (
    "## Table 8: video\n\nAccuracy in percent / score of 0 to 5, by a judge "
    "(GPT-3.5 in the paper); without a judge, answers that match word for "
    "word.\n\n"
    f"{markdown.table((*header, *paper.VIDEO_BENCHMARKS.values()), lines)}"
  )
  return text if scores else f"{text}\n\nNo results of ours."


def _judged(row: rows.Row, name: str) -> str:
  accuracy, score, match = (
    row.cells.get(f"{name} {what}")
    for what in ("judge_accuracy", "judge_score", "match")
  )
  if accuracy and score:
    return f"{accuracy.score} / {score.score}"
  return f"match {match.score}" if match else "-"
