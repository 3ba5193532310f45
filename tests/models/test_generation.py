"""Answering from a cache against the full masked pass, at every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models.cache import ImageKeyValues
from vocojax.models.vlm import VisionLanguageModel

STEPS = 8
TOLERANCE = 1e-4  # of the largest logit

# Images of each row, and the length of its prompt; -1 is an empty slot.
ONE_SLOT = [([0], 5), ([2], 1), ([-1], 3), ([1], 4), ([2], 5)]
TWO_SLOTS = [
  ([0, 1], 2),
  ([2, -1], 5),
  ([-1, -1], 4),
  ([-1, 1], 1),
  ([2, 2], 3),
]


def _jit(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _cached(vlm, params, images, image_index, prompts, lengths, shift=0):
  """Greedy decoding as the inference does it: logits [steps + 1, B, V]."""
  B, width = prompts.shape
  K, F = len(vlm.stream.visible), image_index.shape[1]
  cache, _ = _jit(vlm.compress)(params, images)
  # The images of a row go first; what its empty slots hold is never seen.
  rows = [[i for i in row if i >= 0] for row in image_index]
  index = np.array([row + [0] * (F - len(row)) for row in rows])
  laid = ImageKeyValues(
    *(
      x[:, index].reshape(len(x), B, F * K, *x.shape[3:])
      for x in (cache.keys, cache.values)
    )
  )
  positions = np.broadcast_to(vlm.stream.positions(F)[0], (B, F * K))
  cache = _jit(lambda x, p: vlm.place(x, p, num_text_slots=width + STEPS))(
    laid, jnp.asarray(positions)
  )
  slot = np.array([len(row) for row in rows]) * K
  start = np.array([vlm.stream.positions(len(row))[1] for row in rows]) + shift
  extend = _jit(vlm.extend)
  tokens, last, found = prompts, lengths - 1, []
  for step in range(STEPS + 1):
    read = lengths + step - 1 if step else np.zeros_like(lengths)
    logits, cache = extend(
      params,
      jnp.asarray(tokens),
      cache,
      *map(jnp.asarray, (slot + read, start + read, last)),
    )
    found.append(np.asarray(logits))
    tokens, last = found[-1].argmax(-1)[:, None], np.zeros_like(lengths)
  return np.stack(found)


def _joint(vlm, params, images, image_index, prompts, lengths, chosen):
  """The whole sequence through the joint pass, once per generated token."""
  config = dataclasses.replace(vlm.config, attention="bias")
  vlm = VisionLanguageModel(config, vlm.tokens)
  B, width = prompts.shape
  text_logits = _jit(vlm.text_logits)
  ids = np.zeros((B, width + STEPS), np.int32)
  ids[:, :width] = prompts
  found = []
  has_image = (image_index >= 0).any(axis=1)
  for step in range(STEPS + 1):
    count = lengths + step
    real = np.arange(width + STEPS) < count[:, None]
    batch = {
      "images": images[image_index],
      "image_group_ids": image_index >= 0,
      "input_ids": ids,
      "segment_ids": real,
      "text_group_ids": real & has_image[:, None],
    }
    batch = {
      name: x if name == "images" else jnp.asarray(x, jnp.int32)
      for name, x in batch.items()
    }
    logits = np.asarray(text_logits(params, batch))
    found.append(logits[np.arange(B), count - 1])
    if step < STEPS:
      ids[np.arange(B), count] = chosen[step]
  return np.stack(found)


def _setup(k, rows, **overrides):
  vlm = builders.model({"compressor.num_voco_tokens": k} | overrides)
  rng = np.random.default_rng(k)
  lengths = np.array([length for _, length in rows])
  vocab = vlm.config.llm.vocab_size
  size = vlm.config.vision.image_size
  # What stands in the padding of a prompt must not matter.
  prompts = rng.integers(0, vocab, (len(rows), lengths.max()), np.int32)
  images = rng.integers(0, 256, (3, size, size, 3), np.uint8)
  index = np.array([row for row, _ in rows])
  arguments = (jnp.asarray(images), index, prompts, lengths)
  return vlm, builders.init(vlm, seed=k), arguments


@pytest.mark.parametrize(
  "k, rows, overrides",
  [
    (1, ONE_SLOT, {}),
    (2, TWO_SLOTS, {"compressor.text_sees_bos": True}),
    (7, ONE_SLOT, {"scan_layers": False, "llm.num_key_value_heads": 4}),
    (7, TWO_SLOTS, {"llm.tie_word_embeddings": True}),
    (1, TWO_SLOTS, {"compressor.name": "full"}),
    (2, TWO_SLOTS, {"compressor.name": "voco_causal"}),
  ],
)
def test_cached_answers_equal_the_joint_pass(k, rows, overrides):
  vlm, params, arguments = _setup(k, rows, **overrides)
  found = _cached(vlm, params, *arguments)
  chosen = found.argmax(axis=-1)
  expected = _joint(vlm, params, *arguments, chosen)
  vocab = vlm.config.llm.vocab_size
  scale = np.abs(expected[..., :vocab]).max()
  error = np.abs(found - expected)[..., :vocab].max() / scale
  print(f"\nerror {error:.1e} of the scale over {found.shape[:2]} tokens")
  assert error <= TOLERANCE
  np.testing.assert_array_equal(chosen, expected.argmax(axis=-1))
  assert chosen.max() < vocab  # a padded row of the vocabulary never wins
  assert (found[..., vocab:] == np.finfo(np.float32).min).all()
  # A position of text off by one is noticed.
  shifted = _cached(vlm, params, *arguments, shift=1)
  wrong = np.abs(shifted - expected)[0, ..., :vocab].max(axis=-1) / scale
  has_image = (arguments[1] >= 0).any(axis=1)
  assert (wrong[has_image] > 10 * TOLERANCE).all()
  assert (wrong[~has_image] <= TOLERANCE).all()  # RoPE is relative


def test_a_row_does_not_depend_on_its_batch():
  vlm, params, (images, index, prompts, lengths) = _setup(2, TWO_SLOTS)
  together = _cached(vlm, params, images, index, prompts, lengths)
  for b in range(2):
    alone = _cached(
      vlm,
      params,
      images,
      index[b : b + 1],
      prompts[b : b + 1, : lengths[b]],
      lengths[b : b + 1],
    )
    vocab = vlm.config.llm.vocab_size
    difference = np.abs(alone[:, 0] - together[:, b])[:, :vocab].max()
    assert difference <= TOLERANCE * np.abs(alone[..., :vocab]).max()


def test_the_cache_and_attention_of_an_image():
  vlm, params, (images, *_) = _setup(2, ONE_SLOT)
  cache, weights = _jit(vlm.compress)(params, images)
  c = vlm.config.llm
  L, N, K, G, P = cache.keys.shape
  assert (L, N, K) == (c.num_hidden_layers, 3, 2)
  assert (G, P) == (c.num_key_value_heads, c.head_dim)
  assert cache.nbytes_per_image == 2 * L * K * G * P * 4
  A = vlm.stream.length
  assert weights.shape == (L, N, c.num_attention_heads, K, A)
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
  assert not weights[..., 0, A - 1].any()  # VoCo token 1 can't see token 2
  assert (np.asarray(weights[..., 1, :]) > 0).all()
