"""Answers from compressed images against the full masked pass, 64 tokens long.

The reference is the specification: the joint pass under the two-stage mask,
over pixels and the whole text, without any cache. Read next: test_cache.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.inference import cache as cache_lib
from vocojax.inference.cache import CacheOrigin, VocoCache
from vocojax.models.cache import ImageKeyValues
from vocojax.models.vlm import VisionLanguageModel

STEPS = 64
TOLERANCE = 1e-4  # of the largest logit
WIDTH = 6  # of the longest question
NUM_IMAGES = 4
ORIGIN = CacheOrigin("0" * 64, "voco_v1/1")

# Images of each row (-1: empty slot), and the lengths of its two questions.
ROWS = (
  ((2, 0, -1), (1, 4)),
  ((0, -1, -1), (5, 1)),
  ((-1, -1, -1), (3, 3)),
  ((0, 1, 2), (6, 2)),
  ((3, 3, 1), (2, 6)),
  ((-1, 1, 3), (4, 5)),
  ((-1, -1, 2), (6, 6)),
  ((1, -1, 0), (1, 1)),
)


def _model(k: int, overrides: dict | None = None) -> VisionLanguageModel:
  return builders.model({"compressor.num_voco_tokens": k} | (overrides or {}))


@functools.cache
def _params(seed: int):
  """The same for every k; nothing in them depends on it."""
  return builders.init(_model(1), seed)


@functools.cache
def _images() -> np.ndarray:
  shape = (NUM_IMAGES, 8, 8, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@functools.cache
def _compiled(vlm, method, **static):
  f = functools.partial(getattr(VisionLanguageModel, method), vlm, **static)
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _compress(vlm, params, images) -> VocoCache:
  found, _ = _compiled(vlm, "compress")(params, jnp.asarray(images))
  return VocoCache(
    np.asarray(found.keys),
    np.asarray(found.values),
    None,
    None,
    ORIGIN,
    tuple(cache_lib.image_hash(image) for image in images),
  )


class Conversation:
  """Rows that read text from caches, question by question, token by token.

  Attributes:
    texts: the tokens that each row has read.
    read_so_far: how many they were before each choice of a next token.
    logits: what that choice was made from; [B, V] each.
  """

  def __init__(self, vlm, params, cache: VocoCache, rows, text_shift=0):
    images, positions, self._slot, self._next = _lay(vlm, cache, rows)
    # Room for two padded questions and all answers but the last token.
    place = _compiled(vlm, "place", num_text_slots=2 * WIDTH + STEPS - 1)
    self._cache = place(images, positions)
    self._next += text_shift
    self._extend = functools.partial(_compiled(vlm, "extend"), params)
    self.texts = [[] for _ in rows]
    self.read_so_far = []
    self.logits = []

  def read(self, ids, lengths):
    """Reads right-padded tokens [B, T]; returns the next token of each row."""
    logits, self._cache = self._extend(
      *(jnp.asarray(ids, jnp.int32), self._cache),
      *(jnp.asarray(x, jnp.int32) for x in (self._slot, self._next)),
      jnp.asarray(lengths - 1, jnp.int32),
    )
    self._slot += lengths
    self._next += lengths
    for text, new, length in zip(self.texts, ids, lengths, strict=True):
      text.extend(new[:length].tolist())
    self.read_so_far.append([len(text) for text in self.texts])
    self.logits.append(np.asarray(logits))
    return self.logits[-1].argmax(axis=-1)


def _lay(vlm, cache: VocoCache, rows):
  """The images of each row one after the other, and where they and text go."""
  stream = vlm.stream_of(cache.num_voco_tokens)
  shown = [[i for i in images if i >= 0] for images, _ in rows]
  K = cache.num_voco_tokens
  C = K * max(map(len, shown))
  L, _, _, G, P = cache.keys.shape
  laid = np.zeros((2, L, len(rows), C, G, P), np.float32)
  positions = np.zeros((len(rows), C), np.int32)
  slots, starts = np.zeros((2, len(rows)), int)
  for b, index in enumerate(shown):
    slots[b] = K * len(index)
    positions[b, : slots[b]], starts[b] = stream.positions(len(index))
    if index:
      images = cache.select(index).key_values("float32")
      for x, y in zip(laid, (images.keys, images.values), strict=True):
        x[:, b, : slots[b]] = y.reshape(L, slots[b], G, P)
  images = ImageKeyValues(*map(jnp.asarray, laid))
  return images, jnp.asarray(positions), slots, starts


def _answer(vlm, params, cache, rows, turns=2, seed=0, text_shift=0):
  """Asks random questions and answers each greedily, STEPS tokens in all."""
  rng = np.random.default_rng(seed)
  talk = Conversation(vlm, params, cache, rows, text_shift)
  for turn in range(turns):
    lengths = np.array([lengths[turn] for _, lengths in rows])
    # What stands in the padding of a question must not matter.
    questions = rng.integers(0, vlm.config.llm.vocab_size, (len(rows), WIDTH))
    token = talk.read(questions, lengths)
    is_last = turn == turns - 1
    for _ in range(STEPS // turns - is_last):
      token = talk.read(token[:, None], np.ones(len(rows), int))
  return talk


def _joint(vlm, params, rows, texts, num_voco_tokens=0):
  """Logits [B, slots, V] of whole texts, from pixels, without a cache.

  An elastic model sees `num_voco_tokens` of each image.
  """
  config = dataclasses.replace(vlm.config, attention="bias")
  B, slots = len(ROWS), 2 * WIDTH + STEPS
  index = np.full((B, max(len(images) for images, _ in ROWS)), -1)
  ids, real = np.zeros((2, B, slots), np.int32)
  for b, ((images, _), text) in enumerate(zip(rows, texts, strict=True)):
    index[b, : len(images)] = images
    ids[b, : len(text)] = text
    real[b, : len(text)] = 1
  present = index >= 0
  batch = {
    "images": _images()[index],
    "image_group_ids": present.astype(np.int32),
    "input_ids": ids,
    "segment_ids": real,
    "text_group_ids": real * present.any(axis=1)[:, None],
  }
  if num_voco_tokens:
    batch["num_voco_tokens"] = (num_voco_tokens * present).astype(np.int32)
  logits = _compiled(VisionLanguageModel(config, vlm.tokens), "text_logits")
  logits = logits(params, jax.tree.map(jnp.asarray, batch))
  return np.asarray(logits)[: len(rows)]


def _difference(a, b, vlm) -> float:
  """Largest difference, in units of the largest logit."""
  real = slice(0, vlm.config.llm.vocab_size)
  a, b = a[..., real], b[..., real]
  return float(np.abs(a - b).max() / np.abs(b).max())


def _check(vlm, params, talk, rows, num_voco_tokens=0):
  """Every choice of a token: all logits, and what was chosen.

  Text is causal, so one pass over the finished text gives what a pass after
  every token would; `test_a_pass_after_every_token` does the latter.
  """
  joint = _joint(vlm, params, rows, talk.texts, num_voco_tokens)
  found = np.stack(talk.logits)
  expected = joint[np.arange(len(rows)), np.array(talk.read_so_far) - 1]
  error = _difference(found, expected, vlm)
  print(f"\nerror {error:.1e} of the scale over {found.shape[:2]} choices")
  assert len(found) >= STEPS  # and what would follow the first answer
  assert error <= TOLERANCE
  np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
  # A padded row of the vocabulary never wins.
  assert found.argmax(-1).max() < vlm.config.llm.vocab_size


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
  "k, overrides",
  [
    (1, {}),
    (2, {"compressor.text_sees_bos": True, "scan_layers": False}),
    (7, {"llm.tie_word_embeddings": True}),
    (16, {"llm.num_key_value_heads": 4}),
  ],
)
def test_answers_equal_the_joint_pass(k, overrides, batch):
  vlm = _model(k, overrides)
  params = builders.init(vlm, seed=k)
  cache = _compress(vlm, params, _images())
  rows = ROWS[:batch]
  talk = _answer(vlm, params, cache, rows, seed=k)
  _check(vlm, params, talk, rows)


def test_a_pass_after_every_token():
  """The joint pass chooses its own tokens, one pass for each."""
  vlm, params = _model(2), _params(2)
  talk = _answer(vlm, params, _compress(vlm, params, _images()), ROWS, turns=1)
  lengths = [first for _, (first, _) in ROWS]
  texts = [text[:n] for text, n in zip(talk.texts, lengths, strict=True)]
  for found in talk.logits:
    last = [len(text) - 1 for text in texts]
    joint = _joint(vlm, params, ROWS, texts)[np.arange(len(ROWS)), last]
    assert _difference(found, joint, vlm) <= TOLERANCE
    for text, token in zip(texts, joint.argmax(axis=-1), strict=True):
      text.append(int(token))
  chosen = np.stack(talk.logits).argmax(axis=-1).T.tolist()
  for text, n, answer in zip(texts, lengths, chosen, strict=True):
    assert text[n:] == answer and len(answer) == STEPS
  assert len(np.unique(chosen)) > 10  # not one word all along


def _logits(*arguments, **options):
  """[STEPS, B, V] of answers to ROWS."""
  return np.stack(_answer(*arguments, ROWS, **options).logits)


@functools.cache
def _case():
  """A model with two VoCo tokens, its cache, and answers from it."""
  vlm, params = _model(2), _params(2)
  cache = _compress(vlm, params, _images())
  return vlm, params, cache, _logits(vlm, params, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_saved_and_loaded_caches_give_the_same_bits(dtype, tmp_path):
  vlm, params, cache, exact = _case()
  if dtype != "float32":
    cache = cache.quantize() if dtype == "int8" else cache.dequantize(dtype)
  (tmp_path / "images.voco").write_bytes(cache.to_bytes())
  loaded = cache_lib.from_bytes((tmp_path / "images.voco").read_bytes(), "file")
  found, before = (_logits(vlm, params, c) for c in (loaded, cache))
  np.testing.assert_array_equal(found.view(np.uint32), before.view(np.uint32))
  assert np.array_equal(found, exact) == (dtype == "float32")


@pytest.mark.parametrize("m", [1, 2, 7])
def test_truncated_caches_equal_fewer_tokens(m):
  params, longest, vlm = _params(2), _model(16), _model(m)
  cache = _compress(longest, params, _images()).truncate(m)
  direct = _compress(vlm, params, _images())
  for name in ("keys", "values"):
    x, y = getattr(cache, name), getattr(direct, name)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
  # Read by the model of 16 tokens; checked against that of m.
  _check(vlm, params, _answer(longest, params, cache, ROWS), ROWS)


@pytest.mark.parametrize("m", [1, 4, 7])
def test_truncated_caches_equal_the_elastic_pass(m):
  """What is trained is what a cut cache answers, with several images too."""
  elastic = {"compressor.train_num_voco_tokens": "elastic"}
  params, vlm = _params(2), _model(7, elastic)
  cache = _compress(vlm, params, _images()).truncate(m)
  _check(vlm, params, _answer(vlm, params, cache, ROWS), ROWS, m)


def test_caches_put_together_in_another_order():
  vlm, params, cache, exact = _case()
  parts = [cache.select([3]), cache.select([2, 0]), cache.select([1])]
  restored = cache_lib.concatenate(parts).select([2, 3, 1, 0])
  assert restored.image_hashes == cache.image_hashes
  np.testing.assert_array_equal(_logits(vlm, params, restored), exact)
  # Compressed one by one, in reverse.
  alone = [_compress(vlm, params, _images()[[i]]) for i in (3, 2, 1, 0)]
  restored = cache_lib.concatenate(alone).select([3, 2, 1, 0])
  _check(vlm, params, _answer(vlm, params, restored, ROWS), ROWS)


def test_relocated_caches_give_the_same_logits():
  vlm, params, cache, exact = _case()
  # With so many more tokens before the patches, everything lies further on.
  tokens = dataclasses.replace(
    vlm.tokens, prefix_ids=vlm.tokens.prefix_ids * 572
  )
  further = VisionLanguageModel(vlm.config, tokens)
  assert further.stream.visible[0] == vlm.stream.visible[0] + 571
  error = _difference(_logits(further, params, cache), exact, vlm)
  print(f"\nrelocated: {error:.1e} of the scale")
  assert error <= TOLERANCE
  # Where only the text moves on, each row with an image notices at once.
  moved = _logits(vlm, params, cache, text_shift=1)
  for b, (images, _) in enumerate(ROWS):
    first = _difference(moved[0, b], exact[0, b], vlm)
    assert (first > 10 * TOLERANCE) == (max(images) >= 0)


def test_the_order_of_images_matters():
  vlm, params, cache, _ = _case()
  rows = [((0, 1), (4, 1)), ((1, 0), (4, 1))]
  for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
    talk = Conversation(vlm, params, cache.select(order), rows)
    talk.read(np.array([[5, 11, 7, 2]] * 2), np.array([4, 4]))
    first, second = talk.logits[0]
    assert _difference(second, first, vlm) > 100 * TOLERANCE
    if order == [0, 1, 2, 3]:
      expected = first, second
  # Both ways to swap them agree.
  np.testing.assert_allclose((second, first), expected, rtol=1e-5)
