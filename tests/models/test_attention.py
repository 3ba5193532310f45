"""Attention that reads a cache in chunks, against the plain einsums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import attention, layers

TOLERANCE = 1e-5

_cached, _plain = map(
  jax.jit, (attention.attend_cached, attention.attend_with_bias)
)


def _random(rng, B: int, S: int, T: int, H: int, G: int, P: int = 8):
  """Queries large enough that the likeliest slot is in any chunk."""
  query = rng.normal(0, 3, (B, T, H, P)).astype(np.float32)
  key, value = rng.normal(0, 1, (2, B, G, S, P)).astype(np.float32)
  return query, key, value


@pytest.mark.parametrize("H, G", [(6, 2), (4, 4)])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("S", [7, 64, 65, 150, 256])
def test_equals_the_plain_form(S, T, H, G):
  rng = np.random.default_rng(S)
  query, key, value = _random(rng, 6, S, T, H, G)
  slot = rng.integers(0, S - T + 1, 6, np.int32)
  slot[:2] = 0, S - T
  mask = np.arange(S) <= (slot[:, None] + np.arange(T))[:, :, None]
  # What nobody sees may be anything.
  unseen = ~mask[:, -1][:, None, :, None]
  found = _cached(query, np.where(unseen, 1e4, key), value, slot)
  expected = _plain(
    query,
    key.swapaxes(1, 2),
    value.swapaxes(1, 2),
    attention.bias_from_mask(jnp.asarray(mask)),
  )
  np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("T", [5, 160, 161, 333])
def test_causal_in_blocks(T):
  """Values and gradients; as many blocks as `_QUERY_BLOCK` makes of T."""
  rng = np.random.default_rng(T)
  query, key, value = _random(rng, 2, T, T, 4, 2)
  arrays = (query, key.swapaxes(1, 2), value.swapaxes(1, 2))
  weight = rng.normal(size=query.shape).astype(np.float32)
  bias = attention.bias_from_mask(jnp.tril(jnp.ones((2, T, T), bool)))
  config = builders.model_config()
  found = []
  for attend in (
    lambda *x: attention.attend(*x, config, causal=True),
    lambda *x: attention.attend_with_bias(*x, bias),
  ):
    f = jax.value_and_grad(lambda *x: jnp.sum(attend(*x) * weight), (0, 1, 2))  # noqa: B023
    found.append(jax.tree.leaves(jax.jit(f)(*map(jnp.asarray, arrays))))
  for a, b in zip(*found, strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, atol=TOLERANCE * scale)


_LENGTHS = [
  (577, 577, True),
  (578, 578, True),
  (577, 577, False),
  (3, 7, False),
]


def _half(monkeypatch, T, S):
  """Arrays that cuDNN takes, and attention as a GPU runs it."""
  monkeypatch.setattr(layers, "platform", lambda: "gpu")
  rng = np.random.default_rng(0)
  shapes = (2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16)
  arrays = [jnp.asarray(rng.normal(size=x), jnp.bfloat16) for x in shapes]
  return arrays, builders.model_config({"dtype": "bfloat16"})


def _derive(attend):
  return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2)))


@pytest.mark.parametrize("T, S, causal", _LENGTHS)
def test_cudnn_takes_all_lengths(T, S, causal, monkeypatch):
  """Lowered for a GPU as far as that goes without one."""
  module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(module, "check_cudnn_version", lambda: 91200)
  arrays, config = _half(monkeypatch, T, S)
  attend = functools.partial(attention.attend, config=config, causal=causal)
  lowered = _derive(attend).trace(*arrays).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@__cudnn$fmha") == 2  # there and back


@pytest.mark.parametrize("T, S, causal", _LENGTHS)
def test_what_cudnn_is_given(T, S, causal, monkeypatch):
  """XLA's attention of the same arguments, against the plain einsums."""
  arrays, config = _half(monkeypatch, T, S)
  real, called = jax.nn.dot_product_attention, []

  def by_xla(*args, implementation, **more):
    called.append(implementation)
    return real(*args, implementation="xla", **more)

  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  seen = np.tri(T, S) if causal else np.ones((T, S))
  bias = attention.bias_from_mask(jnp.tile(jnp.asarray(seen > 0), (2, 1, 1)))
  attend = functools.partial(attention.attend, config=config, causal=causal)
  plain = functools.partial(attention.attend_with_bias, attention_bias=bias)
  found = _derive(attend)(*arrays)
  assert called == ["cudnn"]
  for a, b in zip(found, _derive(plain)(*arrays), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= 0.02 * np.abs(b).max()


@functools.cache
def _rows():
  rng = np.random.default_rng(0)
  return _random(rng, 4, 300, 1, 6, 2)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 170])
def test_a_row_does_not_depend_on_longer_ones(length):
  query, key, value = _rows()
  alone = _cached(query, key, value, np.full(4, length - 1, np.int32))
  slot = np.array([299, length - 1, 0, 200], np.int32)
  among = _cached(query, key, value, slot)
  np.testing.assert_array_equal(alone[1], among[1])  # to the bit
  assert np.abs(np.asarray(alone[0] - among[0])).max() > 1e-3
