"""Text that sees the first m of k VoCo tokens, against models with k = m.

Those know nothing of an elastic number: they are the reference. Read next:
`test_two_stream.py`, which has the elastic pass against the joint one, and
`inference/test_cached_answers.py`, against caches that are cut.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import masks
from vocojax.models.vlm import VisionLanguageModel

K, T = 5, 14
# Groups that share a row, an image that is shared, and empty slots.
ROWS = [
  ((1, 1, 2), [(1, 4), (2, 3), (1, 5), (0, 2)]),
  ((0, 1, 1), [(0, 3), (1, 6)]),
  ((1, 2, 3), [(3, 5), (2, 4), (1, 3)]),
]
MIXED = [[3, 3, 1], [0, 2, 2], [5, 1, 4]]


def _model(k: int, train="fixed", attention="two_stream"):
  return builders.model(
    {
      "compressor.num_voco_tokens": k,
      "compressor.train_num_voco_tokens": train,
      "attention": attention,
    }
  )


@functools.cache
def _inputs():
  batch = builders.batch(np.random.default_rng(0), _model(K), ROWS, T)
  return builders.init(_model(K)), jax.tree.map(jnp.asarray, batch)


def _compiled(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _elastic(attention: str, numbers):
  """Loss, logits and gradients where each slot shows so many tokens."""
  params, batch = _inputs()
  batch = batch | {"num_voco_tokens": jnp.array(numbers)}
  return _run(_model(K, "elastic", attention), params, batch)


def _run(vlm, params, batch):
  def loss(params):
    logits = vlm.text_logits(params, batch)
    total, count = builders.loss_of(logits, batch)
    return total / count, logits

  grad = jax.value_and_grad(loss, has_aux=True)
  (value, logits), gradients = _compiled(grad)(params)
  return float(value), np.asarray(logits), gradients


@functools.cache
def _reference(m: int):
  """The same of a model that has no more than m tokens."""
  return _run(_model(m, attention="bias"), *_inputs())


def _logit_error(attention, numbers, m_of_token):
  """Largest error of a token's logits against the model of its own m."""
  _, found, _ = _elastic(attention, numbers)
  real = np.asarray(_inputs()[1]["segment_ids"]) > 0
  worst, scale = 0.0, 0.0
  for m in np.unique(m_of_token[real]):
    # Text that sees no image is the same in every model.
    _, expected, _ = _reference(int(m) or K)
    own = real & (m_of_token == m)
    a, b = (
      x[own][:, : _model(K).config.llm.vocab_size] for x in (found, expected)
    )
    worst, scale = max(worst, np.abs(a - b).max()), max(scale, np.abs(b).max())
  return worst / scale


def _m_of_token(numbers):
  groups = np.asarray(_inputs()[1]["image_group_ids"])
  of_group = np.zeros((len(ROWS), groups.max() + 1), int)
  for b, f in np.argwhere(groups > 0):
    of_group[b, groups[b, f]] = numbers[b][f]
  text = np.asarray(_inputs()[1]["text_group_ids"])
  return np.take_along_axis(of_group, text, axis=1)


@pytest.mark.parametrize("attention", ["two_stream", "bias"])
def test_one_number_for_all_equals_a_model_of_so_many_tokens(attention):
  groups = np.asarray(_inputs()[1]["image_group_ids"])
  for m in (2, K):
    loss, _, gradients = _elastic(attention, m * (groups > 0))
    expected, _, expected_gradients = _reference(m)
    assert loss == pytest.approx(expected, rel=1e-5)
    pairs = zip(
      *map(jax.tree.leaves, (gradients, expected_gradients)), strict=True
    )
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    # Biases of keys have no gradient but rounding.
    floor = 1e-2 * max(np.abs(b).max() for _, b in pairs)
    for a, b in pairs:
      assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), floor)
  assert abs(_reference(2)[0] / _reference(K)[0] - 1) > 1e-3


@pytest.mark.parametrize("attention", ["two_stream", "bias"])
def test_each_group_has_its_own_number(attention):
  assert _logit_error(attention, MIXED, _m_of_token(MIXED)) <= 1e-5


def _place_text_after_all_tokens(monkeypatch):
  positions = masks.text_positions
  monkeypatch.setattr(
    masks,
    "text_positions",
    lambda *a: positions(*a[:-1], jnp.where(a[-1] > 0, K, 0)),
  )


def _place_images_after_all_tokens(monkeypatch):
  offsets = masks.image_offsets
  monkeypatch.setattr(
    masks,
    "image_offsets",
    lambda groups, strides: offsets(groups, jnp.full_like(strides, K)),
  )


def _show_the_last_tokens(monkeypatch):
  def broken(self, batch):
    first = self.stream.length - batch["num_voco_tokens"]
    return jnp.arange(self.stream.length) >= first[..., None]

  monkeypatch.setattr(VisionLanguageModel, "_visible", broken)


def _show_all_tokens(monkeypatch):
  visible = VisionLanguageModel._visible

  def broken(self, batch):
    return jnp.ones_like(visible(self, batch)) & self.stream.visible_mask

  monkeypatch.setattr(VisionLanguageModel, "_visible", broken)


@pytest.mark.parametrize(
  "break_it",
  [
    _place_text_after_all_tokens,
    _place_images_after_all_tokens,
    _show_the_last_tokens,
    _show_all_tokens,
  ],
)
def test_a_broken_pass_is_noticed(break_it, monkeypatch):
  expected = [_reference(m) for m in range(1, K + 1)]
  del expected  # so that they are cached, and right
  break_it(monkeypatch)
  assert _logit_error("two_stream", MIXED, _m_of_token(MIXED)) > 1e-2
