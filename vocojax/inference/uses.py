"""Who used which entry of a store when, for eviction. Read next: blobs.py.

Each process collects uses and writes them to a file of its own, a JSON object
{key: [bytes, seconds since 1970]}, at most every ten minutes, and when it ends.
No file is changed after that; `compact` writes one for many and then deletes
those. So nothing is locked, and the cost is that of the processes, not of the
entries.
"""

import json
import threading
import time
import uuid

from absl import logging

from vocojax.core import files
from vocojax.errors import CacheError
from vocojax.inference.blobs import Blobs

FOLDER = "vocojax-uses/1/"
_MAX_SECONDS = 600  # between two files of a process
_MAX_COUNT = 4096  # in a file of one process
_MAX_TIME = 2**35  # beyond it, a time is not one, or has no date

Sizes = dict[str, tuple[int, float]]  # by key: bytes, time of the last use


class Uses:
  """Size and last use of entries, by key; shared through files."""

  def __init__(self, blobs: Blobs):
    self._blobs = blobs
    self._pending: Sizes = {}  # not in a file yet
    self._known: Sizes = {}  # from files
    self._files: set[str] = set()  # that `_known` is from
    self._written = time.monotonic()
    self._lock = threading.Lock()

  @property
  def num_files(self) -> int:
    """That `read` has found."""
    return len(self._files)

  def note(self, key: str, nbytes: int) -> None:
    """An entry of this size is used now."""
    with self._lock:
      self._pending[key] = nbytes, time.time()
      seconds = time.monotonic() - self._written
      due = len(self._pending) >= _MAX_COUNT or seconds > _MAX_SECONDS
    if due:
      self.flush()

  def flush(self, warn: bool = True) -> None:
    """Writes what is not written; a store that cannot be is left alone."""
    with self._lock:
      pending, self._pending = self._pending, {}
      self._written = time.monotonic()
    if pending:
      try:
        self._write(pending)
      except CacheError as e:
        if warn:
          logging.warning(
            "%s: got %s; eviction will not know what was used", e.where, e.got
          )

  def read(self) -> Sizes:
    """What is known from all processes, of entries there or gone."""
    with self._lock:
      listed = set(self._files)
      # Again: another process may have just put some of them together.
      while new := set(self._blobs.keys(FOLDER)) - listed:
        listed |= new
        for name, value, _ in self._blobs.read(new):
          self._files.add(name)
          _merge(self._known, _parse(f"{self._blobs.url}: {name}", value))
      return _merge(dict(self._known), self._pending)

  def compact(self, entries: Sizes) -> None:
    """Puts all files that were read into one, of these entries only."""
    with self._lock:
      old, self._files = self._files, set()
      self._known = {}
    if entries:
      self._write(entries)
    self._blobs.delete(old)

  def _write(self, entries: Sizes) -> None:
    name = f"{FOLDER}{uuid.uuid4().hex}"
    self._blobs.write({name: json.dumps(entries).encode()})


def _merge(sizes: Sizes, more: Sizes) -> Sizes:
  """Adds to `sizes`, of two uses of an entry the later one."""
  for key, use in more.items():
    if key not in sizes or sizes[key][1] < use[1]:
      sizes[key] = use
  return sizes


def _parse(where: str, value: bytes | None) -> Sizes:
  try:
    found = files.parse_json(value or b"", where, dict, CacheError)
    for key, use in found.items():
      nbytes, used = use  # TypeError or ValueError where it is no pair
      files.check_kind(nbytes, where, int, CacheError)
      files.check_kind(used, where, float, CacheError)
      if not (0 <= nbytes < 2**63 and 0 <= used < _MAX_TIME):
        raise ValueError(f"{key}: {use}")
    return {key: (nbytes, used) for key, (nbytes, used) in found.items()}
  except (CacheError, TypeError, ValueError):
    logging.warning("%s: damaged, so some uses are forgotten", where)
    return {}
