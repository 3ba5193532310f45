"""Stores of compressed images, and saved caches. Next: benchmark_kinds.py."""

import json
import pathlib
import shutil

import numpy as np

from tests.fuzz import documents, files
from tests.fuzz.kinds import Case, Input, Kind, Mutation, Parts, array
from tests.inference import stored
from vocojax.errors import CacheError
from vocojax.inference import cache as cache_lib
from vocojax.inference import sealed
from vocojax.inference.store import CacheStore

_NAMES = "abc"
_GLOB = "vocojax-cache/1/*/*/*/k*/*"
_ENTRY, _CACHE = files.one_of(_GLOB), files.one_of("cache")
_USES, _HEADER = files.one_of("vocojax-uses/1/*"), files.one_of("header")


def _plain(x: cache_lib.VocoCache) -> tuple:
  arrays = (x.keys, x.values, x.key_scales, x.value_scales)
  found = [None if a is None else array(a) for a in arrays]
  return x.origin, x.image_hashes, found


def _make_store(folder: pathlib.Path) -> Parts:
  with CacheStore(str(folder)) as store:
    store.put(stored.make(_NAMES))
  return {stored.digest(x): _plain(stored.make(x)) for x in _NAMES}


def _read_store(folder: pathlib.Path) -> Parts:
  """An entry that is not there is a refused one: it is made again."""
  hashes = [stored.digest(name) for name in _NAMES]
  with CacheStore(str(folder)) as store:
    assert len(store.ls()) <= len(_NAMES)
    found = store.get_many(stored.ORIGIN, 1, hashes)
    assert all(n is not None for _, n in store.verify())
    store.gc()
  missing = CacheError("entry", "a miss", "an entry", "compress the image")
  plain = [missing if x is None else _plain(x) for x in found]
  return dict(zip(hashes, plain, strict=True))


def _make_cache(folder: pathlib.Path) -> Parts:
  cache = stored.make(_NAMES, k=2).quantize()
  (folder / "cache").write_bytes(cache.to_bytes())
  return {"cache": _plain(cache)}


def _read_cache(folder: pathlib.Path) -> Parts:
  path = folder / "cache"
  return {"cache": _plain(cache_lib.from_bytes(path.read_bytes(), str(path)))}


def _swap(given: Input) -> None:
  """Two sound entries under each other's name."""
  a, b = sorted(given.folder.glob(_GLOB))[:2]
  first = a.read_bytes()
  a.write_bytes(b.read_bytes())
  b.write_bytes(first)


def _instead(put) -> Case:
  def mutate(given: Input) -> None:
    shutil.rmtree(given.folder)
    put(given.folder)

  return "refuse", mutate


def _sealed(pick: files.Pick, mutate: Mutation) -> Mutation:
  """A mutation of the header, with a checksum that fits it."""

  def mutate_header(given: Input) -> None:
    path, file = pick(given), given.folder / "header"
    header, arrays = sealed.loads(path.read_bytes(), "")
    file.write_text(json.dumps(header))
    mutate(given)
    path.write_bytes(sealed.dumps(json.loads(file.read_text()), arrays))
    file.unlink()
    given.also = None

  return mutate_header


def _other_arrays(pick: files.Pick) -> Mutation:
  """Arrays of shapes and dtypes that do not belong together, sealed."""

  def mutate(given: Input) -> None:
    path = pick(given)
    header, arrays = sealed.loads(path.read_bytes(), "")
    name = given.rng.choice(sorted(arrays))
    x = arrays.pop(name)
    others = (x[..., :1].copy(), x[:0], x.reshape(-1), np.float32(x)[None])
    if given.rng.random() < 0.7:
      arrays[name] = given.rng.choice(others)
    path.write_bytes(sealed.dumps(header, arrays))

  return mutate


def _cases(pick: files.Pick) -> dict[str, Case]:
  whole = files.cases(pick)
  for name in ("bits", "cut", "extended"):
    whole[name] = "refuse", whole[name][1]
  trees = documents.cases(_HEADER)
  for name in ("wrong_type", "other_value", "missing_key", "extra_key"):
    whole[f"header_{name}"] = "either", _sealed(pick, trees[name][1])
  return whole | {"other_arrays": ("refuse", _other_arrays(pick))}


_USES_CASES = files.cases(_USES) | documents.cases(_USES)
_STORE: dict[str, Case] = {
  **_cases(_ENTRY),
  **{f"uses_{x}": ("read", mutate) for x, (_, mutate) in _USES_CASES.items()},
  "uses_link_to_itself": ("either", _USES_CASES["link_to_itself"][1]),
  "swapped": ("refuse", _swap),
  "no_store": _instead(files.TARGETS["missing"]),
  "store_is_a_file": _instead(lambda path: path.write_bytes(b"x")),
  "store_is_a_pipe": _instead(files.TARGETS["pipe"]),
}
_DRAWN = ("bits", "header_wrong_type", "header_other_value", "other_arrays")
_BYTES = {k: v for k, v in _cases(_CACHE).items() if k not in files.TARGETS}
KINDS = {
  "store": Kind(_make_store, _read_store, _STORE, _DRAWN),
  "cache": Kind(_make_cache, _read_cache, _BYTES, _DRAWN),
}
