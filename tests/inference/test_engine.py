"""The engine against itself alone, and against the joint pass."""

import collections
import dataclasses
import io
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.inference import engines
from tests.models import builders
from vocojax.data import prompt
from vocojax.errors import DataError, UserError
from vocojax.inference.engine import Engine
from vocojax.inference.requests import Request
from vocojax.inference.sampling import Sampling, SamplingRows, sample
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import sharding

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def engine(folder):
  with runs.quick_compile():
    engine = engines.engine(folder)
    engine.warm_up()
    yield engine


@pytest.fixture(scope="module")
def cache(engine):
  return engine.compress(engines.pictures(np.random.default_rng(1), 4))


def question(text: str = "is it green ?", images=None, **fields) -> Request:
  return Request([(text, None)], images, **fields)


def test_a_busy_engine_answers_as_if_alone(engine, cache):
  rng = np.random.default_rng(2)
  requests = engines.random_requests(rng, engine, cache, 200)
  alone = [engine.run([request])[0] for request in requests]
  for _ in range(2):
    order = rng.permutation(len(requests))
    busy = list(engine.generate(requests[i] for i in order))
    found = {int(order[index]): result for index, result in busy}
    assert [found[i] for i in range(len(requests))] == alone
    # Slots changed hands out of order.
    assert [index for index, _ in busy] != sorted(index for index, _ in busy)
  reasons = collections.Counter(result.finish_reason for result in alone)
  assert min(reasons[x] for x in ("eos", "stop", "length")) >= 10, reasons
  assert len({result.text for result in alone}) > 100
  sampled = [
    (request, result)
    for request, result in zip(requests, alone, strict=True)
    if request.sampling.temperature and len(result.token_ids) > 4
  ]
  changed = [
    dataclasses.replace(
      request,
      sampling=dataclasses.replace(
        request.sampling, seed=request.sampling.seed ^ 1
      ),
    )
    for request, _ in sampled
  ]
  other = engine.run(changed)
  differ = [a != b for a, (_, b) in zip(other, sampled, strict=True)]
  assert np.mean(differ) > 0.4  # top_k = 1 leaves no choice


def joint_tokens(model, params, words, images, requests, results):
  """What the joint pass would choose at every token of the answers.

  One pass over pixels, prompts and answers under the two-stage mask.
  """
  B, F, T = len(requests), engines.MAX_IMAGES, engines.TEXT_LENGTH + 1
  ids, segments = np.zeros((2, B, T), np.int32)
  groups = np.zeros((B, F), np.int32)
  shape = (engines.IMAGE_SIZE, engines.IMAGE_SIZE, 3)
  pixels = np.zeros((B, F, *shape), np.uint8)
  for b, (request, result) in enumerate(zip(requests, results, strict=True)):
    tokens, _ = prompt.encode(
      prompt.LAYOUTS["qa_v1"], words, request.turns, len(images[b]), "original"
    )
    assert len(tokens) == result.num_prompt_tokens
    tokens += result.token_ids
    ids[b, : len(tokens)], segments[b, : len(tokens)] = tokens, 1
    for f, image in enumerate(images[b]):
      pixels[b, f], groups[b, f] = image, 1
  bias = VisionLanguageModel(
    dataclasses.replace(model.config, attention="bias"), model.tokens
  )
  batch = {
    "images": pixels,
    "image_group_ids": groups,
    "input_ids": ids,
    "segment_ids": segments,
    "text_group_ids": segments * groups[:, :1],
  }
  forward = jax.jit(bias.text_logits, compiler_options=builders.QUICK_COMPILE)
  logits = np.asarray(forward(params, batch))
  # Every token of every answer is a row of `sample`.
  where = [
    (b, count)
    for b, result in enumerate(results)
    for count in range(len(result.token_ids))
  ]
  rows = SamplingRows.greedy(len(where))
  for row, (b, count) in enumerate(where):
    rows.start(row, requests[b].sampling)
    rows.count[row] = count
  read = [results[b].num_prompt_tokens - 1 + count for b, count in where]
  logits = jnp.asarray(logits[[b for b, _ in where], read])
  chosen = jax.jit(sample)(logits, rows).tolist()
  return [
    tuple(
      token for token, (row, _) in zip(chosen, where, strict=True) if row == b
    )
    for b in range(B)
  ]


@pytest.mark.parametrize("k", [3, 2])
def test_tokens_are_those_of_the_joint_pass(engine, cache, folder, k):
  """Greedy and sampled; k = 2 by cutting the cache of k = 3."""
  rng = np.random.default_rng(k)
  pictures = engines.pictures(np.random.default_rng(1), 4)  # those of `cache`
  _, model, params, words = engines.setup(folder, k=k)
  requests, images = [], []
  for request in engines.random_requests(rng, engine, cache, 24):
    index = rng.integers(0, 4, rng.integers(0, 3)).tolist()
    images.append([pictures[i] for i in index])
    shown = cache.select(index).truncate(k) if index else None
    requests.append(dataclasses.replace(request, images=shown, stop=()))
  results = engine.run(requests)
  assert sum(len(result.token_ids) for result in results) > 200
  assert [result.token_ids for result in results] == joint_tokens(
    model, params, words, images, requests, results
  )


def test_1000_requests_compile_nothing(engine, cache):
  engine.warm_up()
  compiled = engine.num_compilations
  assert compiled == 1 + 4 + 1  # compress; prompts of 16, 32, 64, 80; decode
  rng = np.random.default_rng(4)
  requests = engines.random_requests(rng, engine, cache, 1000)
  requests = [dataclasses.replace(r, max_new_tokens=4) for r in requests]
  events = []

  def listen(name, *_, **__):
    events.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    assert len(engine.run(requests)) == 1000
    jax.jit(lambda x: x + 1)(
      np.zeros(17)
    )  # so that the listener is seen to work
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert engine.num_compilations == compiled
  assert events.count(COMPILED) == 1


def test_a_recompilation_is_counted(folder):
  with runs.quick_compile():
    engine = engines.engine(folder, slots=1, prefill_rows=1)
    counts = [engine.num_compilations]
    for text in ("is it green ?", "red", "is it " * 12, "red"):
      engine.ask(text, max_new_tokens=2)
      counts.append(engine.num_compilations)
  assert counts == [0, 2, 2, 3, 3]


def test_slots_are_refilled_while_others_go_on(engine):
  taken, events = [], []

  def requests():
    for i in range(12):
      taken.append(i)
      length = 60 if i == 0 else 5
      yield question(
        max_new_tokens=length,
        sampling=Sampling(1.0, seed=i),
      )

  for index, result in engine.generate(requests()):
    events.append((index, len(result.token_ids), len(taken)))
  by_index = {index: (length, seen) for index, length, seen in events}
  # While the first was answered, the others took turns in what was left.
  assert by_index[0][0] > 20
  assert events[-1][0] == 0
  assert events[0][2] <= engine.slots + 1  # taken only when there is a slot


def test_images_are_compressed_the_same_in_any_batch(engine):
  pictures = engines.pictures(np.random.default_rng(5), 5)
  together = engine.compress(pictures)
  for i, picture in enumerate(pictures):
    alone = engine.compress(picture)
    for a, b in zip(
      (alone.keys, alone.values), (together.keys, together.values), strict=True
    ):
      np.testing.assert_array_equal(a[:, 0], b[:, i])
    assert alone.image_hashes[0] == together.image_hashes[i]
  assert np.abs(together.keys[:, 0] - together.keys[:, 1]).max() > 0.1


def test_images_and_their_cache_give_the_same(engine, folder):
  path = folder / "1.png"
  forms = [path, str(path), path.read_bytes(), [path], engine.compress(path)]
  answers = {engine.ask("what color is this ?", form) for form in forms}
  assert len(answers) == 1
  two = engine.compress([path, folder / "2.png"])
  assert engine.run([question(images=two)]) == engine.run(
    [question(images=[path, folder / "2.png"])]
  )
  assert engine.run([question(images=[])]) == engine.run([question()])


def test_numbers_of_tokens(engine, cache):
  request = Request(
    [("is it green ?", "no"), ("red ?", None)],
    cache.select([0, 1]).truncate(2),
    max_new_tokens=3,
    sampling=Sampling(1.0, seed=1),
  )
  [result] = engine.run([request])
  # Two questions of 4 and 2 words, an answer, `</s>`.
  assert (result.num_prompt_tokens, result.num_image_tokens) == (8, 4)


def test_a_full_row_ends_an_answer(engine):
  request = question("red " * 75, max_new_tokens=70, sampling=Sampling(2.0))
  for seed in range(20):
    sampling = Sampling(2.0, seed=seed)
    [result] = engine.run([dataclasses.replace(request, sampling=sampling)])
    if result.finish_reason == "length":
      # The last token needs no slot, since it is never read.
      used = result.num_prompt_tokens + len(result.token_ids) - 1
      assert used == engines.TEXT_LENGTH
      break
  else:
    raise AssertionError("all answers ended early")


def test_streaming_and_stop_strings(engine):
  for seed in range(30):
    whole = question(max_new_tokens=20, sampling=Sampling(1.5, seed=seed))
    [result] = engine.run([whole])
    pieces = []
    streamed = dataclasses.replace(whole, on_text=pieces.append)
    assert engine.run([streamed]) == [result]
    assert "".join(pieces) == result.text
    words = result.text.split()
    if len(words) < 4:
      continue
    stop = f"{words[2]} {words[3]}"  # spans two tokens
    pieces.clear()
    [cut] = engine.run([dataclasses.replace(streamed, stop=(stop,))])
    assert cut.text == result.text[: result.text.index(stop)].strip()
    assert "".join(pieces) == cut.text
    assert cut.finish_reason == "stop"
    length = len(cut.token_ids)
    assert cut.token_ids == result.token_ids[:length]
    assert length <= len(result.token_ids)


def test_stop_tokens(engine):
  request = question(max_new_tokens=20, sampling=Sampling(1.5, seed=3))
  [result] = engine.run([request])
  token = result.token_ids[4]
  stopping = dataclasses.replace(request, stop_token_ids=(token,))
  [cut] = engine.run([stopping])
  length = result.token_ids.index(token) + 1
  assert cut.token_ids == result.token_ids[:length]
  assert cut.finish_reason == "stop"
  text = engine.tokenizer.decode(cut.token_ids[:-1], skip_special_tokens=True)
  assert cut.text == text


def test_an_abandoned_generate_leaves_a_clean_engine(engine):
  requests = [
    question(max_new_tokens=9, sampling=Sampling(1.0, seed=i)) for i in range(9)
  ]
  expected = engine.run(requests)
  running = engine.generate(requests)
  next(running)
  with pytest.raises(RuntimeError, match="already generating"):
    engine.run(requests)
  running.close()
  assert engine.run(requests) == expected


@pytest.mark.parametrize(
  "compressor, tokens",
  [("full", 17), ("avgpool", 5), ("voco_causal", 16 + 1 + 4)],
)
def test_other_compressors(folder, compressor, tokens):
  """Their cache gives what a single pass over everything gives."""
  with runs.quick_compile():
    config, model, params, words = engines.setup(folder, compressor, 4)
    engine = Engine(config, model, params, words, slots=2, max_text_length=16)
    assert engine.num_image_tokens == tokens
    [picture] = engines.pictures(np.random.default_rng(6), 1)
    requests = [question(images=picture, max_new_tokens=n) for n in (6, 3, 8)]
    results = engine.run(requests)
  images = [[picture]] * len(requests)
  assert [result.token_ids for result in results] == joint_tokens(
    model, params, words, images, requests, results
  )


def test_a_mesh_gives_the_same(engine, folder):
  config, model, params, words = engines.setup(folder)
  requests = [
    question(
      images=engines.pictures(np.random.default_rng(n), 1), max_new_tokens=n
    )
    for n in (5, 9, 3, 7, 4)
  ]
  mesh = runs.mesh(2, 2, 2)
  params = jax.device_put(params, sharding.param_shardings(params, mesh))
  with runs.quick_compile():
    sharded = Engine(config, model, params, words, slots=4, max_text_length=16)
    assert sharded.run(requests) == engine.run(requests)
  assert sharded.num_compilations == 3
  keys = sharded._cache.keys[0]
  assert keys.addressable_shards[0].data.size == keys.size / 8


@pytest.mark.parametrize(
  "fields, where, got",
  [
    ({"turns": []}, "turns", "none"),
    ({"turns": [(" \n", None)]}, "question", "an empty text"),
    ({"turns": [("a", "b"), ("", None)]}, "question 1", "an empty text"),
    ({"turns": [("a", None), ("b", None)]}, "answer 0", "None"),
    ({"turns": [("a", "b")]}, "answer 0", "'b'"),
    ({"turns": [("red " * 81, None)]}, "prompt", "82 tokens"),
    ({"turns": [("\ud83d ?", None)]}, "question", "half of a surrogate pair"),
    (
      {"turns": [("a", "\udc00"), ("b", None)]},
      "answer 0",
      "half of a surrogate pair",
    ),
    ({"turns": [("<image>\na", None)]}, "question", "1 <image>"),
    ({"max_new_tokens": 0}, "max_new_tokens", "0"),
    ({"stop_token_ids": (20,)}, "stop_token_ids", "20"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids", "-1"),
    ({"stop": ("a", "")}, "stop", "an empty text"),
  ],
)
def test_errors_of_requests(engine, fields, where, got):
  """Named by their numbers where there are several."""
  request = Request(**({"turns": [("is it green ?", None)]} | fields))
  for use, before in (
    (lambda: engine.check(request), ""),
    (lambda: engine.run([question(), request]), "request 1: "),
    (lambda: engine.foretell([request]), "request 0: "),
  ):
    with pytest.raises(UserError) as e:
      use()
    assert e.value.where == before + where
    assert e.value.got.startswith(got)


def test_markers_are_as_many_as_images_or_none(engine, cache):
  """One in each of several turns, or in answers, which are no questions."""
  text, two = "<image>", cache.select([0, 1])
  for turns in (
    [("a", None)],
    [(f"{text} a {text}", None)],
    [(f"{text} a", f"b {text}"), (f"{text} c", None)],
    [("a", f"b {text}"), ("c", None)],
  ):
    engine.check(Request(turns, two))
  for turns, got in (
    ([(text, None)], "1 <image>"),
    ([(f"{text}a{text}", "b"), (text, None)], "3 <image>"),
  ):
    with pytest.raises(UserError) as e:
      engine.check(Request(turns, two))
    assert (e.value.where, e.value.got) == ("question", got)


def test_errors_of_images(engine, cache, folder):
  more = dataclasses.replace(
    cache,
    keys=np.repeat(cache.keys, 2, axis=2),
    values=np.repeat(cache.values, 2, axis=2),
  )
  origin = dataclasses.replace(cache.origin, layout="other/1")
  foreign = dataclasses.replace(cache, origin=origin)
  for images, where, got in (
    (cache.select([0, 1, 2]), "images", "3"),
    (more.select([0]), "images", "6 tokens each"),
    (foreign, "images", "images compressed by model "),
    (folder / "nothing.png", f"{folder}/nothing.png", "no such file"),
    (folder / "data.json", f"{folder}/data.json", "a file that begins"),
    (pathlib.Path("~nosuchuser/a.png"), "~nosuchuser/a.png", "a user that "),
    ("/dev/zero", "/dev/zero", "a device"),
    ("a\0.png", "a\\x00.png", ""),
    (b"", "image", "an empty file"),
    (np.zeros((8, 8), np.uint8), "image", "an array of uint8 [8, 8]"),
    (np.zeros((0, 8, 3), np.uint8), "image", "8 x 0 pixels"),
    ([], "images", "none"),
  ):
    with pytest.raises(UserError) as e:
      engine.check(question(images=images))
    assert e.value.where == where
    assert e.value.got.startswith(got)


def test_an_opened_image_that_is_broken(engine, folder):
  data = (folder / "0.png").read_bytes()
  opened = Image.open(io.BytesIO(data[: len(data) // 2]))
  with pytest.raises(DataError) as e:
    engine.compress(opened)
  assert e.value.where == "image"


def test_errors_of_sizes(folder):
  with pytest.raises(UserError) as e:
    engines.engine(folder, slots=0)
  error = e.value
  assert (error.where, error.got) == ("slots", "0")


def test_the_package_is_light():
  code = "import sys, vocojax; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True)
