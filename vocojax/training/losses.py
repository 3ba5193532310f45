"""Token-weighted cross-entropy on answers. Read next: `step.py`.

B text rows, T text length, V padded vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int

IGNORE = -100  # label of a token that is not trained


def answer_loss(
  logits: Float32[Array, "B T V"],
  labels: Int[Array, "B T"],
  segment_ids: Int[Array, "B T"],
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
  """Sum of next-token cross-entropy over trained tokens, and counts.

  Row position t predicts label t + 1 where both belong to one segment, not to
  padding.

  Returns:
    The sum, and the sums that metrics are made of: `tokens` trained,
    `correct_tokens`, `answers` (segments with a trained token) and
    `correct_answers` (all of whose trained tokens are right).
  """
  same_segment = segment_ids[:, 1:] == segment_ids[:, :-1]
  same_segment &= segment_ids[:, 1:] > 0
  targets, logits = labels[:, 1:], logits[:, :-1]
  trained = (targets != IGNORE) & same_segment
  targets = jnp.where(trained, targets, 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  right = (jnp.argmax(logits, axis=-1) == targets) & trained

  def per_segment(flags):  # [B, T + 1] counts
    return jax.vmap(lambda f, s: jnp.zeros(labels.shape[1] + 1).at[s].add(f))(
      flags.astype(jnp.float32), segment_ids[:, 1:]
    )

  answered = per_segment(trained)
  wrong = per_segment(trained & ~right)
  return jnp.sum(jnp.where(trained, losses, 0.0)), {
    "tokens": jnp.sum(trained, dtype=jnp.float32),
    "correct_tokens": jnp.sum(right, dtype=jnp.float32),
    "answers": jnp.sum(answered > 0, dtype=jnp.float32),
    "correct_answers": jnp.sum(
      (answered > 0) & (wrong == 0), dtype=jnp.float32
    ),
  }
