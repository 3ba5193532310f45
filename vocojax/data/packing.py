"""Which records share a text row. Read next: pipeline.py.

A row has room for T text tokens and F images. Of the records that wait, in the
order in which they were read, the oldest goes into the next row, and with it
those that fill the row best. That takes lengths and counts only: images are
decoded when it is known which row they go to.
"""

import collections
import copy
import json
from collections.abc import Sequence

import grain

from vocojax.config import DataConfig
from vocojax.data.rows import Arrays, Encoder, Prepared, Skipped
from vocojax.data.sources import record_border
from vocojax.errors import DataError

# What a reader of rows gives: the row, or None if it came to nothing, records
# that were left out on the way, and the state after its batch, as JSON.
Row = tuple[Arrays | None, tuple[Skipped, ...], str]
START = {"next_record": 0, "waiting": []}


def choose(
  lengths: Sequence[int],
  num_images: Sequence[int],
  max_length: int,
  max_images: int,
) -> list[int]:
  """Indices of the records that share a row with the first one.

  The row gets as many text tokens as any choice gives it, of those choices one
  with the most images (or the records without would be gone before they can
  fill the text of rows that have all their images), and of those the records
  that have waited longest.

  All sums that a choice can reach are kept as the bits of a number, as in the
  textbook solution of the subset-sum problem: adding a record is a shift.

  Args:
    lengths: above 0; the first at most `max_length`.
    num_images: the first at most `max_images`.
    max_length: text tokens of a row.
    max_images: image slots of a row.
  """
  text, slots = max_length - lengths[0], max_images - num_images[0]
  mask = (1 << (text + 1)) - 1
  # Bit s of reached[f]: some records looked at so far have s tokens in all, and
  # f images. From the newest on, so that the way back meets the oldest first.
  reached, before = [1] + [0] * slots, {}
  for i in range(len(lengths) - 1, 0, -1):
    before[i] = reached
    length, count = lengths[i], num_images[i]
    reached = [
      bits | (reached[f - count] << length & mask if f >= count else 0)
      for f, bits in enumerate(reached)
    ]
  images = max(range(slots + 1), key=lambda f: (reached[f].bit_length(), f))
  tokens = reached[images].bit_length() - 1
  chosen = [0]
  for i, reached in sorted(before.items()):
    length, count = lengths[i], num_images[i]
    if length > tokens or count > images:
      continue
    if reached[images - count] >> (tokens - length) & 1:
      chosen.append(i)
      tokens, images = tokens - length, images - count
  return chosen


class Packer:
  """Deals records out to rows, one epoch after the other.

  Every good record of an epoch is in one row, and in none together with a
  record of another epoch, so the last rows of an epoch may be emptier.
  """

  def __init__(
    self,
    records: Sequence[Prepared | Skipped] | grain.MapDataset,
    epoch_length: int,
    data: DataConfig,
    state: dict = START,
  ):
    """Goes on where another one was in `state`.

    Args:
      records: in order, prepared, or what is wrong with them.
      epoch_length: number of records of an epoch.
      data: sizes of a row, and how many records may wait for one.
      state: of the other one.
    """
    self._records = records
    self._epoch_length = epoch_length
    self._data = data
    self._next = state["next_record"]
    self._waiting = {i: records[i] for i in state["waiting"]}

  @property
  def state(self) -> dict:
    """Index of the next record to be read, and of those that wait."""
    return {"next_record": self._next, "waiting": list(self._waiting)}

  @property
  def done(self) -> bool:
    """Whether the last row was that of an epoch."""
    return not self._waiting and self._next % self._epoch_length == 0

  def next_row(self) -> tuple[list[Prepared], list[Skipped]]:
    """Records of a row, and those that were left out on the way.

    There are no records if none of the last two epochs was good.
    """
    bad = self._read()
    if not self._waiting:
      return [], bad
    keys, records = zip(*self._waiting.items(), strict=True)
    chosen = choose(
      [x.length for x in records],
      [x.num_images for x in records],
      self._data.max_text_length,
      self._data.max_images,
    )
    return [self._waiting.pop(keys[i]) for i in chosen], bad

  def _read(self) -> list[Skipped]:
    """Reads until enough records wait, or all that are left of an epoch."""
    bad, useless = [], 0
    while len(self._waiting) < self._data.pack_lookahead:
      # Two orders in a row may have their good records far apart.
      if self._waiting and self._next % self._epoch_length == 0:
        break
      if useless == 2 * self._epoch_length:
        break
      record = self._records[self._next]
      self._next += 1
      if isinstance(record, Prepared) and record.length:
        self._waiting[self._next - 1] = record
        continue
      useless += not self._waiting
      if isinstance(record, Skipped):
        bad.append(record)
    return bad


class PackedRows(grain.IterDataset[Row]):
  """Rows of several records. Every reader packs all, and makes its own.

  So the state of the packer, which each row carries, is all that is needed to
  go on with any number of readers, and a bad image, which is found last,
  changes no other row.
  """

  start = START

  def __init__(
    self,
    records: grain.MapDataset,
    epoch_length: int,
    encoder: Encoder,
    data: DataConfig,
    batch_size: int,
    own: slice,
  ):
    """Records and so on are those of `Packer`.

    Args:
      records: for ever, in order.
      epoch_length: number of records of an epoch.
      encoder: makes a row.
      data: for the packer.
      batch_size: rows of a batch, over all processes.
      own: the rows of this process, without end.
    """
    super().__init__()
    self.records = records
    self.epoch_length = epoch_length
    self.encoder = encoder
    self.data = data
    self.batch_size = batch_size
    self.own = own
    self.state = START

  def read(self, state: dict) -> "PackedRows":
    """The rows from the batch on that begins in this state."""
    result = copy.copy(self)
    result.state = state
    return result

  def after(self, state: dict, row: Row) -> dict:
    """The state after the batch of this row."""
    return json.loads(row[2])

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    """Keeps some of the own rows; called by Grain in a worker."""
    start, step = self.own.start, self.own.step
    self.own = slice(start + step * sl.start, None, step * sl.step)

  def __iter__(self) -> "_PackedRowIterator":
    return _PackedRowIterator(self)


class _PackedRowIterator(grain.DatasetIterator[Row]):
  def __init__(self, rows: PackedRows):
    super().__init__()
    self._rows = rows
    self._packer = Packer(
      rows.records, rows.epoch_length, rows.data, rows.state
    )
    self._packed = 0  # rows, own or not
    self._ready = collections.deque()

  def __next__(self) -> Row:
    while not self._ready:
      self._pack_batch()
    records, bad, state = self._ready.popleft()
    if not records:
      return None, tuple(bad), state
    loaded = []
    for record in records:
      try:
        with record_border(f"record {record.record.id}"):
          loaded.append((record, self._rows.encoder.load(record)))
      except DataError as e:
        bad.append(Skipped(e))
    return self._rows.encoder.lay(loaded), tuple(bad), state

  def _pack_batch(self) -> None:
    own, batch = self._rows.own, []
    for number in range(self._packed, self._packed + self._rows.batch_size):
      records, bad = self._packer.next_row()
      mine = number >= own.start and (number - own.start) % own.step == 0
      if mine or not records:
        batch.append((records, bad))
      if not records:  # nor will there be: every reader says so
        break
    self._packed += self._rows.batch_size
    state = json.dumps(self._packer.state)
    self._ready.extend((records, bad, state) for records, bad in batch)

  def get_state(self) -> dict:
    return {}  # Grain asks for it, but nobody reads it: rows carry the state

  def set_state(self, state: dict) -> None:
    raise NotImplementedError("PackedRows.read starts in a state")
