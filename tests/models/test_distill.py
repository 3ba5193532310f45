"""KL from a teacher that sees all patches, against PyTorch and two passes.

The reference knows nothing of a second text stream: logits of a model with the
compressor `full` and of one with `voco`, from the joint pass, to PyTorch's
`kl_div` in float64. Read next: `training/test_distill.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models import builders
from vocojax.models import compressors, head
from vocojax.models.vlm import VisionLanguageModel

T = 13
ROWS = [
  ((1, 1), [(1, 4), (1, 5), (0, 3)]),
  ((0, 1), [(0, 3), (1, 8)]),
  ((1, 2), [(2, 6), (1, 5)]),
]
ELASTIC = {"compressor.train_num_voco_tokens": "elastic"}
# Of the 29 real rows of the vocabulary 128 are scored at a time, or all.
CHUNKED = {"logits_chunk": 128, "llm.vocab_size": 300}
CASES = {
  "two streams": {},
  "joint": {"attention": "bias"},
  "elastic": ELASTIC,
  "elastic, joint": ELASTIC | {"attention": "bias"},
  "BOS": {"compressor.text_sees_bos": True, "scan_layers": False},
  "chunks": CHUNKED | {"remat": "full", "llm.tie_word_embeddings": True},
  "splash": ELASTIC | {"attention_kernel": "splash"},
}


def _model(overrides, **more):
  return builders.model({"compressor.num_voco_tokens": 3} | overrides | more)


def _inputs(vlm):
  batch = builders.batch(np.random.default_rng(0), vlm, ROWS, T)
  return builders.init(vlm), jax.tree.map(jnp.asarray, batch)


def _compiled(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _teacher_logits(overrides, params, batch):
  """Of text that sees all patches."""
  full = overrides | {"attention": "bias", "compressor.name": "full"}
  model = _model(full | {"compressor.train_num_voco_tokens": "fixed"})
  return model.text_logits(params, batch)


def _student_logits(overrides, params, batch):
  return _model(overrides | {"attention": "bias"}).text_logits(params, batch)


def _targets(batch):
  return jnp.roll(batch["input_ids"], -1, axis=1)


def _torch_kl(teacher, student, vocab_size):
  """[B, T], as transformers' users write it."""
  teacher, student = (
    torch.log_softmax(
      torch.tensor(np.asarray(x))[..., :vocab_size].double(), dim=-1
    )
    for x in (teacher, student)
  )
  each = torch.nn.functional.kl_div(
    student, teacher, reduction="none", log_target=True
  )
  return each.sum(-1).numpy()


def _torch_losses(logits, batch, vocab_size):
  """Cross-entropy [B, T] of the next token."""
  logits = torch.tensor(np.asarray(logits))[..., :vocab_size].double()
  targets = torch.tensor(np.asarray(_targets(batch))).long()
  return torch.nn.functional.cross_entropy(
    logits.movedim(-1, 1), targets, reduction="none"
  ).numpy()


def _check(found, expected, real):
  error = np.abs(found - expected)[real].max() / np.abs(expected)[real].max()
  print(f"\ndiffers by {error:.1e} of the largest")
  assert error <= 1e-5
  # It is no small thing, nor the same everywhere.
  assert np.abs(expected)[real].max() > 0.3


@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch_on_two_passes(case):
  overrides = CASES[case]
  vlm = _model(overrides)
  params, batch = _inputs(vlm)
  losses, right, found, own = _compiled(vlm.distilled_losses)(
    params, batch, _targets(batch)
  )
  taught, student = (
    _compiled(functools.partial(logits, overrides))(params, batch)
    for logits in (_teacher_logits, _student_logits)
  )
  real = np.asarray(batch["segment_ids"]) > 0
  expected = _torch_kl(taught, student, vlm.config.llm.vocab_size)
  _check(np.asarray(found), expected, real)
  losses_of_teacher = _torch_losses(taught, batch, vlm.config.llm.vocab_size)
  _check(np.asarray(own), losses_of_teacher, real)
  # Text without images reads the same in both.
  blind = real & (np.asarray(batch["text_group_ids"]) == 0)
  assert blind.any() and np.abs(found)[blind].max() < 1e-5
  plain = _compiled(vlm.token_losses)(params, batch, _targets(batch))
  np.testing.assert_allclose(losses[real], plain[0][real], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(right[real], plain[1][real])


def test_a_teacher_with_weights_of_its_own():
  vlm = _model({})
  params, batch = _inputs(vlm)
  other = builders.init(vlm, seed=1)
  _, _, found, _ = _compiled(vlm.distilled_losses)(
    params, batch, _targets(batch), other
  )
  expected = _torch_kl(
    _teacher_logits({}, other, batch),
    _student_logits({}, params, batch),
    vlm.config.llm.vocab_size,
  )
  _check(np.asarray(found), expected, np.asarray(batch["segment_ids"]) > 0)


def _gradients(divergence, params):
  """Of a weighted sum of what a function of params returns, [B, T]."""
  weights = np.random.default_rng(1).normal(size=(len(ROWS), T))

  def total(*params):
    x = divergence(*params)
    return jnp.sum(jnp.where(_REAL, x, 0) * weights)

  argnums = tuple(range(len(params)))
  return _compiled(jax.grad(total, argnums))(*params)


_REAL = np.array(
  [np.arange(T) < sum(n for _, n in conversations) for _, conversations in ROWS]
)


def _plain_kl(overrides, params, batch, stop):
  """From whole logits, in so many words; `stop` keeps the teacher fixed."""
  n = _model(overrides).config.llm.vocab_size
  taught = stop(_teacher_logits(overrides, params, batch))[..., :n]
  student = _student_logits(overrides, params, batch)[..., :n]
  p = jax.nn.softmax(taught)
  return jnp.sum(
    p * (jax.nn.log_softmax(taught) - jax.nn.log_softmax(student)), axis=-1
  )


def _gradient_error(found, expected):
  """Largest difference over the largest value, leaf by leaf."""
  pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
  pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
  floor = 1e-2 * max(np.abs(b).max() for _, b in pairs)
  return max(
    np.abs(a - b).max() / max(np.abs(b).max(), floor) for a, b in pairs
  )


@pytest.mark.parametrize("case", ["two streams", "elastic, joint", "chunks"])
def test_gradients_equal_those_of_whole_logits(case):
  overrides = CASES[case]
  vlm = _model(overrides)
  params, batch = _inputs(vlm)

  def ours(params):
    return vlm.distilled_losses(params, batch, _targets(batch))[2]

  def plain(stop):
    return lambda params: _plain_kl(overrides, params, batch, stop)

  found, expected = (
    _gradients(f, (params,)) for f in (ours, plain(jax.lax.stop_gradient))
  )
  error = _gradient_error(found, expected)
  print(f"\ngradients differ by {error:.1e}")
  assert error <= 3e-5
  if case == "two streams":  # a teacher that learns too would be noticed
    learning = _gradients(plain(lambda x: x), (params,))
    assert _gradient_error(found, learning) > 1e-2


def test_a_teacher_gets_no_gradient():
  vlm = _model({})
  params, batch = _inputs(vlm)

  def ours(params, teacher):
    return vlm.distilled_losses(params, batch, _targets(batch), teacher)[2]

  own, taught = _gradients(ours, (params, builders.init(vlm, seed=1)))
  assert all(np.asarray(x).any() for x in jax.tree.leaves(own["llm"]))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(taught))


def _see_a_patch_less(monkeypatch):
  stream = compressors.image_stream

  def broken(config, tokens):
    right = stream(config, tokens)
    if config.compressor.name != "full":
      return right
    return dataclasses.replace(right, visible=right.visible[:-1])

  monkeypatch.setattr("vocojax.models.vlm.image_stream", broken)


def _place_the_text_elsewhere(monkeypatch):
  reader = VisionLanguageModel._reader

  def broken(self, batch):
    right = reader(self, batch)
    if self.config.compressor.name != "full":
      return right
    return dataclasses.replace(right, text_positions=right.text_positions + 1)

  monkeypatch.setattr(VisionLanguageModel, "_reader", broken)


def _swap_teacher_and_student(monkeypatch):
  add = head._add_teacher
  monkeypatch.setattr(head, "_add_teacher", lambda t, a, b, i: add(t, b, a, i))


@pytest.mark.parametrize(
  "break_it",
  [_see_a_patch_less, _place_the_text_elsewhere, _swap_teacher_and_student],
)
def test_a_broken_teacher_is_noticed(break_it, monkeypatch):
  vlm = _model({})
  params, batch = _inputs(vlm)
  expected = _torch_kl(
    _teacher_logits({}, params, batch),
    _student_logits({}, params, batch),
    vlm.config.llm.vocab_size,
  )
  break_it(monkeypatch)
  _, _, found, _ = _compiled(vlm.distilled_losses)(
    params, batch, _targets(batch)
  )
  assert np.abs(found - expected)[_REAL].max() > 1e-2
