"""Caches whose content follows from their names. Read next: test_store.py."""

import numpy as np

from vocojax.inference.cache import CacheOrigin, VocoCache, image_hash

ORIGIN = CacheOrigin("a" * 64, "voco_v1/1")


def digest(name) -> str:
  return image_hash(str(name).encode())


def make(names, k=1, origin=ORIGIN) -> VocoCache:
  """A cache of images with these names, of the size of easy-VQA's."""
  arrays = [
    np.random.default_rng([k, int(digest(n)[:8], 16)]).normal(
      size=(2, 4, 1, k, 4, 16)
    )
    for n in names
  ]
  keys, values = np.concatenate(arrays, axis=2).astype(np.float32)
  return VocoCache(
    keys, values, None, None, origin, tuple(digest(n) for n in names)
  )


def same(a: VocoCache, b: VocoCache) -> bool:
  arrays = ("keys", "values", "key_scales", "value_scales")
  return (
    (a.origin, a.image_hashes, a.dtype) == (b.origin, b.image_hashes, b.dtype)
  ) and all(np.array_equal(getattr(a, x), getattr(b, x)) for x in arrays)
