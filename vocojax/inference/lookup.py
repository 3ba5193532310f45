"""From image files to caches: out of memory, the store, or the model.

Read next: engine.py (`compress`), store.py.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence

from vocojax.core import files as files_lib
from vocojax.data import images
from vocojax.errors import UserError
from vocojax.inference.cache import VocoCache, concatenate, image_hash
from vocojax.inference.engine import Engine
from vocojax.inference.store import CacheStore

MEMORY = 2**30  # bytes of caches kept: 2,048 images of a 7B at one token each


@dataclasses.dataclass(frozen=True)
class _File:
  path: str
  content: bytes
  hash: str


@dataclasses.dataclass(frozen=True)
class Found:
  """What stands for an image file.

  Attributes:
    path: of the file.
    cache: of this one image.
    num_patches: as which the model saw the image.
    source: where the cache is from: "memory", "store" or "model".
  """

  path: str
  cache: VocoCache
  num_patches: int
  source: str

  @property
  def size(self) -> str:
    """What it was and what it became."""
    tokens = self.cache.num_voco_tokens
    return (
      f"{self.num_patches:,} patches -> {tokens:,} token"
      f"{'s' if tokens > 1 else ''}, {self.cache.nbytes:,} bytes"
    )

  def __str__(self) -> str:
    note = ", from the store" if self.source == "store" else ""
    return f"{self.path}: {self.size}{note}"


class Lookup:
  """Finds the caches of image files; an image is known by its bytes.

  Attributes:
    counts: images found so far, by source.
    seconds: spent in the model so far, compilation included.
  """

  def __init__(
    self,
    engine: Engine,
    store: CacheStore | None = None,
    stored_tokens: int | None = None,
    memory: int = MEMORY,
  ):
    """Finds nothing yet.

    Args:
      engine: compresses.
      store: looked into before, and given what was not in it.
      stored_tokens: tokens of an image in the store that may be cut to those
        of the engine; no others than those of the engine by default.
      memory: bytes of caches to keep; the least recently used go first.
    """
    self._engine = engine
    self._store = store
    self._stored_tokens = stored_tokens or engine.num_image_tokens
    self._memory = memory
    self._kept: dict[str, VocoCache] = {}  # by hash, the latest used last
    self._size = 0
    self.counts: collections.Counter[str] = collections.Counter()
    self.seconds = 0.0

  def find(self, paths: Sequence[str]) -> list[Found | UserError]:
    """The cache of each file, or what is wrong with the file.

    Those that have to be compressed are compressed together.

    Raises:
      UserError: the store cannot be used.
    """
    found: dict[str, Found | UserError] = {}  # by path
    files: dict[str, _File] = {}
    for path in dict.fromkeys(paths):
      try:
        content = files_lib.read_bytes(
          files_lib.expand_user(path), limit=images.MAX_BYTES
        )
        files[path] = _File(path, content, image_hash(content))
      except UserError as e:
        found[path] = e
    caches: dict[str, tuple[VocoCache | UserError, str]] = {}  # by hash
    for look, source in (
      (self._in_memory, "memory"),
      (self._in_store, "store"),
      (self._in_model, "model"),
    ):
      left = {x.hash: x for x in files.values() if x.hash not in caches}
      new = look(list(left.values())) if left else {}
      caches |= {key: (cache, source) for key, cache in new.items()}
    for key, (cache, source) in caches.items():
      if isinstance(cache, VocoCache):
        self._keep(key, cache)
        self.counts[source] += 1
    for path, file in files.items():
      found[path] = self._found(path, *caches[file.hash])
    return [found[path] for path in paths]

  def _in_memory(self, files: list[_File]) -> dict[str, VocoCache]:
    return {x.hash: self._kept[x.hash] for x in files if x.hash in self._kept}

  def _in_store(self, files: list[_File]) -> dict[str, VocoCache]:
    if self._store is None:
      return {}
    origin, k = self._engine.origin, self._engine.num_image_tokens
    found: dict[str, VocoCache] = {}
    for stored in dict.fromkeys((k, self._stored_tokens)):
      keys = [x.hash for x in files if x.hash not in found]
      caches = self._store.get_many(origin, stored, keys)
      for key, cache in zip(keys, caches, strict=True):
        if cache is not None:
          found[key] = cache.truncate(k)
    return found

  def _in_model(self, files: list[_File]) -> dict[str, VocoCache | UserError]:
    started = time.perf_counter()
    try:
      cache = self._engine.compress([x.content for x in files])
    except UserError as e:
      if len(files) == 1:
        # The engine was not told its name.
        named = type(e)(files[0].path, e.got, e.expected, e.fix)
        return {files[0].hash: named}
      # A bad one must not spoil the others.
      return {x.hash: self._in_model([x])[x.hash] for x in files}
    self.seconds += time.perf_counter() - started
    if self._store is not None:
      self._store.put(cache)
    return {x.hash: cache.select([i]) for i, x in enumerate(files)}

  def _keep(self, key: str, cache: VocoCache) -> None:
    if key in self._kept:
      self._size -= self._kept.pop(key).nbytes
    self._kept[key] = cache
    self._size += cache.nbytes
    while self._size > self._memory:
      self._size -= self._kept.pop(next(iter(self._kept))).nbytes

  def _found(
    self, path: str, cache: VocoCache | UserError, source: str
  ) -> Found | UserError:
    if isinstance(cache, UserError):
      return cache
    return Found(path, cache, self._engine.num_patches, source)


def join(found: Sequence[Found | UserError]) -> VocoCache | None:
  """One cache of several images, in order; None for no image.

  Raises:
    UserError: what is wrong with one of them.
  """
  caches = []
  for image in found:
    if isinstance(image, UserError):
      raise image
    caches.append(image.cache)
  if len({cache.dtype for cache in caches}) > 1:  # some in the store are int8
    caches = [cache.dequantize() for cache in caches]
  return concatenate(caches) if caches else None
