"""Sampling against the definitions, written down slowly in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vocojax.errors import UserError
from vocojax.inference import sampling
from vocojax.inference.sampling import Sampling, SamplingRows

VOCABULARY = 23  # of 24 rows
SETTINGS = [
  Sampling(temperature, top_k, top_p)
  for temperature in (0.3, 1.0, 2.5)
  for top_k in (0, 1, 5, 100)
  for top_p in (1.0, 0.9, 0.5, 1e-6)
]
DRAWS = 20_000
_sample, _distribution = map(jax.jit, (sampling.sample, sampling.distribution))


def rows(settings) -> SamplingRows:
  result = SamplingRows.greedy(len(settings))
  for row, setting in enumerate(settings):
    result.start(row, setting)
  return result


def random_logits(rng, num_rows: int) -> np.ndarray:
  logits = rng.normal(0, 2, (num_rows, VOCABULARY + 1)).astype(np.float32)
  logits[:, VOCABULARY:] = np.finfo(np.float32).min
  return logits


def reference(logits, setting: Sampling) -> np.ndarray:
  """Probabilities in float64, token by token."""
  real = logits[:VOCABULARY].astype(np.float64) / setting.temperature
  p = np.exp(real - real.max())
  order = sorted(range(VOCABULARY), key=lambda token: -p[token])
  allowed = order[: setting.top_k or VOCABULARY]
  total = sum(p[token] for token in allowed)
  nucleus, reached = [], 0.0
  for token in allowed:
    nucleus.append(token)
    reached += p[token] / total
    if reached >= setting.top_p:
      break
  result = np.zeros(VOCABULARY + 1)
  result[nucleus] = p[nucleus] / p[nucleus].sum()
  return result


def test_distributions():
  rng = np.random.default_rng(0)
  for _ in range(10):
    logits = random_logits(rng, len(SETTINGS))
    found = _distribution(logits, rows(SETTINGS))
    found = np.asarray(jax.nn.softmax(found, axis=-1))
    expected = np.stack(
      [reference(x, s) for x, s in zip(logits, SETTINGS, strict=True)]
    )
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
  assert {1, 5, VOCABULARY} <= set((expected > 0).sum(axis=1).tolist())


@pytest.mark.parametrize(
  "setting", [Sampling(1.0), Sampling(0.7, top_k=6), Sampling(1.5, top_p=0.8)]
)
@pytest.mark.parametrize("varied", ["seed", "count"])
def test_frequencies(setting, varied):
  """Over seeds at one token, and over the tokens of one seed."""
  logits = random_logits(np.random.default_rng(1), 1)
  many = rows([setting])
  many = jax.tree.map(lambda x: np.repeat(x, DRAWS), many)
  getattr(many, varied)[:] = np.arange(DRAWS)
  tokens = np.asarray(_sample(np.repeat(logits, DRAWS, axis=0), many))
  counts = np.bincount(tokens, minlength=VOCABULARY + 1)
  expected = reference(logits[0], setting) * DRAWS
  assert not counts[expected == 0].any()
  often = expected > 5
  rest = [x[~often].sum() for x in (counts, expected)]
  found, expected = counts[often], expected[often]
  if rest[1] > 5:
    found, expected = np.append(found, rest[0]), np.append(expected, rest[1])
  p = scipy.stats.chisquare(
    found, expected * found.sum() / expected.sum()
  ).pvalue
  assert p > 1e-3
  # Draws follow each other independently.
  top = (tokens == np.bincount(tokens).argmax()).astype(float)
  assert abs(np.corrcoef(top[:-1], top[1:])[0, 1]) < 4 / np.sqrt(DRAWS)


def test_seeds_and_tokens_are_not_interchangeable():
  logits = np.repeat(random_logits(np.random.default_rng(4), 1), 1000, axis=0)
  found = []
  for shift in (0, 1):
    many = jax.tree.map(lambda x: np.repeat(x, 1000), rows([Sampling(2.0)]))
    many.seed[:] = np.arange(1000) + shift
    many.count[:] = 1 - shift
    found.append(np.asarray(_sample(logits, many)))
  assert np.mean(found[0] == found[1]) < 0.3


def test_a_row_does_not_depend_on_the_others():
  rng = np.random.default_rng(2)
  settings = [
    dataclasses.replace(s, temperature=float(rng.choice([0, s.temperature])))
    for s in SETTINGS
  ]
  settings = [dataclasses.replace(s, seed=i) for i, s in enumerate(settings)]
  logits = random_logits(rng, len(settings))
  together = np.asarray(_sample(logits, rows(settings)))
  greedy = Sampling()
  for i, setting in enumerate(settings):
    # In another place, and with nobody who needs sorting or noise.
    others = [greedy] * len(settings)
    others[-1 - i] = setting
    alone = _sample(np.roll(logits, -1 - 2 * i, axis=0), rows(others))
    assert alone[-1 - i] == together[i]
  is_greedy = np.array([s.temperature == 0 for s in settings])
  np.testing.assert_array_equal(
    together[is_greedy], logits[is_greedy].argmax(axis=-1)
  )
  assert is_greedy.any() and (together != logits.argmax(axis=-1)).any()


def test_extremes():
  logits = jnp.asarray(random_logits(np.random.default_rng(3), 1))
  cold = Sampling(1e-6, top_k=9, top_p=0.9)
  assert _sample(100 * logits, rows([cold])) == logits.argmax()
  hot = [Sampling(1e6, seed=i) for i in range(500)]
  tokens = np.asarray(_sample(jnp.repeat(logits, 500, axis=0), rows(hot)))
  assert set(tokens.tolist()) == set(range(VOCABULARY))  # never the padding
  # Equally likely tokens stay together.
  equal = jnp.zeros((1, 24)).at[0, 20:].set(-1.0)
  found = _distribution(equal, rows([Sampling(1.0, top_k=3)]))
  assert np.isfinite(found[0]).tolist() == [True] * 20 + [False] * 4


@pytest.mark.parametrize(
  "field, value",
  [
    ("temperature", -0.1),
    ("temperature", 1e-7),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("seed", -1),
    ("seed", 2**32),
  ],
)
def test_errors(field, value):
  with pytest.raises(UserError) as e:
    Sampling(**{field: value})
  assert (e.value.where, e.value.got) == (field, str(value))
