"""Answers from as few tokens as will do, against models of so many tokens.

The reference asks a model with k = m for each m, in the joint pass, and knows
no cache. Read next: test_engine.py.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests import runs
from tests.inference import engines
from tests.models import builders
from vocojax import assemble
from vocojax.data import prompt
from vocojax.errors import UserError
from vocojax.inference import adaptive
from vocojax.inference.engine import Engine
from vocojax.inference.requests import Request
from vocojax.models.vlm import VisionLanguageModel

K = 5
NUMBERS = (1, 2, 4, 5)
COUNT = 24


def _setup(folder, k=K, bos=False):
  parts = config, _, params, words = engines.setup(folder, k=k)
  if not bos:
    return parts
  compressor = dataclasses.replace(config.model.compressor, text_sees_bos=True)
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, compressor=compressor)
  )
  return config, assemble.make_model(config, words), params, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("adaptive")


def _engine(parts):
  return Engine(
    *parts, slots=4, max_images=2, max_text_length=24, prefill_rows=3
  )


@pytest.fixture(scope="module")
def engine(folder):
  with runs.quick_compile():
    yield _engine(_setup(folder))


@functools.cache
def _asked() -> list[tuple[str, list[np.ndarray]]]:
  """Questions about one or two images."""
  rng = np.random.default_rng(0)
  pictures = engines.pictures(rng, 4)
  words = ["is", "it", "green", "red", "what", "color", "number", "?"]
  return [
    (
      " ".join(rng.choice(words, rng.integers(1, 9))),
      [pictures[i] for i in rng.integers(0, 4, rng.integers(1, 3))],
    )
    for _ in range(COUNT)
  ]


def _requests() -> list[Request]:
  return [
    Request([(text, None)], images, max_new_tokens=5)
    for text, images in _asked()
  ]


def _first_probabilities(folder, m, bos):
  """Of a model with m tokens, from pixels, float64 [COUNT, V]."""
  _, model, params, words = _setup(folder, m, bos)
  ids, segments = np.zeros((2, COUNT, 24), np.int32)
  groups = np.zeros((COUNT, 2), np.int32)
  pixels = np.zeros((COUNT, 2, 64, 64, 3), np.uint8)
  last = []
  for b, (text, images) in enumerate(_asked()):
    tokens, _ = prompt.encode(
      prompt.LAYOUTS["qa_v1"], words, [(text, None)], len(images), "original"
    )
    ids[b, : len(tokens)], segments[b, : len(tokens)] = tokens, 1
    last.append(len(tokens) - 1)
    for f, image in enumerate(images):
      pixels[b, f], groups[b, f] = image, 1
  config = dataclasses.replace(model.config, attention="bias")
  forward = jax.jit(
    VisionLanguageModel(config, model.tokens).text_logits,
    compiler_options=builders.QUICK_COMPILE,
  )
  logits = forward(
    params,
    {
      "images": pixels,
      "image_group_ids": groups,
      "input_ids": ids,
      "segment_ids": segments,
      "text_group_ids": segments,
    },
  )
  logits = np.asarray(logits, np.float64)[np.arange(COUNT), last]
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


@functools.cache
def _distances(folder, bos=False) -> list[np.ndarray]:
  """Total variation from each number to the one before, [COUNT] each."""
  found = [_first_probabilities(folder, m, bos) for m in NUMBERS]
  return [
    # As it is defined: the event is all that became likelier.
    np.where(a > b, a - b, 0).sum(-1)
    for a, b in zip(found[1:], found[:-1], strict=True)
  ]


def _between(distances, share) -> float:
  """About so many are below it, and none so close that rounding decides."""
  middle = int(share * np.size(distances))
  near = np.sort(distances, axis=None)[middle - 4 : middle + 5]
  gap = int(np.argmax(np.diff(near)))
  assert near[gap + 1] - near[gap] > 1e-4
  return float(near[gap : gap + 2].mean())


def _expected(distances, threshold) -> list[int]:
  settled = []
  for own in np.stack(distances, axis=1):
    below = np.flatnonzero(own <= threshold)
    settled.append(NUMBERS[1 + below[0]] if below.size else K)
  return settled


@pytest.mark.parametrize("bos", [False, True])
def test_stops_where_the_answer_no_longer_moves(engine, folder, bos):
  if bos:
    with runs.quick_compile():
      engine = _engine(_setup(folder, bos=True))
  distances = _distances(folder, bos)
  settled = {}
  for share in (0.8, 0.3, 0.5):
    threshold = _between(distances, share)
    expected = settled[share] = _expected(distances, threshold)
    found = adaptive.run(engine, _requests(), threshold)
    assert [answer.num_voco_tokens for answer in found] == expected
  assert {m for expected in settled.values() for m in expected} == {2, 4, 5}
  assert settled[0.8] != settled[0.5] != settled[0.3]
  # The answers are those of a cache cut there.
  cut = [
    dataclasses.replace(r, images=engine.compress(r.images).truncate(m + bos))
    for r, m in zip(_requests(), expected, strict=True)
  ]
  assert [answer.result for answer in found] == engine.run(cut)


def test_extreme_thresholds(engine):
  requests = _requests()[:6]
  for threshold, number in ((0.0, K), (1.0, 2)):
    found = adaptive.run(engine, requests, threshold)
    assert {answer.num_voco_tokens for answer in found} == {number}


def test_caches_that_were_cut_and_text_alone(engine):
  """It asks from no more tokens than there are, of those without images 0."""
  [(text, images), *_] = _asked()
  cache = engine.compress(images)
  requests = [
    Request([(text, None)], shown, max_new_tokens=5)
    for shown in (cache.truncate(3), None, cache.truncate(1), cache)
  ]
  found = adaptive.run(engine, requests, 0.0)
  assert [answer.num_voco_tokens for answer in found] == [3, 0, 1, K]
  assert [answer.result for answer in found] == engine.run(requests)
  assert adaptive.run(engine, [], 0.0) == []


def test_refusals(engine, folder):
  with pytest.raises(UserError) as e:
    adaptive.run(engine, _requests()[:1], 1.5)
  assert (e.value.where, e.value.got) == ("threshold", "1.5")
  full = _engine(engines.setup(folder, "full"))
  with pytest.raises(UserError) as e:
    adaptive.run(full, _requests()[:1], 0.1)
  assert e.value.got == "an engine whose image tokens cannot be cut"
