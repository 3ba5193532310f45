"""One training step against the same arithmetic written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import builders
from vocojax.training import losses, state, step

ROWS = [
  ((1, 0), [(1, 9), (0, 4)]),
  ((1, 1), [(1, 3)]),
  ((0, 0), [(0, 2)]),  # hardly a token to train
  ((1, 2), [(2, 6), (1, 5)]),
]


def jit(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def batch_of(model):
  batch = builders.batch(np.random.default_rng(0), model, ROWS, 13)
  return jax.tree.map(jnp.asarray, batch)


def one_step(model, optimizer, freeze=(), accumulate=1, params=None):
  params = params or builders.init(model)
  before = step.init_state(params, optimizer, freeze)
  train_step = step.make_train_step(model, optimizer, freeze, accumulate)
  return jit(train_step)(before, batch_of(model))


def mean_loss(model, params, batch):
  """Mean cross-entropy over the trained tokens, and how many there are."""
  logits = model.text_logits(params, batch)[:, :-1]
  labels, segments = batch["labels"], batch["segment_ids"]
  trained = (labels[:, 1:] >= 0) & (segments[:, 1:] == segments[:, :-1])
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(
    log_p, jnp.maximum(labels[:, 1:], 0)[..., None], axis=-1
  )[..., 0]
  count = jnp.sum(trained)
  return -jnp.sum(jnp.where(trained, picked, 0)) / count, count


@pytest.fixture(scope="module")
def reference():
  """Parameters, loss and gradient as numpy, and the number of tokens."""
  model = builders.model()
  batch = batch_of(model)
  params = builders.init(model)
  (loss, count), grads = jit(
    jax.value_and_grad(lambda p: mean_loss(model, p, batch), has_aux=True)
  )(params)
  return params, float(loss), jax.tree.map(np.asarray, grads), int(count)


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
  found, expected = state.flatten(found), state.flatten(expected)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    scale = float(np.max(np.abs(x)))
    np.testing.assert_allclose(
      found[path], x, rtol=rtol, atol=atol * max(scale, 1), err_msg=path
    )


def test_sgd_step(reference):
  params, loss, grads, count = reference
  after, metrics = one_step(builders.model(), optax.sgd(0.5))
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
  assert_close(after.params, expected)
  assert int(after.step) == 1
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
  after_norm = np.sqrt(sum(np.sum(p**2) for p in jax.tree.leaves(expected)))
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics["param_norm"], after_norm, rtol=1e-4)
  assert metrics["tokens"] == count


def test_adamw_step(reference):
  params, _, grads, _ = reference
  b1, b2, eps, decay, rate = 0.8, 0.9, 1e-8, 0.1, 0.01
  optimizer = optax.adamw(rate, b1, b2, eps, weight_decay=decay)
  after, _ = one_step(builders.model(), optimizer)
  flat, found = state.flatten(grads), state.flatten(after.params)
  compared = total = 0
  for path, p in state.flatten(params).items():
    g = flat[path]
    # In the first step the corrected moments are g and g * g.
    expected = p - rate * (g / (np.sqrt(g * g) + eps) + decay * p)
    # Where a gradient is zero but for rounding, its sign may be anything.
    sure = np.abs(g) > 1e-5
    np.testing.assert_allclose(
      np.asarray(found[path])[sure], expected[sure], rtol=1e-4, err_msg=path
    )
    compared, total = compared + np.sum(sure), total + g.size
  assert compared > 0.8 * total


def test_frozen_parameters(reference):
  params, loss, grads, _ = reference
  freeze = ("^vision/", "embed_tokens", "norm")
  after, metrics = one_step(builders.model(), optax.adam(0.1), freeze)
  before, found = state.flatten(params), state.flatten(after.params)
  (adam, _) = after.opt_state
  frozen = {p for p in before if state.matches(p, freeze)}
  assert 20 < len(frozen) < len(before)
  for path, x in before.items():
    same = x.tobytes() == np.asarray(found[path]).tobytes()
    assert same == (path in frozen), path
  for moments in (adam.mu, adam.nu):
    assert set(state.flatten(moments)) == set(before) - frozen
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  flat = state.flatten(grads)
  norm = np.sqrt(sum(np.sum(g**2) for p, g in flat.items() if p not in frozen))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


@pytest.mark.parametrize(
  "overrides",
  [
    {"scan_layers": False},
    {"remat": "full"},
    {"remat": "dots"},
    {"remat": "full", "scan_layers": False},
    {"attention": "bias"},
    {"mlp_chunks": 4},
    {"mlp_chunks": 3, "remat": "full", "attention_kernel": "splash"},
  ],
)
def test_same_numbers_however_it_is_computed(reference, overrides):
  """Unrolled layers, recomputation, the joint pass: one gradient."""
  params, loss, grads, _ = reference
  after, metrics = one_step(builders.model(overrides), optax.sgd(0.5))
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
  assert_close(after.params, expected)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_weigh_by_their_tokens(reference, accumulate):
  params, loss, grads, count = reference
  model = builders.model()
  after, metrics = one_step(model, optax.sgd(0.5), accumulate=accumulate)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
  assert_close(after.params, expected)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  assert metrics["tokens"] == count
  # No two micro-batches hold as many tokens, so means of means would show.
  batch = batch_of(model)
  same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
  tokens = jnp.sum((batch["labels"][:, 1:] >= 0) & same, axis=1)
  tokens = tokens.reshape(-1, accumulate).sum(axis=0)
  assert len(set(tokens.tolist())) == accumulate, tokens


def test_optimiser_state_of_bfloat16_weights_is_float32():
  model = builders.model({"param_dtype": "bfloat16", "dtype": "bfloat16"})
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), builders.init(model))
  after, _ = one_step(model, optax.adam(0.1), params=params)
  (adam, _) = after.opt_state
  for tree, dtype in (
    (adam.mu, "float32"),
    (adam.nu, "float32"),
    (after.params, "bfloat16"),
  ):
    assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {dtype}


def test_batch_without_a_trained_token():
  model = builders.model()
  batch = batch_of(model)
  batch["labels"] = jnp.full_like(batch["labels"], losses.IGNORE)
  params = builders.init(model)
  optimizer = optax.sgd(0.5)
  after, metrics = jit(step.make_train_step(model, optimizer, (), 2))(
    step.init_state(params, optimizer, ()), batch
  )
  assert (metrics["loss"], metrics["tokens"]) == (0, 0)
  assert_close(after.params, params, rtol=0, atol=0)
