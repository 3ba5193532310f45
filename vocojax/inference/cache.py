"""Compressed images as values to keep, send and put together. Next: store.py.

L layers, N images, K visible tokens of an image, G key/value heads, P head dim.

A `VocoCache` lies in the host's memory and is never changed. In a program it is
an `ImageKeyValues` (models/cache.py), which `key_values` makes.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped
from PIL import ExifTags, Image

from vocojax.core import files
from vocojax.errors import CacheError, shorten
from vocojax.inference import sealed
from vocojax.models.cache import ImageKeyValues

FORMAT = "vocojax-cache/1"
_INT8_MAX = 127
_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
  "int8": np.dtype(np.int8),
}
_REMEDY = "compress the images again"
# What a store can make a path of.
_HASH = re.compile("[0-9a-f]{64}")
_LAYOUT = re.compile(r"\w[\w.-]*/\d+")


@dataclasses.dataclass(frozen=True)
class CacheOrigin:
  """What a cache was made with, and so what it may be used with.

  Attributes:
    model_fingerprint: 64 hex digits, see fingerprint.py.
    layout: name and version of the prompt layout, such as "voco_v1/1".
  """

  model_fingerprint: str
  layout: str


@dataclasses.dataclass(frozen=True, eq=False)
class VocoCache:
  """N compressed images: keys before rotation, and values.

  Immutable: an array that could be written to is copied.

  Attributes:
    keys: float32, bfloat16, float16 or int8.
    values: the same.
    key_scales: where `keys` are int8, what one step of them is worth.
    value_scales: the same for `values`.
    origin: model and layout.
    image_hashes: `image_hash` of each image.

  Raises:
    ValueError: shapes, dtypes and hashes do not belong together.
  """

  keys: Shaped[np.ndarray, "L N K G P"]
  values: Shaped[np.ndarray, "L N K G P"]
  key_scales: Float32[np.ndarray, "L N G"] | None
  value_scales: Float32[np.ndarray, "L N G"] | None
  origin: CacheOrigin
  image_hashes: tuple[str, ...]

  def __post_init__(self):
    for name, x in self._arrays().items():
      object.__setattr__(self, name, _read_only(x))
    self._validate()

  def __reduce__(self):
    """Pickles and copies are made as any cache is, with arrays of their own."""
    fields = dataclasses.fields(self)
    return type(self), tuple(getattr(self, x.name) for x in fields)

  def _arrays(self) -> dict[str, np.ndarray]:
    """The arrays by name; without scales where there are none."""
    arrays = {
      "keys": self.keys,
      "values": self.values,
      "key_scales": self.key_scales,
      "value_scales": self.value_scales,
    }
    return {name: x for name, x in arrays.items() if x is not None}

  def _validate(self):
    shape = self.keys.shape
    if len(shape) != 5 or 0 in shape:
      raise ValueError(f"keys of shape {shape}, expected [L, N, K, G, P]")
    if self.keys.dtype not in _DTYPES.values():
      raise ValueError(
        f"keys of {self.keys.dtype}, expected one of {', '.join(_DTYPES)}"
      )
    expected = {name: (shape, self.keys.dtype) for name in ("keys", "values")}
    if self.dtype == "int8":
      scales = (*shape[:2], shape[3]), _DTYPES["float32"]
      expected |= {"key_scales": scales, "value_scales": scales}
    found = {name: (x.shape, x.dtype) for name, x in self._arrays().items()}
    if found != expected:
      raise ValueError(f"arrays {found}, expected {expected}")
    if len(self.image_hashes) != self.num_images:
      raise ValueError(
        f"{len(self.image_hashes)} hashes of {self.num_images} images"
      )

  @property
  def num_images(self) -> int:
    return self.keys.shape[1]

  @property
  def num_voco_tokens(self) -> int:
    """Tokens that text sees of each image."""
    return self.keys.shape[2]

  @property
  def dtype(self) -> str:
    """float32, bfloat16, float16 or int8."""
    return self.keys.dtype.name

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays; for a 7B 524,288 per token in bfloat16."""
    return sum(x.nbytes for x in self._arrays().values())

  def select(self, indices: Sequence[int]) -> "VocoCache":
    """Some of the images, in any order, repeats allowed.

    Raises:
      IndexError: there is no such image.
    """
    index = list(indices)
    return _from_arrays(
      {name: x[:, index] for name, x in self._arrays().items()},
      self.origin,
      tuple(self.image_hashes[i] for i in index),
    )

  def truncate(self, m: int) -> "VocoCache":
    """The first m tokens of each image.

    VoCo tokens are causal among themselves, so this is what the same model
    makes of the images with k = m. (Not so with `avgpool`, whose tokens are
    parts of the image, and `qformer`, whose tokens read each other.)

    Raises:
      CacheError: there are fewer than m tokens, or m is not positive.
    """
    k = self.num_voco_tokens
    if not 1 <= m <= k:
      raise CacheError(
        "cache.truncate",
        f"{m} tokens an image",
        f"1 to {k}" if k > 1 else "1, which is all it holds",
        f"choose so many, or {_REMEDY} to more",
      )
    # A copy, so that what is cut off is freed.
    return dataclasses.replace(
      self, keys=self.keys[:, :, :m].copy(), values=self.values[:, :, :m].copy()
    )

  def quantize(self) -> "VocoCache":
    """As int8, with one scale for each layer, image and head.

    A number changes by at most half its scale, which is the largest magnitude
    of its head divided by 127.

    Raises:
      CacheError: a key or value is not finite.
    """
    if self.dtype == "int8":
      return self
    keys, key_scales = _quantize(self.keys)
    values, value_scales = _quantize(self.values)
    return dataclasses.replace(
      self,
      keys=keys,
      values=values,
      key_scales=key_scales,
      value_scales=value_scales,
    )

  def dequantize(self, dtype: str = "float32") -> "VocoCache":
    """As float32 or bfloat16, whatever it is now."""
    return dataclasses.replace(
      self,
      keys=_as_float(self.keys, self.key_scales, dtype),
      values=_as_float(self.values, self.value_scales, dtype),
      key_scales=None,
      value_scales=None,
    )

  def key_values(self, dtype: str) -> ImageKeyValues:
    """For use in a program, on the default device, in the compute dtype."""
    cache = self.dequantize(dtype)
    return ImageKeyValues(jnp.asarray(cache.keys), jnp.asarray(cache.values))

  def check(self, origin: CacheOrigin, where: str = "cache") -> None:
    """Whether a model and layout may read this cache.

    Args:
      origin: of the model that is to read it.
      where: names the cache in the error.

    Raises:
      CacheError: it was made by another model, or with another layout.
    """
    if self.origin != origin:
      raise CacheError(
        where,
        f"images compressed by {_describe(self.origin)}",
        _describe(origin),
        f"{_REMEDY}, or load the checkpoint that compressed them",
      )

  def to_bytes(self) -> bytes:
    """As a safetensors file that says what it is, see sealed.py."""
    header = {
      "format": FORMAT,
      "k": self.num_voco_tokens,
      "dtype": self.dtype,
      "origin": dataclasses.asdict(self.origin),
      "image_hashes": self.image_hashes,
    }
    return sealed.dumps(header, self._arrays())


def concatenate(caches: Sequence[VocoCache]) -> VocoCache:
  """The images of several caches, one after the other.

  Raises:
    CacheError: there is none, or they differ in origin, k or dtype.
  """
  if not caches:
    raise CacheError("concatenate", "no cache", "at least one", "give it one")
  first = caches[0]
  for i, cache in enumerate(caches):
    cache.check(first.origin, f"cache {i} of {len(caches)}")
    if (cache.num_voco_tokens, cache.dtype) != (
      first.num_voco_tokens,
      first.dtype,
    ):
      raise CacheError(
        f"cache {i} of {len(caches)}",
        f"k = {cache.num_voco_tokens} in {cache.dtype}",
        f"k = {first.num_voco_tokens} in {first.dtype}, as in the first",
        "use truncate() and quantize() or dequantize() before",
      )
  arrays = [cache._arrays() for cache in caches]
  return _from_arrays(
    {
      name: np.concatenate([a[name] for a in arrays], axis=1)
      for name in arrays[0]
    },
    first.origin,
    tuple(h for cache in caches for h in cache.image_hashes),
  )


def from_bytes(data: bytes, where: str) -> VocoCache:
  """Reads what `VocoCache.to_bytes` wrote, to the bit.

  Args:
    data: the bytes.
    where: names their place in the error.

  Raises:
    CacheError: they are something else, or not one bit as they were written.
  """
  try:
    header, arrays = sealed.loads(data, where)
    return _from_header(header, arrays, where)
  except CacheError as e:
    raise CacheError(e.where, e.got, e.expected, _REMEDY) from e


def _from_header(
  header: dict[str, Any], arrays: dict[str, np.ndarray], where: str
) -> VocoCache:
  def field(values: dict, key: str, kind: type) -> Any:
    return files.get_field(values, key, kind, where, CacheError)

  if (found := field(header, "format", str)) != FORMAT:
    raise CacheError(where, f"format {shorten(found)}", FORMAT)
  origin = field(header, "origin", dict)
  fingerprint = field(origin, "model_fingerprint", str)
  layout = field(origin, "layout", str)
  hashes = field(header, "image_hashes", list)
  for name in (fingerprint, *hashes):
    if not (isinstance(name, str) and _HASH.fullmatch(name)):
      raise CacheError(where, shorten(name), "64 hex digits")
  if not _LAYOUT.fullmatch(layout):
    raise CacheError(where, f"layout {shorten(layout)}", "NAME/VERSION")
  if not {"keys", "values"} <= set(arrays):
    raise CacheError(where, f"arrays {sorted(arrays)}", "keys and values")
  try:
    return _from_arrays(arrays, CacheOrigin(fingerprint, layout), tuple(hashes))
  except ValueError as e:  # shapes or dtypes that do not belong together
    raise CacheError(where, str(e), "compressed images") from e


def image_hash(source: bytes | np.ndarray | Image.Image) -> str:
  """64 hex digits that name an image.

  Args:
    source: the bytes of its file, or its pixels. They are hashed as they are,
      so the same picture has another name in another form.
  """
  if isinstance(source, bytes):
    return hashlib.sha256(source).hexdigest()
  if isinstance(source, np.ndarray):
    kind = [str(source.dtype), source.shape]
    data = np.ascontiguousarray(source).tobytes()
  else:
    # Not only the pixels: all that changes the picture made of them.
    orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
    kind = [source.mode, source.size, orientation, source.getpalette()]
    data = source.tobytes()
  return hashlib.sha256(f"{kind}:".encode() + data).hexdigest()


def _read_only(x: np.ndarray) -> np.ndarray:
  if x.flags.writeable or not x.flags.c_contiguous:
    x = np.array(x, order="C")
    x.flags.writeable = False
  return x


def _quantize(
  x: Shaped[np.ndarray, "L N K G P"],
) -> tuple[Shaped[np.ndarray, "L N K G P"], Float32[np.ndarray, "L N G"]]:
  x = x.astype(np.float32)
  largest = np.abs(x).max(axis=(2, 4))
  if not np.isfinite(largest).all():
    raise CacheError(
      "cache.quantize",
      "keys or values that are not finite",
      "finite ones, since int8 holds no others",
      "look for what makes the model overflow",
    )
  scales = largest / np.float32(_INT8_MAX)
  # A head without any number but 0 has the scale 0.
  steps = x / np.where(scales > 0, scales, 1)[:, :, None, :, None]
  return np.rint(steps).astype(np.int8), scales


def _as_float(x, scales, dtype: str) -> Shaped[np.ndarray, "L N K G P"]:
  if scales is not None:
    x = x.astype(np.float32) * scales[:, :, None, :, None]
  return x.astype(_DTYPES[dtype], copy=False)


def _from_arrays(
  arrays: dict[str, np.ndarray],
  origin: CacheOrigin,
  image_hashes: tuple[str, ...],
) -> VocoCache:
  return VocoCache(
    arrays["keys"],
    arrays["values"],
    arrays.get("key_scales"),
    arrays.get("value_scales"),
    origin,
    image_hashes,
  )


def _describe(origin: CacheOrigin) -> str:
  return f"model {origin.model_fingerprint[:12]} with layout {origin.layout}"
