"""Keeps compressed images, in a folder or a bucket. Next: uses.py, blobs.py.

Below its URL a store holds

  vocojax-cache/1/FINGERPRINT/LAYOUT/VERSION/kK/HASH   VocoCache of one image
  vocojax-uses/1/NAME                                  who was used when

An entry says itself what it is, with a checksum (cache.py), is written at once
or not at all, and may vanish at any moment. So nobody waits for anybody: who
does not find an entry, or finds a damaged one, compresses the image again.

Uses are for eviction, least recently used first; see uses.py. An entry whose
use nobody wrote down, since its writer was killed, counts as used when found.
"""

import dataclasses
import math
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from vocojax.errors import CacheError
from vocojax.inference import cache as cache_lib
from vocojax.inference import uses
from vocojax.inference.blobs import Blobs
from vocojax.inference.cache import CacheOrigin, VocoCache

_ENTRIES = f"{cache_lib.FORMAT}/"
_KEY = re.compile(
  rf"{_ENTRIES}([0-9a-f]{{64}})/(\w[\w.-]*/\d+)/k([1-9]\d*)/([0-9a-f]{{64}})"
)
_USES_FILES = 256  # before they are put together
_CHUNK = 64  # entries that are written together


@dataclasses.dataclass(frozen=True)
class Entry:
  """What is known about a stored image without reading it.

  Attributes:
    key: its place in the store.
    origin: model and layout.
    num_voco_tokens: k.
    image_hash: see cache.image_hash.
    nbytes: size of the entry, a little more than that of its arrays.
    last_used: seconds since 1970; None if nobody wrote it down.
  """

  key: str
  origin: CacheOrigin
  num_voco_tokens: int
  image_hash: str
  nbytes: int
  last_used: float | None


@dataclasses.dataclass(frozen=True)
class Collected:
  """What `gc` did.

  Attributes:
    num_kept: entries in the store now.
    bytes_kept: their size.
    num_removed: entries evicted.
    bytes_removed: their size.
    num_leftovers: temporary files of killed writers, removed.
  """

  num_kept: int
  bytes_kept: int
  num_removed: int
  bytes_removed: int
  num_leftovers: int


class CacheStore:
  """Caches of single images by what they were made from and with.

  Any number of processes and threads may use one store at once.
  """

  def __init__(self, url: str, max_bytes: int | None = None):
    """Opens a store; a folder that is not there is made at the first write.

    Args:
      url: see `Blobs`.
      max_bytes: size of all entries that a write may lead to; entries are
        evicted to stay below it. Several processes that write at once may
        exceed it by a sixteenth each. None is no limit.

    Raises:
      CacheError: the URL cannot be used.
    """
    self._blobs = Blobs(url)
    self._uses = uses.Uses(self._blobs)
    self._max_bytes = max_bytes
    # A limited store is looked through again when a process has written this
    # part of it since it last did.
    self._slack = math.inf if max_bytes is None else max_bytes // 16
    self._budget: float = 0  # bytes that may be written before that
    self._lock = threading.Lock()
    self._finalizer = weakref.finalize(self, self._uses.flush)

  @property
  def url(self) -> str:
    return self._blobs.url

  def require(self) -> None:
    """Checks that the store is there, for who means to read what it has.

    Raises:
      CacheError: its folder is not.
    """
    self._blobs.require()

  @staticmethod
  def key(origin: CacheOrigin, k: int, image_hash: str) -> str:
    """Where the first k tokens of an image are kept.

    Raises:
      ValueError: a hash is not 64 hex digits, or k is not positive.
    """
    key = f"{_group(origin, k)}{image_hash}"
    if not _KEY.fullmatch(key):
      raise ValueError(f"{key}: does not name an image")
    return key

  def hashes(self, origin: CacheOrigin, k: int) -> set[str]:
    """Of the images that are there, sound or damaged."""
    prefix = _group(origin, k)
    return {key.removeprefix(prefix) for key in self._blobs.keys(prefix)}

  def get(
    self, origin: CacheOrigin, k: int, image_hash: str
  ) -> VocoCache | None:
    """The cache of one image; see `get_many`."""
    return self.get_many(origin, k, [image_hash])[0]

  def get_many(
    self, origin: CacheOrigin, k: int, image_hashes: Sequence[str]
  ) -> list[VocoCache | None]:
    """The caches of images, each in the dtype that it was stored with.

    Returns:
      One for each hash; None where there is none, or a damaged one. That is
      logged and removed.

    Raises:
      CacheError: the store cannot be read.
    """
    keys = [self.key(origin, k, x) for x in image_hashes]
    found = {}
    for key, value, version in self._blobs.read(dict.fromkeys(keys)):
      found[key] = self._checked(key, value, version)
      if found[key] is not None and value is not None:
        self._uses.note(key, len(value))
    return [found.get(key) for key in keys]

  def put(self, cache: VocoCache) -> None:
    """Stores each image of a cache; what was there of it is replaced.

    Raises:
      CacheError: the store cannot be written to. Some images may be in it.
    """
    values: dict[str, bytes] = {}
    size = 0
    for i, image_hash in enumerate(cache.image_hashes):
      key = self.key(cache.origin, cache.num_voco_tokens, image_hash)
      value = cache.select([i]).to_bytes()
      if len(values) == _CHUNK or size + len(value) > self._slack:
        self._write(values, size)
        values, size = {}, 0
      values[key] = value
      size += len(value)
    self._write(values, size)

  def ls(self) -> list[Entry]:
    """All entries, the last used first.

    Raises:
      CacheError: the store cannot be read.
    """
    entries = []
    for key, (nbytes, used) in self._scan().items():
      match = _KEY.fullmatch(key)
      assert match  # or `_scan` would have left it out
      fingerprint, layout, k, image_hash = match.groups()
      origin = CacheOrigin(fingerprint, layout)
      entries.append(Entry(key, origin, int(k), image_hash, nbytes, used))
    return sorted(entries, key=lambda e: (-(e.last_used or 0), e.key))

  def verify(self) -> Iterator[tuple[str, int | None]]:
    """Reads every entry; logs and removes what is damaged.

    Yields:
      Key and bytes of an entry; None instead of bytes if it was damaged.

    Raises:
      CacheError: the store cannot be read.
    """
    for key, value, version in self._blobs.read(self._keys()):
      sound = self._checked(key, value, version) is not None
      yield key, len(value) if sound and value is not None else None

  def gc(self, max_bytes: int | None = None) -> Collected:
    """Removes what killed writers left, and entries beyond the limit.

    Args:
      max_bytes: of all entries together; by default that of this object.

    Raises:
      CacheError: the store cannot be written to.
    """
    leftovers = self._blobs.remove_leftovers((_ENTRIES, uses.FOLDER))
    limit = self._max_bytes if max_bytes is None else max_bytes
    kept, removed = self._evict(limit)
    self._uses.compact(kept)
    return Collected(
      len(kept),
      _total(kept),
      len(removed),
      _total(removed),
      leftovers,
    )

  def close(self) -> None:
    """Writes down what was used; also done when the process ends."""
    self._uses.flush()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # What cannot be written to, or not any more, is not reported twice.
    self._uses.flush(warn=kind is None or not issubclass(kind, CacheError))

  def _checked(
    self, key: str, value: bytes | None, version: bytes
  ) -> VocoCache | None:
    """The cache of an entry; None, logged and removed, if it is not one."""
    where = f"{self.url}: {key}"
    try:
      return _one_image(key, value, where)
    except CacheError as e:
      logging.warning(
        "%s: got %s, expected %s; it is removed, and the image compressed "
        "again when it is needed",
        *(e.where, e.got, e.expected),
      )
    try:
      self._blobs.delete_version(key, version)
    except CacheError as e:
      logging.warning("%s: not removed: %s", where, e)
    return None

  def _keys(self) -> list[str]:
    return [k for k in self._blobs.keys(_ENTRIES) if _KEY.fullmatch(k)]

  def _scan(self) -> dict[str, tuple[int, float | None]]:
    """Size and last use of each entry."""
    keys = self._keys()
    known = self._uses.read()
    found: dict[str, tuple[int, float | None]] = {
      key: known[key] for key in keys if key in known
    }
    rest = [key for key in keys if key not in known]
    for key, value, _ in self._blobs.read(rest):
      if value is not None:
        found[key] = len(value), None
    return found

  def _write(self, values: Mapping[str, bytes], size: int) -> None:
    """Writes entries of so many bytes."""
    with self._lock:
      self._make_room(size)
    self._blobs.write(values)
    for key, value in values.items():
      self._uses.note(key, len(value))

  def _make_room(self, needed: int) -> None:
    """Evicts what is in the way of so many bytes."""
    if self._max_bytes is None:
      return
    if needed > self._max_bytes:
      raise CacheError(
        self.url,
        f"an image of {needed:,} bytes",
        f"at most {self._max_bytes:,} in all",
        "raise max_bytes",
      )
    if needed > self._budget:
      total = _total(self._scan())
      if total + needed > self._max_bytes:
        kept, _ = self._evict(max(0, self._max_bytes - needed - self._slack))
        if self._uses.num_files > _USES_FILES:
          self._uses.compact(kept)
        total = _total(kept)
      self._budget = max(needed, min(self._slack, self._max_bytes - total))
    self._budget -= needed

  def _evict(self, limit: int | float | None):
    """Removes the least recently used until the rest is within the limit.

    Returns:
      Size and last use of the entries kept, and of those removed.
    """
    now = time.time()
    entries = {}
    for key, (nbytes, used) in self._scan().items():
      entries[key] = nbytes, now if used is None else used
      if used is None:
        self._uses.note(key, nbytes)
    removed = {}
    excess = 0 if limit is None else _total(entries) - limit
    for key in sorted(entries, key=lambda key: (entries[key][1], key)):
      if excess <= 0:
        break
      removed[key] = entries.pop(key)
      excess -= removed[key][0]
    self._blobs.delete(removed)
    return entries, removed


def _one_image(key: str, value: bytes | None, where: str) -> VocoCache:
  """The cache that an entry holds.

  Raises:
    CacheError: it is none, damaged, or that of another key.
  """
  if value is None:
    raise CacheError(where, "no file", "a file", "delete it")
  cache = cache_lib.from_bytes(value, where)
  k, hashes = cache.num_voco_tokens, cache.image_hashes
  if [CacheStore.key(cache.origin, k, x) for x in hashes] != [key]:
    raise CacheError(
      where, "another image or model", "what its name says", "delete it"
    )
  return cache


def _total(sizes: Mapping[str, tuple[int, Any]]) -> int:
  return sum(nbytes for nbytes, _ in sizes.values())


def _group(origin: CacheOrigin, k: int) -> str:
  return f"{_ENTRIES}{origin.model_fingerprint}/{origin.layout}/k{k}/"
