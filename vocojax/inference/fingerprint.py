"""A name for a model's weights and shape. Read next: cache.py, which keeps it.

Two models with one fingerprint make the same of an image; a cache of one is
safe to use with the other. Equal wherever the weights lie: one device or many.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, UInt32

from vocojax.config import HOW_COMPUTED, ModelConfig
from vocojax.models.vlm import VisionLanguageModel

_VERSION = "vocojax-fingerprint/1"
# Odd, so that to multiply by one loses nothing. Two sums of 32 bits each.
_POSITION_FACTORS = (0x9E3779B1, 0x85EBCA77)
_MIX_FACTORS = (0x7FEB352D, 0x846CA68B)


def model_fingerprint(
  model: VisionLanguageModel, params, pad_to_square: bool
) -> str:
  """64 hex digits that name what a model makes of an image.

  Changes with any bit of the weights, their order, the shape of the model, the
  tokens around the image and its preprocessing. The number of VoCo tokens does
  not count, since a cache can be cut to fewer, nor how training drew it; nor
  does what leaves the numbers alone (attention path, remat, scan).

  Args:
    model: shape and layout.
    params: as `model.init` returns them, on any devices.
    pad_to_square: as in `config.data`.
  """
  description = {
    "version": _VERSION,
    "model": _relevant(model.config),
    "tokens": dataclasses.asdict(model.tokens),
    "pad_to_square": pad_to_square,
  }
  digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
  named = jax.tree_util.tree_leaves_with_path(params)
  all_sums = _all_sums([x for _, x in named])
  for (path, x), sums in zip(named, all_sums, strict=True):
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {x.dtype} {x.shape}".encode())
    digest.update(_fetch(sums).tobytes())
  return digest.hexdigest()


def _relevant(config: ModelConfig) -> dict:
  fields: dict[str, Any] = dataclasses.asdict(config)
  for key in HOW_COMPUTED:
    del fields[key]
  del fields["compressor"]["train_num_voco_tokens"]
  del fields["llm"]["rope"]["round_positions"]  # of training
  if config.compressor.name == "qformer":
    return fields
  del fields["compressor"]["qformer_layers"]
  # The tokens of avgpool are parts of the image: k changes each of them. With
  # voco_causal text sees them with all else, and no cache is cut among them.
  if config.compressor.name not in ("avgpool", "voco_causal"):
    del fields["compressor"]["num_voco_tokens"]
  return fields


def _fetch(x: UInt32[Array, "2 rows"]) -> UInt32[np.ndarray, "2 rows"]:
  if x.is_fully_addressable:
    return np.asarray(x)
  # Rows lie on several hosts.
  return multihost_utils.process_allgather(x, tiled=True)


@jax.jit
def _all_sums(tensors):
  return [_row_sums(x) for x in tensors]


def _row_sums(x: Float[Array, "..."]) -> UInt32[Array, "2 rows"]:
  """Two sums modulo 2^32 for each row: a slice along the first axis.

  Each term mixes the bits of a number with its position in the row, one to one,
  so that one flipped bit always changes the sum and a swap nearly always. Sums
  of integers come out the same in any order, hence on any mesh. Rows keep
  positions below 2^32 in large models.
  """
  x = jnp.atleast_1d(x)
  unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(1, x.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position += index * jnp.uint32(math.prod(x.shape[axis + 1 :]))
  # Both in one reduction: `jnp.sum` of each would first write all terms out
  # (XLA on CPU: 10 times slower, with twice the tensor in temporaries).
  sums = jax.lax.reduce(
    [_mix(bits ^ position * jnp.uint32(f)) for f in _POSITION_FACTORS],
    [jnp.uint32(0), jnp.uint32(0)],
    lambda a, b: [a[0] + b[0], a[1] + b[1]],
    tuple(range(1, x.ndim)),
  )
  return jnp.stack(sums)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """Spreads each bit over the word, one to one (lowbias32, C. Wellons)."""
  x ^= x >> 16
  x *= jnp.uint32(_MIX_FACTORS[0])
  x ^= x >> 15
  x *= jnp.uint32(_MIX_FACTORS[1])
  return x ^ (x >> 16)
