"""The two-stage attention mask and the positions that go with it.

B text rows, F image slots per row, A image-stream length, K visible tokens of
an image, T text length, S = F*A + T. Read next: `vlm.py`, which uses them.

A row of a batch is F image streams and one text stream. Image streams never
look at each other or at text. Text looks at text of its own segment, and at the
*visible* tokens (the VoCo tokens) of the images of its own group.

Position rule: within its stream an image token has its plain index; the f-th
image of a group is shifted by f times `stride`, the number of positions that
one image leaves in the text's past; text goes on after the last image. With one
image these are the positions of the original, VoCo at 579..578+k for 576
patches, text from 579+k. Where text sees only the first m of k VoCo tokens, the
stride is m, as it is after a cache was cut to m.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def two_stage_mask(
  stream_ids: Int[Array, "B S"],
  segment_ids: Int[Array, "B S"],
  group_ids: Int[Array, "B S"],
  visible: Bool[Array, "B S"],
) -> Bool[Array, "B S S"]:
  """Who may attend to whom, from what each token is.

  One image of 6 patches `I`, separators `_` and `n`, two VoCo tokens `V`, and
  six text tokens, as `examples/joint sequence` of the original lays them out
  (llava_llama_1stg.py, lines 61-103); 1 means that the row may attend to the
  column:

           B IIIIII _n VV tttttt
      B    1 000000 00 00 000000
      I    1 100000 00 00 000000
      I    1 110000 00 00 000000
      I    1 111000 00 00 000000
      I    1 111100 00 00 000000
      I    1 111110 00 00 000000
      I    1 111111 00 00 000000
      _    1 111111 10 00 000000
      n    1 111111 11 00 000000
      V    1 111111 11 10 000000
      V    1 111111 11 11 000000
      t    0 000000 00 11 100000
      t    0 000000 00 11 110000
      t    0 000000 00 11 111000
      t    0 000000 00 11 111100
      t    0 000000 00 11 111110
      t    0 000000 00 11 111111

  Args:
    stream_ids: 0 for text, f + 1 for a token of image slot f.
    segment_ids: conversation of a text token, from 1; 0 is padding. Of no
      effect on image tokens.
    group_ids: group of an image slot, from 1, 0 if the slot is empty; for text
      the group whose images it may see, 0 for none.
    visible: True where text may see an image token.

  Returns:
    [row, column] True where attention is allowed. Rows of padding and of empty
    slots are all False; nobody reads them.
  """
  is_text = stream_ids == 0
  valid = jnp.where(is_text, segment_ids, group_ids) > 0
  index = jnp.arange(stream_ids.shape[1])
  causal = index[:, None] >= index[None, :]

  def same(ids):
    return ids[:, :, None] == ids[:, None, :]

  row_text, column_text = is_text[:, :, None], is_text[:, None, :]
  stage1 = same(stream_ids) & ~row_text
  text_to_text = same(segment_ids) & row_text & column_text
  text_to_image = same(group_ids) & row_text & visible[:, None, :]
  allowed = stage1 | text_to_text | (text_to_image & ~column_text)
  return allowed & causal & valid[:, :, None] & valid[:, None, :]


def joint_tokens(
  image_group_ids: Int[Array, "B F"],
  segment_ids: Int[Array, "B T"],
  text_group_ids: Int[Array, "B T"],
  stream_visible: Bool[Array, "B F A"],
) -> tuple[
  Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"], Bool[Array, "B S"]
]:
  """Arguments of `two_stage_mask` for [stream 1, ..., stream F, text]."""
  B, F = image_group_ids.shape
  A = stream_visible.shape[2]
  T = segment_ids.shape[1]
  slots = jnp.repeat(jnp.arange(1, F + 1), A)
  stream_ids = jnp.concatenate([slots, jnp.zeros(T, slots.dtype)])
  segments = jnp.pad(segment_ids, ((0, 0), (F * A, 0)))
  groups = jnp.concatenate(
    [jnp.repeat(image_group_ids, A, axis=1), text_group_ids], axis=1
  )
  visible = jnp.pad(stream_visible.reshape(B, -1), ((0, 0), (0, T)))
  return (
    jnp.broadcast_to(stream_ids, (B, F * A + T)),
    segments,
    groups,
    visible,
  )


def text_mask(
  token_group_ids: Int[Array, "B FK"],
  segment_ids: Int[Array, "B T"],
  text_group_ids: Int[Array, "B T"],
) -> Bool[Array, "B T FK+T"]:
  """The text rows of the two-stage mask over [visible tokens, text].

  K tokens of each of the F slots come before the T text tokens; each has the
  group of its image, or 0 if nobody may see it.
  """
  T = segment_ids.shape[1]
  to_image = text_group_ids[:, :, None] == token_group_ids[:, None, :]
  to_image &= token_group_ids[:, None, :] > 0
  same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
  causal = jnp.tril(jnp.ones((T, T), bool))
  mask = jnp.concatenate([to_image, same_segment & causal], axis=2)
  return mask & (segment_ids > 0)[:, :, None]


def image_offsets(
  image_group_ids: Int[Array, "B F"], strides: Int[Array, "B F"]
) -> Int[Array, "B F"]:
  """Positions by which each image stream is shifted: strides before it."""
  F = image_group_ids.shape[1]
  same_group = image_group_ids[:, :, None] == image_group_ids[:, None, :]
  earlier = jnp.tril(jnp.ones((F, F), bool), -1)
  return jnp.sum((same_group & earlier) * strides[:, None, :], axis=2)


def text_positions(
  image_group_ids: Int[Array, "B F"],
  segment_ids: Int[Array, "B T"],
  text_group_ids: Int[Array, "B T"],
  start: int,
  strides: Int[Array, "B F"],
) -> Int[Array, "B T"]:
  """Position of every text token: index in its segment, after its images.

  Images take the positions from `start` on, `strides` each.
  """
  index = jnp.arange(segment_ids.shape[1])[None, :]
  previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
  starts = jnp.where(segment_ids != previous, index, 0)
  index = index - jax.lax.cummax(starts, axis=1)
  sees = text_group_ids[:, :, None] == image_group_ids[:, None, :]
  sees &= (text_group_ids > 0)[:, :, None]
  past = start + jnp.sum(sees * strides[:, None, :], axis=2)
  return index + jnp.where(jnp.any(sees, axis=2), past, 0)
