"""Attention by platform, in one place. Read next: `llama.py`, `splash.py`.

B rows, F image slots, K visible tokens of an image, T text length, S key
length, H heads, G key/value heads, P head dim.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from vocojax.config import ModelConfig
from vocojax.errors import ConfigError
from vocojax.models import layers, masks, splash

# Measured on 2 cores: slots of a cache that are read at a time, queries of a
# causal stream.
_CHUNK = 64
_QUERY_BLOCK = 160
# Text tokens that are worth products of their own.
_TEXT_BLOCK = 24


def kernel(config: ModelConfig) -> str:
  """'splash', 'cudnn' or 'xla': what runs on the platform compiled for.

  cuDNN takes half precision only, and heads of up to 128 numbers; a dense mask
  costs it its speed, so what needs one, the text of a batch, is left to XLA.
  """
  if config.attention_kernel != "auto":
    return config.attention_kernel
  by_platform = {"tpu": "splash", "gpu": "cudnn"}
  found = by_platform.get(layers.platform(), "xla")
  return "xla" if found == "cudnn" and config.dtype == "float32" else found


def attend(
  query: Float[Array, "B T H P"],
  key: Float[Array, "B S G P"],
  value: Float[Array, "B S G P"],
  config: ModelConfig,
  mask: Bool[Array, "B T S"] | None = None,
  causal: bool = False,
) -> Float[Array, "B T H P"]:
  """Scaled dot-product attention; softmax in float32.

  G key/value heads serve H query heads, H a multiple of G. A row whose mask is
  all False gives finite values that mean nothing.
  """
  chosen = kernel(config)
  if chosen == "splash" and mask is None:
    return _splash(config)(query, key, value, causal=causal)
  if layers.platform() == "cpu":
    if causal:
      return _attend_cpu_causal(query, key, value)
    return _attend_cpu(query, key, value, mask)
  fits = mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
  if chosen == "cudnn" and fits:
    return _attend_cudnn(query, key, value, causal)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=None if mask is None else mask[:, None],
    is_causal=causal,
    implementation="xla",
  )


def _attend_cudnn(query, key, value, causal: bool):
  """By cuDNN, whose backward pass takes even lengths only: 577 becomes 578."""
  B, T = query.shape[:2]
  S = key.shape[1]

  def even(x):
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

  # Where it is causal, no row that is kept comes after the new key.
  lengths = None if causal or S % 2 == 0 else jnp.full(B, S, jnp.int32)
  out = jax.nn.dot_product_attention(
    *map(even, (query, key, value)),
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return out[:, :T]


def _splash(config: ModelConfig) -> Callable:
  return functools.partial(
    splash.attend,
    block_size=config.attention_block_size,
    interpret=layers.platform() != "tpu",
  )


def text_attention(
  config: ModelConfig,
  batch: dict[str, Shaped[Array, "B ..."]],
  visible: Bool[Array, "B F K"],
  text_slots: int = 1,
) -> Callable:
  """How the text of a batch attends, the same in every layer.

  Args:
    config: of the model.
    batch: as `VisionLanguageModel.text_logits` has it; for splash attention
      with `image_segment_ids` [B, F, R], the conversations that see each image.
    visible: False for what nobody may see of the K tokens of an image.
    text_slots: equal parts of a row of text, no two of which share a segment;
      products of one with another are left out where that saves time.

  Returns:
    A function of queries [B, T, H, P], keys and values [B, T, G, P] of the
    text, then keys and values [B, F*K, G, P] of what it sees of the images.

  Raises:
    ConfigError: it is not known which conversations see an image.
  """
  segment_ids = batch["segment_ids"]
  if kernel(config) != "splash":
    T = segment_ids.shape[1]
    # As many parts as slots, or fewer and larger ones; the mask does the rest.
    parts = [n for n in range(1, text_slots + 1) if text_slots % n == 0]
    num_parts = max((n for n in parts if T // n >= _TEXT_BLOCK), default=1)

    def apart(x):  # [B, T, ...] to a row for each part
      return x.reshape(-1, T // num_parts, *x.shape[2:])

    def for_each(x):  # [B, F*K, ...]
      return jnp.repeat(x, num_parts, axis=0)

    token_groups = jnp.where(visible, batch["image_group_ids"][..., None], 0)
    mask = masks.text_mask(
      for_each(token_groups.reshape(len(token_groups), -1)),
      apart(segment_ids),
      apart(batch["text_group_ids"]),
    )

    def with_mask(query, key, value, seen_key, seen_value):
      key = jnp.concatenate([for_each(seen_key), apart(key)], axis=1)
      value = jnp.concatenate([for_each(seen_value), apart(value)], axis=1)
      attended = attend(apart(query), key, value, config, mask)
      return attended.reshape(query.shape)

    return with_mask

  if "image_segment_ids" not in batch:
    raise ConfigError(
      "config.data.conversations_per_record",
      "0",
      "how many conversations may share an image, for splash attention",
      "set it, or config.model.attention_kernel to 'xla'",
    )
  # A key belongs to one segment only: where R conversations share an image, its
  # tokens are there R times.
  seen_segments = batch["image_segment_ids"]
  B, F, R = seen_segments.shape
  num_visible = visible.shape[2]
  token_segments = jnp.where(visible[:, :, None], seen_segments[..., None], 0)
  key_segments = jnp.concatenate(
    [token_segments.reshape(B, -1), segment_ids], axis=1
  )

  def for_each_conversation(x):
    x = x.reshape(B, F, 1, num_visible, *x.shape[2:])
    x = jnp.broadcast_to(x, (B, F, R, *x.shape[3:]))
    return x.reshape(B, -1, *x.shape[4:])

  def with_segments(query, key, value, seen_key, seen_value):
    key = jnp.concatenate([for_each_conversation(seen_key), key], axis=1)
    value = jnp.concatenate([for_each_conversation(seen_value), value], axis=1)
    return _splash(config)(
      query, key, value, segment_ids, key_segments, causal=True
    )

  return with_segments


def _attend_cpu_causal(query, key, value):
  """In blocks of queries, so that most of what nobody sees is left out."""
  T = query.shape[1]
  num_blocks = -(-T // _QUERY_BLOCK)
  bounds = [T * i // num_blocks for i in range(num_blocks + 1)]
  out = []
  for first, end in itertools.pairwise(bounds):
    seen = np.arange(end) <= np.arange(first, end)[:, None]
    rows = query[:, first:end]
    mask = jnp.asarray(seen[None])
    out.append(_attend_cpu(rows, key[:, :end], value[:, :end], mask))
  return jnp.concatenate(out, axis=1)


def _attend_cpu(query, key, value, mask):
  """In plain products; XLA on CPU must not fuse transposes into them."""
  B, T, H, P = query.shape
  G = key.shape[2]
  query = query * np.asarray(P**-0.5, query.dtype)

  def heads_first(x):  # [B, G, rows, P]
    x = x.reshape(B, -1, G, x.shape[2] // G, P).transpose(0, 2, 3, 1, 4)
    return jax.lax.optimization_barrier(x.reshape(B, G, -1, P))

  out = _attend_rows(*map(heads_first, (query, key, value)), mask)
  out = jax.lax.optimization_barrier(out)
  return out.reshape(B, H, T, P).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend_rows(query, key, value, mask):
  """Attention of scaled queries [B, G, M, P] to keys [B, G, S, P].

  The M rows of a key/value head are those of its queries' heads, each of T.
  What jax.grad makes of the forward pass takes XLA on CPU three times as long
  as the backward pass written out below: it computes weights again in products
  that read them, and products of transposed weights are slow.
  """
  return _attend_rows_forward(query, key, value, mask)[0]


def _attend_rows_forward(query, key, value, mask):
  scores = jnp.einsum(
    "bgmp,bgsp->bgms", query, key, preferred_element_type=jnp.float32
  )
  if mask is not None:
    B, G, _, S = scores.shape
    bias = bias_from_mask(mask)[:, None, None]
    scores = (scores.reshape(B, G, -1, mask.shape[1], S) + bias).reshape(
      scores.shape
    )
  weights = jax.nn.softmax(scores, axis=-1)
  weights = jax.lax.optimization_barrier(weights.astype(value.dtype))
  out = jnp.einsum("bgms,bgsp->bgmp", weights, value)
  return out, (query, key, value, weights, out)


def _attend_rows_backward(kept, grad):
  query, key, value, weights, out = kept
  weight_grad = jnp.einsum(
    "bgmp,bgsp->bgms", grad, value, preferred_element_type=jnp.float32
  )
  mean = jnp.sum(grad * out, axis=-1, keepdims=True, dtype=jnp.float32)
  score_grad = (weights * (weight_grad - mean)).astype(query.dtype)
  score_grad = jax.lax.optimization_barrier(score_grad)
  # [B, G, P, S]: products that read weights and their gradient as they lie.
  key_grad = jnp.einsum("bgmp,bgms->bgps", query, score_grad)
  value_grad = jnp.einsum("bgmp,bgms->bgps", grad, weights)
  key_grad, value_grad = jax.lax.optimization_barrier((key_grad, value_grad))
  return (
    jnp.einsum("bgms,bgsp->bgmp", score_grad, key),
    key_grad.swapaxes(2, 3),
    value_grad.swapaxes(2, 3),
    None,
  )


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


def attend_cached(
  query: Float[Array, "B T H P"],
  key: Float[Array, "B G S P"],
  value: Float[Array, "B G S P"],
  slot: Int[Array, " B"],
) -> Float[Array, "B T H P"]:
  """Attention of T tokens that were written to a cache from `slot` on.

  Token t of row b sees the first slot[b] + t + 1 slots. On CPU the slots are
  read in chunks up to the last that any row sees (softmax with a running
  maximum, arXiv 1805.02867): the time goes with the length of the texts, not
  with S. A chunk that a row does not see changes nothing in it, not one bit.
  """
  B, T, H, P = query.shape
  G, S = key.shape[1:3]
  size = min(_CHUNK, S) if layers.platform() == "cpu" else S
  query = query.reshape(B, T, G, H // G, P).transpose(0, 2, 3, 1, 4)
  query = query.reshape(B, G, -1, P)
  last = slot[:, None] + jnp.arange(T)

  def read(chunk, running):
    highest, total, out = running
    first = jnp.minimum(chunk * size, S - size)
    keys, values = (
      jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (key, value)
    )
    scores = jnp.einsum(
      "bgmp,bgsp->bgms", query, keys, preferred_element_type=jnp.float32
    )
    # Here and below: XLA on CPU must not compute it again in what follows.
    scores = jax.lax.optimization_barrier(scores / jnp.sqrt(P))
    index = first + jnp.arange(size)
    # The last chunk begins in the one before if `size` does not divide S.
    mask = (index >= chunk * size) & (index <= last[:, :, None])
    bias = bias_from_mask(mask)[:, None, None]
    scores = (scores.reshape(B, G, -1, T, size) + bias).reshape(scores.shape)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_highest[..., None])
    weights = jax.lax.optimization_barrier(weights)
    kept = jnp.exp(highest - new_highest)
    gathered = jnp.einsum(
      "bgms,bgsp->bgmp",
      weights.astype(value.dtype),
      values,
      preferred_element_type=jnp.float32,
    )
    total = total * kept + jnp.sum(weights, axis=-1)
    return new_highest, total, out * kept[..., None] + gathered

  zeros = jnp.zeros(query.shape[:3], jnp.float32)
  running = (zeros - jnp.inf, zeros, jnp.zeros(query.shape, jnp.float32))
  if size == S:
    running = read(0, running)
  else:
    num_chunks = jnp.max(last) // size + 1
    running = jax.lax.fori_loop(0, num_chunks, read, running)
  _, total, out = running
  out = (out / total[..., None]).astype(value.dtype)
  out = out.reshape(B, G, -1, T, P).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, T, H, P)


def attend_with_bias(
  query: Float[Array, "B T H P"],
  key: Float[Array, "B S G P"],
  value: Float[Array, "B S G P"],
  attention_bias: Float[Array, "B T S"],
) -> Float[Array, "B T H P"]:
  """The same with an additive bias, in plain einsums: the specification."""
  B, T, H, P = query.shape
  G = key.shape[2]
  grouped = query.reshape(B, T, G, H // G, P)
  scores = jnp.einsum(
    "btgrp,bsgp->bgrts", grouped, key, preferred_element_type=jnp.float32
  )
  scores = scores / jnp.sqrt(P) + attention_bias[:, None, None]
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bgrts,bsgp->btgrp", weights, value).reshape(B, T, H, P)


def weights(
  query: Float[Array, "B T H P"],
  key: Float[Array, "B S G P"],
  mask: Bool[np.ndarray, "T S"],
) -> Float32[Array, "B H T S"]:
  """Attention probabilities, for looking at."""
  key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
  scores = jnp.einsum(
    "bthp,bshp->bhts", query, key, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask, scores / jnp.sqrt(query.shape[-1]), -jnp.inf)
  return jax.nn.softmax(scores, axis=-1)


def bias_from_mask(mask: Bool[Array, "B T S"]) -> Float[Array, "B T S"]:
  """0 where attention is allowed, a large negative float32 elsewhere."""
  return jnp.where(mask, 0.0, 0.7 * jnp.finfo(jnp.float32).min)
