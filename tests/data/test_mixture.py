"""Several files with weights, and records that are held out."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_pipeline import DATA, PROMPT, assert_equal, entry, take
from tests.fields import raises
from vocojax.config import Config, EvaluationConfig, TrainingConfig
from vocojax.data import pipeline, sources, tokenizer
from vocojax.errors import ConfigError, DataError

SIZES = (20, 30, 50)
WEIGHTS = (5.0, 3.0, 2.0)  # 50, 30 and 20 of the 100 records of an epoch
BATCHINGS = {
  "shuffle": {},
  "slots": {"conversations_per_record": 2},
  "pack": {},
  "group_by_length": {"micro_batch_size": 2},
}


def write(path, entries, lines):
  parts = [json.dumps(x) for x in entries]
  path.write_text("\n".join(parts) if lines else f"[{','.join(parts)}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files 0 and 2 are lists, 1 has lines; a pixel says file and record."""
  folder = tmp_path_factory.mktemp("mixture")
  for i, size in enumerate(SIZES):
    (folder / f"images{i}").mkdir()
    for n in range(size):
      image = Image.new("RGB", (8, 8), (n, i, 0))
      image.save(folder / f"images{i}/{n}.png")
    write(folder / f"{i}.json", [entry(n) for n in range(size)], i == 1)
  return folder


@pytest.fixture(scope="module")
def words():
  return tokenizer.build_word_level(f"number {i} ?" for i in range(max(SIZES)))


def keys(folder, evaluation=None, **data):
  numbers = range(len(SIZES))
  data = {
    "source": "llava_json",
    "path": ",".join(f"{folder}/{i}.json" for i in numbers),
    "image_folder": ",".join(f"{folder}/images{i}" for i in numbers),
    **data,
  }
  return Config(
    data=dataclasses.replace(DATA, **data),
    evaluation=EvaluationConfig(**(evaluation or {})),
    training=TrainingConfig(steps=1),
  )


def mixed(folder, words, batching, shard=(0, 1), **data):
  """Batches of 10 rows of the mixture."""
  data = {"weights": WEIGHTS, "max_text_length": 24} | data
  config = keys(folder, batching=batching, **BATCHINGS[batching], **data)
  encoder = pipeline.Encoder(words, PROMPT, config.data, 8)
  source = sources.make_source(config, "train")
  return pipeline.train_dataset(
    source, encoder, config.data, 0, *shard, 10 // shard[1]
  )


def records(batch):
  """File and record of each image, row after row."""
  pixels = batch.arrays["images"][:, :, 0, 0].reshape(-1, 3)
  used = batch.arrays["image_group_ids"].reshape(-1) > 0
  return [(int(i), int(n)) for n, i, _ in pixels[used]]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_shares_of_an_epoch(folder, words, batching):
  """They are exact; the small file comes again, all of the large one comes."""
  found = take(mixed(folder, words, batching), 40)
  order = list(itertools.chain(*map(records, found)))
  epochs = [order[i : i + 100] for i in range(0, 300, 100)]
  for epoch in epochs:
    files = collections.Counter(i for i, _ in epoch)
    assert [files[i] / 100 for i in range(3)] == [0.5, 0.3, 0.2]
    times = collections.Counter(epoch)
    assert {times[0, n] for n in range(SIZES[0])} == {2, 3}
    assert {times[1, n] for n in range(SIZES[1])} == {1}
    # Shuffled, not file after file.
    assert len({i for i, _ in epoch[:30]}) > 1
  assert epochs[0] != epochs[1]
  large = collections.Counter(n for i, n in order[:300] if i == 2)
  assert {large[n] for n in range(SIZES[2])} == {1, 2}
  assert order != list(
    itertools.chain(
      *map(records, take(mixed(folder, words, batching, weights=()), 40))
    )
  )


@pytest.mark.parametrize("batching", BATCHINGS)
def test_two_processes_workers_and_resuming(folder, words, batching):
  """The order is one process'; a state holds for any number of workers."""
  whole = take(mixed(folder, words, batching), 14)
  for i in range(2):
    part = take(mixed(folder, words, batching, (i, 2)), 14)
    for batch, mine in zip(whole, part, strict=True):
      for key, x in mine.arrays.items():
        np.testing.assert_array_equal(x, batch.arrays[key][i::2], key)
  begun = iter(mixed(folder, words, batching))
  for _ in range(8):  # the next one is of the second epoch, or packed, later
    next(begun)
  state = json.loads(json.dumps(begun.get_state()))
  begun.close()
  assert set(state) <= {"next_record", "waiting"}
  num_workers = 2 if batching == "shuffle" else 0  # they are slow to start
  resumed = iter(mixed(folder, words, batching, num_workers=num_workers))
  resumed.set_state(state)
  for batch in whole[8:]:
    assert_equal(next(resumed), batch)
  resumed.close()


def test_files_without_weights_are_one(folder, words):
  """As if all records stood in one file."""
  config = keys(folder)
  source = sources.make_source(config, "train")
  assert len(source) == sum(SIZES)
  for i, at in enumerate((0, 20, 50)):
    last = source[at + SIZES[i] - 1]
    assert source[at].id == f"{folder}/{i}.json:r0"
    assert last.images == (folder / f"images{i}/{SIZES[i] - 1}.png",)
  part = sources.make_source(config, "train[10%:25]")
  assert [part[i] for i in range(15)] == [source[10 + i] for i in range(15)]
  encoder = pipeline.Encoder(words, PROMPT, config.data, 8)
  (batch,) = take(
    pipeline.train_dataset(source, encoder, config.data, 0, 0, 1, 100), 1
  )
  every = [(i, n) for i, size in enumerate(SIZES) for n in range(size)]
  assert sorted(records(batch)) == every


@pytest.mark.parametrize(
  "change, where, got",
  [
    ({"weights": (1.0,)}, "config.data.weights", "1 weights"),
    ({"weights": (1.0, 0.0, 1.0)}, "config.data.weights", "(1.0, 0.0, 1.0)"),
    ({"image_folder": "a,b"}, "config.data.image_folder", "2 folders"),
    ({"source": "easy_vqa", "weights": (1.0,)}, "config.data.weights", "(1.0"),
    ({"weights": (1.0, 1.0, 1e-3)}, "config.data.weights", "(1.0, 1.0, 0.001)"),
    ({"train_split": "train[:50]", "weights": WEIGHTS}, None, "(5.0, 3.0, 2.0"),
  ],
)
def test_mixtures_that_cannot_be(folder, words, change, where, got):
  with pytest.raises((ConfigError, DataError)) as e:
    config = keys(folder, **change)
    source = sources.make_source(config, config.data.train_split)
    encoder = pipeline.Encoder(words, PROMPT, config.data, 8)
    take(pipeline.train_dataset(source, encoder, config.data, 0, 0, 1, 10), 1)
  assert e.value.where == (where or "config.data.weights")
  assert e.value.got.startswith(got)


def test_one_of_the_files_is_missing(folder):
  paths = f"{folder}/0.json, {folder}/no.json"
  config = keys(folder, path=paths, image_folder=str(folder))
  with raises(DataError, f"config.data.path: {folder}/no.json", "no such file"):
    sources.make_source(config, "train")
  (folder / "a,b.json").write_bytes((folder / "0.json").read_bytes())
  config = keys(folder, path=f"{folder}/a,b.json", image_folder=str(folder))
  assert len(sources.make_source(config, "train")) == SIZES[0]


def test_held_out_records(folder, tmp_path):
  """About the share; each stays where it is when others come, go or move."""
  config = keys(folder, {"holdout": 0.3})

  def split(config, name):
    source = sources.make_source(config, name)
    return [source[i] for i in range(len(source))]

  train, test = split(config, "train"), split(config, "test")
  assert not {x.id for x in train} & {x.id for x in test}
  assert len(train) + len(test) == 100 and 20 < len(test) < 40
  assert split(config, "test[1:3]") == test[1:3]
  entries = [entry(n) for n in reversed(range(10, 30))]
  for x in entries:  # other questions about the same images
    x["conversations"][0]["value"] += " ?"
  entries.append(entry(10, image=["10.png", "11.png"]))
  entries += [entry(i % 2, image=None, id=f"r{i}") for i in range(60)]
  write(tmp_path / "other.json", entries, lines=True)
  other = keys(
    folder,
    {"holdout": 0.3},
    path=str(tmp_path / "other.json"),
    image_folder=str(folder / "images1"),
  )
  held_out = {x.images for x in test if x.images[0].parent.name == "images1"}
  for name in ("train", "test"):
    for x in split(other, name):
      assert not x.images or (x.images[:1] in held_out) == (name == "test")
  # No text is on both sides.
  texts = [
    {x.conversations for x in split(other, name) if not x.images}
    for name in ("train", "test")
  ]
  assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 2


def test_a_file_of_its_own(folder):
  path = {"path": f"{folder}/2.json", "image_folder": f"{folder}/images2"}
  config = keys(folder, path)
  assert len(sources.make_source(config, "train")) == 100
  source = sources.make_source(config, "test")
  assert len(source) == SIZES[2] and source[3].id == "r3"
  for change, key in (
    (path | {"holdout": 0.1}, "holdout"),
    (path | {"split": "train[90%:]"}, "split"),
    ({"image_folder": "x"}, "image_folder"),
    ({"holdout": 1.0}, "holdout"),
  ):
    with raises(ConfigError, f"config.evaluation.{key}"):
      keys(folder, change)
  with raises(DataError, "", "no split 'test'") as e:
    sources.make_source(keys(folder), "test")
  assert "config.evaluation.holdout" in e.value.fix


def test_identity(folder):
  """Whatever changes which records are trained on, and how often."""
  some = [
    keys(folder),
    keys(folder, weights=WEIGHTS),
    keys(folder, weights=WEIGHTS[::-1]),
    keys(folder, {"holdout": 0.1}),
    keys(folder, {"holdout": 0.2}),
    keys(folder, path=f"{folder}/0.json"),
    keys(folder, path=f"{folder}/1.json"),
    keys(folder, path=f"{folder}/1.json,{folder}/0.json"),
  ]
  assert len({sources.identity(x) for x in some}) == len(some)
  assert sources.identity(some[0]) == sources.identity(
    keys(folder, {"path": f"{folder}/0.json"})
  )
