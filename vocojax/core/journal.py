"""A file of JSON lines that only grows. Read next: files.py.

After a crash it holds whole lines, and at most one that is cut off at its end,
which the next writer drops.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vocojax.core import files
from vocojax.errors import DataError, UserError


class Journal:
  """Adds objects to a file, one a line; there is one writer at a time.

  Attributes:
    entries: `FILE:LINE` and object of each line that was there.
  """

  def __init__(
    self, path: pathlib.Path, error: type[UserError] = DataError
  ) -> None:
    """Reads the file, which is made if it is not there.

    Raises:
      UserError: of class `error`; it cannot be written, is no regular file, or
        a line other than the last one is no JSON object.
    """
    self._path, self._error = path, error
    self.entries: list[tuple[str, dict[str, Any]]] = []
    with files.storage(path, error):
      path.parent.mkdir(parents=True, exist_ok=True)
      self._object = files.open_growing(path) if files.in_bucket(path) else None
      with self._open():
        pass
    self._end = 0  # of the whole lines
    self._before = b""  # what is between them and the next one
    self._has_cut = False
    for where, end, line, entry in _lines(path, error):
      if entry is None:
        self._has_cut = True
        break
      self.entries.append((where, entry))
      self._end, self._before = end, b"" if line.endswith(b"\n") else b"\n"

  def drop_cut(self) -> None:
    """Drops the last line, if it is cut off; `add` does so, too.

    Raises:
      UserError: of the class that was given; the file cannot be written.
    """
    if self._has_cut:
      with files.storage(self._path, self._error):
        with self._open() as file:
          file.truncate(self._end)
      self._has_cut = False

  def add(self, entry: Mapping[str, Any]) -> None:
    """Adds an object: in the file when this returns, or not at all.

    In a bucket, it is there after `flush`, or after some seconds.

    Raises:
      UserError: of the class that was given; there is no room.
    """
    self.drop_cut()
    # Escaped to ASCII: no character can then look like the end of a line.
    line = self._before + json.dumps(entry, allow_nan=False).encode() + b"\n"
    with files.storage(self._path, self._error), self._open() as file:
      file.append(line)
    self._before = b""

  def flush(self) -> None:
    """In a bucket, writes what was added in the last seconds.

    Raises:
      UserError: it cannot be written.
    """
    if self._object:
      self._object.flush()

  def _open(self) -> Any:
    return self._object or files.GrowingFile(self._path)


def read_journal(
  path: pathlib.Path, error: type[UserError] = DataError
) -> Iterator[tuple[str, dict[str, Any]]]:
  """`FILE:LINE` and object of each line, of which none may be cut off.

  Raises:
    UserError: of class `error`; the file is missing or a line is bad.
  """
  for where, _, _, entry in _lines(path, error):
    if entry is None:
      raise error(
        where,
        "a line that is cut off",
        "whole lines",
        "run the same command again, which continues there",
      )
    yield where, entry


def _lines(
  path: pathlib.Path, error: type[UserError]
) -> Iterator[tuple[str, int, bytes, dict[str, Any] | None]]:
  """`FILE:LINE`, byte after it, line, object; None for a cut-off last line."""
  end = 0
  for number, line in enumerate(files.read_lines(path, error), 1):
    end += len(line)
    where = f"{path}:{number}"
    try:
      entry = files.parse_json(line.rstrip(), where, dict, error)
    except UserError as e:
      if line.endswith(b"\n"):
        raise error(
          e.where, e.got, e.expected, "delete the line and run again"
        ) from e
      entry = None
    yield where, end, line, entry
