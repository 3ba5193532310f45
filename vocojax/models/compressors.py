"""What goes into the image stream, and which of its tokens text may see.

N images, A image-stream length, D width. Read next: `qformer.py`, `vlm.py`.

| name          | image stream                           | visible to text |
|---------------|----------------------------------------|-----------------|
| `voco`        | prefix, patches, suffix, k VoCo tokens | the VoCo tokens |
| `voco_causal` | the same                               | all of it       |
| `full`        | prefix, patches                        | all of it       |
| `avgpool`     | prefix, k pooled tokens                | all of it       |
| `qformer`     | prefix, k query tokens                 | all of it       |
| `blind`       | prefix                                 | all of it       |

Every VoCo token is the same row of the embedding table; only its position
tells the first from the second, so k may change without new parameters.
`voco_causal` is the upper bound of the paper (arXiv 2406.12275, section 4.2):
text is at the positions that it has with `voco`, and only the mask differs. Its
weights read as `voco` are the lower bound. `full` is LLaVA.
`avgpool` averages the vision tower's features over k regions of the image, and
each mean goes through the projector, as in LLaMA-VID (arXiv 2311.17043), and a
linear layer. `blind` is the control that tells how far the questions alone
lead.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vocojax.config import ModelConfig
from vocojax.errors import ConfigError
from vocojax.models import layers


@dataclasses.dataclass(frozen=True)
class StreamTokens:
  """Token ids around the patches; they come from the prompt layout."""

  prefix_ids: tuple[int, ...]
  suffix_ids: tuple[int, ...]
  voco_token_id: int


@dataclasses.dataclass(frozen=True)
class ImageStream:
  """Layout of the image stream of one compressor."""

  before: tuple[int, ...]  # ids before the patches
  after: tuple[int, ...]  # ids after them
  num_image_tokens: int
  visible: tuple[int, ...]  # indices that text may see, ascending
  stride: int  # positions that one image leaves in the text's past

  @property
  def length(self) -> int:
    return len(self.before) + self.num_image_tokens + len(self.after)

  @property
  def start(self) -> int:
    """Position from which images push the text on, `stride` each."""
    return self.length - self.stride

  @property
  def visible_mask(self) -> np.ndarray:
    """bool [A]."""
    return np.isin(np.arange(self.length), self.visible)

  def positions(self, num_images: int) -> tuple[Int[np.ndarray, " FK"], int]:
    """Where the visible tokens of so many images are in a text's past.

    Returns:
      Their positions, and that of the first text token; see masks.py.
    """
    shifts = self.stride * np.arange(num_images)
    positions = shifts[:, None] + np.asarray(self.visible)
    text = self.start + self.stride * num_images if num_images else 0
    return positions.reshape(-1), text

  def embed(
    self, image_tokens: Float[Array, "N I D"], embed_tokens
  ) -> Float[Array, "N A D"]:
    """Puts the token embeddings around what stands for the patches."""

    def tokens(ids):
      x = embed_tokens(jnp.asarray(ids, jnp.int32))
      return jnp.broadcast_to(x, (image_tokens.shape[0], *x.shape))

    return jnp.concatenate(
      [tokens(self.before), image_tokens, tokens(self.after)], axis=1
    )


def image_stream(config: ModelConfig, tokens: StreamTokens) -> ImageStream:
  """The image stream that `config.compressor` asks for."""
  patches = config.vision.num_patches
  before = tokens.prefix_ids
  compressor = config.compressor
  if compressor.name == "full":
    length = len(before) + patches
    return ImageStream(before, (), patches, tuple(range(length)), length)
  k = compressor.num_voco_tokens
  if compressor.name in ("avgpool", "qformer", "blind"):
    if compressor.name == "avgpool":
      pool_grid(config)
    count = 0 if compressor.name == "blind" else k
    length = len(before) + count
    return ImageStream(before, (), count, tuple(range(length)), length)
  after = tokens.suffix_ids + (tokens.voco_token_id,) * k
  first = len(before) + patches + len(tokens.suffix_ids)
  visible = tuple(range(first, first + k))
  if compressor.name == "voco_causal":
    visible = tuple(range(first + k))
  elif compressor.text_sees_bos:
    visible = (0, *visible)
  return ImageStream(before, after, patches, visible, k)


def pool_grid(config: ModelConfig) -> tuple[int, int]:
  """Rows and columns of the k regions of `avgpool`, as square as k allows.

  Raises:
    ConfigError: the image's patches cannot be cut that way.
  """
  k = config.compressor.num_voco_tokens
  side = config.vision.image_size // config.vision.patch_size
  rows = max(r for r in range(1, math.isqrt(k) + 1) if k % r == 0)
  if side % rows or side % (k // rows):
    raise ConfigError(
      "config.model.compressor.num_voco_tokens",
      f"{k}, regions of {rows} x {k // rows}",
      f"a number whose regions divide {side} x {side} patches, for avgpool",
      "choose another number",
    )
  return rows, k // rows


def average_regions(
  features: Float[Array, "N patches D"], config: ModelConfig
) -> Float[Array, "N K D"]:
  """Mean over each of the k regions of `avgpool`."""
  rows, columns = pool_grid(config)
  side = config.vision.image_size // config.vision.patch_size
  N, _, D = features.shape
  x = features.reshape(N, rows, side // rows, columns, side // columns, D)
  return x.mean((2, 4)).reshape(N, rows * columns, D)


class PooledLinear(nn.Module):
  """Linear layer of `avgpool`, on what the projector makes of the means.

  Its parameters were called `linear` where the mean was taken of projected
  patches, another model.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "N K D"]) -> Float[Array, "N K D"]:
    c = self.config
    return layers.Dense(
      c.llm.hidden_size,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      name="pooled_linear",
    )(x)
