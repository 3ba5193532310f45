"""Reading question files, with errors that name the line. Read next: gqa.py.

Every reader takes an `origin`, a few words about where a file comes from,
which is the remedy for a missing or foreign file.
"""

import base64
import binascii
import contextlib
import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

from vocojax.core import files
from vocojax.core.files import remedy
from vocojax.errors import DataError, shorten

T = TypeVar("T")
Kind = type | tuple[type, ...]

LLAVA_EVAL = (
  "it is in eval.zip of LLaVA-1.5, see docs/Evaluation.md of "
  "https://github.com/haotian-liu/LLaVA"
)
ID = (str, int)  # of a question, a video


def data_file(
  folder: str | os.PathLike, name: str, origin: str
) -> pathlib.Path:
  """Path of FOLDER/NAME, which is there.

  Raises:
    DataError: it is not, or is no regular file.
  """
  path = files.expand_user(folder) / name
  with remedy(f"name its folder with --data; {origin}"):
    files.open_regular(path).close()
  return path


def read_json(path: pathlib.Path, kind: type[T], origin: str) -> T:
  """What a JSON file holds: an object (`kind` dict) or an array (list).

  Raises:
    DataError: the file is no JSON, or holds something else or nothing.
  """
  with remedy(f"take the official file; {origin}"):
    value = files.read_json(path, kind)
    if not value:
      raise DataError(path, "nothing in it", "questions")
    return value


@contextlib.contextmanager
def text_lines(path: pathlib.Path, origin: str) -> Iterator[TextIO]:
  """A text file, whose lines end as they do.

  Raises:
    DataError: it is no UTF-8, such as a file that is still compressed, or no
      table.
  """
  with files.open_regular(path) as file:
    try:
      yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    except (UnicodeDecodeError, csv.Error, OSError) as e:
      raise DataError(
        path, str(e), "UTF-8 text", f"take the official file; {origin}"
      ) from e


def read_jsonl(
  path: pathlib.Path, fields: Mapping[str, Kind], origin: str
) -> Iterator[tuple[str, dict]]:
  """(where, object) of every line that is not blank; `where` is FILE:LINE.

  Raises:
    DataError: a line is no JSON object or has not the fields, or there is no
      line.
  """
  found = False
  with remedy(f"take the official file; {origin}"):
    for where, entry in files.read_json_lines(path):
      found = True
      yield where, with_fields(where, entry, fields, origin)
    if not found:
      raise DataError(path, "nothing in it", "questions")


def with_fields(
  where: Any,
  entry: Any,
  fields: Mapping[str, Kind],
  origin: str,
  optional: Mapping[str, Kind] | None = None,
) -> dict:
  """`entry`, if it is an object that has all the fields, of these types.

  Raises:
    DataError: it is not, or an `optional` field has another type.
  """
  with remedy(f"take the official file; {origin}"):
    return files.check_fields(entry, where, fields, DataError, optional)


def read_tsv(
  path: pathlib.Path, fields: Iterable[str], origin: str
) -> Iterator[tuple[str, dict[str, str]]]:
  """(where, row) of a table with a header line; cells may be quoted.

  Raises:
    DataError: a column is missing, or a row has not as many cells as columns.
  """
  # A cell may hold an image; the default limit is 128 KiB.
  csv.field_size_limit(2**31 - 1)
  with text_lines(path, origin) as lines:
    table = csv.DictReader(lines, delimiter="\t", restval=None)
    columns = list(table.fieldnames or ())
    for field in fields:
      if field not in columns:
        raise DataError(
          path,
          f"columns {shorten(columns, 200)}",
          f"a column {field}",
          f"take the official file; {origin}",
        )
    for row in table:
      where = f"{path}:{table.line_num}"
      if None in row or None in row.values():
        raise DataError(
          where,
          "a row of another number of cells",
          f"{len(columns)}, as in the header",
          f"take the official file; {origin}",
        )
      yield where, row


def decode_image(where: str, text: str, origin: str) -> bytes:
  """The image in a base64 cell.

  Raises:
    DataError: it is no base64.
  """
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as e:  # ValueError: not ASCII
    raise DataError(
      f"{where}: column image",
      str(e),
      "base64",
      f"take the official file; {origin}",
    ) from e


def add_unique(entries: dict[str, Any], key: str, value, where: str) -> None:
  """`entries[key] = value`, for a new key.

  Raises:
    DataError: the key is there already.
  """
  if key in entries:
    raise DataError(
      where,
      f"id {shorten(key)} a second time",
      "each id once",
      "take the official file again",
    )
  entries[key] = value


def data_hash(paths: Iterable[pathlib.Path]) -> str:
  """SHA-256 over the names and contents of files, whatever their order."""
  total = hashlib.sha256()
  for path in sorted(paths, key=lambda p: (p.name, str(p))):
    with files.open_regular(path) as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    total.update(f"{path.name} {digest}\n".encode())
  return total.hexdigest()
