"""The mean per micro-batch of the original, and whom it lets be heard.

Each device takes the mean over the trained tokens of its rows; devices and
accumulation steps count alike, however many tokens each has.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import align, voco_1tok
from tests import runs
from tests.models import builders
from vocojax import config as config_lib
from vocojax.data import grouping
from vocojax.training import losses, sharding, state, step

T, ROWS, MICRO = 14, 16, 2


def data_config(module=voco_1tok, **changes):
  [phase] = config_lib.phases(module.get_config())
  return dataclasses.replace(phase.data, **changes)


def layout(packed, rng):
  """Rows of one conversation, or of several with their own images."""
  if packed:
    return builders.random_rows(rng, ROWS, 2, T)
  lengths = rng.integers(2, T + 1, ROWS)
  return [((1, 0), [(1, int(n))]) for n in lengths]


def by_hand(model, params, batch):
  """Gradient of the mean of means, micro-batch after micro-batch."""

  def mean(params, part):
    total, count = builders.loss_of(model.text_logits(params, part), part)
    return total / count, count

  gradient = jax.jit(
    jax.grad(mean, has_aux=True), compiler_options=builders.QUICK_COMPILE
  )
  gradients = []
  for i in range(0, ROWS, MICRO):
    part = {k: x[i : i + MICRO] for k, x in batch.items()}
    found, count = gradient(params, part)
    if count:
      gradients.append(found)
  assert len(gradients) > ROWS // MICRO // 2
  return jax.tree.map(lambda *g: sum(g) / len(g), *gradients)


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "packed"])
def setup(request):
  model = builders.model({"vision.intermediate_size": 16})
  rng = np.random.default_rng(int(request.param))
  batch = builders.batch(rng, model, layout(request.param, rng), T)
  batch["labels"][:: MICRO + 1, : T // 2] = -100  # some have little to train
  params = builders.init(model)
  batch = {k: jnp.asarray(x) for k, x in batch.items()}
  return model, params, batch, by_hand(model, params, batch)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1)], ids=["1", "8"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient(setup, sizes, accumulate):
  model, params, batch, expected = setup
  data = data_config(batch_size=ROWS, micro_batch_size=MICRO)
  batch = batch | {"micro_batch_ids": grouping.micro_batch_ids(data, 0, 1)}
  mesh, sgd = runs.mesh(*sizes), optax.sgd(1.0)
  with jax.set_mesh(mesh):
    train_step = jax.jit(
      step.make_train_step(model, sgd, (), accumulate),
      compiler_options=builders.QUICK_COMPILE,
    )
    laid = jax.device_put(params, sharding.param_shardings(params, mesh))
    after, metrics = train_step(
      step.init_state(laid, sgd, ()),
      jax.device_put(batch, sharding.rows(mesh)),
    )
  gradient = jax.tree.map(lambda a, b: a - b, params, after.params)
  found, expected = state.flatten(gradient), state.flatten(expected)
  largest = max(np.abs(x).max() for x in expected.values())
  for path, x in expected.items():
    error = np.abs(np.asarray(found[path]) - x).max()
    assert error <= 2e-5 * largest, path
  # The reported loss stays that per token.
  total, count = builders.loss_of(model.text_logits(params, batch), batch)
  np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)


def test_micro_batches_of_shares_are_those_of_the_order():
  """However many processes deal the rows out among themselves."""
  for module, (rows, size) in ((voco_1tok, (128, 8)), (align, (256, 32))):
    data = data_config(module)
    assert (data.batch_size, data.micro_batch_size) == (rows, size)
    for count in (1, 2, 8):
      found = np.zeros(rows, int)
      for share in range(count):
        found[share::count] = grouping.micro_batch_ids(data, share, count)
      np.testing.assert_array_equal(found, np.arange(rows) // size)


def test_a_micro_batch_without_trained_tokens_counts_for_nothing():
  targets = np.full((4, 3), losses.IGNORE)
  targets[0], targets[1, 0] = 7, 7  # three tokens and one, then none
  weights = losses.row_weights(jnp.asarray(targets), jnp.array([0, 1, 2, 2]))
  tokens = np.array([3, 1, 0, 0])
  shares = np.asarray(weights) * tokens / tokens.sum()
  np.testing.assert_allclose(shares, [0.5, 0.5, 0, 0])


def text_only_share(data, loss_mean, is_text, tokens):
  """Part of an epoch's gradient that is of the records without images."""
  rng = np.random.default_rng(0)
  if data.batching == "group_by_length":
    chunks = data.batch_size // data.micro_batch_size
    signed = np.where(is_text, -tokens, tokens)
    order = grouping.order(signed, data.batch_size, chunks, rng)
  else:
    order = rng.permutation(len(tokens))
  ids = jnp.asarray(grouping.micro_batch_ids(data, 0, 1))
  shares = []
  for start in range(0, len(order) - data.batch_size + 1, data.batch_size):
    rows = order[start : start + data.batch_size]
    targets = np.where(
      np.arange(tokens.max()) < tokens[rows][:, None], 0, losses.IGNORE
    )
    weights = np.ones(len(rows))
    if loss_mean == "micro_batches":
      weights = np.asarray(losses.row_weights(jnp.asarray(targets), ids))
    heard = weights * tokens[rows]
    shares.append(heard[is_text[rows]].sum() / tokens[rows].sum())
  return np.mean(shares)


def test_the_weight_of_records_without_images():
  """6.1 % of LLaVA's records, whose answers are long, as made up here."""
  rng = np.random.default_rng(1)
  is_text = rng.random(40 * 128) < 0.061
  tokens = np.where(
    is_text,
    np.clip(rng.lognormal(6.2, 0.6, is_text.size), 8, 1400),
    np.clip(rng.lognormal(4.0, 0.8, is_text.size), 2, 1400),
  ).astype(int)
  [recipe] = config_lib.phases(voco_1tok.get_config())
  share = text_only_share(
    recipe.data, recipe.training.loss_mean, is_text, tokens
  )
  print(f"\ntext-only records: {is_text.mean():.1%}, heard {share:.1%}")
  assert abs(share - is_text.mean()) < 0.015
  # Shuffled, under one mean over all tokens of a step.
  plain = data_config(batching="shuffle")
  share = text_only_share(plain, "tokens", is_text, tokens)
  print(f"shuffled, by tokens: heard {share:.1%}")
  assert 0.26 < share < 0.43
