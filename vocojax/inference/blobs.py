"""Values by key in a folder or a bucket, many at a time. Read next: store.py.

TensorStore does the work, with the same code for all places. A write is atomic:
in a folder it goes to a temporary file, which is locked by its writer and then
renamed; in a bucket it is one request. Files are not forced to the disk (that
would take several times as long), so a power cut can leave damaged ones behind:
whoever reads must check.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping

import tensorstore as ts

from vocojax.core import files
from vocojax.errors import CacheError, shorten

_WINDOW = 64  # requests under way; a value is at most some megabytes
_TEMPORARY = ".__lock"  # what TensorStore appends to a file's name
_PLACES = "a folder, or a URL that begins with file://, gs:// or s3://"


class Blobs:
  """Values below one URL.

  Attributes:
    url: where, for messages.
  """

  def __init__(self, url: str):
    """Opens it; nothing is written or looked up yet.

    Args:
      url: a folder, or a URL `file://`, `gs://`, `s3://` or `memory://` (for
        tests: gone with the process). AWS_ENDPOINT_URL is obeyed for `s3://`,
        so that it may be any server that speaks S3.

    Raises:
      CacheError: it is neither.
    """
    self.url = url
    spec = _spec(url)
    self._folder = pathlib.Path(spec["path"]) if _is_file(spec) else None
    there = self._folder and os.path.exists(self._folder)
    if self._folder and there and not self._folder.is_dir():
      raise CacheError(url, "a file", "a folder", "name another place")
    with _clear(self.url, "opened"):
      self._kv = ts.KvStore.open(spec, context=_context()).result()

  def require(self) -> None:
    """Checks that there is a folder; a bucket shows at its first use.

    Raises:
      CacheError: there is none.
    """
    if self._folder is not None and not self._folder.is_dir():
      raise CacheError(
        self.url,
        "no such folder",
        "compressed images",
        "correct the path; python -m vocojax.compress makes a new store",
      )

  def keys(self, prefix: str) -> list[str]:
    """All keys that begin with `prefix`, which ends in '/'."""
    end = prefix[:-1] + chr(ord("/") + 1)
    with _clear(self.url, "listed"):
      found = self._kv.list(ts.KvStore.KeyRange(prefix, end)).result()
    # No key of ours has bytes that are no UTF-8.
    return [key.decode(errors="replace") for key in found]

  def read(
    self, keys: Collection[str]
  ) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Key, value and version of those that exist, in order.

    The value is None of what is in a folder under this name, but is no file.
    """
    for window in _windows(list(keys)):
      foreign = {key for key in window if self._is_foreign(key)}
      with _clear(self.url, "read"):
        reads = [(k, self._kv.read(k)) for k in window if k not in foreign]
        found = {key: future.result() for key, future in reads}
      for key in window:
        if key in foreign:
          yield key, None, b""
        elif found[key].state == "value":
          yield key, found[key].value, found[key].stamp.generation

  def _is_foreign(self, key: str) -> bool:
    """Whether it is a pipe, which blocks who reads it, a folder or a device."""
    if self._folder is None:
      return False
    try:
      return not stat.S_ISREG((self._folder / key).stat().st_mode)
    except OSError:
      return False  # absent, or TensorStore says what is wrong

  def write(self, values: Mapping[str, bytes]) -> None:
    """Returns when all are written; of one key, the last writer's stays."""
    for window in _windows(list(values)):
      self._finish("written to", [self._kv.write(k, values[k]) for k in window])

  def delete(self, keys: Collection[str]) -> None:
    """Deletes those that exist."""
    for window in _windows(list(keys)):
      self._finish("deleted from", [self._kv.write(k, None) for k in window])

  def delete_version(self, key: str, version: bytes) -> None:
    """Deletes a value unless it was written again since it was read."""
    if self._folder is not None and self._is_foreign(key):
      with _clear(self.url, "deleted from"):
        return (self._folder / key).unlink(missing_ok=True)
    self._finish("deleted from", [self._kv.write(key, None, if_equal=version)])

  def remove_leftovers(self, prefixes: Iterable[str]) -> int:
    """Removes temporary files of writers that were killed.

    Returns:
      How many there were; 0 for a bucket, where there are none.
    """
    if self._folder is None:
      return 0
    with _clear(self.url, "cleaned"):
      return sum(
        _remove_if_dead(path)
        for prefix in prefixes
        for path in (self._folder / prefix).rglob(f"*{_TEMPORARY}")
      )

  def _finish(self, what: str, futures: list[ts.Future]) -> None:
    """Waits for all, then raises the first error."""
    errors = [e for future in futures if (e := future.exception()) is not None]
    if errors:
      with _clear(self.url, what):
        raise errors[0]


@contextlib.contextmanager
def _clear(url: str, what: str):
  """Makes a CacheError of what TensorStore raises: one line and a remedy."""
  try:
    yield
  # TensorStore raises ValueError for nearly all, and the rest by kind.
  except Exception as e:
    text = " ".join(str(e).split())
    expected = f"a store that can be {what}"
    if re.search(r"RESOURCE_EXHAUSTED|os_error_code='(28|122)'", text):
      raise CacheError(
        url,
        "no space left",
        expected,
        "free some, or shrink the store: python -m vocojax.store gc "
        f"--store={url} --max_bytes=N",
      ) from e
    if match := re.search(
      r"os_error_code='(1|13|30)'|AccessDenied|code='40[13]'", text
    ):
      raise CacheError(
        url,
        os.strerror(int(match[1])) if match[1] else _short(text),
        expected,
        "choose another --store, or get the right to use this one",
      ) from e
    raise CacheError(
      url,
      _short(text),
      expected,
      "check that it is there and can be reached, or choose another --store",
    ) from e


def _short(text: str) -> str:
  """An error of TensorStore without what it appends, and broken paths."""
  text = re.split(r" \[\w[\w-]*='", text)[0]
  return re.sub(r': "[^"]*\\x[^"]*"?', "", text)[:200]


@functools.cache
def _context() -> ts.Context:
  """One for all, so that two stores at one memory:// URL are the same."""
  # By default an unreachable bucket is tried 32 times, a quarter of an hour.
  retries = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
  return ts.Context(
    {
      "file_io_sync": False,
      # As many as there are cores is slower: they wait for locks.
      "file_io_concurrency": {"limit": 16},
      "s3_request_retries": retries,
      "gcs_request_retries": retries,
    }
  )


def _spec(url: str) -> dict:
  """TensorStore's description of a place; its path ends in '/'."""
  files.refuse_surrogates(url, "--store", CacheError)
  scheme = re.match(r"(\w[\w+.-]*):", url)
  if scheme is None and url:
    path = files.expand_user(url, CacheError).absolute()
    return {"driver": "file", "path": f"{path}/".replace("//", "/")}
  if scheme is None or scheme[1] not in ("file", "gs", "s3", "memory"):
    raise CacheError("--store", shorten(url), _PLACES, "name one of these")
  try:
    spec = ts.KvStore.Spec(url if url.endswith("/") else f"{url}/").to_json()
  except ValueError as e:
    reason = str(e).rpartition('": ')[2]
    raise CacheError(
      "--store", f"{shorten(url)} ({reason})", _PLACES, "correct the URL"
    ) from e
  endpoint = os.environ.get("AWS_ENDPOINT_URL")
  if spec["driver"] == "s3" and endpoint:
    spec["endpoint"] = endpoint
  return spec


def _is_file(spec: dict) -> bool:
  return spec["driver"] == "file"


def _windows(keys: list[str]) -> Iterator[list[str]]:
  for first in range(0, len(keys), _WINDOW):
    yield keys[first : first + _WINDOW]


def _remove_if_dead(path: pathlib.Path) -> bool:
  """Removes a temporary file unless a living process writes to it.

  TensorStore's rule: only who has locked the file that has this name may
  remove it. The lock of a killed process is gone.
  """
  try:
    with path.open("r+b") as file:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        path.unlink()
        return True
  except OSError:
    pass  # it is written to, was renamed just now, or is no file
  return False
