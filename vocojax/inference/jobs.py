"""Questions from a JSONL file, answers to another. Read next: batch.py.

A line of the file is an object:

  {"id": "a", "image": "cat.png", "question": "What is it?"}

"image" is a path or a list of paths inside the image folder, by default that of
the file; without it the question is about no image. Instead of "question" there
may be "turns", a list of [question, answer] whose last answer is null. `FIELDS`
may stand in a line, too. "id" is text or a number; without one a line is known
by its number, from 1.

Of each line one object is written: id, answer, finish_reason, or id, error. Its
`key` stands for all that decides the answer, so that a job that was stopped can
resume, and one that was changed meanwhile is noticed. A line that cannot be
used gets an error, at each run again; the others are answered.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vocojax import config as config_lib
from vocojax.core import files
from vocojax.errors import DataError, UserError, shorten

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
_BEGINNING = b'{"id": '  # of every line of answers

Id = str | int | float


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
    error: why the line cannot be used; it has none of the above then.
  """

  where: str
  id: Id
  images: tuple[str, ...] = ()
  turns: tuple[tuple[str, str | None], ...] = ()
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  content: str = ""
  error: UserError | None = None


def read(path: str, image_folder: str | None = None) -> list[Job]:
  """The jobs of a file, in its order.

  Args:
    path: of the file.
    image_folder: folder of the images; by default that of the file.

  Raises:
    DataError: the file cannot be read, or two lines have one id.
  """
  file = files.expand_user(path)
  folder = file.parent
  if image_folder is not None:
    folder = files.expand_user(image_folder)
  data = files.read_bytes(file).removeprefix(b"\xef\xbb\xbf")
  lines = {i: x for i, x in enumerate(data.split(b"\n"), 1) if x.strip()}
  if not lines:
    raise DataError(path, "an empty file", "a line per question", "write one")
  given = {number: _id(line) for number, line in lines.items()}
  known = set(given.values())
  jobs: dict[Id, Job] = {}
  for number, line in lines.items():
    job_id = given[number]
    if job_id is None:
      job_id = f"line {number}" if number in known else number
    job = _parse(line, job_id, f"{path}:{number}", folder)
    if job_id in jobs:
      raise DataError(
        job.where,
        f"the id {shorten(job_id)}, as in {jobs[job_id].where}",
        "an id of its own",
        "change one of them",
      )
    jobs[job_id] = job
  return list(jobs.values())


def _id(line: bytes) -> Id | None:
  """What a line names itself, even where it cannot be used otherwise."""
  with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
    found = json.loads(line.decode(errors="replace"))["id"]
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    return found if type(found) in (str, int, float) else None
  return None


def _parse(line: bytes, job_id: Id, where: str, folder: pathlib.Path) -> Job:
  try:
    entry = files.parse_json(line, "line")
    for key in entry:
      if key not in _KEYS:
        near = config_lib.nearest(key, _KEYS)
        raise DataError(
          "line",
          f"the field {shorten(key)}",
          f"one of {', '.join(_KEYS)}",
          f"write {near}" if near else "leave it out",
        )
    kinds = (str, int, float, type(None))
    files.check_kind(entry.pop("id", None), "line: field id", kinds)
    fields = {key: value for key, value in entry.items() if key in FIELDS}
    for key, value in fields.items():
      if not _is(FIELDS[key], value):
        raise _bad(key, value, FIELDS[key])
    images, turns = _images(entry, folder), _turns(entry)
    content = json.dumps(entry, sort_keys=True)
    return Job(where, job_id, images, turns, fields, content)
  except UserError as e:
    return Job(where, job_id, error=e)
  except Exception as e:  # whatever it is, the other lines are answered
    error = DataError("line", repr(e)[:200], "a question", "correct the line")
    return Job(where, job_id, error=error)


def _is(kind: str, value: object) -> bool:
  if kind == "a whole number":
    return type(value) is int
  if kind == "a number":  # a whole number may be beyond float64
    return isinstance(value, float) or (
      type(value) is int and abs(value) < 2**1023
    )
  return _is_texts(value)


def _is_texts(value: object) -> bool:
  """Whether it is a text or a list of texts, none empty."""
  texts = value if isinstance(value, list) else [value]
  return all(isinstance(text, str) and text for text in texts)


def _images(entry: dict, folder: pathlib.Path) -> tuple[str, ...]:
  names = [] if entry.get("image") is None else entry["image"]
  if not _is_texts(names):
    raise _bad("image", names, "a path or a list of paths")
  names = [names] if isinstance(names, str) else names
  where = "line: field image"
  try:
    return tuple(
      str(files.path_inside(folder, os.path.expanduser(name), where))
      for name in names
    )
  except DataError as e:
    fix = "correct the path, or set --image_folder to a folder that holds it"
    raise DataError(e.where, e.got, e.expected, fix) from e


def _turns(entry: dict) -> tuple[tuple[str, str | None], ...]:
  if ("question" in entry) == ("turns" in entry):
    raise DataError(
      "line",
      f"{'both' if 'turns' in entry else 'neither'} question and turns",
      "one of them",
      "correct the line",
    )
  if "question" in entry:
    turns: Any = [[entry["question"], None]]
    field = "question"
  else:
    turns, field = entry["turns"], "turns"
  expected = "[question, answer] each, the last answer null"
  if not isinstance(turns, list) or not turns:
    raise _bad(field, turns, expected)
  for i, turn in enumerate(turns, 1):
    if not isinstance(turn, list) or len(turn) != 2:
      raise _bad(field, turn, expected)
    question, answer = turn
    if not isinstance(question, str) or not question.strip():
      raise _bad(field, question, "a question")
    if (answer is None) != (i == len(turns)) or not isinstance(
      answer, str | None
    ):
      raise _bad(field, turn, expected)
  return tuple((question, answer) for question, answer in turns)


def _bad(field: str, found: object, expected: str) -> DataError:
  return DataError(
    f"line: field {field}", shorten(found), expected, "correct the line"
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
    file = files.expand_user(path)
    old = files.read_bytes(file) if os.path.lexists(file) else b""
    *lines, last = old.split(b"\n")
    if not _is_torn(last):
      lines.append(last)
    self.done: set[Id] = set()
    kept, failed = [], 0
    for number, line in enumerate(lines, 1):
      job_id = self._answered(line, f"{path}:{number}")
      if job_id is None:
        failed += bool(line)
      else:
        self.done.add(job_id)
        kept.append(line + b"\n")
    if b"".join(kept) != old:
      files.write_atomic(file, b"".join(kept), DataError)
    with files.storage(path, DataError):
      # Unbuffered: on a full disk, closing must not try once more.
      self._file = file.open("ab", buffering=0)
    notes = ["an incomplete last line"] * bool(last and _is_torn(last))
    notes += [f"{failed} line{'s' * (failed > 1)} with an error"] * bool(failed)
    self.note = f"{path}: dropped {' and '.join(notes)}" if notes else ""

  def _answered(self, line: bytes, where: str) -> Id | None:
    """The id of the job whose answer a line has; None where it has none.

    Raises:
      DataError: it is no answer to one of the jobs.
    """
    if not line:
      return None
    try:
      entry = files.parse_json(line, where)
      if "error" in entry:
        return None
      job_id = files.get_field(entry, "id", (str, int, float), where)
      key = files.get_field(entry, "key", str, where)
      files.get_field(entry, "answer", str, where)
    except DataError as e:
      fix = "delete the line and it is answered again, or name another file"
      raise DataError(e.where, e.got, e.expected, fix) from e
    if key != self._keys.get(job_id):
      raise DataError(
        where,
        f"an answer to id {shorten(job_id)} of another job: the question, "
        "its image, the checkpoint or a flag was another",
        "answers to this job",
        "name another file, or delete this one",
      )
    return job_id

  def write(self, job: Job, **fields: Any) -> None:
    """Appends what came of a job; a kill after this does not lose it.

    Raises:
      DataError: the disk is full.
    """
    line = {"id": job.id, **fields, "key": self._keys[job.id]}
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    with files.storage(self._file.name, DataError):
      while data:
        data = data[self._file.write(data) :]

  def close(self) -> None:
    self._file.close()


def _is_torn(line: bytes) -> bool:
  """Whether a last line without an end may be all that came of an answer.

  After a power cut there may be zeros instead.
  """
  begins = line.startswith(_BEGINNING) and b'"question"' not in line
  return begins or _BEGINNING.startswith(line) or not line.strip(b"\0")


def _key(job: Job, settings: object) -> str:
  text = json.dumps([settings, job.content], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
