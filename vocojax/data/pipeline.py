"""From records to batches, with Grain. Read next: training/loop.py.

B text rows, F image slots per row, S pixels a side, T text length.
A row of a batch is one record, or several where `config.data.batching` is
'pack'. A batch holds, as numpy arrays,

  images             uint8 [B,F,S,S,3]
  image_group_ids    int32 [B,F]  0: empty slot; else the group of the image
  image_segment_ids  int32 [B,F,R]  who sees the image; 0: nobody (more)
  num_voco_tokens    int32 [B,F]  how many of its VoCo tokens they see
  input_ids          int32 [B,T]
  labels             int32 [B,T]  -100 where not trained, else input_ids
  segment_ids        int32 [B,T]  0: padding; conversations count from 1
  text_group_ids     int32 [B,T]  the group whose images it sees; 0: none

A group is a record with images; groups of a row count from 1. Several
conversations (segments) may share a group's images. `image_segment_ids` holds
the same the other way round, in ascending order, for attention kernels that
know segments only. R is the most conversations that a record can have; where
the config does not say how many that is (easy_vqa with all conversations), the
array is left out. `num_voco_tokens`, one number for each group, is there if
config.model.compressor.train_num_voco_tokens is 'elastic'.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

from vocojax.config import DataConfig
from vocojax.core import workers
from vocojax.data import grouping, packing, prompt
from vocojax.data.rows import (
  Arrays,
  Encoder,
  Prepared,
  Skipped,
  load_images,
  with_system,
)
from vocojax.data.sources import Record, Source, record_border
from vocojax.errors import DataError

# Records that the number of rows of an epoch is estimated from.
_SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch, and what went wrong while it was collected.

  Attributes:
    arrays: see the head of this module.
    bad_records: one message per record that was skipped on the way.
  """

  arrays: Arrays
  bad_records: tuple[str, ...]

  @property
  def fill(self) -> dict[str, int]:
    """Text tokens and images of the batch, and how many it has room for."""
    text, slots = (
      self.arrays[key] for key in ("segment_ids", "image_group_ids")
    )
    return {
      "text_tokens": int(np.count_nonzero(text)),
      "text_room": text.size,
      "images": int(np.count_nonzero(slots)),
      "image_room": slots.size,
    }


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

  There is one order of rows, drawn anew in each epoch; a shard takes every
  `shard_count`-th of it. So in an epoch no two shards see the same record, and
  together the shards see what one process with the whole batch would see.
  Workers only prepare rows and never change their order.

  Where rows are packed, every process and worker tokenises all records to know
  which share a row, but decodes only the images of its own rows. A bad image
  then leaves a gap in its row.

  The state of an iterator is the number of records it has read and, of packed
  rows, which records wait for a row. It may be restored with another number of
  workers, and of packed rows with another number of processes.

  Args:
    source: the records.
    encoder: makes a row of records.
    data: says how rows are batched.
    seed: of the order, and of whatever the encoder samples.
    shard_index: this process, from 0.
    shard_count: processes that each read a part of every batch.
    local_batch_size: rows of this process' part, B.

  Returns:
    A dataset of `Batch`. Iterating raises DataError at a bad record if
    `on_bad_record` is 'stop', and when no record at all is good.
  """
  batch_size = local_batch_size * shard_count
  if data.batching == "group_by_length":
    order = grouping.GroupedOrder(source, data, batch_size, _seed32(seed))
    indices = grain.MapDataset.source(order).seed(_seed32(seed))
  else:
    indices = _shuffled(source, data, seed)
  if data.batching == "pack":
    rows = packing.PackedRows(
      indices.random_map(_Prepare(source, encoder)),
      len(source),
      encoder,
      data,
      batch_size,
      slice(shard_index, None, shard_count),
    )
  else:
    encoded = indices.random_map(_Encode(source, encoder))
    rows = _SingleRows(
      encoded[shard_index::shard_count],
      data.prefetch_batches * local_batch_size,
    )
  return grain.experimental.ThreadPrefetchIterDataset(
    _Batches(rows, len(source), data, local_batch_size),
    prefetch_buffer_size=data.prefetch_batches,
  )


def rows_per_epoch(
  source: Source, encoder: Encoder, data: DataConfig, seed: int
) -> float:
  """Rows that hold every record once; of packed rows, an estimate.

  It is exact for a source of 4096 records and less; for others the first 4096
  records that are trained on are packed.

  Raises:
    DataError: no record is good.
  """
  if data.batching != "pack":
    return float(len(source))
  count = min(len(source), _SAMPLE)
  prepared = _shuffled(source, data, seed).random_map(_Prepare(source, encoder))
  records = [
    x
    for x in map(prepared.__getitem__, range(count))
    if isinstance(x, Prepared) and x.length
  ]
  if not records:
    raise _nothing()
  packer = packing.Packer(records, len(records), data)
  rows = 1
  while packer.next_row() and not packer.done:
    rows += 1
  return rows * len(source) / count


def eval_records(
  source: Source,
  image_size: int,
  data: DataConfig,
  layout: str,
  report: Callable[[str], None] = logging.warning,
) -> Iterator[tuple[Record, UInt8[np.ndarray, "F S S 3"]]]:
  """Every record once, in order, with its images ready for the model.

  A bad record is left out and its message given to `report`. The text of a
  system turn is part of the first question.

  Args:
    source: the records.
    image_size: S.
    data: how many images a record may have, and what to do with a bad one.
    layout: the prompt layout that the questions are for.
    report: is given messages.

  Raises:
    DataError: a record is bad and `data.on_bad_record` is 'stop'.
  """
  for i in range(len(source)):
    try:
      with record_border(f"record {i}"):
        record = with_system(source[i], prompt.LAYOUTS[layout])
        pixels = load_images(record, image_size, data)
    except DataError as e:
      if data.on_bad_record == "stop":
        raise
      report(str(e))
      continue
    yield record, pixels


def _stopped(error: DataError) -> DataError:
  remedy = "leave such records out with config.data.on_bad_record=skip"
  return DataError(
    error.where, error.got, error.expected, f"{error.fix}, or {remedy}"
  )


def _nothing() -> DataError:
  return DataError(
    "config.data",
    "no record with a conversation to train on",
    "some",
    "shorten config.data.skip_answers",
  )


def _seed32(seed: int) -> int:
  """`seed` as Grain wants it: any integer to one below 2**32."""
  digest = hashlib.sha256(str(seed).encode()).digest()
  return int.from_bytes(digest[:4], "little")


def _shuffled(source: Source, data: DataConfig, seed: int) -> grain.MapDataset:
  """Indices of records for ever, each epoch in an order of its own."""
  if data.weights:
    order = grouping.MixedOrder(source, data, _seed32(seed))
    return grain.MapDataset.source(order).seed(_seed32(seed))
  indices = grain.MapDataset.range(len(source))
  return indices.seed(_seed32(seed)).shuffle().repeat()


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.RandomMap):
  """Index of a record to the record prepared, unless it is left out."""

  source: Source
  encoder: Encoder

  def random_map(
    self, index: int, rng: np.random.Generator
  ) -> Prepared | Skipped:
    try:
      with record_border(f"record {index}"):
        return self.encoder.prepare(self.source[index], rng)
    except DataError as e:
      return Skipped(e)


@dataclasses.dataclass(frozen=True)
class _Encode(grain.transforms.RandomMap):
  """Index of a record to a `packing.Row` with it alone."""

  source: Source
  encoder: Encoder

  def random_map(self, index: int, rng: np.random.Generator) -> packing.Row:
    try:
      with record_border(f"record {index}"):
        return self.encoder(self.source[index], rng), (), ""
    except DataError as e:
      return None, (Skipped(e),), ""


class _SingleRows:
  """Rows of one record each; their state is a number of records.

  So it fits any number of workers.
  """

  def __init__(self, rows: grain.MapDataset, buffer_size: int):
    self.start = {"next_record": 0}
    self._rows = rows
    self._buffer_size = buffer_size

  def read(self, state: dict) -> grain.IterDataset:
    # One thread: decoding holds the interpreter lock most of the time.
    return self._rows[state["next_record"] :].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._buffer_size)
    )

  def after(self, state: dict, row: packing.Row) -> dict:
    return {"next_record": state["next_record"] + 1}


class _Batches(grain.IterDataset):
  """Rows to batches; skips bad records or stops at them."""

  def __init__(
    self,
    rows: "_SingleRows | packing.PackedRows",
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
  """Its state is that of the rows it was made of, whoever prepares more."""

  def __init__(self, dataset: _Batches):
    super().__init__()
    self._dataset = dataset
    self._state = dataset.rows.start
    self._rows: grain.DatasetIterator | None = None
    self._bad_in_a_row = 0

  def __next__(self) -> Batch:
    if self._rows is None:
      self._rows = self._start()
    rows, bad = [], []
    while len(rows) < self._dataset.batch_size:
      row = next(self._rows)
      self._state = self._dataset.rows.after(self._state, row)
      arrays, skipped, _ = row
      if self._dataset.data.on_bad_record == "stop":
        for record in skipped:
          if record.stops:
            raise _stopped(record.error)
      bad += [str(record.error) for record in skipped]
      self._bad_in_a_row += len(skipped)
      # Two orders in a row may have their good records far apart.
      if self._bad_in_a_row >= 2 * self._dataset.num_records:
        raise DataError(
          "config.data",
          f"{self._bad_in_a_row} bad records in a row of a source of "
          f"{self._dataset.num_records}, the last of which is {bad[-1]}",
          "some good ones",
          "correct the records",
        )
      if arrays is None:
        if not skipped:
          raise _nothing()
        continue
      rows.append(arrays)
      if not skipped or arrays["segment_ids"].any():
        self._bad_in_a_row = 0
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return Batch(arrays, tuple(bad))

  def get_state(self) -> dict:
    return self._state

  def set_state(self, state: dict):
    self._stop()
    self._state = state

  def close(self):
    self._stop()
    super().close()

  def _start(self) -> grain.DatasetIterator:
    data = self._dataset.data
    rows = self._dataset.rows.read(self._state)
    if data.num_workers:
      if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its flags
        flags.FLAGS.mark_as_parsed()
      rows = rows.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=data.num_workers,
          per_worker_buffer_size=-(
            -self._dataset.batch_size // data.num_workers
          ),
        ),
        worker_init_fn=workers.begin,
      )
    return iter(rows)

  def _stop(self):
    if self._rows is not None:
      self._rows.close()
      self._rows = None
