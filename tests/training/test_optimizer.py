"""Schedules, decay, freezing and muon against hand computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests.models import builders
from vocojax import config as config_lib
from vocojax.config import default_config
from vocojax.training import optimizer, state


def _config(**overrides):
  values = default_config().optimizer.to_dict() | overrides
  return config_lib.from_mapping(
    config_lib.OptimizerConfig, values, "config.optimizer"
  )


def _jit(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _rates(steps, config):
  schedule = optimizer.schedule(config, config.learning_rate, steps)
  return np.array([float(schedule(i)) for i in range(steps)])


def test_cosine_after_warm_up():
  config = _config(learning_rate=2.0, warmup_ratio=0.1)
  rates = _rates(100, config)
  np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
  assert rates[10] == 2.0
  np.testing.assert_allclose(rates[55], 1.0, rtol=1e-6)  # half of the 90 left
  expected = 1 + np.cos(np.pi * np.arange(90) / 90)
  np.testing.assert_allclose(rates[10:], expected, rtol=1e-5, atol=1e-6)
  # Step 100 would be the first at the end value; step 99 is one before it.
  schedule = optimizer.schedule(config, config.learning_rate, 100)
  assert float(schedule(100)) == pytest.approx(0, abs=1e-7)


def test_ends_at_a_fraction_of_the_peak():
  cosine = _config(learning_rate=2.0, warmup_ratio=0.0, end_learning_rate=0.25)
  rates = _rates(8, cosine)
  assert rates[0] == 2.0  # no warm-up
  expected = 0.5 + 0.75 * (1 + np.cos(np.pi * np.arange(8) / 8))
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  linear = dataclasses.replace(cosine, schedule="linear")
  np.testing.assert_allclose(
    _rates(8, linear), 2 - 1.5 * np.arange(8) / 8, rtol=1e-6
  )
  constant = dataclasses.replace(cosine, schedule="constant")
  np.testing.assert_allclose(_rates(8, constant), 2)


def test_one_step_of_warm_up_and_one_step_in_all():
  np.testing.assert_allclose(
    _rates(4, _config(learning_rate=1.0, warmup_ratio=0.25))[:2], [1, 1]
  )
  assert np.isfinite(_rates(1, _config(learning_rate=1.0))).all()


def _params():
  return jax.tree.map(jnp.asarray, builders.init(builders.model()))


def test_freeze_splits_by_path_and_merge_restores():
  params = _params()
  trained, frozen = state.split(params, ("^vision/", "embed_tokens"))
  trained_paths, frozen_paths = state.flatten(trained), state.flatten(frozen)
  assert not set(trained_paths) & set(frozen_paths)
  assert set(trained_paths) | set(frozen_paths) == set(state.flatten(params))
  expected = {
    p
    for p in state.flatten(params)
    if p.startswith("vision/") or p == "llm/embed_tokens/embedding"
  }
  assert set(frozen_paths) == expected
  assert "projector/linear_1/bias" in trained_paths
  merged = state.merge(trained, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  for a, b in zip(
    jax.tree.leaves(merged), jax.tree.leaves(params), strict=True
  ):
    assert a is b
  nothing_frozen, empty = state.split(params, ())
  assert not empty and len(state.flatten(nothing_frozen)) == len(
    state.flatten(params)
  )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_reaches_matrices_only(name):
  """With zero gradients, decay is all that an update holds."""
  config = _config(
    name=name,
    learning_rate=0.5,
    adam_learning_rate=0.5,
    weight_decay=0.1,
    warmup_ratio=0.0,
    schedule="constant",
    freeze=(),
  )
  params = _params()
  transform = optimizer.make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = _jit(transform.update)(
    zeros, _jit(transform.init)(params), params
  )
  updates, flat = state.flatten(updates), state.flatten(params)
  spared = ("norm", "bias", "embed")  # of vocojax/config.py
  assert config.no_decay == spared
  for path, update in updates.items():
    expected = 0.0 if any(s in path for s in spared) else -0.05 * flat[path]
    np.testing.assert_allclose(
      update, expected, rtol=1e-5, atol=1e-8, err_msg=path
    )
  assert np.any(updates["llm/layers/mlp/up_proj/kernel"])


def test_adamw_is_optax_adamw_with_clipping():
  config = _config(learning_rate=0.1, warmup_ratio=0.0, grad_clip=0.5, b2=0.9)
  params = {"a": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
  gradient = {"a": {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}}  # norm 5
  transform = optimizer.make_optimizer(config, 10)
  plain = optax.adamw(
    optax.cosine_decay_schedule(0.1, 10), b1=0.9, b2=0.9, weight_decay=0.0
  )
  ours, theirs = transform.init(params), plain.init(params)
  for scale in (1.0, 0.01):  # clipped to a tenth; below the limit
    scaled = jax.tree.map(lambda g, s=scale: s * g, gradient)
    by_hand = jax.tree.map(lambda g, s=scale: g * min(s, 0.1), gradient)
    found, ours = transform.update(scaled, ours, params)
    expected, theirs = plain.update(by_hand, theirs, params)
    np.testing.assert_allclose(
      found["a"]["kernel"], expected["a"]["kernel"], rtol=1e-5
    )


def test_muon_treats_each_layer_of_a_stack_alone():
  """[L, in, out] kernels against `contrib.muon` run matrix by matrix."""
  rate, L = 0.1, 3
  config = _config(
    name="muon",
    learning_rate=rate,
    adam_learning_rate=0.02,
    warmup_ratio=0.0,
    schedule="constant",
    grad_clip=0.0,
    b2=0.9,
  )
  rng = np.random.default_rng(0)

  def draw():
    shapes = {
      "llm/embed_tokens/embedding": (7, 4),
      "llm/layers/mlp/up_proj/kernel": (L, 4, 6),
      "llm/layers/mlp/down_proj/kernel": (L, 6, 4),
      "llm/layers/input_layernorm/scale": (L, 4),
      "llm/lm_head/kernel": (4, 7),
      "projector/linear_1/kernel": (5, 4),
    }
    return state.unflatten(
      {
        p: jnp.asarray(rng.normal(size=s), jnp.float32)
        for p, s in shapes.items()
      }
    )

  params, gradients = draw(), [draw(), draw()]
  transform = optimizer.make_optimizer(config, 10)
  opt_state, updates = transform.init(params), None
  update = _jit(transform.update)
  for gradient in gradients:
    updates, opt_state = update(gradient, opt_state, params)
  updates = state.flatten(updates)

  def alone(transform, pick):
    p = {"w": pick(state.flatten(params))}
    opt_state, u, update = transform.init(p), None, _jit(transform.update)
    for gradient in gradients:
      g = {"w": pick(state.flatten(gradient))}
      u, opt_state = update(g, opt_state, p)
    return u["w"]

  muon = contrib.muon(rate)
  for path in ("up_proj", "down_proj"):
    path = f"llm/layers/mlp/{path}/kernel"
    for i in range(L):
      expected = alone(muon, lambda flat, p=path, i=i: flat[p][i])
      np.testing.assert_allclose(
        updates[path][i], expected, rtol=1e-4, atol=2e-6
      )
  path = "projector/linear_1/kernel"
  np.testing.assert_allclose(
    updates[path], alone(muon, lambda flat: flat[path]), rtol=1e-4, atol=2e-6
  )
  # Everything else is Adam with Nesterov momentum at its own rate, the head
  # and tables too.
  adam = optax.adamw(0.02, b2=0.9, weight_decay=0.0, nesterov=True)
  for path in (
    "llm/embed_tokens/embedding",
    "llm/layers/input_layernorm/scale",
    "llm/lm_head/kernel",
  ):
    expected = alone(adam, lambda flat, p=path: flat[p])
    np.testing.assert_allclose(updates[path], expected, rtol=1e-4, atol=2e-6)


def _updates(config, param, gradients):
  """Updates of one matrix, and the last optimiser state."""
  params = {"kernel": jnp.asarray(param)}
  transform = optimizer.make_optimizer(config, 10)
  opt_state, found = transform.init(params), []
  update = _jit(transform.update)
  for g in gradients:
    updates, opt_state = update({"kernel": jnp.asarray(g)}, opt_state, params)
    found.append(np.asarray(updates["kernel"]))
  return found, opt_state


def _draw(*shape):
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


PLAIN = {
  "learning_rate": 0.1,
  "warmup_ratio": 0.0,
  "schedule": "constant",
  "grad_clip": 0.0,
  "weight_decay": 0.5,
}


def test_lion_steps_by_signs():
  config = _config(name="lion", b1=0.8, b2=0.9, **PLAIN)
  param, first, second = _draw(3, 4, 5)
  found, _ = _updates(config, param, [first, second])
  expected = -0.1 * (np.sign(0.2 * first) + 0.5 * param)
  np.testing.assert_allclose(found[0], expected, rtol=1e-5)
  sign = np.sign(0.8 * 0.1 * first + 0.2 * second)
  expected = -0.1 * (sign + 0.5 * param)
  np.testing.assert_allclose(found[1], expected, rtol=1e-5)


def test_adafactor_keeps_a_row_and_a_column():
  """Two steps written out after the paper's algorithm 4."""
  config = _config(name="adafactor", **PLAIN)
  param, *gradients = _draw(3, 130, 140)
  gradients[1] *= 3  # so that the second update is clipped
  found, opt_state = _updates(config, param, gradients)
  row = column = 0
  for step, g in enumerate(gradients):
    decay = 1 - (step + 1) ** -0.8
    square = g * g + 1e-30
    row = decay * row + (1 - decay) * square.mean(axis=1)
    column = decay * column + (1 - decay) * square.mean(axis=0)
    v = row[:, None] * column[None] / row.mean()
    u = g / np.sqrt(v)
    u /= max(1, np.sqrt((u * u).mean()))
    expected = -0.1 * (u + 0.5 * param)
    np.testing.assert_allclose(found[step], expected, rtol=1e-3, atol=1e-5)
  sizes = [x.size for x in jax.tree.leaves(opt_state)]
  assert max(sizes) == 140 and sizes.count(140) == 1 == sizes.count(130)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moment_in_bfloat16(name):
  param, *gradients = _draw(3, 6, 8)
  config = _config(name=name, adam_learning_rate=0.1, **PLAIN)
  half = dataclasses.replace(config, first_moment_dtype="bfloat16")
  whole, _ = _updates(config, param, gradients)
  found, opt_state = _updates(half, param, gradients)
  dtypes = [x.dtype for x in jax.tree.leaves(opt_state) if x.size == 48]
  assert dtypes.count(jnp.bfloat16) == 1
  assert dtypes.count(jnp.float32) == (name == "adamw")
  difference = np.abs(found[1] - whole[1]).max() / np.abs(whole[1]).max()
  assert 0 < difference < 0.02 or name == "lion"
