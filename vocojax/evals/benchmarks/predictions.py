"""Answers on disk, one JSON line each, safe to resume. Read next: result.py.

A line has the keys of LLaVA's answer files: question_id, prompt, text and
model_id. `model_id` says what answered; a file is resumed by nothing else.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vocojax.errors import DataError

_KEYS = ("question_id", "text")  # what a line must have
_CUT = object()  # in place of what a line holds


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
      DataError: another model answered, or a line other than the last one is
        bad.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    self.answered: dict[str, str] = {}
    self._model_id = model_id
    keep = 0
    for where, end, entry in _lines(path) if path.exists() else ():
      if entry is _CUT:
        break
      _add(self.answered, where, entry)
      found = entry.get("model_id")
      if found != model_id:
        raise DataError(
          f"{where}: answered by {found!r}, expected {model_id!r}; delete the "
          "file or choose another folder"
        )
      keep = end
    self._file = path.open("ab")
    self._file.truncate(keep)
    self._file.seek(0, os.SEEK_END)
    if keep and not path.read_bytes().endswith(b"\n"):
      self._file.write(b"\n")

  def __enter__(self) -> "PredictionWriter":
    return self

  def __exit__(self, *exception) -> None:
    self._file.close()

  def add(self, id: str, prompt: str, text: str) -> None:
    """Writes one answer, which is on disk when this returns.

    Raises:
      ValueError: the question was answered before.
    """
    if id in self.answered:
      raise ValueError(f"question {id!r} has an answer")
    entry = {
      "question_id": id,
      "prompt": prompt,
      "text": text,
      "model_id": self._model_id,
    }
    # Escaped to ASCII: no character can then look like the end of a line.
    self._file.write(json.dumps(entry).encode() + b"\n")
    self._file.flush()
    self.answered[id] = text


def read_predictions(paths: Iterable[pathlib.Path]) -> dict[str, str]:
  """The answer to each question id, of one file or of the parts of several.

  Raises:
    DataError: a file is missing, a line is bad or cut off, or a question is
      answered twice.
  """
  answered: dict[str, str] = {}
  for path in paths:
    if not path.is_file():
      raise DataError(f"{path}: no such file of answers; evaluate first")
    for where, _, entry in _lines(path):
      if entry is _CUT:
        raise DataError(
          f"{where}: the last line is cut off, expected whole lines; run the "
          "evaluation again, which continues there"
        )
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
      f"{where}: answers to {_some(foreign)}, which the benchmark does not "
      "ask; give the data folder that was answered"
    )
  if missing:
    raise DataError(
      f"{where}: no answer to {_some(missing)} of {len(ids)} questions; run "
      "the evaluation again, which asks those"
    )


def _some(ids: list[str]) -> str:
  more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
  return ", ".join(ids[:3]) + more


def _lines(path: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
  """(FILE:LINE, byte after the line, object) each; `_CUT` for a cut last line.

  Raises:
    DataError: a line other than the last one is no JSON object.
  """
  end = 0
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      end += len(line)
      where = f"{path}:{number}"
      try:
        entry = json.loads(line)
      except (json.JSONDecodeError, UnicodeDecodeError) as e:
        if line.endswith(b"\n"):
          raise DataError(
            f"{where}: not JSON ({e}), expected an answer; delete the line "
            "and run the evaluation again"
          ) from e
        entry = _CUT
      yield where, end, entry


def _add(answered: dict[str, str], where: str, entry) -> None:
  if not isinstance(entry, dict) or not all(key in entry for key in _KEYS):
    raise DataError(
      f"{where}: found {json.dumps(entry)[:60]}, expected an object with "
      f"{' and '.join(_KEYS)}; delete the line and run the evaluation again"
    )
  id_, text = str(entry["question_id"]), entry["text"]
  if not isinstance(text, str):
    raise DataError(f"{where}: text: found {text!r}, expected a string")
  if id_ in answered:
    raise DataError(
      f"{where}: question {id_!r} is answered a second time, expected once; "
      "delete one of the lines"
    )
  answered[id_] = text
