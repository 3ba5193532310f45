"""Cross-entropy on answers: what is counted, and how much. Next: `step.py`.

B text rows, T text length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

IGNORE = -100  # label of a token that is not trained


def next_tokens(
  labels: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
  """What each token is to foretell: the label that follows, or `IGNORE`.

  A label counts where both tokens belong to one segment, not to padding.
  """
  same_segment = segment_ids[:, 1:] == segment_ids[:, :-1]
  same_segment &= segment_ids[:, 1:] > 0
  targets = jnp.where(same_segment, labels[:, 1:], IGNORE)
  return jnp.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORE)


def trained_sum(
  values: Float32[Array, "B T"], targets: Int[Array, "B T"]
) -> Float32[Array, ""]:
  """Sum over the tokens that are trained; `targets` from `next_tokens`."""
  return jnp.sum(jnp.where(targets != IGNORE, values, 0.0))


def row_weights(
  targets: Int[Array, "B T"], micro_batch_ids: Int[Array, " B"]
) -> Float32[Array, " B"]:
  """Weights of rows with which the mean over tokens is that over micro-batches.

  The weighted sum over trained tokens, divided by their number, is the mean
  over micro-batches of the mean over each one's trained tokens. A micro-batch
  without any counts for nothing.

  Args:
    targets: from `next_tokens`, of the whole batch.
    micro_batch_ids: of each row, from 0 and below B.
  """
  tokens = jnp.sum(targets != IGNORE, axis=1, dtype=jnp.float32)
  of_each = jnp.zeros_like(tokens).at[micro_batch_ids].add(tokens)
  share = jnp.sum(tokens) / jnp.maximum(jnp.sum(of_each > 0), 1)
  return share / jnp.maximum(of_each[micro_batch_ids], 1)


def sums(
  token_losses: Float32[Array, "B T"],
  right: Bool[Array, "B T"],
  targets: Int[Array, "B T"],
  segment_ids: Int[Array, "B T"],
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
  """Sum of the losses over trained tokens, and counts.

  Args:
    token_losses: of every token, in nats.
    right: whether its target is the likeliest.
    targets: from `next_tokens`; losses of ignored ones do not count.
    segment_ids: conversation of each token.

  Returns:
    The sum, and the sums that metrics are made of: `tokens` trained,
    `correct_tokens`, `answers` (segments with a trained token) and
    `correct_answers` (all of whose trained tokens are right).
  """
  trained = targets != IGNORE
  right = right & trained

  def per_segment(flags):  # [B, T + 1] counts
    return jax.vmap(lambda f, s: jnp.zeros(s.shape[0] + 1).at[s].add(f))(
      flags.astype(jnp.float32), segment_ids
    )

  answered = per_segment(trained)
  wrong = per_segment(trained & ~right)
  return trained_sum(token_losses, targets), {
    "tokens": jnp.sum(trained, dtype=jnp.float32),
    "correct_tokens": jnp.sum(right, dtype=jnp.float32),
    "answers": jnp.sum(answered > 0, dtype=jnp.float32),
    "correct_answers": jnp.sum(
      (answered > 0) & (wrong == 0), dtype=jnp.float32
    ),
  }
