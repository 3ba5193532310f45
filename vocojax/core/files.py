"""Files of others, read; files of ours, written whole. Read next: errors.py.

The one reader of JSON, the one reader of text, and the one rule for a name that
comes from a file and becomes a path. What is wrong with a file becomes a
`UserError` with the file's name, of the class that the caller chooses.
"""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from vocojax.errors import DataError, UserError, one_line, shorten

T = TypeVar("T")
Errors = type[UserError]

_NAMES = {
  dict: "an object",
  list: "a list",
  str: "text",
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  type(None): "null",
}
# Of files that are read whole. LLaVA's largest JSON file has 1.0 GiB.
MAX_BYTES = 2**33
_MAX_NAME = 255  # bytes of a file's name, on any file system
_MAX_PATH = 4095  # bytes


def expand_user(
  path: str | os.PathLike, error: Errors = DataError
) -> pathlib.Path:
  """A path that a person typed, with `~` and `~NAME` at its start replaced.

  Raises:
    UserError: of class `error`; there is no such user.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise error(
      os.fspath(path),
      "a user that does not exist",
      "a path",
      "correct the name after ~, or write the whole path",
    ) from e


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is no local one, but a URL."""
  return "://" in os.fspath(path)


def to_path(path: str | os.PathLike, error: Errors = UserError) -> pathlib.Path:
  """The absolute path of a local file, or of one in a bucket (gs://, s3://).

  Raises:
    UserError: of class `error`; there is no such user, or no such buckets.
  """
  if in_bucket(path):
    from vocojax.core import bucket  # slow to import

    return bucket.open_path(os.fspath(path), error)
  return expand_user(path, error).absolute()


def kvstore(folder: str | os.PathLike) -> dict[str, str]:
  """TensorStore's description of a folder, local or in a bucket."""
  if in_bucket(folder):
    from vocojax.core import bucket

    return bucket.kvstore(f"{folder}/")
  return {"driver": "file", "path": f"{folder}/"}


def open_regular(
  path: str | os.PathLike, error: Errors = DataError
) -> io.BufferedReader:
  """Opens a regular file for reading; a pipe or device is refused at once.

  Symlinks are followed.

  Raises:
    UserError: of class `error`; there is no such file, it may not be read, or
      it is not a regular file.
  """
  if in_bucket(path):
    from vocojax.core import bucket

    return bucket.open_object(os.fspath(path), error)
  path = os.fspath(path)
  try:
    # Without O_NONBLOCK, opening a pipe waits for someone to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except (FileNotFoundError, NotADirectoryError) as e:
    raise error(
      path, "no such file", "a file", "check the path and the folder it is in"
    ) from e
  except OSError as e:
    raise error(
      path, e.strerror or str(e), "a readable file", "check its permissions"
    ) from e
  except ValueError as e:  # a NUL or a lone surrogate
    raise error(path, str(e), "the path of a file", "correct the path") from e
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    kind = _kind(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    raise error(path, kind, "a regular file", "name the file itself")
  return open(descriptor, "rb")


def _kind(mode: int) -> str:
  for test, name in (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
  ):
    if test(mode):
      return name
  return "a device"


def read_bytes(
  path: str | os.PathLike, error: Errors = DataError, limit: int = MAX_BYTES
) -> bytes:
  """All bytes of a regular file, at most `limit` of them.

  Raises:
    UserError: of class `error`; as `open_regular`, or the file is larger.
  """
  with open_regular(path, error) as file:
    size = size_of(file)
    if size > limit:
      raise error(
        os.fspath(path),
        f"{size:,} bytes",
        f"at most {limit:,}",
        "check that it is the right file",
      )
    try:
      return file.read()
    except OSError as e:
      raise _unreadable(path, e, error) from e


def size_of(file: io.BufferedReader) -> int:
  """Bytes of a file that was opened for reading and is at its beginning."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  return size


@contextlib.contextmanager
def listing(
  folder: str | os.PathLike, error: Errors = DataError
) -> Iterator[None]:
  """Turns an error of looking into a folder into one line.

  Raises:
    UserError: of class `error`.
  """
  if in_bucket(folder):
    from vocojax.core import bucket

    with bucket.reached(folder, error, "a folder that can be read"):
      yield
    return
  try:
    yield
  except OSError as e:
    raise error(
      os.fspath(folder),
      e.strerror or str(e),
      "a readable folder",
      "check its permissions",
    ) from e


def _unreadable(
  path: str | os.PathLike, cause: OSError, error: Errors
) -> UserError:
  return error(
    os.fspath(path),
    cause.strerror or str(cause),
    "a readable file",
    "copy it again",
  )


def read_text(
  path: str | os.PathLike, error: Errors = DataError, limit: int = MAX_BYTES
) -> str:
  """The text of a UTF-8 file, with or without a byte-order mark.

  Raises:
    UserError: of class `error`; as `read_bytes`, or it is not UTF-8.
  """
  return decode(read_bytes(path, error, limit), path, error)


def decode(data: bytes, where: Any, error: Errors = DataError) -> str:
  """UTF-8 bytes as text, with or without a byte-order mark.

  Raises:
    UserError: of class `error`; the bytes are not UTF-8.
  """
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise error(
      where,
      f"byte 0x{data[e.start]:02x} at offset {e.start}",
      "UTF-8 text",
      "save the file as UTF-8",
    ) from e


def read_json(
  path: str | os.PathLike,
  kind: type[T] | tuple[type, ...] = dict,
  error: Errors = DataError,
  limit: int = MAX_BYTES,
) -> T:
  """The value in a JSON file, which must be of type `kind`.

  Raises:
    UserError: of class `error`; as `read_bytes` and `parse_json`.
  """
  return parse_json(read_bytes(path, error, limit), path, kind, error)


def read_json_lines(
  path: str | os.PathLike,
  kind: type[T] | tuple[type, ...] = dict,
  error: Errors = DataError,
  nan: bool = False,
) -> Iterator[tuple[str, T]]:
  """`FILE:LINE` and the value of each line that is not blank.

  With `nan`, NaN and Infinity are read, as logs of a run may hold them.

  Raises:
    UserError: of class `error`; as `open_regular` and `parse_json`.
  """
  for number, line in enumerate(read_lines(path, error), 1):
    if line.strip():
      where = f"{os.fspath(path)}:{number}"
      yield where, parse_json(line.rstrip(), where, kind, error, nan)


def read_lines(
  path: str | os.PathLike, error: Errors = DataError
) -> Iterator[bytes]:
  r"""The lines of a regular file, each with the `\n` at its end.

  Raises:
    UserError: of class `error`; as `open_regular`, or reading fails.
  """
  with open_regular(path, error) as file:
    try:
      yield from file
    except OSError as e:
      raise _unreadable(path, e, error) from e


def parse_json(
  data: bytes | str,
  where: Any,
  kind: type[T] | tuple[type, ...] = dict,
  error: Errors = DataError,
  nan: bool = False,
) -> T:
  """The value of a JSON text, which must be of type `kind`.

  Stricter than Python: a key that stands twice in an object, NaN, Infinity,
  numbers beyond float64 and lone surrogates are refused, too.

  Example:
    >>> parse_json(b'{"a": 1}', "a.json")
    {'a': 1}

  Args:
    data: UTF-8 bytes, with or without a byte-order mark, or text.
    where: what to call the text in errors.
    kind: the type (or types) that the value must have.
    error: the class of error to raise.
    nan: whether NaN and Infinity are read.

  Raises:
    UserError: of class `error`; the text is not JSON or holds another type.
  """
  text = decode(data, where, error) if isinstance(data, bytes) else data
  try:
    value = (_NAN_DECODER if nan else _DECODER).decode(text)
  except json.JSONDecodeError as e:
    raise error(
      where,
      f"{e.msg} at line {e.lineno}, column {e.colno}",
      "JSON",
      "correct the file, or write or download it again",
    ) from e
  except RecursionError as e:
    raise error(
      where, "lists or objects nested too deep", "JSON", "correct the file"
    ) from e
  except _BadNumber as e:
    key = re.search(rf'"([^"\\]{{1,99}})"\s*:\s*{re.escape(e.token)}', text)
    at = f" of {shorten(key[1])}" if key else ""
    got = f"the number {shorten(e.token)}{at}"
    raise error(where, got, "numbers of float64", "correct the file") from e
  except ValueError as e:  # a number of too many digits, a key twice
    got = str(e).partition(";")[0]  # Python adds advice to programmers
    raise error(where, got, "JSON", "correct the file") from e
  if re.search(r"\\u[dD][89a-fA-F]", text):
    _refuse_surrogates(value, where, error)
  return check_kind(value, where, kind, error)


def check_kind(
  value: Any,
  where: Any,
  kind: type[T] | tuple[type, ...],
  error: Errors = DataError,
) -> T:
  """Returns a value that was read from JSON if it is of type `kind`.

  A whole number passes as `float`; true and false pass as `bool` only.

  Raises:
    UserError: of class `error`; the value is of another type.
  """
  kinds = kind if isinstance(kind, tuple) else (kind,)
  if object in kinds or type(value) in kinds:
    return value
  if float in kinds and type(value) is int and abs(value) < 2**1023:
    return value  # type: ignore[return-value]
  names = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
  raise error(where, shorten(value), names, "correct it")


_REQUIRED = object()


def get_field(
  values: dict,
  key: str,
  kind: type[T] | tuple[type, ...],
  where: Any,
  error: Errors = DataError,
  default: Any = _REQUIRED,
) -> T:
  """`values[key]`, which must be of type `kind`; `default` where it lacks.

  Example:
    >>> get_field({"id": 3}, "id", int, "record 0")
    3

  Raises:
    UserError: of class `error`; the key is missing and there is no default, or
      the value is of another type.
  """
  if key not in values:
    if default is not _REQUIRED:
      return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
    raise error(f"{where}: field {key}", "nothing", names, "add it")
  return check_kind(values[key], f"{where}: field {key}", kind, error)


def check_fields(
  values: Any,
  where: Any,
  fields: Mapping[str, type | tuple[type, ...]],
  error: Errors = DataError,
  optional: Mapping[str, type | tuple[type, ...]] | None = None,
) -> dict[str, Any]:
  """Returns `values` if it is an object that has all fields, of their types.

  Raises:
    UserError: of class `error`; it is not, or one of the `optional` fields is
      there and has another type.
  """
  values = check_kind(values, where, dict, error)
  for field, kind in fields.items():
    get_field(values, field, kind, where, error)
  for field, kind in (optional or {}).items():
    get_field(values, field, kind, where, error, default=None)
  return values


@contextlib.contextmanager
def remedy(words: str) -> Iterator[None]:
  """Replaces the remedy of every `UserError`, where the caller knows better."""
  try:
    yield
  except UserError as e:
    raise type(e)(e.where, e.got, e.expected, words) from e


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"the key {shorten(twice)} twice in one object")
  return result


class _BadNumber(ValueError):
  """A number that is none of float64."""

  def __init__(self, token: str):
    super().__init__(token)
    self.token = token


def _no_constant(name: str) -> Any:
  raise _BadNumber(name)


def _finite(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    raise _BadNumber(text)
  return value


_DECODER = json.JSONDecoder(
  object_pairs_hook=_no_repeats,
  parse_constant=_no_constant,
  parse_float=_finite,
)
_NAN_DECODER = json.JSONDecoder(
  object_pairs_hook=_no_repeats, parse_float=_finite
)


def _refuse_surrogates(value: Any, where: Any, error: Errors) -> None:
  """Raises if any text in a JSON value cannot be written as UTF-8."""
  pending = [value]
  while pending:
    found = pending.pop()
    if isinstance(found, dict):
      pending += [*found.keys(), *found.values()]
    elif isinstance(found, list):
      pending += found
    elif isinstance(found, str):
      refuse_surrogates(found, where, error)


def refuse_surrogates(text: str, where: Any, error: Errors = DataError) -> None:
  """Raises if a text cannot be written as UTF-8.

  Raises:
    UserError: of class `error`.
  """
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise error(
      where,
      f"half of a surrogate pair ({shorten(text[e.start])})",
      "text that UTF-8 can hold",
      "write the whole character",
    ) from e


def path_inside(
  folder: str | os.PathLike,
  name: str,
  where: Any,
  error: Errors = DataError,
) -> pathlib.Path:
  """The path of `name` in `folder`: the rule for names that come from a file.

  The check is lexical: `name` may not lead out of `folder` by being absolute or
  by `..`. Symlinks inside the folder are followed when the file is opened. An
  absolute name that lies in `folder` is fine; in the folder `/` every one does.

  Example:
    >>> path_inside("images", "coco/../a.png", "record 0")
    PosixPath('images/a.png')

  Raises:
    UserError: of class `error`; the name is empty, leads out of `folder`, or
      no file can have it.
  """
  folder = os.fspath(folder)
  what = f"a path inside {folder}"
  refuse_surrogates(name, where, error)
  if not name.strip() or "\0" in name:
    raise error(where, shorten(name), what, "correct the path")
  inner = os.path.normpath(name)
  if os.path.isabs(inner):
    inner = os.path.relpath(inner, os.path.abspath(folder))
  if inner.split(os.sep)[0] in (os.pardir, os.curdir):
    raise error(
      where,
      shorten(name),
      what,
      "correct the path, or name a folder that holds it",
    )
  bucket = in_bucket(folder)
  path = to_path(folder) / inner if bucket else pathlib.Path(folder, inner)
  parts = [len(os.fsencode(part)) for part in path.parts]
  if max(parts) > _MAX_NAME or sum(parts) + len(parts) > _MAX_PATH:
    raise error(where, shorten(name), "a shorter path", "correct the path")
  return path


def file_name(name: str, where: Any, error: Errors = DataError) -> str:
  """Returns `name` if it is a plain file name: no folders, no `..`.

  Raises:
    UserError: of class `error`; it is anything else.
  """
  with contextlib.suppress(error):
    if path_inside(".", name, where, error).name == name:
      return name
  raise error(where, shorten(name), "a plain file name", "correct the name")


def write_atomic(
  path: str | os.PathLike, data: bytes | str, error: Errors = UserError
) -> None:
  """Writes a file whole: after a crash the old or the new one is there.

  Raises:
    UserError: of class `error`; the disk is full or the folder read-only.
      Nothing is left of what was written.
  """
  if isinstance(data, str):  # paths in it may hold any byte
    data = data.encode("utf-8", "backslashreplace")
  with storage(path, error):
    if in_bucket(path):
      to_path(path, error).write_bytes(data)
      return
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
      with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(part, path)
    except BaseException:
      with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
      raise


class GrowingFile:
  """A local file that bytes are added to; closed at the end of a `with`."""

  def __init__(self, path: pathlib.Path):
    """Opens it, or makes it."""
    # Without O_NONBLOCK, opening a pipe waits for someone to read from it.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

  def append(self, data: bytes) -> None:
    """Adds all of it or nothing: in the file when this returns."""
    size = os.fstat(self._descriptor).st_size
    try:
      while data:
        data = data[os.write(self._descriptor, data) :]
    except OSError:
      self.truncate(size)
      raise

  def truncate(self, size: int) -> None:
    """Drops all but the first bytes."""
    os.ftruncate(self._descriptor, size)

  def flush(self) -> None:
    """Is for files in buckets."""

  def close(self) -> None:
    os.close(self._descriptor)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def open_growing(path: pathlib.Path) -> Any:
  """A `GrowingFile`, or the like of it in a bucket.

  Raises:
    OSError: a local one cannot be written.
    UserError: one in a bucket cannot be.
  """
  if in_bucket(path):
    from vocojax.core import bucket

    return bucket.GrowingObject(path)
  return GrowingFile(path)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def storage(
  path: str | os.PathLike, error: Errors = UserError
) -> Iterator[None]:
  """Turns an error of writing into one line about `path` and the remedy.

  Such as that of a full disk; TensorStore and tokenizers only speak of it.

  Raises:
    UserError: of class `error`.
  """
  if in_bucket(path):
    from vocojax.core import bucket

    with bucket.reached(path, error, "a place that can be written"):
      yield
    return
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    cause = _os_error(e)
    if cause is None:
      raise
    raise storage_error(path, cause, error) from e


def _os_error(error: BaseException | None) -> OSError | None:
  """The error of the system that another one came from, if it came from one."""
  while error is not None and not isinstance(error, OSError):
    if match := re.search(r"\bos[ _]error(?:_code=')? ?(\d+)", str(error)):
      return OSError(int(match[1]), os.strerror(int(match[1])))
    error = error.__cause__
  return error


def storage_error(
  path: str | os.PathLike, cause: OSError, error: Errors = UserError
) -> UserError:
  """What to raise when `path` cannot be written."""
  full = cause.errno in _FULL
  return error(
    os.fspath(path),
    one_line(cause.strerror or cause),
    "room to write" if full else "a place that can be written",
    "free some space and run the same command again"
    if full
    else "choose another place, or make this one writable",
  )
