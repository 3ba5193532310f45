"""Stores of compressed images, and saved caches. Next: benchmark_kinds.py."""

import json
import pathlib
import shutil

import numpy as np

from tests.fuzz import documents, files
from tests.fuzz.kinds import Case, Input, Kind, Parts, array
from tests.inference import stored
from vocojax.errors import CacheError
from vocojax.inference import cache as cache_lib
from vocojax.inference import sealed
from vocojax.inference.store import CacheStore

_NAMES = "abc"
_ENTRY = files.one_of("vocojax-cache/1/*/*/*/k*/*")
_USES = files.one_of("vocojax-uses/1/*")


def _plain(cache: cache_lib.VocoCache) -> tuple:
  return (
    cache.origin,
    cache.image_hashes,
    *(
      None if x is None else array(x)
      for x in (
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
      )
    ),
  )


def _make_store(folder: pathlib.Path) -> Parts:
  whole = stored.make(_NAMES)
  with CacheStore(str(folder)) as store:
    store.put(whole)
  return {
    stored.digest(name): _plain(whole.select([i]))
    for i, name in enumerate(_NAMES)
  }


def _read_store(folder: pathlib.Path) -> Parts:
  """An entry that is not there is a refused one: it is made again."""
  hashes = [stored.digest(name) for name in _NAMES]
  with CacheStore(str(folder)) as store:
    assert len(store.ls()) <= len(_NAMES)
    found = store.get_many(stored.ORIGIN, 1, hashes)
    assert all(n is not None for _, n in store.verify())
    store.gc()
  missing = CacheError("entry", "a miss", "an entry", "compress the image")
  return {
    digest: missing if x is None else _plain(x)
    for digest, x in zip(hashes, found, strict=True)
  }


def _swap(given: Input) -> None:
  """Two sound entries under each other's name."""
  a, b = sorted(given.folder.glob("vocojax-cache/1/*/*/*/k*/*"))[:2]
  before = a.read_bytes()
  a.write_bytes(b.read_bytes())
  b.write_bytes(before)


def _instead_of_all(put) -> files.Change:
  def mutate(given: Input) -> None:
    shutil.rmtree(given.folder)
    put(given.folder)

  return mutate


def _make_cache(folder: pathlib.Path) -> Parts:
  cache = stored.make(_NAMES, k=2).quantize()
  (folder / "cache").write_bytes(cache.to_bytes())
  return {"cache": _plain(cache)}


def _read_cache(folder: pathlib.Path) -> Parts:
  path = folder / "cache"
  return {"cache": _plain(cache_lib.from_bytes(path.read_bytes(), str(path)))}


def _sealed_again(pick: files.Pick, mutate: files.Change) -> files.Change:
  """A mutation of the header, with a checksum that fits it."""

  def mutate_header(given: Input) -> None:
    path, header = pick(given), given.folder / "header"
    found, arrays = sealed.loads(path.read_bytes())
    header.write_text(json.dumps(found))
    mutate(given)
    path.write_bytes(sealed.dumps(json.loads(header.read_text()), arrays))
    header.unlink()
    given.also.clear()

  return mutate_header


def _other_arrays(pick: files.Pick) -> files.Change:
  """Arrays of shapes and dtypes that do not belong together, sealed."""

  def mutate(given: Input) -> None:
    path = pick(given)
    header, arrays = sealed.loads(path.read_bytes())
    name = given.rng.choice(sorted(arrays))
    x = arrays[name]
    arrays[name] = given.rng.choice(
      (x[..., :1].copy(), x[:0], x.reshape(-1), x.astype(np.float32)[None])
    )
    if given.rng.random() < 0.3:
      del arrays[name]
    path.write_bytes(sealed.dumps(header, arrays))

  return mutate


def _cases(pick: files.Pick, whole: dict[str, Case]) -> dict[str, Case]:
  header = files.one_of("header")
  trees = documents.cases(header)
  return {
    **whole,
    "bits": ("refuse", files.changes(pick, files.flip_bits)),
    "cut": ("refuse", files.changes(pick, files.cut)),
    "extended": ("refuse", files.changes(pick, files.extend)),
    "other_arrays": ("refuse", _other_arrays(pick)),
    **{
      f"header_{name}": ("either", _sealed_again(pick, trees[name][1]))
      for name in ("wrong_type", "other_value", "missing_key", "extra_key")
    },
  }


_DRAWN = ("bits", "header_wrong_type", "header_other_value", "other_arrays")
_CACHE = files.one_of("cache")
_BYTES = {
  name: case
  for name, case in files.cases(_CACHE).items()
  if name not in files.TARGETS
}
_STORE: dict[str, Case] = {
  **_cases(_ENTRY, files.cases(_ENTRY)),
  **{
    f"uses_{name}": ("read", mutate)
    for name, (_, mutate) in files.cases(_USES).items()
  },
  **{
    f"uses_{name}": ("read", documents.cases(_USES)[name][1])
    for name in documents.DRAWN
  },
  "swapped": ("refuse", _swap),
  "no_store": ("refuse", _instead_of_all(lambda path: None)),
  "store_is_a_file": (
    "refuse",
    _instead_of_all(lambda path: path.write_bytes(b"x")),
  ),
  "store_is_a_pipe": ("refuse", _instead_of_all(files.TARGETS["pipe"])),
}
KINDS = {
  "store": Kind(_make_store, _read_store, _STORE, _DRAWN),
  "cache": Kind(_make_cache, _read_cache, _cases(_CACHE, _BYTES), _DRAWN),
}
