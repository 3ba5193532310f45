"""Questions from a JSONL file, answers to another. Read next: batch.py.

A line of the file is an object:

  {"id": "a", "image": "cat.png", "question": "What is it?"}

"image" is a path or a list of paths, relative to the folder of the file;
without it the question is about no image. Instead of "question" there may be
"turns", a list of [question, answer] whose last answer is null. `FIELDS` may
stand in a line, too. Without an "id" a line is known by its number, from 1.

Of each line one object is written: id, answer, finish_reason, or id, error. Its
`key` stands for all that decides the answer, so that a job that was stopped can
go on, and one that was changed meanwhile is noticed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vocojax import config as config_lib
from vocojax.errors import DataError

# What a line may say about its answer, and as what.
FIELDS = {
  "max_new_tokens": "a whole number",
  "temperature": "a number",
  "top_k": "a whole number",
  "top_p": "a number",
  "seed": "a whole number",
  "stop": "a text or a list of texts",
  "stop_token": "a text or a list of texts",
}
_KEYS = ("id", "image", "question", "turns", *FIELDS)


@dataclasses.dataclass(frozen=True)
class Job:
  """One line of the file.

  Attributes:
    where: file and line, for errors.
    id: as given, or the number of the line.
    images: paths.
    turns: questions and answers; the last answer is None.
    fields: those of `FIELDS` that the line has.
    content: the line in one way of writing it, without its id.
  """

  where: str
  id: str | int
  images: tuple[str, ...]
  turns: tuple[tuple[str, str | None], ...]
  fields: Mapping[str, Any]
  content: str


def read(path: str) -> list[Job]:
  """The jobs of a file, in its order.

  Raises:
    DataError: the file or a line of it cannot be used.
  """
  file = pathlib.Path(path).expanduser()
  try:
    lines = file.read_bytes().split(b"\n")
  except OSError as e:
    raise DataError(f"{path}: cannot be read ({e.strerror})") from e
  jobs: dict[str | int, Job] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    job = _parse(line, number, f"{path}:{number}", file.parent)
    if job.id in jobs:
      raise DataError(
        f"{job.where}: id {job.id!r} is also that of {jobs[job.id].where}; "
        "give each line its own"
      )
    jobs[job.id] = job
  if not jobs:
    raise DataError(f"{path}: an empty file, expected a line per question")
  return list(jobs.values())


def _parse(line: bytes, number: int, where: str, folder: pathlib.Path) -> Job:
  entry = _object(line, where)
  for key in entry:
    if key not in _KEYS:
      near = config_lib.nearest_key(key, _KEYS).replace("key", "field")
      raise DataError(
        f"{where}: unknown field {key!r}{near}; known are {', '.join(_KEYS)}"
      )
  job_id = entry.pop("id", number)
  if not job_id or type(job_id) not in (str, int):
    raise _bad(where, "id", job_id, "text or a positive whole number")
  images = [] if entry.get("image") is None else entry["image"]
  if not _is_texts(images):
    raise _bad(where, "image", images, "a path or a list of paths")
  images = [images] if isinstance(images, str) else images
  fields = {key: value for key, value in entry.items() if key in FIELDS}
  for key, value in fields.items():
    if not _is(FIELDS[key], value):
      raise _bad(where, key, value, FIELDS[key])
  return Job(
    where,
    job_id,
    tuple(str(folder / pathlib.Path(name).expanduser()) for name in images),
    _turns(entry, where),
    fields,
    json.dumps(entry, sort_keys=True),
  )


def _is(kind: str, value: object) -> bool:
  if kind == "a whole number":
    return type(value) is int
  if kind == "a number":
    return type(value) in (int, float)
  return _is_texts(value)


def _is_texts(value: object) -> bool:
  """Whether it is a text or a list of texts, none empty."""
  texts = value if isinstance(value, list) else [value]
  return all(isinstance(text, str) and text for text in texts)


def _object(line: bytes, where: str) -> dict:
  try:
    entry = json.loads(line)
  except ValueError as e:
    raise DataError(f"{where}: not JSON ({e}); correct the line") from e
  if not isinstance(entry, dict):
    raise DataError(
      f"{where}: found {type(entry).__name__}, expected an object; correct the "
      "line"
    )
  return entry


def _turns(entry: dict, where: str) -> tuple[tuple[str, str | None], ...]:
  if ("question" in entry) == ("turns" in entry):
    raise DataError(
      f"{where}: has {'both' if 'turns' in entry else 'neither'} "
      "'question' and 'turns', expected one of them; correct the line"
    )
  if "question" in entry:
    turns: Any = [[entry["question"], None]]
    field = "question"
  else:
    turns, field = entry["turns"], "turns"
  expected = "[question, answer] each, the last answer null"
  if not isinstance(turns, list) or not turns:
    raise _bad(where, field, turns, expected)
  for i, turn in enumerate(turns, 1):
    if not isinstance(turn, list) or len(turn) != 2:
      raise _bad(where, field, turn, expected)
    question, answer = turn
    if not isinstance(question, str) or not question.strip():
      raise _bad(where, field, question, "a question")
    if (answer is None) != (i == len(turns)) or not isinstance(
      answer, str | None
    ):
      raise _bad(where, field, turn, expected)
  return tuple((question, answer) for question, answer in turns)


def _bad(where: str, field: str, found: object, expected: str) -> DataError:
  text = json.dumps(found)
  text = text if len(text) <= 60 else text[:57] + "..."
  return DataError(
    f"{where}: field {field!r}: found {text}, expected {expected}; correct the "
    "line"
  )


class Answers:
  """The file of answers; a line is in it as soon as it is written.

  Attributes:
    done: ids of the jobs that have an answer.
    note: what was dropped from the file, or ''.
  """

  def __init__(self, path: str, jobs: Sequence[Job], settings: object):
    """Opens the file and drops what is to be written again from it.

    That is an incomplete last line, which a killed run leaves, and lines with
    an error.

    Args:
      path: created if it is not there.
      jobs: all of them.
      settings: what the answers depend on besides the lines; goes to JSON.

    Raises:
      DataError: the file cannot be written to, or has other answers.
    """
    self._keys = {job.id: _key(job, settings) for job in jobs}
    file = pathlib.Path(path).expanduser()
    try:
      old = file.read_bytes() if file.exists() else b""
      lines = old.splitlines(keepends=True)
      incomplete = bool(lines) and not lines[-1].endswith(b"\n")
      lines = lines[: len(lines) - incomplete]
      entries = [_object(x, f"{path}:{i}") for i, x in enumerate(lines, 1)]
      for number, entry in enumerate(entries, 1):
        self._check(entry, f"{path}:{number}")
      kept = [
        line
        for line, entry in zip(lines, entries, strict=True)
        if "error" not in entry
      ]
      if b"".join(kept) != old:
        part = file.with_name(file.name + ".part")
        part.write_bytes(b"".join(kept))
        os.replace(part, file)
      # Unbuffered: on a full disk, closing must not try once more.
      self._file = file.open("ab", buffering=0)
    except OSError as e:
      raise _not_writable(path, e) from e
    self.done = {e["id"] for e in entries if "error" not in e}
    failed = len(lines) - len(kept)
    notes = ["an incomplete last line"] * incomplete
    notes += [f"{failed} line{'s' * (failed > 1)} with an error"] * bool(failed)
    self.note = f"{path}: dropped {' and '.join(notes)}" if notes else ""

  def _check(self, entry: dict, where: str) -> None:
    job_id: Any = entry.get("id")
    expected = self._keys.get(job_id) if type(job_id) in (str, int) else None
    if entry.get("key") != expected or expected is None:
      raise DataError(
        f"{where}: an answer to id {job_id!r} of another job: the question, "
        "its image, the checkpoint or a flag was another; name another file, "
        "or delete this one"
      )

  def write(self, job: Job, **fields: Any) -> None:
    """Appends what came of a job; a kill after this does not lose it.

    Raises:
      DataError: the disk is full.
    """
    line = {"id": job.id, **fields, "key": self._keys[job.id]}
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as e:
      raise _not_writable(self._file.name, e) from e

  def close(self) -> None:
    self._file.close()


def _not_writable(path: str, e: OSError) -> DataError:
  return DataError(
    f"{path}: cannot be written to ({e.strerror}); name another file or make "
    "room"
  )


def _key(job: Job, settings: object) -> str:
  text = json.dumps([settings, job.content], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
