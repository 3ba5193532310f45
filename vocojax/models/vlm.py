"""The vision-language model: two streams, one stack. Next: training/step.py.

B text rows, F image slots per row, A image-stream length, K visible tokens of
an image, T text length, L layers, D width, V padded vocabulary.

No row of an image stream depends on text, so the masked joint pass over
[image streams, text] is exactly two causal passes over the same weights, joined
at the keys and values of the visible tokens. `text_logits` runs both streams
through each layer at once; with `attention="bias"` it runs the joint pass with
the two-stage mask as an additive bias, which is the specification.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from vocojax.config import ModelConfig
from vocojax.models import attention, layers, masks
from vocojax.models.cache import ImageKeyValues, TextCache
from vocojax.models.clip import ClipVision
from vocojax.models.compressors import (
  AveragePool,
  ImageStream,
  StreamTokens,
  image_stream,
)
from vocojax.models.llama import Llama
from vocojax.models.projector import Projector


@dataclasses.dataclass(frozen=True)
class VisionLanguageModel:
  """Shape and layout; parameters are passed to every method.

  Parameters: `vision`, `projector`, `llm`, each as its module describes them,
  and `compressor` where it has some.
  """

  config: ModelConfig
  tokens: StreamTokens

  @property
  def vision(self) -> ClipVision:
    return ClipVision(self.config)

  @property
  def llm(self) -> Llama:
    return Llama(self.config)

  @property
  def stream(self) -> ImageStream:
    return image_stream(self.config, self.tokens)

  def init(self, key) -> dict:
    """Random parameters."""
    vision_key, projector_key, llm_key = jax.random.split(key, 3)
    features = jnp.zeros((1, self.config.vision.hidden_size))
    projector = Projector(self.config).init(projector_key, features)
    params = {
      "vision": self.vision.init(vision_key),
      "projector": projector["params"],
      "llm": self.llm.init(llm_key),
    }
    if self.config.compressor.name == "avgpool":
      grid = (1, self.config.vision.num_patches, self.config.llm.hidden_size)
      pool = AveragePool(self.config).init(projector_key, jnp.zeros(grid))
      params["compressor"] = pool["params"]
    return params

  def embed_images(
    self, params, images: UInt8[Array, "N S S 3"]
  ) -> Float[Array, "N A D"]:
    """Pixels to the input of the image stream."""
    features = self.vision.features(params["vision"], images)
    patches = Projector(self.config).apply(
      {"params": params["projector"]}, features
    )
    if self.config.compressor.name == "avgpool":
      patches = AveragePool(self.config).apply(
        {"params": params["compressor"]}, patches
      )
    return self.stream.embed(
      patches, lambda ids: self.llm.embed(params["llm"], ids)
    )

  def text_logits(
    self, params, batch: dict[str, Shaped[Array, "B ..."]]
  ) -> Float32[Array, "B T V"]:
    """Logits of every text token of a batch, as training sees them.

    Args:
      params: as `init` returns them.
      batch: `images` uint8 [B, F, S, S, 3], `image_group_ids` [B, F],
        `input_ids`, `segment_ids` and `text_group_ids` [B, T]; see masks.py.
    """
    images = batch["images"]
    image_x = self.embed_images(params, images.reshape(-1, *images.shape[2:]))
    return self.logits_from_embeddings(params["llm"], image_x, batch)

  def logits_from_embeddings(
    self,
    llm_params,
    image_x: Float[Array, "BF A D"],
    batch: dict[str, Shaped[Array, "B ..."]],
  ) -> Float32[Array, "B T V"]:
    """`text_logits` from the embedded image streams on."""
    text_x = self.llm.embed(llm_params, batch["input_ids"])
    image_x, text_x = layers.shard_rows(image_x), layers.shard_rows(text_x)
    forward = {"two_stream": self._two_stream, "bias": self._joint}
    text_x = forward[self.config.attention](llm_params, image_x, text_x, batch)
    return self.llm.logits(llm_params, text_x)

  def _positions(self, batch):
    """Shift of each image stream [B, F] and text positions [B, T]."""
    stream = self.stream
    groups = batch["image_group_ids"]
    offsets = masks.image_offsets(groups, stream.stride)
    text = masks.text_positions(
      groups,
      batch["segment_ids"],
      batch["text_group_ids"],
      stream.length,
      stream.stride,
    )
    return offsets, text

  def _joint(self, llm_params, image_x, text_x, batch):
    """One pass over [stream 1, ..., stream F, text] under the whole mask."""
    stream = self.stream
    B, T, D = text_x.shape
    x = jnp.concatenate([image_x.reshape(B, -1, D), text_x], axis=1)
    mask = masks.two_stage_mask(
      *masks.joint_tokens(
        batch["image_group_ids"],
        batch["segment_ids"],
        batch["text_group_ids"],
        jnp.asarray(stream.visible_mask),
      )
    )
    offsets, text_positions = self._positions(batch)
    image_positions = offsets[:, :, None] + jnp.arange(stream.length)
    positions = jnp.concatenate(
      [image_positions.reshape(B, -1), text_positions], axis=1
    )
    x, _ = self.llm.run(llm_params, x, positions, mask)
    return x[:, -T:]

  def _two_stream(self, llm_params, image_x, text_x, batch):
    """Both streams through each layer, joined at the visible tokens."""
    llm, visible = self.llm, np.asarray(self.stream.visible)
    B = text_x.shape[0]
    offsets, text_positions = self._positions(batch)
    stream_positions = jnp.arange(self.stream.length)[None]
    visible_positions = (offsets[:, :, None] + visible).reshape(B, -1)
    mask = masks.text_mask(
      batch["image_group_ids"],
      batch["segment_ids"],
      batch["text_group_ids"],
      len(visible),
    )

    def body(streams, layer_params):
      image_x, text_x = streams
      q, k, v = llm.qkv(layer_params, image_x)
      attended = attention.attend(
        llm.rotate(q, stream_positions),
        llm.rotate(k, stream_positions),
        v,
        causal=True,
      )
      image_x = llm.output(layer_params, image_x, attended)
      seen_k = k[:, visible].reshape(B, -1, *k.shape[2:])
      seen_v = v[:, visible].reshape(B, -1, *v.shape[2:])

      q, k, v = llm.qkv(layer_params, text_x)
      seen_k = llm.rotate(seen_k, visible_positions)
      attended = attention.attend(
        llm.rotate(q, text_positions),
        jnp.concatenate([seen_k, llm.rotate(k, text_positions)], axis=1),
        jnp.concatenate([seen_v, v], axis=1),
        mask,
      )
      text_x = llm.output(layer_params, text_x, attended)
      return (layers.shard_rows(image_x), layers.shard_rows(text_x)), None

    (_, text_x), _ = layers.run_stack(
      body, (image_x, text_x), llm_params["layers"], self.config
    )
    return text_x

  def compress(
    self, params, images: UInt8[Array, "N S S 3"]
  ) -> tuple[ImageKeyValues, Float32[Array, "L N H K A"]]:
    """Stage 1: what stands for each image.

    Returns:
      The cache, and the attention of its K tokens over the image stream (which
      costs nothing where it is not used: the compiler drops it).
    """
    llm, visible = self.llm, np.asarray(self.stream.visible)
    x = self.embed_images(params, images)
    positions = jnp.arange(self.stream.length)[None]
    causal = visible[:, None] >= np.arange(self.stream.length)[None]

    def body(x, layer_params):
      q, k, v = llm.qkv(layer_params, x)
      rotated_q, rotated_k = llm.rotate(q, positions), llm.rotate(k, positions)
      attended = attention.attend(rotated_q, rotated_k, v, causal=True)
      weights = attention.weights(rotated_q[:, visible], rotated_k, causal)
      x = layers.shard_rows(llm.output(layer_params, x, attended))
      return x, (k[:, visible], v[:, visible], weights)

    _, (keys, values, weights) = layers.run_stack(
      body, x, params["llm"]["layers"], self.config
    )
    return ImageKeyValues(keys, values), weights

  def place(
    self,
    cache: ImageKeyValues,
    image_index: Int[Array, "B F"],
    num_text_slots: int,
  ) -> tuple[TextCache, Bool[Array, "B FK"], Int[Array, " B"]]:
    """Lays cached images before a text, rotated to their positions.

    Args:
      cache: of N images.
      image_index: which of them each row sees, in order; -1 for an empty slot.
      num_text_slots: room for text tokens after the images.

    Returns:
      The text cache, which of its first F*K slots hold an image, and the
      position of the first text token of each row.
    """
    stream = self.stream
    F, K = image_index.shape[1], len(stream.visible)
    present = image_index >= 0
    groups = present.astype(jnp.int32)
    offsets = masks.image_offsets(groups, stream.stride)
    positions = offsets[:, :, None] + np.asarray(stream.visible)

    def lay(x):
      x = x[:, image_index]  # [L, B, F, K, G, P]
      return x.reshape(*x.shape[:2], F * K, *x.shape[4:])

    def widen(x):
      return jnp.pad(x, ((0, 0), (0, 0), (0, num_text_slots), (0, 0), (0, 0)))

    flat_positions = positions.reshape(len(present), -1)
    keys = jax.vmap(lambda k: self.llm.rotate(k, flat_positions))(
      lay(cache.keys)
    )
    num_images = jnp.sum(groups, axis=1)
    start = jnp.where(
      num_images > 0, stream.length + (num_images - 1) * stream.stride, 0
    )
    return (
      TextCache(widen(keys), widen(lay(cache.values))),
      jnp.repeat(present, K, axis=1),
      start,
    )

  def extend(
    self,
    params,
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "B T"],
    cache: TextCache,
    slot: Int[Array, ""],
    mask: Bool[Array, "B T S"],
  ) -> tuple[Float32[Array, "B T V"], TextCache]:
    """Stage 2: reads T more tokens of each row, written from `slot` on.

    Args:
      params: as `init` returns them.
      input_ids: the tokens.
      position_ids: their positions.
      cache: of S slots, those before `slot` filled.
      slot: where the first of the tokens goes, the same for all rows.
      mask: which of the S slots each token may attend to.
    """
    llm = self.llm
    x = llm.embed(params["llm"], input_ids)

    def body(x, layer):
      layer_params, keys, values = layer
      q, k, v = llm.qkv(layer_params, x)
      k = llm.rotate(k, position_ids)
      keys = jax.lax.dynamic_update_slice_in_dim(keys, k, slot, axis=1)
      values = jax.lax.dynamic_update_slice_in_dim(values, v, slot, axis=1)
      q = llm.rotate(q, position_ids)
      attended = attention.attend(q, keys, values, mask)
      return llm.output(layer_params, x, attended), (keys, values)

    x, (keys, values) = layers.run_stack(
      body, x, (params["llm"]["layers"], cache.keys, cache.values), self.config
    )
    return llm.logits(params["llm"], x), TextCache(keys, values)
