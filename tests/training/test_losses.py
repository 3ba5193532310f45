"""The loss against plain numpy, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vocojax.models import head
from vocojax.training import losses

VOCAB = 300


def _answer_loss(logits, labels, segments, chunk=VOCAB):
  """The loss and counts from logits, which are scored in chunks."""
  targets = losses.next_tokens(labels, segments)
  each, right = head.token_losses(
    logits, jnp.eye(VOCAB), jnp.maximum(targets, 0), VOCAB, chunk
  )
  return losses.sums(each, right, targets, segments)


def _plain(logits, labels, segment_ids):
  """Loops over tokens in float64."""
  total = tokens = correct = answers = correct_answers = 0
  for row_logits, row_labels, row_segments in zip(
    logits.astype(np.float64), labels, segment_ids, strict=True
  ):
    for segment in set(row_segments) - {0}:
      rights = []
      for t in range(1, len(row_labels)):
        inside = row_segments[t] == segment == row_segments[t - 1]
        if not inside or row_labels[t] == -100:
          continue
        x = row_logits[t - 1]
        total += np.log(np.sum(np.exp(x - x.max()))) + x.max()
        total -= x[row_labels[t]]
        rights.append(np.argmax(x) == row_labels[t])
      tokens += len(rights)
      correct += sum(rights)
      answers += bool(rights)
      correct_answers += bool(rights) and all(rights)
  return total, {
    "tokens": tokens,
    "correct_tokens": correct,
    "answers": answers,
    "correct_answers": correct_answers,
  }


@pytest.mark.parametrize("chunk", [100, VOCAB])
@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_numpy(seed, chunk):
  rng = np.random.default_rng(seed)
  B, T = 4, 14
  logits = rng.normal(0, 2, (B, T, VOCAB)).astype(np.float32)
  ids = rng.integers(0, VOCAB, (B, T))
  labels = np.where(rng.random((B, T)) < 0.5, ids, -100)
  segments = np.sort(rng.integers(1, 5, (B, T)), axis=1)
  segments[1, -4:] = 0  # padding at the end, with labels that must not count
  segments[3] = 0
  for b, t in np.argwhere(rng.random((B, T - 1)) < 0.7):  # most are right
    logits[b, t, ids[b, t + 1]] += 20
  total, sums = _answer_loss(
    *map(jnp.asarray, (logits, labels, segments)), chunk
  )
  expected, expected_sums = _plain(logits, labels, segments)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert {k: float(v) for k, v in sums.items()} == expected_sums
  assert 0 < sums["correct_answers"] < sums["answers"] < sums["tokens"]


@pytest.mark.parametrize("chunk", [100, VOCAB])
def test_gradients_equal_optax(chunk):
  """By states and head; the last 20 rows of the head are padding."""
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 3, 8)), rng.normal(size=(8, VOCAB + 20))
  targets = rng.integers(0, VOCAB, (2, 3))
  weight = rng.normal(size=(2, 3))

  def ours(x, kernel):
    each, _ = head.token_losses(x, kernel, targets, VOCAB, chunk)
    return jnp.sum(each * weight)

  def theirs(x, kernel):
    each = optax.softmax_cross_entropy_with_integer_labels(
      (x @ kernel)[..., :VOCAB], targets
    )
    return jnp.sum(each * weight)

  arrays = [jnp.asarray(a, jnp.float32) for a in (x, kernel)]
  targets = jnp.asarray(targets)
  found, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1)))(*arrays) for f in (ours, theirs)
  )
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
  assert not np.any(found[1][1][:, VOCAB:])


def _loss(labels, segments, right):
  """Loss and counts where `right[t]` says that label t is predicted."""
  logits = np.zeros((1, len(labels), VOCAB), np.float32)
  for t in range(1, len(labels)):
    logits[0, t - 1, (labels[t] + 1 - right[t]) % VOCAB] = 50
  arrays = (logits, np.array([labels]), np.array([segments]))
  total, sums = _answer_loss(*map(jnp.asarray, arrays))
  return float(total), {k: int(v) for k, v in sums.items()}


def test_counts_answers_by_hand():
  # Segment 1: its first label has no predecessor, the others are right.
  # Segment 2: one of two wrong. Segment 3: not trained. Then padding.
  total, sums = _loss(
    [3, 4, 5, 6, 7, 8, -100, -100, 9],
    [1, 1, 1, 2, 2, 2, 3, 3, 0],
    [0, 1, 1, 1, 1, 0, 1, 1, 0],
  )
  assert sums == {
    "tokens": 4,
    "correct_tokens": 3,
    "answers": 2,
    "correct_answers": 1,
  }
  assert total == pytest.approx(50)


def test_nothing_trained_is_zero_and_not_nan():
  total, sums = _loss([-100] * 4, [1, 1, 0, 0], [1] * 4)
  assert total == 0 and not any(sums.values())


def test_the_last_logits_count_for_nothing():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 6, VOCAB)).astype(np.float32)
  labels = rng.integers(0, VOCAB, (2, 6))
  segments = np.ones((2, 6), np.int32)
  totals = []
  for last in (0.0, 1e4):
    logits[:, -1] = last * np.arange(VOCAB)
    arrays = map(jnp.asarray, (logits, labels, segments))
    totals.append(float(_answer_loss(*arrays)[0]))
  assert totals[0] == totals[1]
