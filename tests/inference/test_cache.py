"""The value that stands for images: operations, sizes, bytes, refusals.

What answers make of it is in test_cached_answers.py.
"""

import copy
import dataclasses
import hashlib
import io
import json
import pickle

import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vocojax.errors import CacheError, UserError
from vocojax.inference import cache as cache_lib
from vocojax.inference import sealed
from vocojax.inference.cache import CacheOrigin, VocoCache

ORIGIN = CacheOrigin("0123456789abcdef" * 4, "voco_v1/1")
OTHER = CacheOrigin("fedcba9876543210" * 4, "plain/3")
DTYPES = ["float32", "bfloat16", "int8"]


def _cache(rng, shape=(2, 3, 4, 2, 6), dtype="float32", origin=ORIGIN):
  # Heads of very different size, as in a real model.
  size = np.exp(rng.normal(0, 3, (*shape[:2], 1, shape[3], 1)))
  keys, values = (rng.normal(0, 1, (2, *shape)) * size).astype(np.float32)
  hashes = tuple(rng.bytes(32).hex() for _ in range(shape[1]))
  cache = VocoCache(keys, values, None, None, origin, hashes)
  return cache.quantize() if dtype == "int8" else cache.dequantize(dtype)


def _shapes(rng, count):
  return [tuple(int(n) for n in rng.integers(1, 6, 5)) for _ in range(count)]


def _arrays(cache):
  names = ("keys", "values", "key_scales", "value_scales")
  return {n: x for n in names if (x := getattr(cache, n)) is not None}


def _assert_same(a: VocoCache, b: VocoCache):
  assert (a.origin, a.image_hashes) == (b.origin, b.image_hashes)
  assert _arrays(a).keys() == _arrays(b).keys()
  for name, x in _arrays(a).items():
    y = getattr(b, name)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_back(dtype):
  rng = np.random.default_rng(0)
  for shape in _shapes(rng, 10):
    cache = _cache(rng, shape, dtype)
    data = cache.to_bytes()
    _assert_same(cache_lib.from_bytes(data, "file"), cache)
    assert data == cache.to_bytes()
    assert cache.nbytes < len(data) < cache.nbytes + 1200 + 100 * shape[1]
  # Others can read the file too, and see what it is.
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])["__metadata__"]
  header = json.loads(header["vocojax"])
  assert len(header.pop("sha256")) == 64
  assert header == {
    "format": "vocojax-cache/1",
    "k": shape[2],
    "dtype": dtype,
    "origin": dataclasses.asdict(ORIGIN),
    "image_hashes": list(cache.image_hashes),
  }


def test_special_values_survive():
  x = np.array([np.nan, np.inf, -0.0, 1e-45], np.float32)
  x = x.reshape(1, 1, 1, 1, 4)
  cache = VocoCache(x, -x, None, None, ORIGIN, ("a" * 64,))
  assert cache.keys.tobytes() == x.tobytes()
  assert cache.values.tobytes() == (-x).tobytes()
  _assert_same(cache_lib.from_bytes(cache.to_bytes(), "file"), cache)


def test_nothing_can_be_written():
  rng = np.random.default_rng(0)
  keys = np.zeros((1, 2, 3, 1, 2), np.float32)
  cache = VocoCache(keys, keys, None, None, ORIGIN, ("a" * 64, "b" * 64))
  keys += 1
  assert not cache.keys.any() and not cache.values.any()
  whole = _cache(rng, dtype="int8")
  for made in (
    cache,
    whole,
    whole.select([1]),
    whole.truncate(2),
    whole.dequantize(),
    cache_lib.concatenate([whole, whole]),
    cache_lib.from_bytes(whole.to_bytes(), "file"),
    *(pickle.loads(pickle.dumps(whole, n)) for n in range(6)),
    copy.copy(whole),
    copy.deepcopy(whole),
  ):
    for x in _arrays(made).values():
      assert x.flags.c_contiguous
      with pytest.raises(ValueError, match="read-only"):
        x[...] = 0
  _assert_same(pickle.loads(pickle.dumps(whole)), whole)
  _, arrays = sealed.loads(whole.to_bytes(), "file")
  assert len(arrays) == 4
  assert not any(x.flags.writeable for x in arrays.values())
  with pytest.raises(dataclasses.FrozenInstanceError):
    cache.keys = keys


def test_select_and_concatenate():
  rng = np.random.default_rng(0)
  for shape in _shapes(rng, 20):
    cache = _cache(rng, shape, str(rng.choice(DTYPES)))
    index = rng.integers(0, shape[1], rng.integers(1, 6)).tolist()
    picked = cache.select(index)
    assert picked.num_images == len(index)
    for n, i in enumerate(index):
      assert picked.image_hashes[n] == cache.image_hashes[i]
      for name, x in _arrays(cache).items():
        np.testing.assert_array_equal(getattr(picked, name)[:, n], x[:, i])
    alone = [cache.select([i]) for i in index]
    _assert_same(cache_lib.concatenate(alone), picked)
    _assert_same(cache_lib.concatenate([picked]), picked)
  with pytest.raises(IndexError):
    cache.select([cache.num_images])


def test_truncate():
  rng = np.random.default_rng(0)
  for dtype in DTYPES:
    cache = _cache(rng, (2, 3, 5, 2, 4), dtype)
    for m in range(1, 6):
      short = cache.truncate(m)
      assert short.num_voco_tokens == m
      np.testing.assert_array_equal(short.keys, cache.keys[:, :, :m])
      np.testing.assert_array_equal(short.values, cache.values[:, :, :m])
      _assert_same(short.truncate(1), cache.truncate(1))
    for m in (0, -1, 6):
      with pytest.raises(CacheError) as e:
        cache.truncate(m)
      assert e.value.got == f"{m} tokens an image"
      assert e.value.expected == "1 to 5"
    with pytest.raises(CacheError) as e:
      cache.truncate(1).truncate(2)
    assert e.value.expected == "1, which is all it holds"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_errors_are_at_most_half_a_step(dtype):
  rng = np.random.default_rng(0)
  worst = 0.0
  for shape in [*_shapes(rng, 20), (3, 4, 16, 2, 64)]:
    cache = _cache(rng, shape, dtype)
    small = cache.quantize()
    back = small.dequantize()
    for name in ("keys", "values"):
      x = getattr(cache, name).astype(np.float64)
      scales = getattr(small, f"{name[:-1]}_scales")
      L, N, _, G, _ = shape
      for layer, n, g in np.ndindex(L, N, G):
        head = x[layer, n, :, g]
        step = scales[layer, n, g]
        np.testing.assert_allclose(step, np.abs(head).max() / 127, rtol=1e-6)
        error = np.abs(getattr(back, name)[layer, n, :, g] - head).max()
        worst = max(worst, error / step)
    _assert_same(small.quantize(), small)
  print(f"\nlargest error: {worst:.6f} steps")
  assert 0.45 < worst <= 0.5 + 1e-4  # and the rounding of float32


def test_int8_of_heads_without_numbers():
  rng = np.random.default_rng(0)
  keys = rng.normal(0, 1, (2, 2, 3, 2, 4)).astype(np.float32)
  keys[1, 0, :, 1] = 0
  cache = VocoCache(keys, keys, None, None, ORIGIN, ("a" * 64, "b" * 64))
  back = cache.quantize().dequantize()
  assert not back.keys[1, 0, :, 1].any() and back.keys[1, 0, :, 0].any()
  keys[0, 1, 2, 1, 3] = np.inf
  cache = VocoCache(keys, -keys, None, None, ORIGIN, ("a" * 64, "b" * 64))
  with pytest.raises(CacheError) as e:
    cache.quantize()
  assert e.value.got == "keys or values that are not finite"


def test_dtypes():
  rng = np.random.default_rng(0)
  cache = _cache(rng)
  half = cache.dequantize("bfloat16")
  assert half.dtype == "bfloat16" and half.key_scales is None
  expected = cache.keys.astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(half.keys, expected)
  whole = half.dequantize("float32")
  np.testing.assert_array_equal(whole.keys, half.keys.astype(np.float32))
  np.testing.assert_array_equal(whole.values, half.values.astype(np.float32))
  _assert_same(cache.dequantize(), cache)
  small = cache.quantize()
  assert small.dtype == "int8" and small.dequantize().dtype == "float32"
  for stored in (cache, half, small):
    for dtype in ("float32", "bfloat16"):
      placed = stored.key_values(dtype)
      want = stored.dequantize(dtype)
      assert placed.keys.dtype == placed.values.dtype == dtype
      np.testing.assert_array_equal(placed.keys, want.keys)
      np.testing.assert_array_equal(placed.values, want.values)


def test_bytes_of_a_7b():
  """32 layers, 32 heads of 128: the 0.5 MiB of the paper's one token."""
  zeros = np.zeros((32, 1, 1, 32, 128), ml_dtypes.bfloat16)
  cache = VocoCache(zeros, zeros, None, None, ORIGIN, ("a" * 64,))
  assert cache.nbytes == 2 * 32 * 32 * 128 * 2 == 524_288
  assert cache.key_values("bfloat16").nbytes_per_image == 524_288
  assert cache.dequantize("float32").nbytes == 2 * 524_288
  # Half, and 4 bytes for each of 2 x 32 x 32 scales.
  assert cache.quantize().nbytes == 524_288 // 2 + 4 * 2 * 32 * 32
  many = cache_lib.concatenate([cache] * 3)
  assert many.nbytes == 3 * 524_288
  wide = np.zeros((32, 1, 16, 32, 128), ml_dtypes.bfloat16)
  wide = VocoCache(wide, wide, None, None, ORIGIN, ("a" * 64,))
  assert wide.nbytes == 16 * 524_288
  assert wide.quantize().nbytes / wide.nbytes == pytest.approx(0.5, rel=4e-3)


def test_every_flipped_bit_is_noticed():
  cache = _cache(np.random.default_rng(0), (1, 1, 1, 1, 2), "int8")
  data = cache.to_bytes()
  for i in range(8 * len(data)):
    damaged = bytearray(data)
    damaged[i // 8] ^= 1 << i % 8
    with pytest.raises(CacheError) as e:
      cache_lib.from_bytes(bytes(damaged), "a/b")
    assert e.value.where.startswith("a/b")


def test_foreign_and_cut_files():
  cache = _cache(np.random.default_rng(0), (1, 2, 1, 1, 2), "bfloat16")
  data = cache.to_bytes()
  buffer = io.BytesIO()
  Image.new("RGB", (4, 4)).save(buffer, "png")
  arrays = {"keys": np.zeros((2, 2), np.float32)}
  foreign = [
    b"",
    b"{}",
    buffer.getvalue(),
    np.random.default_rng(1).bytes(4096),
    data + b"\0",
    data[8:],
    safetensors.numpy.save(arrays),
    safetensors.numpy.save(arrays, {"format": "pt"}),
    safetensors.numpy.save(arrays, {"vocojax": "[]"}),
    safetensors.numpy.save(arrays, {"vocojax": "{}"}),
    *(data[:n] for n in range(0, len(data), 7)),
  ]
  for other in foreign:
    with pytest.raises(CacheError) as e:
      cache_lib.from_bytes(other, "store/x")
    assert e.value.where.startswith("store/x") and e.value.got
    assert e.value.fix == "compress the images again"
    assert len(str(e.value)) < 400


DEEP = 100_000


@pytest.mark.parametrize(
  ("header", "where"),
  [
    ("[" * DEEP, "x"),
    ('{"sha256": ' + "[" * DEEP, "x"),
    ('{"sha256": "", "x": ' + "[" * 900 + "]" * 900 + "}", "x"),
    ('{"sha256": "", "x": ' + "9" * 5000 + "}", "x"),
    ('{"sha256": NaN}', "x"),
    ('{"sha256": null}', "x: field sha256"),
    ('{"sha256": "", "sha256": ""}', "x"),
    ('{"sha256": "\\ud800"}', "x"),
    ("null", "x"),
  ],
)
def test_headers_of_another_kind(header, where):
  arrays = {"keys": np.zeros(2, np.float32)}
  data = safetensors.numpy.save(arrays, {"vocojax": header})
  with pytest.raises(CacheError) as e:
    cache_lib.from_bytes(data, "x")
  assert e.value.where == where


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("format", 1),
    ("origin", []),
    ("origin", {}),
    ("origin", {"model_fingerprint": 1, "layout": "a/1"}),
    ("origin", {"model_fingerprint": "a" * 64, "layout": None}),
    ("origin", {"model_fingerprint": "a" * 64, "layout": "../../x/1"}),
    ("origin", {"model_fingerprint": "../" * 21 + "b", "layout": "a/1"}),
    ("image_hashes", "a" * 64),
    ("image_hashes", [1, 2]),
    ("image_hashes", ["../../x", "a" * 64]),
    ("image_hashes", ["a" * 64]),
  ],
)
def test_sealed_headers_of_wrong_types(key, value):
  """With the right checksum: a stranger can make one, too."""
  cache = _cache(np.random.default_rng(0), (1, 2, 1, 1, 2))
  header, arrays = sealed.loads(cache.to_bytes(), "x")
  for other in (header | {key: value}, header | {key: None}):
    with pytest.raises(CacheError) as e:
      cache_lib.from_bytes(sealed.dumps(other, arrays), "x")
    assert e.value.where in ("x", f"x: field {key}") or key == "origin"
  del header[key]
  with pytest.raises(CacheError) as e:
    cache_lib.from_bytes(sealed.dumps(header, arrays), "x")
  assert (e.value.where, e.value.got) == (f"x: field {key}", "nothing")


def test_files_of_another_format(monkeypatch):
  cache = _cache(np.random.default_rng(0))
  monkeypatch.setattr(cache_lib, "FORMAT", "vocojax-cache/2")
  data = cache.to_bytes()
  monkeypatch.undo()
  with pytest.raises(CacheError) as e:
    cache_lib.from_bytes(data, "store/x")
  assert e.value.where == "store/x"
  assert e.value.got == "format 'vocojax-cache/2'"
  assert e.value.expected == "vocojax-cache/1"
  # Sound, but no cache.
  header, _ = sealed.loads(cache.to_bytes(), "x")
  data = sealed.dumps(header, {"keys": np.zeros((2, 2), np.float32)})
  with pytest.raises(CacheError) as e:
    cache_lib.from_bytes(data, "store/x")
  assert e.value.got == "arrays ['keys']"


def test_the_cache_of_another_model_is_refused():
  cache = _cache(np.random.default_rng(0))
  cache.check(CacheOrigin(ORIGIN.model_fingerprint, ORIGIN.layout))
  for origin in (
    OTHER,
    dataclasses.replace(ORIGIN, layout=OTHER.layout),
    dataclasses.replace(ORIGIN, model_fingerprint=OTHER.model_fingerprint),
  ):
    with pytest.raises(UserError) as e:
      cache.check(origin, "store/x")
    assert (e.value.where, e.value.got, e.value.expected) == (
      "store/x",
      "images compressed by model 0123456789ab with layout voco_v1/1",
      f"model {origin.model_fingerprint[:12]} with layout {origin.layout}",
    )


def test_only_like_caches_are_put_together():
  rng = np.random.default_rng(0)
  cache = _cache(rng)
  for caches, where, got in (
    ([], "concatenate", "no cache"),
    ([cache, cache.truncate(3)], "cache 1 of 2", "k = 3 in float32"),
    ([cache, cache, cache.quantize()], "cache 2 of 3", "k = 4 in int8"),
    (
      [cache, _cache(rng, origin=OTHER)],
      "cache 1 of 2",
      "images compressed by model fedcba987654 with layout plain/3",
    ),
  ):
    with pytest.raises(CacheError) as e:
      cache_lib.concatenate(caches)
    assert (e.value.where, e.value.got) == (where, got)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"image_hashes": ("a" * 64,)}, "1 hashes of 3 images"),
    ({"values": np.zeros((2, 3, 5, 2, 6), np.float32)}, "expected.*3, 4, 2"),
    ({"values": np.zeros((2, 3, 4, 2, 6), np.int8)}, "expected.*float32"),
    ({"key_scales": np.ones((2, 3, 2), np.float32)}, "arrays.*key_scales"),
    ({"keys": np.zeros((2, 3, 4, 2, 6))}, "keys of float64"),
    ({"keys": np.zeros((2, 3, 4, 2, 6), np.int8)}, "expected.*key_scales"),
    ({"keys": np.zeros((2, 3, 0, 2, 6), np.float32)}, "keys of shape"),
    ({"keys": np.zeros((2, 3, 4, 2), np.float32)}, "keys of shape"),
  ],
)
def test_parts_that_do_not_belong_together(change, message, monkeypatch):
  cache = _cache(np.random.default_rng(0))
  # The annotations, which only tests check, would refuse some of it before.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(cache, **change)


def test_image_hash():
  data = b"bytes of a file"
  assert cache_lib.image_hash(data) == hashlib.sha256(data).hexdigest()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
  picture = Image.fromarray(pixels)
  indexed = picture.quantize(4)
  other_colours = indexed.copy()
  other_colours.putpalette(indexed.getpalette()[::-1])
  deep = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) + 256)
  turned = picture.copy()
  turned.getexif()[0x0112] = 6
  one_off = pixels.copy()
  one_off[3, 5, 2] ^= 1
  different = [
    pixels,
    pixels.reshape(6, 4, 3),
    np.ascontiguousarray(pixels[::-1]),
    one_off,
    pixels.astype(np.int16),
    picture,
    picture.resize((6, 4), box=(0, 0, 6, 3)),
    picture.convert("L"),
    indexed,
    other_colours,
    deep,
    Image.fromarray(np.asarray(deep) + 1),
    turned,
  ]
  hashes = [cache_lib.image_hash(x) for x in different]
  assert len(set(hashes)) == len(hashes)
  assert all(len(h) == 64 for h in hashes)
  assert cache_lib.image_hash(picture.copy()) == cache_lib.image_hash(picture)
  strided = np.repeat(pixels, 2, axis=1)[:, ::2]
  assert cache_lib.image_hash(strided) == cache_lib.image_hash(pixels)
