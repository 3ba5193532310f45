"""Reading question files, with errors that name the line. Read next: gqa.py.

Every reader takes an `origin`, a few words about where a file comes from,
which a message about a missing or foreign file ends with.
"""

import base64
import binascii
import contextlib
import csv
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from vocojax.errors import DataError

LLAVA_EVAL = (
  "it is in eval.zip of LLaVA-1.5, see docs/Evaluation.md of "
  "https://github.com/haotian-liu/LLaVA"
)


def data_file(
  folder: str | os.PathLike, name: str, origin: str
) -> pathlib.Path:
  """Path of FOLDER/NAME, which is there.

  Raises:
    DataError: it is not.
  """
  path = pathlib.Path(folder).expanduser() / name
  if not path.is_file():
    raise DataError(f"{path}: no such file (--data); {origin}")
  return path


def read_json(path: pathlib.Path, kind: type, origin: str) -> Any:
  """What a JSON file holds: an object (`kind` dict) or an array (list).

  Raises:
    DataError: the file is no JSON, or holds something else or nothing.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise DataError(f"{path}: not JSON ({e}); {origin}") from e
  if not isinstance(value, kind):
    raise DataError(
      f"{path}: found a JSON {type(value).__name__}, expected a "
      f"{kind.__name__}; {origin}"
    )
  if not value:
    raise DataError(f"{path}: is empty; {origin}")
  return value


@contextlib.contextmanager
def text_lines(path: pathlib.Path, origin: str) -> Iterator[TextIO]:
  """A text file, whose lines end as they do.

  Raises:
    DataError: it is no UTF-8, such as a file that is still compressed, or no
      table.
  """
  try:
    with path.open(encoding="utf-8", newline="") as lines:
      yield lines
  except (UnicodeDecodeError, csv.Error) as e:
    raise DataError(f"{path}: not text as expected ({e}); {origin}") from e


def read_jsonl(
  path: pathlib.Path, fields: Iterable[str], origin: str
) -> Iterator[tuple[str, dict]]:
  """(where, object) of every line that is not blank; `where` is FILE:LINE.

  Raises:
    DataError: a line is no JSON object or lacks one of the fields, or there
      is no line.
  """
  fields, found = tuple(fields), False
  with text_lines(path, origin) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      where = f"{path}:{number}"
      try:
        entry = json.loads(line)
      except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON ({e}); {origin}") from e
      found = True
      yield where, with_fields(where, entry, fields, origin)
  if not found:
    raise DataError(f"{path}: is empty; {origin}")


def with_fields(where: str, entry, fields: Iterable[str], origin: str) -> dict:
  """`entry`, if it is an object that has all the fields.

  Raises:
    DataError: it is not.
  """
  if not isinstance(entry, dict):
    raise DataError(
      f"{where}: found {type(entry).__name__}, expected an object; {origin}"
    )
  for field in fields:
    if entry.get(field) is None:
      raise DataError(
        f"{where}: no field {field!r}, found {', '.join(entry) or 'none'}; "
        f"{origin}"
      )
  return entry


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
          f"{path}: no column {field!r}, found {', '.join(columns)[:200]}; "
          f"{origin}"
        )
    for row in table:
      where = f"{path}:{table.line_num}"
      if None in row or None in row.values():
        raise DataError(
          f"{where}: not {len(columns)} cells as in the header; {origin}"
        )
      yield where, row


def decode_image(where: str, text: str, origin: str) -> bytes:
  """The image in a base64 cell.

  Raises:
    DataError: it is no base64.
  """
  try:
    return base64.b64decode(text, validate=True)
  except binascii.Error as e:
    raise DataError(f"{where}: column image: no base64 ({e}); {origin}") from e


def add_unique(entries: dict[str, Any], key: str, value, where: str) -> None:
  """`entries[key] = value`, for a new key.

  Raises:
    DataError: the key is there already.
  """
  if key in entries:
    raise DataError(
      f"{where}: id {key!r} a second time, expected each once; take the "
      "official file again"
    )
  entries[key] = value


def data_hash(files: Iterable[pathlib.Path]) -> str:
  """SHA-256 over the names and contents of files, whatever their order."""
  total = hashlib.sha256()
  for path in sorted(files, key=lambda p: (p.name, str(p))):
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    total.update(f"{path.name} {digest}\n".encode())
  return total.hexdigest()
