"""The pipeline: rows, order, shards, resuming, bad records."""

import dataclasses
import io
import itertools
import json
import re

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from vocojax.config import DataConfig, PromptConfig
from vocojax.data import pipeline, prompt, sources, tokenizer
from vocojax.errors import ConfigError, DataError, OddRecord

PROMPT = PromptConfig(layout="qa_v1", strip_newlines="none")
DATA = DataConfig(
  source="easy_vqa",
  path="",
  image_folder="",
  tokenizer="",
  train_split="train",
  max_text_length=12,
  max_images=2,
  conversations_per_record=0,
  skip_answers=(),
  batching="shuffle",
  pack_lookahead=8,
  batch_size=4,
  flip_images=False,
  pad_to_square=True,
  num_workers=0,
  prefetch_batches=2,
  on_bad_record="skip",
)
NUM_RECORDS = 21


def entry(i, **change):
  turns = [
    {"from": "human", "value": f"number {i} ?"},
    {"from": "gpt", "value": f"{i}"},
  ]
  return {"id": f"r{i}", "image": f"{i}.png", "conversations": turns} | change


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  for i in range(NUM_RECORDS):
    Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
  return folder


@pytest.fixture(scope="module")
def words():
  return tokenizer.build_word_level(f"number {i} ?" for i in range(NUM_RECORDS))


def source_of(tmp_path, folder, entries):
  path = tmp_path / "data.json"
  path.write_text(json.dumps(entries))
  return sources.llava_json(path, folder)


@pytest.fixture
def source(tmp_path, folder):
  return source_of(tmp_path, folder, [entry(i) for i in range(NUM_RECORDS)])


def batches(source, words, data=DATA, seed=0, shard=(0, 1), size=4):
  encoder = pipeline.Encoder(words, PROMPT, data, 8)
  return pipeline.train_dataset(source, encoder, data, seed, *shard, size)


def numbers(batch):
  """Which records are in a batch: each image's colour is its number."""
  return batch.arrays["images"][:, 0, 0, 0, 0].tolist()


def take(dataset, count):
  iterator = iter(dataset)
  result = list(itertools.islice(iterator, count))
  iterator.close()
  return result


def assert_equal(a, b):
  assert a.bad_records == b.bad_records
  for key in a.arrays:
    np.testing.assert_array_equal(a.arrays[key], b.arrays[key], key)


def record(*conversations, images=1):
  colour = Image.new("RGB", (4, 8), (200, 0, 0))
  colour.paste((0, 200, 0), (0, 0, 2, 4))

  file = io.BytesIO()
  colour.save(file, format="PNG")
  return sources.Record(
    "x", (file.getvalue(),) * images, tuple((c,) for c in conversations)
  )


def test_row(words):
  encoder = pipeline.Encoder(words, PROMPT, DATA, 8)
  row = encoder(
    record(("number ?", "3"), ("?", "4 5")), np.random.default_rng(0)
  )
  ids = words.convert_tokens_to_ids(["number", "?", "3", "</s>", "4", "5"])
  number, mark, three, eos, four, five = ids
  want = {
    "input_ids": [number, mark, three, eos, mark, four, five, eos, *[0] * 4],
    "labels": [
      *[-100, -100, three, eos, -100, four, five, eos],
      *[-100] * 4,
    ],
    "segment_ids": [1] * 4 + [2] * 4 + [0] * 4,
    "text_group_ids": [1] * 8 + [0] * 4,
    "image_group_ids": [1, 0],
  }
  for key, value in want.items():
    assert row[key].tolist() == value, key
    assert row[key].dtype == np.int32
  assert row["images"].shape == (2, 8, 8, 3)
  assert row["images"].dtype == np.uint8
  assert row["images"][0].any() and not row["images"][1].any()


def test_text_only_row(words):
  encoder = pipeline.Encoder(words, PROMPT, DATA, 8)
  row = encoder(record(("?", "3"), images=0), np.random.default_rng(0))
  assert row["input_ids"][0] == words.bos_token_id
  assert row["segment_ids"].tolist() == [1] * 4 + [0] * 8
  assert not row["text_group_ids"].any() and not row["image_group_ids"].any()


@pytest.mark.parametrize("layout", ["qa_v1", "vicuna_v1", "plain"])
def test_several_images(words, folder, tmp_path, layout):
  """From the JSON file on; the text is that of one image."""
  turns = entry(3)["conversations"]
  marked = [{"from": "human", "value": "<image><image>number 3 ?"}, turns[1]]
  one, two = source_of(
    tmp_path,
    folder,
    [entry(3), entry(3, image=["3.png", "5.png"], conversations=marked)],
  )
  prompts = dataclasses.replace(PROMPT, layout=layout)
  data = dataclasses.replace(DATA, max_text_length=24)
  encoder = pipeline.Encoder(words, prompts, data, 8)
  rows = [encoder(x, np.random.default_rng(0)) for x in (one, two)]
  for key in ("input_ids", "labels", "segment_ids", "text_group_ids"):
    np.testing.assert_array_equal(rows[0][key], rows[1][key], key)
  assert rows[0]["image_group_ids"].tolist() == [1, 0]
  assert rows[1]["image_group_ids"].tolist() == [1, 1]
  assert rows[1]["images"][:, 0, 0, 0].tolist() == [3, 5]


def test_conversations_are_sampled_without_replacement(words):
  data = dataclasses.replace(DATA, conversations_per_record=3)
  encoder = pipeline.Encoder(words, PROMPT, data, 8)
  turns = [("?", str(i)) for i in range(5)]
  answers = words.convert_tokens_to_ids([str(i) for i in range(5)])
  seen = set()
  for seed in range(20):
    row = encoder(record(*turns), np.random.default_rng(seed))
    found = row["input_ids"][[1, 4, 7]].tolist()
    assert len(set(found)) == 3 and set(found) <= set(answers)
    seen.update(found)
  assert seen == set(answers)


def test_skipped_answers(words):
  data = dataclasses.replace(DATA, skip_answers=("1", "3"))
  encoder = pipeline.Encoder(words, PROMPT, data, 8)
  turns = [("?", str(i)) for i in range(4)]
  row = encoder(record(*turns), np.random.default_rng(0))
  zero, two = words.convert_tokens_to_ids(["0", "2"])
  assert row["input_ids"][[1, 4]].tolist() == [zero, two]
  assert row["segment_ids"].max() == 2
  empty = encoder(record(("?", "1")), np.random.default_rng(0))
  assert not empty["segment_ids"].any() and empty["images"].any()


def test_what_does_not_fit(words):
  encoder = pipeline.Encoder(words, PROMPT, DATA, 8)
  rng = np.random.default_rng(0)
  five = ("number ?", "1 2")
  row = encoder(record(five, five, five), rng)
  assert row["segment_ids"].max() == 2
  assert np.count_nonzero(row["segment_ids"]) == 10
  exact = encoder(record(("?", "1 " * 10)), rng)
  assert exact["segment_ids"].all()
  with pytest.raises(OddRecord) as e:
    encoder(record(("?", "1 " * 11)), rng)
  assert (e.value.where, e.value.kind) == ("record x", "long")
  assert e.value.got == "a conversation of 13 tokens"
  assert e.value.expected == "at most 12"
  with pytest.raises(DataError) as e:
    encoder(record(five, images=3), rng)
  assert (e.value.where, e.value.got) == ("record x", "3 images")
  assert e.value.expected == "at most 2"


@pytest.mark.parametrize("images, most", [(0, 20), (1, 20 - 3), (2, 20 - 5)])
def test_long_texts_are_cut(words, images, most):
  """At `max_text_length` positions, of which images take 1 and 2 each."""
  data = dataclasses.replace(
    DATA, max_text_length=20, on_long_text="truncate", on_bad_record="stop"
  )
  encoder = pipeline.Encoder(words, PROMPT, data, 8, (), (1, 2))
  rng = np.random.default_rng(0)
  fits = 20 - 1 - (images == 0)  # </s> and, without images, <s>
  for length in (fits, fits + 1, 40):
    item = record(("?", "1 " * (length - 1)), images=images)
    refused = pipeline.Encoder(words, PROMPT, DATA, 8)
    with pytest.raises(OddRecord):
      refused(item, np.random.default_rng(0))
    row = encoder(item, np.random.default_rng(0))
    whole = prompt.encode(
      prompt.LAYOUTS["qa_v1"], words, item.conversations[0], images, "none"
    )
    count = min(most, len(whole[0]))
    assert row["input_ids"].tolist()[:count] == whole[0][:count]
    assert row["labels"].tolist()[:count] == whole[1][:count]
    assert np.count_nonzero(row["segment_ids"]) == count
    assert row["input_ids"].shape == (20,)
  # One token of the answer is enough; none is not.
  question = "number " * (most - 1 - (images == 0))
  row = encoder(record((question, "3 4"), images=images), rng)
  assert np.count_nonzero(row["labels"] != -100) == 1
  with pytest.raises(OddRecord) as e:
    encoder(record((f"{question} ?", "3"), images=images), rng)
  assert e.value.kind == "cut"
  assert e.value.got == f"no answer among its first {most} tokens"
  # Of several conversations the others stay.
  two = record((f"{question} ?", "3"), ("?", "5"), images=images)
  row = encoder(two, np.random.default_rng(0))
  assert np.count_nonzero(row["labels"] != -100) == 2


@pytest.mark.parametrize("batching", ["shuffle", "pack", "group_by_length"])
def test_what_is_cut_away_stops_no_run(tmp_path, folder, words, batching):
  """It is counted, though other bad records stop the run."""
  data = dataclasses.replace(
    DATA, on_long_text="truncate", on_bad_record="stop", batching=batching
  )
  data = dataclasses.replace(data, micro_batch_size=2)
  entries = [entry(i) for i in range(NUM_RECORDS)]
  entries[4]["conversations"][0]["value"] = "number " * 12
  entries[7]["conversations"][1]["value"] = "7 " * 30
  source = source_of(tmp_path, folder, entries)
  found = take(batches(source, words, data), 12)
  messages = [m for batch in found for m in batch.bad_records]
  assert len(messages) >= 2
  assert all(m.startswith("record r4: got no answer") for m in messages)
  pixels = np.concatenate([batch.arrays["images"] for batch in found])
  reds = {int(x) for x in pixels[:, :, 0, 0, 0].flat}
  assert 7 in reds and 4 not in reds


def test_slots(folder, words):
  """Each conversation begins a part of the row; longer ones are named."""
  data = dataclasses.replace(
    DATA, batching="slots", max_text_length=40, conversations_per_record=4
  )
  assert (data.text_slots, DATA.text_slots) == (4, 1)
  encoder = pipeline.Encoder(words, PROMPT, data, 8)
  lengths = (3, 1, 2)
  turns = tuple((("number ?" + " ?" * n, "7"),) for n in lengths)
  record = sources.Record("r", (folder / "3.png",), turns)
  row = encoder(record, np.random.default_rng(0))
  segments = row["segment_ids"].reshape(4, 10)
  for i, part in enumerate(segments):
    count = np.count_nonzero(part)
    np.testing.assert_array_equal(part, [i + 1] * count + [0] * (10 - count))
  # In an order that is drawn.
  counts = np.count_nonzero(segments, axis=1)
  assert sorted(counts[:3] - counts[:3].min()) == [0, 1, 2] and not counts[3]
  assert row["image_segment_ids"].tolist() == [[1, 2, 3, 0], [0] * 4]
  long = ((("number ?" + " ?" * 9, "7"),),)
  record = dataclasses.replace(record, conversations=long)
  with pytest.raises(OddRecord) as e:
    encoder(record, np.random.default_rng(0))
  assert (e.value.kind, e.value.expected) == ("long", "at most 10")
  for changes in ({"max_text_length": 42}, {"conversations_per_record": 0}):
    with pytest.raises(ConfigError) as e:
      dataclasses.replace(data, **changes)
    assert e.value.where == "config.data.batching"


def test_system_turns(words):
  """Before the first question where the layout has a place, else refused."""
  item = dataclasses.replace(record(("?", "3"), ("4 ?", "5")), system="number")
  alike = record(("number ?", "3"), ("number 4 ?", "5"))
  encoder = pipeline.Encoder(words, PROMPT, DATA, 8)
  rows = [encoder(x, np.random.default_rng(0)) for x in (item, alike)]
  for key in rows[0]:
    np.testing.assert_array_equal(rows[0][key], rows[1][key])
  ((seen, _),) = pipeline.eval_records([item], 8, DATA, "qa_v1")
  assert seen == alike
  stop = dataclasses.replace(DATA, on_bad_record="stop")
  for layout in ("voco_v1", "vicuna_v1", "plain"):
    prompts = dataclasses.replace(PROMPT, layout=layout)
    encoder = pipeline.Encoder(words, prompts, DATA, 8)
    for read in (
      lambda e=encoder: e(item, np.random.default_rng(0)),
      lambda x=layout: list(pipeline.eval_records([item], 8, stop, x)),
    ):
      with pytest.raises(DataError) as e:
        read()
      assert e.value.where == "record x: system turn"
      assert e.value.got == "'number'"


def test_flips(words):
  data = dataclasses.replace(DATA, flip_images=True)
  plain = pipeline.Encoder(words, PROMPT, DATA, 8)
  encoder = pipeline.Encoder(words, PROMPT, data, 8)
  item = record(("?", "1"))
  image = plain(item, np.random.default_rng(0))["images"][0]
  mirrored = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
  seen = set()
  for seed in range(30):
    flipped = encoder(item, np.random.default_rng(seed))["images"][0]
    (which,) = (i for i, m in enumerate(mirrored) if (flipped == m).all())
    seen.add(which)
  assert seen == {0, 1, 2, 3}


def test_each_epoch_has_every_record_in_a_new_order(source, words):
  dataset = batches(source, words, size=NUM_RECORDS)
  epochs = [numbers(batch) for batch in take(dataset, 3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(NUM_RECORDS))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert [numbers(batch) for batch in take(dataset, 3)] == epochs
  other = take(batches(source, words, seed=1, size=NUM_RECORDS), 1)
  assert numbers(other[0]) != epochs[0]


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_disjoint_and_complete(source, words, count):
  """Together they are what one process would see, in every step."""
  steps, size = 14, 6 // count
  whole = take(batches(source, words, size=6), steps)
  parts = [
    take(batches(source, words, shard=(i, count), size=size), steps)
    for i in range(count)
  ]
  for step, batch in enumerate(whole):
    together = [n for part in parts for n in numbers(part[step])]
    assert sorted(together) == sorted(numbers(batch))
  # 3 steps of 6, and half a fourth, are an epoch of 21.
  first = [n for part in parts for batch in part[:3] for n in numbers(batch)]
  assert len(set(first)) == 18


def test_workers_do_not_change_the_order(source, words):
  data = dataclasses.replace(DATA, flip_images=True, conversations_per_record=1)
  alone = iter(batches(source, words, data))
  whole = [next(alone)]
  state = alone.get_state()
  whole += itertools.islice(alone, 11)
  # A state taken without workers is good with them, and the other way round.
  two = dataclasses.replace(data, num_workers=2)
  workers = iter(batches(source, words, two))
  workers.set_state(state)
  for batch in whole[1:8]:
    assert_equal(next(workers), batch)
  alone.set_state(workers.get_state())
  for batch in whole[8:]:
    assert_equal(next(alone), batch)
  alone.close()
  workers.close()


def test_checkpoint_in_the_middle_of_an_epoch(source, words, tmp_path):
  data = dataclasses.replace(DATA, flip_images=True)
  whole = take(batches(source, words, data), 14)
  for stop in (0, 1, 7):
    iterator = iter(batches(source, words, data))
    for _ in range(stop):
      next(iterator)
    path = tmp_path / str(stop)
    with ocp.CheckpointManager(path) as manager:
      save = grain.checkpoint.CheckpointSave(iterator)
      manager.save(0, args=ocp.args.Composite(data=save))
    iterator.close()
    restored = iter(batches(source, words, data))
    with ocp.CheckpointManager(path) as manager:
      restore = grain.checkpoint.CheckpointRestore(restored)
      manager.restore(0, args=ocp.args.Composite(data=restore))
    for batch in whole[stop:]:
      assert_equal(next(restored), batch)
    restored.close()


def bad_entries(folder):
  """By their index: bad records, each bad in another way."""
  data = (folder / "0.png").read_bytes()
  (folder / "cut.png").write_bytes(data[: len(data) - 30])
  Image.new("L", (1, 65536)).save(folder / "long.png")
  long = entry(18)
  long["conversations"][1]["value"] = "1 " * 12
  odd = entry(19, image=None)
  odd["conversations"][0]["value"] = "<image> number ?"
  return {
    3: entry(3, image="cut.png"),
    5: entry(5, image="a\0.png"),
    8: entry(8, image="gone.png"),
    10: entry(10, image="long.png"),
    13: {"id": "r13", "image": "13.png"},
    15: entry(15, note="\ud83d"),
    16: entry(16, number=int("9" * 4000)),
    18: long,
    19: odd,
  }


@pytest.fixture
def bad_source(tmp_path, folder):
  """21 records, some of which are bad."""
  bad = bad_entries(folder)
  entries = [bad.get(i, entry(i)) for i in range(NUM_RECORDS)]
  text = json.dumps(entries).encode()
  # More digits than Python reads, and text that is not UTF-8.
  text = text.replace(b"9" * 4000, b"9" * 5000)
  text = text.replace(b'"number 16 ?"', b'"n\xe9 16 ?"')
  (tmp_path / "data.json").write_bytes(text)
  return sources.llava_json(tmp_path / "data.json", folder)


BAD = (3, 5, 8, 10, 13, 15, 16, 18, 19)
MESSAGES = [
  "record r3: .*cut.png: got .*, expected an image that can be read",
  r"record 5 \(id 'r5'\): field image: got 'a.x00.png', expected a path insi",
  "record r8: .*gone.png: got no such file",
  "record r10: .*long.png: got 1 x 65,536 pixels, expected at most",
  "record 13 .id 'r13'.: field conversations: got nothing",
  "record 15: got half of a surrogate pair",
  "record 16: got byte 0xe9 at offset",
  "record r18: got a conversation of 16 tokens, expected at most 12",
  r"record 19 \(id 'r19'\): conversations: got 1 <image>, expected none",
]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_skipped_and_reported(bad_source, words, num_workers):
  data = dataclasses.replace(DATA, num_workers=num_workers)
  iterator = iter(batches(bad_source, words, data))
  seen, found, messages, states = [], [], [], []
  for _ in range(8):
    batch = next(iterator)
    seen.append(batch)
    states.append(iterator.get_state())
    found += numbers(batch)
    messages += batch.bad_records
    assert batch.arrays["images"].shape[0] == 4
  assert not set(BAD) & set(found)
  assert len(set(found)) == NUM_RECORDS - len(BAD)
  for pattern in MESSAGES:
    assert any(re.search(pattern, x) for x in messages), (pattern, messages)
  # What was skipped counts as read: nothing comes twice or is reported twice.
  iterator.close()
  if not num_workers:
    again = iter(batches(bad_source, words, data))
    again.set_state(states[2])
    for batch in seen[3:]:
      assert_equal(next(again), batch)
    again.close()


def test_bad_record_stops_the_run(bad_source, words):
  data = dataclasses.replace(DATA, on_bad_record="stop")
  with pytest.raises(DataError) as e:
    take(batches(bad_source, words, data), 8)
  assert e.value.where.count("record ")
  assert e.value.fix.endswith("with config.data.on_bad_record=skip")


def test_no_good_record(tmp_path, folder, words):
  entries = [entry(i, image="gone.png") for i in range(5)]
  source = source_of(tmp_path, folder, entries)
  with pytest.raises(DataError) as e:
    take(batches(source, words), 1)
  assert e.value.where == "config.data"
  assert e.value.got.startswith("10 bad records in a row of a source of 5, ")


def test_one_good_record(tmp_path, folder, words):
  entries = [entry(i, image="gone.png") for i in range(5)]
  entries[3] = entry(3)
  source = source_of(tmp_path, folder, entries)
  for batch in take(batches(source, words), 10):
    assert numbers(batch) == [3] * 4


def test_eval_records(bad_source):
  reports = []
  found = [
    (record.id, images.shape, int(images[0, 0, 0, 0]))
    for record, images in pipeline.eval_records(
      bad_source, 8, DATA, "qa_v1", reports.append
    )
  ]
  # Record 18 is only too long to be trained on.
  good = [i for i in range(NUM_RECORDS) if i not in BAD or i == 18]
  assert found == [(f"r{i}", (1, 8, 8, 3), i) for i in good]
  assert len(reports) == len(BAD) - 1
  stop = dataclasses.replace(DATA, on_bad_record="stop")
  with pytest.raises(DataError, match="record r3"):
    list(pipeline.eval_records(bad_source, 8, stop, "qa_v1"))
