"""Batches of `group_by_length`; of their order see fidelity/test_order.py."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from tests.data.test_packing import source_of
from tests.data.test_pipeline import DATA, PROMPT, assert_equal, take
from vocojax.data import grouping, pipeline, rows, tokenizer
from vocojax.errors import DataError

NUM_RECORDS = 37
GROUP = dataclasses.replace(
  DATA,
  source="llava_json",
  batching="group_by_length",
  max_text_length=48,
  micro_batch_size=2,
)


def grouped_entry(i):
  turns = []
  for k in range(1 + i % 2):
    turns.append({"from": "human", "value": "number ? " * (1 + i * 5 % 7)})
    turns.append({"from": "gpt", "value": f"{i} {k}"})
  image = {} if i % 3 == 1 else {"image": f"{i}.png"}
  return {"id": f"r{i}", "conversations": turns} | image


@pytest.fixture(scope="module")
def words():
  return tokenizer.build_word_level(f"number {i} ?" for i in range(NUM_RECORDS))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("grouped")
  for i in range(NUM_RECORDS):
    Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
  return source_of(
    folder, "data", [grouped_entry(i) for i in range(NUM_RECORDS)]
  )


def batches(source, words, data=GROUP, seed=0, shard=(0, 1), size=6):
  encoder = rows.Encoder(words, PROMPT, data, 8)
  return pipeline.train_dataset(source, encoder, data, seed, *shard, size)


def numbers(batch, words):
  """The first answer of each row."""
  x = batch.arrays
  first = np.argmax(x["labels"] != -100, axis=1)
  ids = x["input_ids"][np.arange(len(first)), first]
  return [int(words.convert_ids_to_tokens(int(i))) for i in ids]


def test_lengths_are_words_with_a_sign(source):
  signed = grouping.signed_lengths(source)
  for i in range(NUM_RECORDS):
    turns = grouped_entry(i)["conversations"]
    count = sum(len(turn["value"].split()) for turn in turns)
    assert signed[i] == (-count if i % 3 == 1 else count)


def test_batches(source, words):
  """An epoch is the rule's order, and its batches end where the rule's do."""
  steps = -(-NUM_RECORDS // 6)
  found = [numbers(b, words) for b in take(batches(source, words), 2 * steps)]
  signed = grouping.signed_lengths(source)
  epochs = found[:steps], found[steps:]
  for epoch in epochs:
    order = list(itertools.chain(*epoch))
    assert sorted(order[:NUM_RECORDS]) == list(range(NUM_RECORDS))
    # Filled up with the first records of the epoch.
    assert order[NUM_RECORDS:] == order[: len(order) - NUM_RECORDS]
    with_images, without = (
      -(-np.count_nonzero(signed * sign > 0) // 6) - 1 for sign in (1, -1)
    )
    kinds = [{bool(signed[i] > 0) for i in batch} for batch in epoch]
    whole = kinds[: with_images + without]
    assert all(len(kind) == 1 for kind in whole)
    assert whole.count({True}) == with_images
  assert epochs[0] != epochs[1]
  assert found != [
    numbers(b, words) for b in take(batches(source, words, seed=1), 2 * steps)
  ]


def test_shards_workers_and_resuming(source, words):
  whole = take(batches(source, words), 9)
  for i in range(2):
    part = take(batches(source, words, shard=(i, 2), size=3), 9)
    for batch, mine in zip(whole, part, strict=True):
      for key, x in mine.arrays.items():
        np.testing.assert_array_equal(x, batch.arrays[key][i::2], key)
  iterator = iter(batches(source, words))
  for _ in range(4):
    next(iterator)
  state = iterator.get_state()
  iterator.close()
  two = dataclasses.replace(GROUP, num_workers=2)
  iterator = iter(batches(source, words, two))
  iterator.set_state(state)
  for batch in whole[4:]:
    assert_equal(next(iterator), batch)
  iterator.close()


def test_a_bad_record_has_its_turn(words, tmp_path):
  entries = [grouped_entry(3 * i + 1) for i in range(6)]
  entries[2] = {"id": "r2"}
  source = source_of(tmp_path, "bad", entries)
  (batch,) = take(batches(source, words, size=5), 1)
  assert sorted(numbers(batch, words)) == [1, 4, 10, 13, 16]
  found = [
    m for b in take(batches(source, words, size=5), 2) for m in b.bad_records
  ]
  assert found and all("r2" in message for message in found)
  stop = dataclasses.replace(GROUP, on_bad_record="stop")
  with pytest.raises(DataError, match="r2"):
    take(batches(source, words, stop, size=5), 2)
