"""How many VoCo tokens text sees of each image, drawn with the record.

Read next: `test_packing.py`, whose records these are.
"""

import collections
import dataclasses

import numpy as np
import pytest

from tests.data import test_packing
from tests.data.test_packing import PACK
from tests.data.test_pipeline import PROMPT, take
from vocojax.data import pipeline, rows

folder, words, source = (
  getattr(test_packing, name) for name in ("folder", "words", "source")
)
BUDGETS = (1, 2, 4, 5)


def _dataset(source, words, budgets=BUDGETS, shard=(0, 1), size=4, **changes):
  data = dataclasses.replace(PACK, **changes)
  encoder = rows.Encoder(words, PROMPT, data, 8, budgets)
  return pipeline.train_dataset(source, encoder, data, 0, *shard, size)


def _arrays(dataset, count=6):
  return [batch.arrays for batch in take(dataset, count)]


@pytest.mark.parametrize("batching", ["pack", "shuffle"])
def test_images_of_a_record_share_a_number(source, words, batching):
  drawn = collections.Counter()
  for x in _arrays(_dataset(source, words, batching=batching), 12):
    numbers, groups = x["num_voco_tokens"], x["image_group_ids"]
    assert numbers.dtype == np.int32 and not numbers[groups == 0].any()
    for row, ids in zip(numbers, groups, strict=True):
      for group in set(ids) - {0}:
        (number,) = set(row[ids == group].tolist())
        drawn[number] += 1
  assert set(drawn) == set(BUDGETS)


def test_all_else_is_as_without_it(source, words):
  """Flips and the choice of conversations too, which are drawn before it."""
  data = dataclasses.replace(PACK, flip_images=True)
  fixed, elastic = (
    rows.Encoder(words, PROMPT, data, 8, budgets) for budgets in ((), BUDGETS)
  )
  for i in range(len(source)):
    one, other = (
      encoder.prepare(source[i], np.random.default_rng(i))
      for encoder in (fixed, elastic)
    )
    assert one == dataclasses.replace(other, num_voco_tokens=0)
    row, drawn = (
      e.lay([(p, e.load(p))]) for e, p in ((fixed, one), (elastic, other))
    )
    assert row.keys() == drawn.keys() - {"num_voco_tokens"}
    for key, x in row.items():
      np.testing.assert_array_equal(x, drawn[key])


def _numbers(batches):
  return np.concatenate([x["num_voco_tokens"] for x in batches])


@pytest.mark.parametrize("batching", ["pack", "shuffle"])
def test_the_same_however_it_is_read(source, words, batching):
  """With workers, in shards, after a stop; another in the next epoch."""
  expected = _numbers(_arrays(_dataset(source, words, batching=batching)))
  workers = _dataset(source, words, batching=batching, num_workers=2)
  np.testing.assert_array_equal(_numbers(_arrays(workers)), expected)
  shards = [
    _numbers(
      _arrays(
        _dataset(source, words, (*BUDGETS,), (i, 2), 2, batching=batching)
      )
    )
    for i in range(2)
  ]
  np.testing.assert_array_equal(shards[0], expected[::2])
  np.testing.assert_array_equal(shards[1], expected[1::2])
  iterator = iter(_dataset(source, words, batching=batching))
  for _ in range(2):
    next(iterator)
  state = iterator.get_state()
  iterator.close()
  resumed = iter(_dataset(source, words, batching=batching))
  resumed.set_state(state)
  found = [next(resumed).arrays for _ in range(4)]
  resumed.close()
  np.testing.assert_array_equal(_numbers(found), expected[8:])


def test_every_number_is_as_likely(source, words):
  encoder = rows.Encoder(words, PROMPT, PACK, 8, BUDGETS)
  rng = np.random.default_rng(0)
  drawn = [encoder.prepare(source[0], rng).num_voco_tokens for _ in range(4000)]
  counts = [drawn.count(m) for m in BUDGETS]
  assert sum(counts) == 4000 and all(900 < n < 1100 for n in counts), counts
