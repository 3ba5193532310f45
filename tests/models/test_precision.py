"""Gradients in the compute dtype, by slots, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models import builders
from vocojax.models import layers, precision


def _stack(num_layers):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  return {
    "a": {"kernel": draw(num_layers, 4, 4), "scale": draw(num_layers, 4)},
    "b": {"kernel": draw(num_layers, 4, 4)},
  }


def _body(x, layer):
  kernels = layer["a"]["kernel"], layer["b"]["kernel"]
  first, second = (kernel.astype(x.dtype) for kernel in kernels)
  scale = layer["a"]["scale"].astype(x.dtype)
  return jnp.tanh(x @ first + scale) @ second, None


def _run(stacked, x, scan, last):
  config = builders.model_config({"scan_layers": scan, "remat": "full"})
  finish = (lambda x, layer: 2 * _body(x, layer)[0]) if last else None
  x, _ = layers.run_stack(_body, x, stacked, config, last=finish)
  return jnp.sum(jnp.sin(x))


def test_slots_get_what_weights_would():
  params, x = _stack(3), jnp.ones((2, 4))
  slots = precision.slots(params, "float32")
  for scan in (True, False):
    for last in (True, False):
      run = lambda p, scan=scan, last=last: _run(p, x, scan, last)  # noqa: E731
      by_slots = jax.jit(
        jax.grad(lambda s, run=run: run(precision.with_slots(params, s)))
      )(slots)
      plain = jax.jit(jax.grad(run))(params)
      for a, b in zip(*map(jax.tree.leaves, (by_slots, plain)), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=1e-4 * scale)
        assert scale > 1e-3


def test_dtypes():
  params, x = _stack(2), jnp.ones((2, 4), jnp.bfloat16)
  slots = precision.slots(params, "bfloat16")

  def loss(slots):
    read = precision.with_slots(params, slots)
    return _run(read, x, True, True).astype(jnp.float32)

  grads = jax.grad(loss)(slots)
  assert grads["a"]["kernel"].dtype == grads["b"]["kernel"].dtype == "bfloat16"
  assert grads["a"]["scale"].dtype == "float32"
  plain = jax.grad(lambda p: _run(p, x.astype(jnp.float32), True, True))(params)
  for a, b in zip(*map(jax.tree.leaves, (grads, plain)), strict=True):
    a = np.asarray(a, np.float32)
    assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
