"""Answers from compressed images: prefill once, then one token at a time.

B text rows, F image slots, T prompt length, M new tokens, S = F*K + T + M key
slots. Read next: models/vlm.py (`compress`, `place`, `extend`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vocojax.models.cache import ImageKeyValues
from vocojax.models.vlm import VisionLanguageModel


def generate(
  model: VisionLanguageModel,
  params,
  cache: ImageKeyValues,
  image_index: Int[Array, "B F"],
  prompt_ids: Int[Array, "B T"],
  prompt_lengths: Int[Array, " B"],
  max_new_tokens: int,
  eos_token_id: int,
) -> Int[Array, "B M"]:
  """Greedy answers; nothing of an image but its cache is read.

  Args:
    model: shape and layout.
    params: as `model.init` returns them.
    cache: of N images.
    image_index: which of them each row sees; -1 for an empty slot.
    prompt_ids: right-padded prompts.
    prompt_lengths: at least 1 each.
    max_new_tokens: M.
    eos_token_id: ends an answer; what follows it is this token again.
  """
  B, T = prompt_ids.shape
  M = max_new_tokens
  text_cache, present, start = model.place(cache, image_index, T + M)
  images = present.shape[1]
  in_prompt = jnp.arange(T) < prompt_lengths[:, None]

  def mask(text):  # bool [B, rows, T + M] of text slots to all slots
    rows = text.shape[1]
    seen = jnp.broadcast_to(present[:, None], (B, rows, images))
    return jnp.concatenate([seen, text], axis=2)

  causal = jnp.tril(jnp.ones((T, T), bool)) & in_prompt[:, None]
  logits, text_cache = model.extend(
    params,
    prompt_ids,
    start[:, None] + jnp.arange(T),
    text_cache,
    jnp.int32(images),
    mask(jnp.pad(causal, ((0, 0), (0, 0), (0, M)))),
  )
  first = jnp.argmax(logits[jnp.arange(B), prompt_lengths - 1], axis=-1)
  tokens = jnp.full((B, M), eos_token_id, jnp.int32)
  tokens = tokens.at[:, 0].set(first.astype(jnp.int32))

  def unfinished(loop):
    count, tokens, _ = loop
    open_rows = jnp.all(tokens != eos_token_id, axis=1, where=written(count))
    return (count < M) & jnp.any(open_rows)

  def written(count):
    return (jnp.arange(M) < count)[None]

  def decode(loop):
    count, tokens, text_cache = loop
    previous = jax.lax.dynamic_index_in_dim(tokens, count - 1, 1)
    generated = jnp.broadcast_to(written(count), (B, M))
    logits, text_cache = model.extend(
      params,
      previous,
      (start + prompt_lengths + count - 1)[:, None],
      text_cache,
      images + T + count - 1,
      mask(jnp.concatenate([in_prompt, generated], axis=1)[:, None]),
    )
    done = jnp.any((tokens == eos_token_id) & written(count), axis=1)
    token = jnp.where(done, eos_token_id, jnp.argmax(logits[:, 0], axis=-1))
    tokens = jax.lax.dynamic_update_slice_in_dim(
      tokens, token.astype(jnp.int32)[:, None], count, axis=1
    )
    return count + 1, tokens, text_cache

  _, tokens, _ = jax.lax.while_loop(
    unfinished, decode, (jnp.int32(1), tokens, text_cache)
  )
  return tokens
