"""The vision-language model: two streams, one stack. Next: training/step.py.

B text rows, F image slots per row, A image-stream length, K visible tokens of
an image, T text length, L layers, D width, V padded vocabulary. In a text cache
C slots for the tokens of a row's images, S slots in all.

No row of an image stream depends on text, so the masked joint pass over
[image streams, text] is exactly two causal passes over the same weights, joined
at the keys and values of the visible tokens. `text_logits` runs both streams
through each layer at once; with `attention="bias"` it runs the joint pass with
the two-stage mask as an additive bias, which is the specification.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from vocojax.config import ModelConfig
from vocojax.models import attention, head, layers, masks, precision
from vocojax.models.cache import ImageKeyValues, TextCache
from vocojax.models.clip import ClipVision
from vocojax.models.compressors import (
  ImageStream,
  PooledLinear,
  StreamTokens,
  average_regions,
  image_stream,
)
from vocojax.models.llama import Llama
from vocojax.models.projector import Projector
from vocojax.models.qformer import QFormer


@dataclasses.dataclass(frozen=True)
class _Reader:
  """How the text of a batch reads the images.

  Attributes:
    visible: indices in an image stream of the K tokens that it sees.
    image_positions: of these tokens of all slots.
    text_positions: of its own tokens.
    attend: see `attention.text_attention`.
  """

  visible: Int[np.ndarray, " K"]
  image_positions: Int[Array, "B FK"]
  text_positions: Int[Array, "B T"]
  attend: Callable


@dataclasses.dataclass(frozen=True)
class VisionLanguageModel:
  """Shape and layout; parameters are passed to every method.

  With `text_slots` a row of text has so many equal parts, no two of which share
  a segment: see config.data.batching.

  Parameters: `vision`, `projector`, `llm`, each as its module describes them,
  and `compressor` where it has some.
  """

  config: ModelConfig
  tokens: StreamTokens
  text_slots: int = 1

  @property
  def vision(self) -> ClipVision:
    return ClipVision(self.config)

  @property
  def llm(self) -> Llama:
    return Llama(self.config)

  @property
  def stream(self) -> ImageStream:
    return image_stream(self.config, self.tokens)

  def stream_of(self, num_visible: int) -> ImageStream:
    """The image stream that shows text so many tokens, as after a cut."""
    compressor = self.config.compressor
    if compressor.name != "voco" or num_visible == len(self.stream.visible):
      return self.stream
    k = num_visible - compressor.text_sees_bos
    compressor = dataclasses.replace(compressor, num_voco_tokens=k)
    config = dataclasses.replace(self.config, compressor=compressor)
    return image_stream(config, self.tokens)

  @property
  def exact(self) -> "VisionLanguageModel":
    """The model with exact positions; only training rounds them."""
    rope = dataclasses.replace(self.config.llm.rope, round_positions="none")
    llm = dataclasses.replace(self.config.llm, rope=rope)
    config = dataclasses.replace(self.config, llm=llm)
    return VisionLanguageModel(config, self.tokens, self.text_slots)

  @property
  def teacher(self) -> "VisionLanguageModel":
    """The model that sees all patches; its stream begins this one's."""
    compressor = dataclasses.replace(self.config.compressor, name="full")
    config = dataclasses.replace(self.config, compressor=compressor)
    return VisionLanguageModel(config, self.tokens, self.text_slots)

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
    if self._connector:
      grid = (1, self.config.vision.num_patches, self.config.llm.hidden_size)
      patches = jnp.zeros(grid, self.config.dtype)
      connector = self._connector.init(projector_key, patches)
      params["compressor"] = connector["params"]
    return params

  @property
  def _connector(self) -> PooledLinear | QFormer | None:
    """What stands between the projector and the language model."""
    if self.config.compressor.name == "avgpool":
      return PooledLinear(self.config)
    if self.config.compressor.name == "qformer":
      return QFormer(self.config)
    return None

  def embed_images(
    self, params, images: UInt8[Array, "N S S 3"]
  ) -> Float[Array, "N A D"]:
    """Pixels to the input of the image stream."""
    if self.config.compressor.name == "blind":
      nothing = (len(images), 0, self.config.llm.hidden_size)
      return self.stream.embed(
        jnp.zeros(nothing, self.config.dtype),
        lambda ids: self.llm.embed(params["llm"], ids),
      )
    features = self.vision.features(params["vision"], images)
    if self.config.compressor.name == "avgpool":
      features = average_regions(features, self.config)
    patches = Projector(self.config).apply(
      {"params": params["projector"]}, features
    )
    if self._connector:
      patches = self._connector.apply({"params": params["compressor"]}, patches)
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
        With an elastic number of VoCo tokens also `num_voco_tokens` [B, F]:
        so many of an image's k, the first ones, are seen.
    """
    image_x = self._embed_slots(params, batch["images"])
    return self.logits_from_embeddings(params["llm"], image_x, batch)

  def token_losses(
    self,
    params,
    batch: dict[str, Shaped[Array, "B ..."]],
    targets: Int[Array, "B T"],
  ) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """How well every text token foretells its target; never makes all logits.

    Args:
      params: as `init` returns them; with slots (see precision.py), what is
        returned may be differentiated by these.
      batch: as for `text_logits`.
      targets: token ids.

    Returns:
      Cross-entropy in nats, and whether the target has the highest logit.
    """
    params = precision.read_all_but_layers(params)
    image_x = self._embed_slots(params, batch["images"])
    x = self._text_states(params["llm"], image_x, batch)
    return self.llm.token_losses(params["llm"], x, targets)

  def distilled_losses(
    self,
    params,
    batch: dict[str, Shaped[Array, "B ..."]],
    targets: Int[Array, "B T"],
    teacher_params=None,
  ) -> head.DistilledLosses:
    """`token_losses`, and how far each token is from what a teacher foretells.

    The teacher sees all patches and gets no gradient. As it is now, this model
    is its own teacher: the image stream is run once, and the text a second time
    beside the first. Memory is that of one more text without a backward pass.

    Args:
      params: as for `token_losses`.
      batch: the same.
      targets: the same.
      teacher_params: of `self.teacher`, another model; None is this one.

    Returns:
      Also KL(teacher || this model) of the next token, and the teacher's own
      cross-entropy, in nats.
    """
    params = precision.read_all_but_layers(params)
    image_x = self._embed_slots(params, batch["images"])
    llm_params = params["llm"]
    if teacher_params is None:
      teacher_params = params
      x, teacher_x = self._both_text_states(llm_params, image_x, batch)
    else:
      x = self._text_states(llm_params, image_x, batch)
      seen = self.teacher._embed_slots(teacher_params, batch["images"])
      teacher_x = self.teacher._text_states(teacher_params["llm"], seen, batch)
    return self.llm.distilled_losses(
      llm_params, x, targets, teacher_params["llm"], teacher_x
    )

  def _embed_slots(self, params, images: UInt8[Array, "B F S S 3"]):
    return self.embed_images(params, images.reshape(-1, *images.shape[2:]))

  def logits_from_embeddings(
    self,
    llm_params,
    image_x: Float[Array, "BF A D"],
    batch: dict[str, Shaped[Array, "B ..."]],
  ) -> Float32[Array, "B T V"]:
    """`text_logits` from the embedded image streams on."""
    x = self._text_states(llm_params, image_x, batch)
    return self.llm.logits(llm_params, x)

  def _text_states(self, llm_params, image_x, batch):
    """Output of the last layer for every text token [B, T, D]."""
    if self.config.attention == "bias":
      return self._joint(llm_params, image_x, batch)
    x, _ = self._two_stream(llm_params, image_x, batch, None)
    return x

  def _both_text_states(self, llm_params, image_x, batch):
    """The same, and as it is for text that sees all patches."""
    teacher = self.teacher
    if self.config.attention == "bias":
      seen = image_x[:, : teacher.stream.length]
      return (
        self._text_states(llm_params, image_x, batch),
        teacher._text_states(llm_params, seen, batch),
      )
    return self._two_stream(llm_params, image_x, batch, teacher._reader(batch))

  def _strides(self, batch) -> Int[Array, "B F"]:
    """Positions that each image leaves in the text's past."""
    if self.config.compressor.budgets:
      return batch["num_voco_tokens"]
    return jnp.full_like(batch["image_group_ids"], self.stream.stride)

  def _visible(self, batch) -> Bool[Array, "B F A"]:
    """What text may see of each image; of k VoCo tokens maybe fewer."""
    stream = self.stream
    end = stream.start + self._strides(batch)
    before_end = jnp.arange(stream.length) < end[..., None]
    return before_end & jnp.asarray(stream.visible_mask)

  def _positions(self, batch):
    """Shift of each image stream [B, F] and text positions [B, T]."""
    groups, strides = batch["image_group_ids"], self._strides(batch)
    offsets = masks.image_offsets(groups, strides)
    text = masks.text_positions(
      groups,
      batch["segment_ids"],
      batch["text_group_ids"],
      self.stream.start,
      strides,
    )
    return offsets, text

  def _reader(self, batch) -> _Reader:
    visible = np.asarray(self.stream.visible)
    offsets, text_positions = self._positions(batch)
    return _Reader(
      visible,
      (offsets[:, :, None] + visible).reshape(len(offsets), -1),
      text_positions,
      attention.text_attention(
        self.config,
        batch,
        self._visible(batch)[:, :, visible],
        self.text_slots,
      ),
    )

  def _embed_text(self, llm_params, image_x, batch):
    """Input of text [B, T, D], and with the streams before it [B, F*A+T, D]."""
    text_x = self.llm.embed(llm_params, batch["input_ids"])
    B, _, D = text_x.shape
    x = jnp.concatenate([image_x.reshape(B, -1, D), text_x], axis=1)
    return text_x, layers.shard_rows(x)

  def _joint(self, llm_params, image_x, batch):
    """One pass over [stream 1, ..., stream F, text] under the whole mask."""
    _, x = self._embed_text(llm_params, image_x, batch)
    stream = self.stream
    B, T = batch["input_ids"].shape
    mask = masks.two_stage_mask(
      *masks.joint_tokens(
        batch["image_group_ids"],
        batch["segment_ids"],
        batch["text_group_ids"],
        self._visible(batch),
      )
    )
    offsets, text_positions = self._positions(batch)
    image_positions = offsets[:, :, None] + jnp.arange(stream.length)
    positions = jnp.concatenate(
      [image_positions.reshape(B, -1), text_positions], axis=1
    )
    x, _ = self.llm.run(llm_params, x, positions, mask)
    return x[:, -T:]

  def _two_stream(self, llm_params, image_x, batch, teacher: _Reader | None):
    """Both streams through each layer, joined at the visible tokens.

    Of a row they lie side by side: a layer's products run once on both.

    Args:
      llm_params: of the language model.
      image_x: the embedded image streams.
      batch: as for `text_logits`.
      teacher: another way to read the same images, or None.

    Returns:
      Output of the last layer for every text token [B, T, D], and for the text
      as the teacher reads it; None if there is no teacher.
    """
    llm, A, reader = self.llm, self.stream.length, self._reader(batch)
    B, F = batch["image_group_ids"].shape
    text_x, x = self._embed_text(llm_params, image_x, batch)
    # Streams attend to themselves only, so their own positions need no shift.
    positions = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.tile(jnp.arange(A), F), (B, F * A)),
        reader.text_positions,
      ],
      axis=1,
    )

    def image_part(x):  # [B, F*A + T, ...] to [B*F, A, ...]
      return x[:, : F * A].reshape(B * F, A, *x.shape[2:])

    def seen_by(reader, x):  # ... to [B, F*K, ...]
      return image_part(x)[:, reader.visible].reshape(B, -1, *x.shape[2:])

    def read(reader, seen_k, seen_v, q, k, v):
      """Attention of text, all keys unrotated."""
      return reader.attend(
        llm.rotate(q, reader.text_positions),
        llm.rotate(k, reader.text_positions),
        v,
        llm.rotate(seen_k, reader.image_positions),
        seen_v,
      )

    def teach(text_x, layer_params, seen_k, seen_v):
      """A layer of the teacher's text."""
      q, k, v = llm.qkv(layer_params, text_x)
      attended = read(teacher, seen_k, seen_v, q, k, v)
      return layers.shard_rows(llm.output(layer_params, text_x, attended))

    def body(carry, layer_params):
      x, taught_x = carry
      q, k, v = llm.qkv(layer_params, x)
      if teacher:
        seen = (seen_by(teacher, y) for y in (k, v))
        taught_x = teach(taught_x, layer_params, *seen)
      seen_k = llm.rotate(seen_by(reader, k), reader.image_positions)
      seen_v = seen_by(reader, v)
      q, k = llm.rotate(q, positions), llm.rotate(k, positions)
      image = attention.attend(
        image_part(q), image_part(k), image_part(v), self.config, causal=True
      )
      text = reader.attend(*(y[:, F * A :] for y in (q, k, v)), seen_k, seen_v)
      attended = jnp.concatenate(
        [image.reshape(B, F * A, *image.shape[2:]), text], axis=1
      )
      x = layers.shard_rows(llm.output(layer_params, x, attended))
      return (x, taught_x), None

    def last(carry, layer_params):
      # Of the images it makes only the keys and values that text sees.
      x, taught_x = carry
      if teacher:
        _, *seen = llm.qkv(layer_params, seen_by(teacher, x))
        taught_x = teach(taught_x, layer_params, *seen)
      text_x, n = x[:, F * A :], F * len(reader.visible)
      q, k, v = llm.qkv(
        layer_params, jnp.concatenate([seen_by(reader, x), text_x], axis=1)
      )
      attended = read(
        reader, k[:, :n], v[:, :n], *(y[:, n:] for y in (q, k, v))
      )
      x = layers.shard_rows(llm.output(layer_params, text_x, attended))
      return x, taught_x

    carry, _ = layers.run_stack(
      body,
      (x, text_x if teacher else None),
      llm_params["layers"],
      self.config,
      last=last,
    )
    return carry

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
      attended = attention.attend(
        rotated_q, rotated_k, v, self.config, causal=True
      )
      weights = attention.weights(rotated_q[:, visible], rotated_k, causal)
      x = layers.shard_rows(llm.output(layer_params, x, attended))
      return x, (k[:, visible], v[:, visible], weights)

    _, (keys, values, weights) = layers.run_stack(
      body, x, params["llm"]["layers"], self.config
    )
    return ImageKeyValues(keys, values), weights

  def place(
    self,
    images: ImageKeyValues,
    positions: Int[Array, "B C"],
    num_text_slots: int,
  ) -> TextCache:
    """Lays the images of each row before its text, rotated to their positions.

    Args:
      images: [L, B, C, G, P]: the visible tokens of a row's images, one image
        after the other; what follows them is written over by `extend`.
      positions: of these tokens, from `ImageStream.positions`.
      num_text_slots: room for text tokens after C.
    """

    def lay(x):
      x = x.swapaxes(1, 2)
      return jnp.pad(x, ((0, 0), (0, 0), (0, num_text_slots), (0, 0)))

    return TextCache(
      [lay(self.llm.rotate(x, positions)) for x in images.keys],
      [lay(x) for x in images.values],
    )

  def extend(
    self,
    params,
    input_ids: Int[Array, "B T"],
    cache: TextCache,
    slot: Int[Array | np.ndarray, " B"],
    position: Int[Array | np.ndarray, " B"],
    last: Int[Array, " B"],
  ) -> tuple[Float32[Array, "B V"], TextCache]:
    """Stage 2: reads T more tokens of each row.

    Args:
      params: as `init` returns them; fastest with `layers.unstack`.
      input_ids: the tokens, padded on the right.
      cache: with the first `slot` slots of each row filled.
      slot: where the first of a row's tokens goes.
      position: of the first of a row's tokens.
      last: index of the token whose logits are returned, the row's last.

    Returns:
      Logits of one token of each row, and the cache with all of them. Donate
      the old one, and it is written to in place.
    """
    llm = self.llm
    B, T = input_ids.shape
    x = llm.embed(params["llm"], input_ids)
    positions = position[:, None] + jnp.arange(T)
    new = TextCache([], [])
    for layer_params, keys, values in zip(
      layers.unstack(params["llm"]["layers"]),
      cache.keys,
      cache.values,
      strict=True,
    ):
      q, k, v = llm.qkv(layer_params, x)
      keys = _write(keys, llm.rotate(k, positions), slot)
      values = _write(values, v, slot)
      q = llm.rotate(q, positions)
      attended = attention.attend_cached(q, keys, values, slot)
      x = llm.output(layer_params, x, attended)
      new.keys.append(keys)
      new.values.append(values)
    return llm.logits(params["llm"], x[jnp.arange(B), last]), new


def _write(
  cached: Float[Array, "B G S P"],
  tokens: Float[Array, "B T G P"],
  slot: Int[Array, " B"],
) -> Float[Array, "B G S P"]:
  """Puts the T tokens of each row from its slot on."""
  return jax.vmap(
    lambda row, new, first: jax.lax.dynamic_update_slice(
      row, new, (0, first, 0)
    )
  )(cached, tokens.swapaxes(1, 2), slot)
