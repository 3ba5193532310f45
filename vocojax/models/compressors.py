"""What goes into the image stream, and which of its tokens text may see.

N images, A image-stream length, D width. Read next: `vlm.py`.

| name   | image stream                                | visible to text  |
|--------|---------------------------------------------|------------------|
| `voco` | prefix, patches, suffix, k VoCo tokens      | the VoCo tokens  |
| `full` | prefix, patches                             | all of it        |

Every VoCo token is the same row of the embedding table; only its position
tells the first from the second, so k may change without new parameters.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vocojax.config import ModelConfig


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
  num_patches: int
  visible: tuple[int, ...]  # indices that text may see, ascending
  stride: int  # positions that one image leaves in the text's past

  @property
  def length(self) -> int:
    return len(self.before) + self.num_patches + len(self.after)

  @property
  def visible_mask(self) -> np.ndarray:
    """bool [A]."""
    return np.isin(np.arange(self.length), self.visible)

  def embed(
    self, patches: Float[Array, "N patches D"], embed_tokens
  ) -> Float[Array, "N A D"]:
    """Puts the token embeddings around projected patches."""

    def tokens(ids):
      x = embed_tokens(jnp.asarray(ids, jnp.int32))
      return jnp.broadcast_to(x, (patches.shape[0], *x.shape))

    return jnp.concatenate(
      [tokens(self.before), patches, tokens(self.after)], axis=1
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
  after = tokens.suffix_ids + (tokens.voco_token_id,) * k
  first = len(before) + patches + len(tokens.suffix_ids)
  visible = tuple(range(first, first + k))
  if compressor.text_sees_bos:
    visible = (0, *visible)
  return ImageStream(before, after, patches, visible, k)
