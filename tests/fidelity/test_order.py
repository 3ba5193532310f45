"""The order of records against LLaVA's `group_by_modality_length`.

A rewrite of the rule of llava_trainer.py (commit c121f04), record by record,
that draws from numpy where the original draws from torch.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from configs import voco_1tok
from tests.data import test_grouping
from tests.data.test_packing import source_of
from tests.data.test_pipeline import take
from vocojax import config as config_lib
from vocojax.data import grouping, pipeline, tokenizer


def chunks_of(batch, words, num_chunks):
  """As in LLaVA: each record of a sorted batch to the chunk of least words."""
  if len(batch) % num_chunks:
    return [batch[c::num_chunks] for c in range(num_chunks)]
  room = len(batch) // num_chunks
  chunks = [[] for _ in range(num_chunks)]
  for record in batch:
    open_chunks = [c for c in chunks if len(c) < room]
    best = open_chunks[0]
    for chunk in open_chunks:
      if sum(words[r] for r in chunk) < sum(words[r] for r in best):
        best = chunk
    best.append(record)
  return chunks


def expected(signed, batch_size, num_chunks, rng):
  """The rule of the original, record by record, in lists."""
  words = {i: abs(n) for i, n in enumerate(signed)}
  cut = []
  for sign in (1, -1):
    records = [i for i, n in enumerate(signed) if n * sign > 0]
    drawn = [records[i] for i in rng.permutation(len(records))]
    batches = []
    while drawn:
      batch, drawn = drawn[:batch_size], drawn[batch_size:]
      batch = sorted(batch, key=lambda r: words[r], reverse=True)
      chunks = chunks_of(batch, words, num_chunks)
      batches.append([r for chunk in chunks for r in chunk])
    cut.append(batches)
  with_images, without = cut
  if not (with_images and without):
    return [r for batch in with_images + without for r in batch]
  last = sorted(with_images.pop() + without.pop())
  batches = with_images + without
  order = [batches[i] for i in rng.permutation(len(batches))] + [last]
  return [r for batch in order for r in batch]


@pytest.mark.parametrize(
  ("share", "count"), [(0.2, 203), (0.5, 64), (0, 50), (1, 50), (0.3, 7)]
)
@pytest.mark.parametrize(("size", "chunks"), [(8, 4), (8, 3), (16, 16), (4, 1)])
def test_order(share, count, size, chunks):
  draw = np.random.default_rng(count)
  signed = draw.integers(1, 12, count)  # with many equal lengths
  signed = np.where(draw.random(count) < share, -signed, signed)
  found = grouping.order(signed, size, chunks, np.random.default_rng(5))
  want = expected(signed.tolist(), size, chunks, np.random.default_rng(5))
  assert found.tolist() == want
  assert sorted(want) == list(range(count))


def test_the_recipe_reads_in_llavas_order(tmp_path):
  """Two epochs from JSON to batches: 128 rows, 16 micro-batches of 8."""
  Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
  rng = np.random.default_rng(0)
  entries, signed = [], []
  for i in range(300):
    image = {} if rng.random() < 0.06 else {"image": "0.png"}
    question = "number ? " * int(rng.integers(1, 20))
    turns = [("human", question), ("gpt", str(i))]
    turns = [{"from": who, "value": text} for who, text in turns]
    entries.append({"id": f"r{i}", "conversations": turns} | image)
    length = len(question.split()) + 1
    signed.append(length if image else -length)
  [recipe] = config_lib.phases(voco_1tok.get_config())
  data = dataclasses.replace(recipe.data, max_text_length=64)
  words = tokenizer.build_word_level(f"number {i} ?" for i in range(300))
  dataset = test_grouping.batches(
    source_of(tmp_path, "data", entries), words, data, recipe.seed, size=128
  )
  found = [test_grouping.numbers(b, words) for b in take(dataset, 6)]
  seed = pipeline._seed32(recipe.seed)
  for epoch in range(2):
    rng = np.random.default_rng([seed, epoch])
    want = expected(signed, 128, 16, rng)
    batches = found[3 * epoch : 3 * epoch + 3]
    assert list(itertools.chain(*batches))[:300] == want
  # A micro-batch of a whole batch has about as many words as any other.
  rows = [abs(signed[i]) for i in found[0]]
  sums = np.reshape(rows, (16, 8)).sum(axis=1)
  assert np.ptp(sums) < 0.1 * sums.mean()
