"""MMBench: multiple choice, with the options rotated. Read next: seed.py."""

import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from vocojax.core.files import write_atomic
from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks.base import (
  OPTION_LETTER,
  Question,
  Score,
  accuracies,
)
from vocojax.evals.benchmarks.files import (
  add_unique,
  data_file,
  decode_image,
  read_tsv,
)
from vocojax.evals.benchmarks.xlsx import xlsx

_ORIGIN = (
  "it is at https://download.openmmlab.com/mmclassification/datasets/mmbench"
)
_ROTATION = 1_000_000  # rotated copies of question i have index i + n * this
# Cells that LLaVA's reader takes for "nothing there", beside any "nan", "none".
_EMPTY = (
  *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "<NA>"),
  *("1.#IND", "1.#QNAN", "N/A", "NA", "NULL", "n/a", "null"),
)
# Columns that LLaVA leaves out of what it hands in.
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6


class MmBench:
  """The dev split. Its file holds every question in all rotations.

  The local score is the circular one of the official code: a question counts
  if every rotation is answered right. Officially a language model reads the
  answers that `infer` cannot; here those are wrong, so this is a lower bound
  of the server's score. For a model that answers with letters they agree.
  """

  headline = "circular"
  max_new_tokens = 1024

  def __init__(
    self, folder: str | os.PathLike, name: str, file: str, suffix: str
  ):
    """Reads FOLDER/`file`, which holds the images too.

    Raises:
      DataError: the file is missing or is not what it should be.
    """
    self.name = name
    self._suffix = suffix
    self.files = (data_file(folder, file, _ORIGIN),)
    self._rows: dict[str, dict[str, str]] = {}
    for where, row in self._table():
      if not re.fullmatch("[0-9]{1,15}", row["index"]):
        raise DataError(
          f"{where}: column index",
          shorten(row["index"]),
          "a number",
          f"take the official file; {_ORIGIN}",
        )
      without_image = {k: v for k, v in row.items() if k != "image"}
      add_unique(self._rows, row["index"], without_image, where)
    if not self._rows:
      raise DataError(
        self.files[0],
        "nothing in it",
        "questions",
        f"take the official file; {_ORIGIN}",
      )
    for index in self._rows:
      if str(_original(index)) not in self._rows:
        raise DataError(
          self.files[0],
          f"rotation {index} of a question that is not there",
          "every question in all rotations",
          f"take the official file; {_ORIGIN}",
        )
    secret = [i for i, row in self._rows.items() if not row.get("answer")]
    self._scored = not secret
    if not self._scored:
      self.headline = ""
    if 0 < len(secret) < len(self._rows):
      raise DataError(
        self.files[0],
        f"no answer in the row of index {secret[0]}",
        "one in every row, or in none",
        f"take the official file; {_ORIGIN}",
      )

  def _table(self) -> Iterator[tuple[str, dict[str, str]]]:
    columns = ("index", "image", "question", "hint", "A", "B")
    return read_tsv(self.files[0], columns, _ORIGIN)

  def questions(self) -> Iterator[Question]:
    for where, row in self._table():
      options = _options(row)
      lines = [] if _is_empty(row["hint"]) else [row["hint"]]
      lines.append(row["question"])
      lines += [f"{letter}. {text}" for letter, text in options.items()]
      yield Question(
        id=row["index"],
        prompt="\n".join(lines) + self._suffix,
        images=(decode_image(where, row["image"], _ORIGIN),),
        reference={"answer": row.get("answer"), "options": options},
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Circular, also by category and ability; static; what was not inferred.

    `static` judges the questions in their first order alone. `few_rotations`
    are questions, in percent, with fewer rows than options: if the file was
    cut, `circular` is too high.
    """
    if not self._scored:
      return
    said = {
      index: infer(predictions[index], _options(row))
      for index, row in self._rows.items()
    }
    right = {
      index: said[index] == row["answer"] for index, row in self._rows.items()
    }
    originals = [i for i in self._rows if int(i) < _ROTATION]
    groups: dict[str, list[str]] = {index: [] for index in originals}
    for index in self._rows:
      groups[str(_original(index))].append(index)

    def results():
      for index in originals:
        row = self._rows[index]
        names = [
          f"{column}/{row[column]}"
          for column in ("category", "l2-category")
          if row.get(column)
        ]
        yield names, float(all(right[i] for i in groups[index]))

    yield from accuracies(results(), "circular")
    first = [right[index] for index in originals]
    yield "static", 100 * sum(first) / len(first)
    few = [
      len(groups[index]) < len(_options(self._rows[index]))
      for index in originals
    ]
    yield "few_rotations", 100 * sum(few) / len(few)
    yield "not_inferred", 100 * list(said.values()).count("") / len(said)

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes the table for the server, which takes Excel files alone."""
    columns = [c for c in next(iter(self._rows.values())) if c not in _DROPPED]
    header = [*columns]
    header.insert(_PREDICTION_COLUMN, "prediction")
    rows: list[list[str | int]] = [[*header]]
    for index, row in self._rows.items():
      cells: list[str | int] = [
        int(index) if column == "index" else row[column] for column in columns
      ]
      cells.insert(_PREDICTION_COLUMN, predictions[index])
      rows.append(cells)
    path = folder / f"{self.files[0].stem}.xlsx"
    write_atomic(path, xlsx(rows))
    return [path]


def english(folder: str | os.PathLike) -> MmBench:
  """MMBench, the file of 12 July 2023 that LLaVA-1.5 is evaluated on."""
  return MmBench(folder, "mmbench", "mmbench_dev_20230712.tsv", OPTION_LETTER)


def chinese(folder: str | os.PathLike) -> MmBench:
  """MMBench-CN."""
  return MmBench(
    folder,
    "mmbench_cn",
    "mmbench_dev_cn_20231003.tsv",
    "\n请直接回答选项字母。",
  )


def infer(answer: str, options: Mapping[str, str]) -> str:
  """The letter that an answer means, or '' if that cannot be told.

  Letters first, then the text of an option: exactly one may occur. An E is
  understood, and is always wrong.
  """
  return _infer_letter(answer) or _infer_text(answer, options)


# What may stand around a letter, in the order in which it is looked for.
_AROUND = (
  *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")")),
  *(("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def _infer_letter(answer: str) -> str:
  words = answer.split()
  for before, after in itertools.chain((("", ""),), _AROUND):
    found = [c for c in "ABCDE" if f"{before}{c}{after}" in words]
    # In a sentence, a bare A is rather the article.
    article = not before + after and "A" in words and len(words) > 3
    if len(found) == 1 and not article:
      return found[0]
  return ""


def _infer_text(answer: str, options: Mapping[str, str]) -> str:
  answer = answer.lower()
  found = [c for c, text in options.items() if text.lower() in answer]
  return found[0] if len(found) == 1 else ""


def _original(index: str) -> int:
  return int(index) % _ROTATION


def _is_empty(cell: str) -> bool:
  return cell in _EMPTY or cell.lower() in ("nan", "none")


def _options(row: Mapping[str, str]) -> dict[str, str]:
  """Letter and text of the options, up to the first that is not there."""
  letters = itertools.takewhile(
    lambda c: c in row and not _is_empty(row[c]), "ABCD"
  )
  return {letter: row[letter] for letter in letters}
