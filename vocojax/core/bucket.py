"""Folders in buckets, as gs:// and s3:// name them. Read next: files.py.

`files.to_path` makes them. Small files are read and written whole by fsspec,
arrays by TensorStore in Orbax. An object is written in one piece, so what is
there is whole; it cannot grow; and a folder is no more than what is in it.
"""

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import stat
import time
from collections.abc import Generator, Iterator
from typing import Any

import fsspec.config
import fsspec.core
from etils.epath import gpath

from vocojax.core import files, orbax_calls
from vocojax.errors import UserError, one_line

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
FLUSH_SECONDS = 20
# The packages that errors of a bucket come from, beside OSError.
_SPEAKERS = {"gcsfs", "s3fs", "aiohttp", "botocore", "aiobotocore", "google"}


class BucketPath(gpath.PosixGPath, pathlib.PosixPath):
  """epath's path of an object that is a `pathlib.Path`, too."""

  def absolute(self) -> "BucketPath":
    return self

  def mkdir(self, *args: Any, **kwargs: Any) -> None:
    """Does nothing; epath would make the bucket itself, too."""

  def rglob(self, pattern: str) -> Generator["BucketPath"]:
    """All files below; other patterns than `*` are not supported."""
    assert pattern == "*"
    system, folder = fsspec.core.url_to_fs(str(self))
    for name in system.find(folder):
      yield self / name.removeprefix(f"{folder}/")

  def read_bytes(self) -> bytes:
    """In one request: a file may be replaced at any time."""
    system, path = fsspec.core.url_to_fs(str(self))
    return system.cat_file(path)

  def write_bytes(self, data: bytes) -> int:  # type: ignore[override]
    system, path = fsspec.core.url_to_fs(str(self))
    system.pipe_file(path, data)
    return len(data)

  def stat(self) -> os.stat_result:  # type: ignore[override]
    """Kind and size only."""
    found = super().stat()
    kind = stat.S_IFDIR if found.is_directory else stat.S_IFREG
    return os.stat_result((kind, 0, 0, 0, 0, 0, found.length, 0, 0, 0))


def open_path(url: str, error: files.Errors) -> BucketPath:
  """The path of a URL; nothing is looked up there yet.

  Raises:
    UserError: of class `error`; no such places are supported, or the package
      that reads them is missing.
  """
  scheme, _, rest = url.partition("://")
  if scheme not in _PACKAGES or not rest or rest.startswith("/"):
    raise error(
      url,
      "no bucket" if scheme in _PACKAGES else f"the scheme {scheme!r}",
      "a local path, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER",
      "choose another place",
    )
  package = _PACKAGES[scheme]
  if importlib.util.find_spec(package) is None:
    raise error(
      url,
      f"no package {package}, which reads {scheme}://",
      "it beside vocojax",
      f"pip install {package}, or this package with its extra '{scheme}'",
    )
  _prepare(scheme)
  return BucketPath(url)


@functools.cache
def _prepare(scheme: str) -> None:
  # One way to read a bucket, with TensorFlow installed or without.
  os.environ["EPATH_USE_TF"] = "false"
  gpath._is_tf_installed.cache_clear()
  for protocol in ("gs", "gcs", "s3"):
    # It would not show what TensorStore and other hosts write.
    settings = fsspec.config.conf.setdefault(protocol, {})
    settings["use_listings_cache"] = False
  if scheme == "s3":
    orbax_calls.enable_s3(kvstore)


def kvstore(url: str) -> dict[str, str]:
  """TensorStore's description of a folder; AWS_ENDPOINT_URL is obeyed."""
  scheme, _, rest = url.partition("://")
  name, _, path = rest.partition("/")
  spec = {"driver": scheme, "bucket": name, "path": path}
  if scheme == "gs":  # the variable is Orbax's
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")
    return spec | {"driver": driver}
  endpoint = os.environ.get("AWS_ENDPOINT_URL")
  return spec | ({"endpoint": endpoint} if endpoint else {})


def open_object(path: str, error: files.Errors) -> io.BufferedReader:
  """Opens an object for reading.

  Raises:
    UserError: of class `error`; there is none, or it may not be read.
  """
  with reached(path, error, "a file that can be read"):
    raw: Any = open_path(path, error).open("rb")
    return io.BufferedReader(raw, 2**20)


class GrowingObject:
  """An object that seems to grow: kept here, and written whole now and then.

  At most `FLUSH_SECONDS` are lost of what is added after the last `flush`.
  """

  def __init__(self, path: pathlib.Path):
    """Reads it, or makes it.

    Raises:
      UserError: it cannot be written.
    """
    self._path = path
    with reached(path, UserError, "a place that can be written"):
      there = path.exists()
    self._content = bytearray(files.read_bytes(path) if there else b"")
    self._is_written = there
    self.flush()

  def append(self, data: bytes) -> None:
    self._content += data
    self._is_written = False
    if time.monotonic() > self._flushed + FLUSH_SECONDS:
      self.flush()

  write = append  # what tensorboardX calls

  def truncate(self, size: int) -> None:
    del self._content[size:]
    self._is_written = False

  def flush(self) -> None:
    """Writes all of it, unless that was done.

    Raises:
      UserError: it cannot be written; a later call tries again.
    """
    if not self._is_written:
      files.write_atomic(self._path, bytes(self._content))
      self._is_written = True
    self._flushed = time.monotonic()

  close = flush

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """It stays open."""


@contextlib.contextmanager
def reached(path: Any, error: files.Errors, expected: str) -> Iterator[None]:
  """Turns what a bucket answers, or fails to, into one line.

  Raises:
    UserError: of class `error`.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    package = type(e).__module__.partition(".")[0]
    speaks = isinstance(e, OSError) or package in _SPEAKERS
    if not speaks and "tensorstore" not in str(e):
      raise
    missing = isinstance(e, FileNotFoundError)
    raise error(
      os.fspath(path),
      "nothing" if missing else one_line(e)[:200] or type(e).__name__,
      expected,
      "check the URL"
      if missing
      else "check the bucket, your rights there and the credentials of this "
      "machine",
    ) from e
