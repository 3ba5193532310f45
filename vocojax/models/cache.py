"""What stands for an image, and the running cache of a text. Next: `vlm.py`.

L layers, N images, K visible tokens of an image, G key/value heads, P head dim,
B text rows, S key slots.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ImageKeyValues:
  """Keys *before rotation* and values of the tokens that text may see.

  Not rotated, so that an image may be put at any position later. Two times
  L * K * G * P numbers an image: 524,288 bytes for one VoCo token of a 7B in
  bfloat16, against 302 MB for its 576 patches.
  """

  keys: Float[Array | np.ndarray, "L N K G P"]
  values: Float[Array | np.ndarray, "L N K G P"]

  @property
  def nbytes_per_image(self) -> int:
    return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[1]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TextCache:
  """Rotated keys and values of text rows: images first, then its tokens.

  One array a layer, so that a layer is written to in place.
  """

  keys: list[Float[Array, "B G S P"]]
  values: list[Float[Array, "B G S P"]]
