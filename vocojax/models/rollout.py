"""What the tokens of an image stream read of each other, for looking at.

L layers, N images, A image-stream length, H heads. Read next: vlm.py, whose
`compress` this is with every token shown.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from vocojax.models.compressors import ImageStream
from vocojax.models.vlm import VisionLanguageModel


class _AllVisible(VisionLanguageModel):
  """The same model, showing every token of its image stream."""

  @property
  def stream(self) -> ImageStream:
    stream = super().stream
    return dataclasses.replace(stream, visible=tuple(range(stream.length)))


def stream_attention(
  model: VisionLanguageModel, params, images: UInt8[Array, "N S S 3"]
) -> Float32[Array, "L N A A"]:
  """Attention of every row of the image stream, mean over heads.

  For a few images: on the way it needs L * N * H * A * A numbers, 1.4 GB an
  image of a 7B.
  """
  _, weights = _AllVisible(model.config, model.tokens).compress(params, images)
  return weights.mean(axis=2)


def rollout(
  attention: Float32[Array, "L N A A"],
) -> Float32[Array, "L+1 N A A"]:
  """How much of each input token is in each token after so many layers.

  Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the residual branch
  carries a token on, attention mixes the others in, half and half; the layers'
  matrices are multiplied. A rough account, since it knows neither values nor
  MLPs.

  Returns:
    [l, n, i, j]: share of input token j in token i after l layers; the shares
    of a token add up to 1.
  """
  identity = jnp.eye(attention.shape[-1], dtype=attention.dtype)

  def through(mixed, weights):
    mixed = (0.5 * weights + 0.5 * identity) @ mixed
    return mixed, mixed

  start = jnp.broadcast_to(identity, attention.shape[1:])
  _, after = jax.lax.scan(through, start, attention)
  return jnp.concatenate([start[None], after])


def of_last_cache(
  attention: Float32[Array, "L N A A"],
) -> Float32[Array, "N A A"]:
  """The roll-up as far as text can see it: through all layers but the last.

  The keys and values of a layer are made of what the layer before it gave.
  What the last layer makes of an image stream, nobody reads.
  """
  return rollout(attention)[-2]
