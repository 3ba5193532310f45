"""Time to write, read and verify many small caches in a store.

  python -m benchmarks.cache_store --store=DIR

The caches are of the size of easy-VQA's: 4 layers, 1 token, 4 heads of 16, in
float32. The store should be empty at first. Read next: inference/store.py.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from absl import flags

from vocojax import cli
from vocojax.inference.cache import CacheOrigin, VocoCache, image_hash
from vocojax.inference.store import CacheStore

_STORE = flags.DEFINE_string("store", None, "Folder or URL.", required=True)
_COUNT = flags.DEFINE_integer("count", 20_000, "Caches.", lower_bound=2)

T = TypeVar("T")


def main() -> int:
  count = _COUNT.value
  origin = CacheOrigin(image_hash(b"a model"), "voco_v1/1")
  keys, values = np.random.default_rng(0).normal(size=(2, 4, count, 1, 4, 16))
  hashes = tuple(image_hash(b"%d" % i) for i in range(count))
  keys, values = keys.astype(np.float32), values.astype(np.float32)
  cache = VocoCache(keys, values, None, None, origin, hashes)
  with CacheStore(_STORE.value) as store:
    _timed("write", count, lambda: store.put(cache))
  with CacheStore(_STORE.value) as store:
    found = _timed("read", count, lambda: store.get_many(origin, 1, hashes))
    sound = _timed("verify", count, lambda: dict(store.verify()))
    there = _timed("skip", count, lambda: store.hashes(origin, 1))
    _timed("ls", count, store.ls)
    half = sum(size or 0 for size in sound.values()) // 2
    evicted = _timed("evict half", count, lambda: store.gc(half))
  wrong = sum(
    x is None
    or not np.array_equal(x.keys[:, 0], keys[:, i])
    or not np.array_equal(x.values[:, 0], values[:, i])
    for i, x in enumerate(found)
  )
  wrong += sum(size is None for size in sound.values())
  wrong += len(there ^ set(hashes)) + abs(evicted.num_kept - count // 2)
  print(
    f"{count:,} caches of {cache.nbytes // count:,} bytes, {2 * half:,} bytes "
    f"in {_STORE.value}, {wrong} wrong; load {os.getloadavg()[0]:.1f} on "
    f"{os.cpu_count()} cores"
  )
  return 1 if wrong else 0


def _timed(name: str, count: int, run: Callable[[], T]) -> T:
  started = time.perf_counter()
  result = run()
  seconds = time.perf_counter() - started
  print(f"{name:>10}: {seconds:6.2f} s, {count / seconds:9,.0f} caches/s")
  sys.stdout.flush()
  return result


if __name__ == "__main__":
  cli.run(main, __doc__)
