"""Attention of all rows of an image stream, and its roll-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import rollout

LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def parts():
  """Model, parameters, images and the attention of all rows."""
  model = builders.model(
    {"llm.num_hidden_layers": LAYERS, "compressor.num_voco_tokens": 2}
  )
  params = builders.init(model)
  rng = np.random.default_rng(1)
  images = jnp.asarray(rng.integers(0, 256, (2, 8, 8, 3), np.uint8))
  return model, params, images, rollout.stream_attention(model, params, images)


def test_attention_by_hand(parts):
  """Scores, mask and softmax written out, from the inputs of each layer."""
  model, params, images, found = parts
  x = model.embed_images(params, images)
  A = model.stream.length
  causal = np.tril(np.ones((2, A, A), bool))
  positions = jnp.broadcast_to(jnp.arange(A), (2, A))
  _, outputs = model.llm.run(params["llm"], x, positions, jnp.asarray(causal))
  for i, before in enumerate([x, *outputs[:-1]]):
    layer = jax.tree.map(lambda p, i=i: p[i], params["llm"]["layers"])
    q, k, _ = model.llm.qkv(layer, before)
    q, k = (np.asarray(model.llm.rotate(y, positions)) for y in (q, k))
    expected = np.zeros((2, A, A))
    for n, h in np.ndindex(2, HEADS):
      scores = q[n, :, h] @ k[n, :, h // 2].T / 2  # heads of 4 numbers
      scores[np.triu_indices(A, 1)] = -np.inf
      weights = np.exp(scores - scores.max(1, keepdims=True))
      expected[n] += weights / weights.sum(1, keepdims=True) / HEADS
    np.testing.assert_allclose(found[i], expected, atol=1e-5)


def test_rows_of_the_voco_tokens_are_those_of_compress(parts):
  model, params, images, found = parts
  _, weights = model.compress(params, images)
  rows = found[:, :, np.asarray(model.stream.visible)]
  np.testing.assert_allclose(rows, weights.mean(axis=2), atol=1e-6)


def test_rollout_is_a_product_of_matrices(parts):
  *_, attention = parts
  found = np.asarray(rollout.rollout(attention))
  attention = np.asarray(attention, np.float64)
  A = attention.shape[-1]
  for n in range(2):
    expected = np.eye(A)
    np.testing.assert_array_equal(found[0, n], expected)
    for i in range(LAYERS):
      half = np.zeros((A, A))
      for row, column in np.ndindex(A, A):
        half[row, column] = (attention[i, n, row, column] + (row == column)) / 2
      expected = half @ expected
      np.testing.assert_allclose(found[i + 1, n], expected, atol=1e-6)
  np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_rollout_of_a_chain():
  """Each token reads the one before it: after two layers, two before."""
  chain = np.eye(3, k=-1, dtype=np.float32)
  chain[0, 0] = 1
  found = rollout.rollout(jnp.stack([chain, chain])[:, None])[-1, 0]
  np.testing.assert_allclose(found[2], [0.25, 0.5, 0.25])


def test_what_the_last_layer_mixes_is_not_in_the_cache(parts):
  *_, attention = parts
  found = rollout.of_last_cache(attention)
  np.testing.assert_array_equal(found, rollout.rollout(attention[:-1])[-1])
  one = rollout.of_last_cache(attention[:1])
  np.testing.assert_array_equal(one[0], np.eye(one.shape[-1]))
