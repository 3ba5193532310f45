"""Rows packed or in slots equal others in the real model: losses and gradients.

And a run of the trainer on packed rows. Read next: `test_packing.py`.
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.data.test_images import encoded
from tests.data.test_packing import PACK
from tests.data.test_pipeline import PROMPT, take
from tests.models import builders
from vocojax.config import load_module, phases
from vocojax.data import pipeline, rows, sources, tokenizer
from vocojax.training import checkpoint, loop


class Records(list):
  """A source; each record has an answer of its own, 'number'."""


@pytest.fixture(scope="module")
def words():
  return tokenizer.build_word_level(f"number {i} ?" for i in range(20))


@functools.cache
def _records():
  """Of 0 to 2 images and one or two conversations with one or two turns."""
  rng = np.random.default_rng(0)
  records = Records()
  for i in range(14):
    images = []
    for _ in range((1, 1, 0, 2, 1)[i % 5]):
      pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
      images.append(encoded(Image.fromarray(pixels), format="PNG"))
    turns = (("number ?", f"{i} 1 2"), ("?", "3 " * (i % 4) + "4"))
    conversations = [turns[: 1 + i % 2]]
    if i % 4 == 1:
      conversations.append((("3 number ?", f"{i} 7"),))
    records.append(sources.Record(str(i), tuple(images), tuple(conversations)))
  return records


@pytest.mark.parametrize(("batching", "length"), [("pack", 40), ("slots", 96)])
def test_rows_equal_those_of_one_record(words, batching, length):
  """Loss of every conversation and gradients of all, to float32 rounding."""
  data = dataclasses.replace(
    PACK,
    source="easy_vqa",
    batching=batching,
    max_text_length=length,
    max_images=4,
    conversations_per_record=2,
    pack_lookahead=14,
  )
  vlm = builders.model({"compressor.num_voco_tokens": 3})
  params = builders.init(vlm)
  encoder = rows.Encoder(words, PROMPT, data, 8)
  source = _records()
  num_rows = int(pipeline.rows_per_epoch(source, encoder, data, 0))
  assert num_rows == 14 if batching == "slots" else num_rows <= 5
  dataset = pipeline.train_dataset(source, encoder, data, 0, 0, 1, num_rows)
  packed = take(dataset, 1)[0].arrays
  single = dataclasses.replace(data, batching="shuffle")
  dataset = pipeline.train_dataset(
    source, rows.Encoder(words, PROMPT, single, 8), single, 1, 0, 1, 14
  )
  unpacked = take(dataset, 1)[0].arrays

  def run(vlm, batch):
    def total(params, batch):
      logits = vlm.text_logits(params, batch)
      return builders.loss_of(logits, batch)[0], logits

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    compiled = grad.lower(params, batch).compile(builders.QUICK_COMPILE)
    (loss, logits), grads = compiled(params, batch)
    return loss, logits, grads

  def by_conversation(batch, logits):
    """Loss by what the conversation says, in numpy."""
    x = np.asarray(logits, np.float64)
    x -= x.max(-1, keepdims=True)
    log = x - np.log(np.exp(x).sum(-1, keepdims=True))
    result = {}
    for b, segments in enumerate(batch["segment_ids"]):
      for segment in range(1, segments.max() + 1):
        where = np.flatnonzero(segments == segment)
        ids = batch["input_ids"][b][where]
        labels = batch["labels"][b][where]
        value = -sum(
          log[b, at, label]
          for at, label in zip(where, labels[1:], strict=False)
          if label != -100
        )
        assert tuple(ids) not in result
        result[tuple(ids)] = value
    return result

  in_slots = dataclasses.replace(vlm, text_slots=data.text_slots)
  one, other = run(in_slots, packed), run(vlm, unpacked)
  found = by_conversation(packed, one[1])
  want = by_conversation(unpacked, other[1])
  assert found.keys() == want.keys() and len(found) == 18
  gap = max(abs(found[key] / want[key] - 1) for key in want)
  print(f"\n{num_rows} rows for 14; losses differ by {gap:.1e}", end=" ")
  assert gap < 1e-5
  np.testing.assert_allclose(one[0], sum(want.values()), rtol=1e-5)
  mine, theirs = (jax.tree.leaves(x[2]) for x in (one, other))
  # Biases of keys have no gradient but rounding.
  floor = 1e-2 * max(float(np.abs(x).max()) for x in theirs)
  worst = max(
    float(np.abs(a - b).max()) / max(float(np.abs(b).max()), floor)
    for a, b in zip(mine, theirs, strict=True)
  )
  print(f"gradients by {worst:.1e}")
  assert worst < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packed")
  runs.write_data(folder)
  tail = """\
  c.data.update(batching="pack", pack_lookahead=8, max_images=3)
  c.data.update(max_text_length=40, batch_size=2)
  c.training.update(
    steps=0, epochs=1.5, log_every=2, checkpoint_every=3, keep_checkpoints=9
  )
  return c
"""
  runs.write_config(folder, "pack.py", tail)
  return folder


def test_a_run_on_packed_rows_goes_on_bit_for_bit(folder):
  """1.5 epochs; stopped after step 3 and not, the end is the same."""
  (config,) = phases(load_module(str(folder / "pack.py")))
  with runs.quick_compile():
    phase = runs.phase(config, folder / "whole")
    whole = loop.run(phase)
    encoder = phase.encoder
    per_epoch = pipeline.rows_per_epoch(
      phase.source, encoder, config.data, config.seed
    )
    assert 8 <= per_epoch < runs.NUM_RECORDS
    assert phase.steps == round(1.5 * per_epoch / 2)
    part = runs.phase(config, folder / "part")
    for step in (folder / "whole" / "checkpoints").iterdir():
      if step.name == "3":
        shutil.copytree(step, folder / "part" / "checkpoints" / "3")
    shutil.copy(folder / "whole" / "metrics.jsonl", folder / "part")
    resumed = loop.run(part)
  lines = runs.metrics(folder / "whole")
  assert lines == runs.metrics(folder / "part")
  states = []
  for name in ("whole", "part"):
    last = folder / name / "checkpoints" / str(phase.steps)
    states.append(checkpoint.read_json(last, "data"))
  assert states[0] == states[1] and "waiting" in states[0]["shares"][0]
  for a, b in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  # The first line is that of the first two steps.
  dataset = pipeline.train_dataset(
    phase.source, encoder, config.data, config.seed, 0, 1, 2
  )
  first = take(dataset, 2)
  text = sum(np.count_nonzero(b.arrays["segment_ids"]) for b in first)
  images = sum(np.count_nonzero(b.arrays["image_group_ids"]) for b in first)
  assert lines[0]["text_fill"] == pytest.approx(text / (4 * 40))
  assert lines[0]["image_fill"] == pytest.approx(images / (4 * 3))
  raw = (folder / "whole" / "metrics.jsonl").read_text().splitlines()[0]
  assert json.loads(raw)["images_per_second"] > 0
