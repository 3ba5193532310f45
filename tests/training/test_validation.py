"""Validation in training: its numbers by hand, and that it disturbs nothing."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from tests import runs
from tests.fields import raises
from tests.models import builders
from vocojax import assemble
from vocojax.config import load_module, phases
from vocojax.data import pipeline, prompt, tokenizer
from vocojax.data.sources import Record, make_source
from vocojax.errors import CheckpointError, DataError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, loop
from vocojax.training.feed import Feed
from vocojax.training.validation import Validation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("validation")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  return folder


def config_of(folder, **groups):
  (config,) = phases(load_module(str(folder / "one.py")))
  changed = {
    name: dataclasses.replace(getattr(config, name), **values)
    for name, values in groups.items()
  }
  return dataclasses.replace(config, **changed)


ASK = "what color is this ?"
# The number of images of each record, and its conversations.
RECORDS = (
  (
    1,
    [
      [(ASK, "red")],
      [(ASK + " number 1", "it is red")],
      [("is it green ?", "no")],
    ],
  ),
  (1, [[(ASK + " number 2", "green")], [("green ?", "")]]),
  (0, [[("is this red ?", "yes it is")]]),
  (2, [[(ASK, "blue"), ("is it green ?", "no"), ("green ?", "it is blue")]]),
  (0, [[("is it ?", "")]]),
  (1, [[("is " * 60, "no")]]),  # too long
  (9, [[(ASK, "red")]]),  # an image that is none
  (0, [[("color ?", "blue yellow")], [("is it ?", "no it is red")]]),
  (1, [[("is it red", "yes")]]),  # beyond max_records
)


def record(folder, i):
  count, conversations = RECORDS[i]
  paths = tuple(folder / f"{i}{j}.png" for j in range(min(count, 2)))
  for j, path in enumerate(paths):
    shutil.copy(folder / f"{i + 8 * j}.png", path)
    if count == 9:
      path.write_bytes(b"no image")
  return Record(f"r{i}", paths, tuple(map(tuple, conversations)))


def by_hand(model, params, words, data, records, longest):
  """One conversation at a time, in one joint pass under the mask."""
  compressor = dataclasses.replace(
    model.config.compressor, train_num_voco_tokens="fixed"
  )
  exact = dataclasses.replace(
    model.config, attention="bias", compressor=compressor
  )
  joint = VisionLanguageModel(exact, model.tokens)
  logits_of = jax.jit(
    joint.text_logits, compiler_options=builders.QUICK_COMPILE
  )
  tokens = right = loss = answers = right_answers = 0
  for one in records:
    for turns in one.conversations:
      ids, labels = prompt.encode(
        prompt.LAYOUTS["qa_v1"], words, turns, len(one.images), "none"
      )
      if len(ids) > longest:
        continue
      images = np.zeros((1, 2, 64, 64, 3), np.uint8)
      pixels = pipeline.load_images(one, 64, data)
      images[0, : len(pixels)] = pixels
      row = np.zeros((1, 48), np.int32)
      row[0, : len(ids)] = ids
      real = (np.arange(48) < len(ids)).astype(np.int32)[None]
      logits = logits_of(
        params,
        {
          "images": images,
          "image_group_ids": (np.arange(2) < len(pixels)).astype("i4")[None],
          "input_ids": row,
          "segment_ids": real,
          "text_group_ids": real * bool(len(pixels)),
        },
      )
      logits = np.asarray(logits[0], np.float64)
      good = True
      for at, label in enumerate(labels[1:]):
        if label == prompt.IGNORE:
          continue
        tokens += 1
        loss += np.log(np.exp(logits[at]).sum()) - logits[at, label]
        hit = np.argmax(logits[at]) == label
        right += hit
        good &= hit
      answers += 1
      right_answers += good
  return loss / tokens, right / tokens, right_answers / answers


@pytest.mark.parametrize(
  ("data", "model", "sizes"),
  [
    ({"conversations_per_record": 2, "max_text_length": 24}, {}, ()),
    ({"batching": "pack", "max_images": 3, "source": "easy_vqa"}, {}, ()),
    (
      {"batching": "slots", "conversations_per_record": 2},
      {"name": "voco_causal"},
      (2, 2, 2),
    ),
    ({"source": "easy_vqa"}, {"train_num_voco_tokens": "elastic"}, (1, 2, 1)),
  ],
)
def test_numbers_by_hand(folder, data, model, sizes, caplog):
  """However rows are made, on any mesh, with batches that are not full."""
  data = {"max_text_length": 48, "max_images": 2} | data
  config = config_of(
    folder,
    data=data | {"batch_size": 8, "on_bad_record": "skip"},
    training={"accumulate": 2},
    evaluation={"max_records": 8, "every": 1},
  )
  config = assemble.with_compressor(config, model.get("name", "voco"), 3)
  compressor = dataclasses.replace(config.model.compressor, **model)
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, compressor=compressor)
  )
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  vlm = assemble.make_model(config, words)
  params = builders.init(vlm, seed=21)  # it says </s> at once, now and then
  mesh = runs.mesh(*sizes)
  shapes = loop.abstract_params(vlm, mesh)
  records = [record(folder, i) for i in range(len(RECORDS))]
  with runs.quick_compile(), jax.set_mesh(mesh):
    placed = jax.tree.map(
      lambda x, s: jax.device_put(x, s.sharding), params, shapes
    )
    validation = Validation(config, vlm, words, records, shapes, mesh)
    found = validation(placed)
    assert validation(placed) == found
  good = [records[i] for i in (0, 1, 2, 3, 4, 5, 7)]
  longest = 48 // 2 if "conversations_per_record" in data else 48
  loss, right, right_answers = by_hand(
    vlm, params, words, config.data, good, longest
  )
  assert 0 < right < 1 and 0 < right_answers < 1 < loss
  np.testing.assert_allclose(found["validation_loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(found["validation_token_accuracy"], right)
  np.testing.assert_allclose(found["validation_answer_accuracy"], right_answers)
  # The long text and the image that is none, each said once.
  assert len(caplog.records) == 2


def test_a_bad_held_out_record_stops_the_run(folder):
  config = config_of(folder, evaluation={"every": 1})
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  vlm = assemble.make_model(config, words)
  mesh = runs.mesh()
  shapes = loop.abstract_params(vlm, mesh)
  records = [record(folder, 5)]
  validation = Validation(config, vlm, words, records, shapes, mesh)
  with raises(DataError, "validation: record r5", "tokens"):
    validation(builders.init(vlm))


# In training a colour ends an answer. So the loss of held-out ones with two
# falls while words are learned, and then rises.
def contradicting(folder: pathlib.Path) -> pathlib.Path:
  entries = [runs.entry(i) for i in range(16)]
  for i in range(16, 24):
    entries.append(runs.entry(i))
    entries[i]["conversations"][1]["value"] = "red blue"
  path = folder / "contradicting.json"
  path.write_text(json.dumps(entries))
  return path


def run_config(folder, **evaluation):
  return config_of(
    folder,
    data={
      "path": str(contradicting(folder)),
      "train_split": "train[:16]",
      "flip_images": True,
    },
    training={"steps": 13, "checkpoint_every": 5, "keep_checkpoints": 1},
    optimizer={"learning_rate": 0.05, "schedule": "constant"},
    evaluation={"split": "train[16:]"} | evaluation,
  )


def run(config, where):
  phase = runs.phase(config, where, (2, 2, 1))
  with runs.quick_compile():
    return loop.run(phase)


@pytest.fixture(scope="module")
def validated(folder):
  """Parameters and workdir of a run that was validated."""
  return run(run_config(folder, every=2), folder / "with"), folder / "with"


@pytest.fixture(scope="module")
def plain(folder):
  """The same of a run that was not."""
  return run(run_config(folder), folder / "without"), folder / "without"


def assert_bit_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_it_disturbs_nothing(validated, plain):
  (params, where), (expected, without) = validated, plain
  assert_bit_equal(params, expected)
  lines = [x for x in runs.metrics(where) if "loss" in x]
  assert lines == runs.metrics(without)


def test_the_best_is_kept_by_name(validated, plain):
  (_, where), (_, without) = validated, plain
  lines = [x for x in runs.metrics(where) if "validation_loss" in x]
  assert [x["step"] for x in lines] == [2, 4, 6, 8, 10, 12, 13]
  best = min(lines, key=lambda x: x["validation_loss"])
  assert best["step"] < 10  # so that others were written after it
  kept = sorted(int(p.name) for p in (where / "checkpoints").iterdir())
  assert kept == [best["step"], 13]
  loaded = checkpoint.load(str(where / "best"))
  assert loaded.step == best["step"]
  # Its weights are those that had this loss.
  config = loaded.config
  model, params = assemble.load_model(loaded, config)
  source = make_source(config, "train[16:]")
  records = [source[i] for i in range(8)]
  loss, *_ = by_hand(model, params, loaded.tokenizer, config.data, records, 24)
  np.testing.assert_allclose(best["validation_loss"], loss, rtol=1e-5)
  with raises(CheckpointError, "without/best", "a run without validation"):
    checkpoint.load(str(without / "best"))


@pytest.mark.parametrize("stops", [4, 7])
def test_a_stopped_run_has_the_same_best(folder, validated, monkeypatch, stops):
  """Stopped where it is to be validated it saves first, and does so later."""
  params, where = validated
  config, there = run_config(folder, every=2), folder / f"stopped{stops}"
  steps, take = itertools.count(1), Feed.__next__

  def take_and_stop(feed):
    if next(steps) == stops:
      os.kill(os.getpid(), signal.SIGTERM)
    return take(feed)

  with monkeypatch.context() as patch, pytest.raises(loop.Stopped):
    patch.setattr(Feed, "__next__", take_and_stop)
    run(config, there)
  assert [x["step"] for x in runs.metrics(there) if "validation_loss" in x] == (
    [2] if stops == 4 else [2, 4, 6]
  )
  phase = dataclasses.replace(
    runs.phase(config, folder / f"unused{stops}", (2, 2, 1)), folder=there
  )
  with runs.quick_compile():
    assert_bit_equal(loop.run(phase), params)
  assert runs.metrics(there) == runs.metrics(where)
  _, step = checkpoint.find(str(there / "best"))
  assert step == checkpoint.find(str(where / "best"))[1]
