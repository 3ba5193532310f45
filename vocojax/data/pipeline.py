"""From records to batches, with Grain. Read next: training/loop.py.

Alphabet: B text rows, F image slots per row, S pixels a side, T text length.
A row of a batch is one record. A batch holds, as numpy arrays,

  images           uint8 [B,F,S,S,3]
  image_group_ids  int32 [B,F]  0: empty slot; else the group of the image
  input_ids        int32 [B,T]
  labels           int32 [B,T]  -100 where not trained, else input_ids
  segment_ids      int32 [B,T]  0: padding; conversations count from 1
  text_group_ids   int32 [B,T]  the group whose images this token sees; 0: none

A group is a record with images; groups of a row count from 1. Several
conversations (segments) may share a group's images.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import grain
import numpy as np
import transformers
from absl import flags, logging
from jaxtyping import UInt8

from vocojax.config import DataConfig, PromptConfig
from vocojax.data import images, prompt
from vocojax.data.sources import Record, Source
from vocojax.errors import DataError

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch, and what went wrong while it was collected.

  Attributes:
    arrays: see the head of this module.
    bad_records: one message per record that was skipped on the way.
  """

  arrays: Arrays
  bad_records: tuple[str, ...]


class Encoder:
  """Turns a record into one row of a batch; can be pickled for workers."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompt_config: PromptConfig,
    data: DataConfig,
    image_size: int,
  ):
    self._tokenizer = tokenizer
    self._prompt = prompt_config
    self._data = data
    self._image_size = image_size

  def __call__(self, record: Record, rng: np.random.Generator) -> Arrays:
    """The arrays of one row, without the axis B.

    Samples `conversations_per_record` conversations of those whose last answer
    is not among `skip_answers`; those that no longer fit beside the ones before
    are left out. A row may stay without text.

    Raises:
      DataError: an image is bad, there are too many images, or a conversation
        alone is longer than a row.
    """
    data, size = self._data, self._image_size
    row = {
      "images": np.zeros((data.max_images, size, size, 3), np.uint8),
      "image_group_ids": np.zeros(data.max_images, np.int32),
      "input_ids": np.full(
        data.max_text_length, self._tokenizer.pad_token_id, np.int32
      ),
      "labels": np.full(data.max_text_length, prompt.IGNORE, np.int32),
      "segment_ids": np.zeros(data.max_text_length, np.int32),
      "text_group_ids": np.zeros(data.max_text_length, np.int32),
    }
    pixels = load_images(record, size, data)
    if data.flip_images:
      # One draw a record: its images may be compared with each other.
      for axis in (1, 2):
        if rng.integers(2):
          pixels = np.flip(pixels, axis)
    row["images"][: len(pixels)] = pixels
    row["image_group_ids"][: len(pixels)] = 1
    start = 0
    for segment, turns in enumerate(self._sample(record, rng), 1):
      ids, labels = prompt.encode(
        prompt.LAYOUTS[self._prompt.layout],
        self._tokenizer,
        turns,
        has_image=bool(record.images),
        strip_newlines=self._prompt.strip_newlines,
      )
      if len(ids) > data.max_text_length:
        raise DataError(
          f"record {record.id}: a conversation of {len(ids)} tokens, expected "
          f"at most {data.max_text_length}; raise config.data.max_text_length "
          "or shorten the answers"
        )
      stop = start + len(ids)
      if stop > data.max_text_length:
        break
      row["input_ids"][start:stop] = ids
      row["labels"][start:stop] = labels
      row["segment_ids"][start:stop] = segment
      row["text_group_ids"][start:stop] = bool(record.images)
      start = stop
    return row

  def _sample(self, record: Record, rng: np.random.Generator):
    skipped = self._data.skip_answers
    conversations = [c for c in record.conversations if c[-1][1] not in skipped]
    count = self._data.conversations_per_record
    if not count:
      return conversations
    order = rng.permutation(len(conversations))[:count]
    return [conversations[i] for i in order]


def load_images(
  record: Record, image_size: int, data: DataConfig
) -> UInt8[np.ndarray, "F S S 3"]:
  """Decoded and scaled images of a record, as many as it has.

  Raises:
    DataError: an image is bad, or there are more than `data.max_images`.
  """
  if len(record.images) > data.max_images:
    raise DataError(
      f"record {record.id}: {len(record.images)} images, expected at most "
      f"{data.max_images}; raise config.data.max_images"
    )
  result = np.zeros((len(record.images), image_size, image_size, 3), np.uint8)
  for i, source in enumerate(record.images):
    which = source if not isinstance(source, bytes) else f"image {i}"
    image = images.decode_image(source, f"record {record.id}: {which}")
    result[i] = images.preprocess(image, image_size, data.pad_to_square)
  return result


def train_dataset(
  source: Source,
  encoder: Encoder,
  data: DataConfig,
  seed: int,
  shard_index: int,
  shard_count: int,
  local_batch_size: int,
) -> grain.IterDataset:
  """Batches for ever, in an order that depends on `seed` only.

  There is one order of records, shuffled anew in each epoch; a shard takes
  every `shard_count`-th of it. So in an epoch no two shards see the same
  record, and together the shards see what one process with the whole batch
  would see. Workers only prepare records and never change their order.

  The state of an iterator is the number of records it has read. It may be
  restored with another number of workers.

  Args:
    source: the records.
    encoder: makes a row of a record.
    data: for `num_workers`, `prefetch_batches` and `on_bad_record`.
    seed: of the order, and of whatever the encoder samples.
    shard_index: this process, from 0.
    shard_count: processes that each read a part of every batch.
    local_batch_size: rows of this process' part, B.

  Returns:
    A dataset of `Batch`. Iterating raises DataError at a bad record if
    `on_bad_record` is 'stop', and when no record at all is good.
  """
  rows = (
    grain.MapDataset.range(len(source))
    .seed(_seed32(seed))
    .shuffle()
    .repeat()
    .random_map(_Encode(source, encoder))
  )
  batches = _Batches(
    rows[shard_index::shard_count], len(source), data, local_batch_size
  )
  return grain.experimental.ThreadPrefetchIterDataset(
    batches, prefetch_buffer_size=data.prefetch_batches
  )


def eval_records(
  source: Source,
  image_size: int,
  data: DataConfig,
  report: Callable[[str], None] = logging.warning,
) -> Iterator[tuple[Record, UInt8[np.ndarray, "F S S 3"]]]:
  """Every record once, in order, with its images ready for the model.

  A bad record is left out and its message given to `report`.

  Raises:
    DataError: a record is bad and `data.on_bad_record` is 'stop'.
  """
  for i in range(len(source)):
    try:
      record = source[i]
      pixels = load_images(record, image_size, data)
    except DataError as e:
      if data.on_bad_record == "stop":
        raise
      report(str(e))
      continue
    yield record, pixels


def _seed32(seed: int) -> int:
  """`seed` as Grain wants it: any integer to one below 2**32."""
  digest = hashlib.sha256(str(seed).encode()).digest()
  return int.from_bytes(digest[:4], "little")


@dataclasses.dataclass(frozen=True)
class _Encode(grain.transforms.RandomMap):
  """Index of a record to its row, or to the message of what is wrong."""

  source: Source
  encoder: Encoder

  def random_map(self, index: int, rng: np.random.Generator) -> Arrays | str:
    try:
      return self.encoder(self.source[index], rng)
    except DataError as e:
      return str(e)


class _Batches(grain.IterDataset):
  """Rows to batches; skips bad records or stops at them."""

  def __init__(
    self,
    rows: grain.MapDataset,
    num_records: int,
    data: DataConfig,
    batch_size: int,
  ):
    super().__init__()
    self.rows = rows
    self.num_records = num_records
    self.data = data
    self.batch_size = batch_size

  def __iter__(self) -> "_BatchIterator":
    return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
  """Its state is a count of records, so it fits any number of workers."""

  def __init__(self, dataset: _Batches):
    super().__init__()
    self._dataset = dataset
    self._next_record = 0
    self._rows: grain.DatasetIterator | None = None

  def __next__(self) -> Batch:
    if self._rows is None:
      self._rows = self._start()
    rows, bad = [], []
    in_a_row = 0
    while len(rows) < self._dataset.batch_size:
      row = next(self._rows)
      self._next_record += 1
      if not isinstance(row, str):
        rows.append(row)
        in_a_row = 0
        continue
      if self._dataset.data.on_bad_record == "stop":
        raise DataError(
          f"{row} (config.data.on_bad_record=skip would leave it out)"
        )
      bad.append(row)
      in_a_row += 1
      # Two orders in a row may have their good records far apart.
      if in_a_row >= 2 * self._dataset.num_records:
        raise DataError(
          f"data: {in_a_row} bad records in a row of a source of "
          f"{self._dataset.num_records}, expected some good ones; correct the "
          f"records, the last of which is: {row}"
        )
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return Batch(arrays, tuple(bad))

  def get_state(self) -> dict[str, int]:
    return {"next_record": self._next_record}

  def set_state(self, state: dict[str, int]):
    self._stop()
    self._next_record = state["next_record"]

  def close(self):
    self._stop()
    super().close()

  def _start(self) -> grain.DatasetIterator:
    data, batch_size = self._dataset.data, self._dataset.batch_size
    # One thread: decoding holds the interpreter lock most of the time.
    rows = self._dataset.rows[self._next_record :].to_iter_dataset(
      grain.ReadOptions(
        num_threads=1, prefetch_buffer_size=data.prefetch_batches * batch_size
      )
    )
    if data.num_workers:
      if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its flags
        flags.FLAGS.mark_as_parsed()
      rows = rows.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=data.num_workers,
          per_worker_buffer_size=-(-batch_size // data.num_workers),
        )
      )
    return iter(rows)

  def _stop(self):
    if self._rows is not None:
      self._rows.close()
      self._rows = None
