"""Splash attention, as TPUs run it, against plain einsums; interpreted here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.config import MeshConfig
from vocojax.errors import ConfigError
from vocojax.models import attention, masks, splash
from vocojax.training import sharding

TOLERANCE = 1e-5


def _random(rng, B, T, S, H, G, P):
  query = rng.normal(0, 2, (B, T, H, P)).astype(np.float32)
  key, value = rng.normal(0, 1, (2, B, S, G, P)).astype(np.float32)
  return query, key, value


def _both(mask, arrays, **how):
  """Output and gradients of the kernel, and of einsums under a mask."""
  query = arrays[0]
  weight = np.random.default_rng(9).normal(size=query.shape).astype(np.float32)

  def ours(*arrays):
    out = splash.attend(*arrays, block_size=128, interpret=True, **how)
    return jnp.sum(out * weight), out

  def plain(*arrays):
    bias = attention.bias_from_mask(jnp.asarray(mask))
    out = attention.attend_with_bias(*arrays, bias)
    return jnp.sum(out * weight), out

  found = []
  for f in (ours, plain):
    f = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    (_, out), gradients = f(*map(jnp.asarray, arrays))
    found.append([np.asarray(x) for x in (out, *gradients)])
  return found


@pytest.mark.parametrize("T, G", [(130, 2), (20, 4)])
def test_causal(T, G):
  arrays = _random(np.random.default_rng(0), 2, T, T, 4, G, 8)
  mask = np.tril(np.ones((2, T, T), bool))
  for a, b in zip(*_both(mask, arrays, causal=True), strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max())


def test_all_see_all():
  arrays = _random(np.random.default_rng(1), 2, 150, 150, 2, 2, 8)
  mask = np.ones((2, 150, 150), bool)
  for a, b in zip(*_both(mask, arrays, causal=False), strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max())


ROWS = {
  "one image each": [
    ((1, 2, 2), [(1, 30), (2, 25), (0, 20)]),
    ((0, 1, 0), [(0, 11), (1, 100)]),
  ],
  "an image for several": [
    ((1, 2, 0), [(1, 30), (1, 25), (2, 20), (0, 9)]),
    ((0, 1, 1), [(1, 11), (0, 3), (1, 60)]),
  ],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("k, T", [(1, 130), (5, 120)])
def test_text_sees_its_images(rows, k, T):
  vlm = builders.model({"attention_kernel": "splash", "llm.head_dim": 8})
  rng = np.random.default_rng(2)
  batch = jax.tree.map(jnp.asarray, builders.batch(rng, vlm, rows, T))
  query, key, value = _random(rng, 2, T, 3 * k + T, 4, 2, 8)
  # Of some images, not all tokens.
  visible = np.random.default_rng(3).random((2, 3, k)) < 0.7
  visible = jnp.asarray(visible | (k == 1))
  groups = batch["image_group_ids"]
  mask = masks.text_mask(
    jnp.where(visible, groups[..., None], 0).reshape(2, -1),
    batch["segment_ids"],
    batch["text_group_ids"],
  )
  real = (batch["segment_ids"] > 0)[..., None, None]

  def run(config, query, key, value):
    attend = attention.text_attention(config, batch, visible)
    seen, text = slice(None, 3 * k), slice(3 * k, None)
    out = attend(
      query, key[:, text], value[:, text], key[:, seen], value[:, seen]
    )
    return jnp.sum(jnp.where(real, out, 0) ** 2), jnp.where(real, out, 0)

  found = []
  for name in ("splash", "xla"):
    config = builders.model_config({"attention_kernel": name})
    f = jax.value_and_grad(functools.partial(run, config), (0, 1, 2), True)
    found.append(jax.jit(f)(*map(jnp.asarray, (query, key, value))))
  assert mask.any(axis=(0, 1))[: 3 * k].any()
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    b = np.asarray(b)
    np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max())


def test_needs_to_know_who_shares_an_image():
  vlm = builders.model({"attention_kernel": "splash"})
  rows = ROWS["one image each"]
  batch = builders.batch(np.random.default_rng(0), vlm, rows, 130)
  batch = jax.tree.map(jnp.asarray, batch)
  del batch["image_segment_ids"]
  with pytest.raises(ConfigError) as e:
    attention.text_attention(vlm.config, batch, jnp.ones((2, 3, 1), bool))
  assert e.value.where == "config.data.conversations_per_record"


@pytest.mark.parametrize("B, G", [(4, 2), (3, 1)])
def test_on_a_mesh(B, G):
  """Every device gets its rows and heads, or all where they do not divide."""
  arrays = _random(np.random.default_rng(4), B, 20, 20, 2 * G, G, 8)
  attend = jax.jit(
    functools.partial(
      splash.attend, causal=True, block_size=128, interpret=True
    )
  )
  expected = attend(*map(jnp.asarray, arrays))
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  with jax.set_mesh(mesh):
    found = attend(*map(jnp.asarray, arrays))
  shard = (1, 20, 2, 8) if (B, G) == (4, 2) else found.shape
  assert found.sharding.shard_shape(found.shape) == shard
  np.testing.assert_allclose(found, expected, atol=TOLERANCE)
