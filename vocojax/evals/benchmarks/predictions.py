"""Answers on disk, one JSON line each, safe to resume. Read next: result.py.

A line has the keys of LLaVA's answer files: question_id, prompt, text and
model_id. `model_id` says what answered; a file is resumed by nothing else.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vocojax.core.files import get_field
from vocojax.core.journal import Journal, read_journal
from vocojax.errors import DataError, shorten

_DELETE = "delete the line and run the evaluation again"


class PredictionWriter:
  """Appends answers to a file; what was answered before is kept.

  Attributes:
    answered: the answer to each question id, those found and those added.
  """

  def __init__(self, path: pathlib.Path, model_id: str):
    """Opens the file.

    A last line that was cut off, by a crash, is dropped; its question is to be
    asked again.

    Args:
      path: the file, made if it is not there.
      model_id: what answers: checkpoint, settings, prompt layout.

    Raises:
      DataError: another model answered, a line other than the last one is bad,
        or the file cannot be written.
    """
    self.answered: dict[str, str] = {}
    self._model_id = model_id
    self._journal = Journal(path)
    for where, entry in self._journal.entries:
      _add(self.answered, where, entry)
      found = entry.get("model_id")
      if found != model_id:
        raise DataError(
          f"{where}: field model_id",
          shorten(found, 300),
          repr(model_id),
          "delete the file or choose another folder",
        )
    self._journal.drop_cut()

  def add(self, id: str, prompt: str, text: str) -> None:
    """Writes one answer, which is on disk when this returns.

    Raises:
      ValueError: the question was answered before.
      DataError: there is no room for it.
    """
    if id in self.answered:
      raise ValueError(f"question {id!r} has an answer")
    self._journal.add(
      {
        "question_id": id,
        "prompt": prompt,
        "text": text,
        "model_id": self._model_id,
      }
    )
    self.answered[id] = text

  def flush(self) -> None:
    """See `Journal.flush`."""
    self._journal.flush()


def read_predictions(paths: Iterable[pathlib.Path]) -> dict[str, str]:
  """The answer to each question id, of one file or of the parts of several.

  Raises:
    DataError: a file is missing, a line is bad or cut off, or a question is
      answered twice.
  """
  answered: dict[str, str] = {}
  for path in paths:
    for where, entry in read_journal(path):
      _add(answered, where, entry)
  return answered


def check_complete(
  predictions: Mapping[str, str], ids: Iterable[str], where: str
) -> None:
  """Checks that exactly the questions `ids` are answered.

  Args:
    predictions: from `read_predictions`; any order.
    ids: of all questions.
    where: names the predictions in errors.

  Raises:
    DataError: an answer is missing, or belongs to no question.
  """
  ids = dict.fromkeys(ids)
  missing = [id_ for id_ in ids if id_ not in predictions]
  foreign = [id_ for id_ in predictions if id_ not in ids]
  if foreign:
    raise DataError(
      where,
      f"answers to {_some(foreign)}, which the benchmark does not ask",
      "answers to its questions",
      "give the data folder that was answered, or another --out",
    )
  if missing:
    raise DataError(
      where,
      f"no answer to {_some(missing)}",
      f"answers to all {len(ids):,} questions",
      "run the evaluation again, which asks those",
    )


def _some(ids: list[str]) -> str:
  more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
  return ", ".join(shorten(id_) for id_ in ids[:3]) + more


def _add(answered: dict[str, str], where: str, entry: dict[str, Any]) -> None:
  try:
    id_ = str(get_field(entry, "question_id", (str, int), where))
    text = get_field(entry, "text", str, where)
  except DataError as e:
    raise DataError(e.where, e.got, e.expected, _DELETE) from e
  if id_ in answered:
    raise DataError(
      where,
      f"question {shorten(id_)} a second time",
      "one answer to a question",
      "delete one of the lines",
    )
  answered[id_] = text
