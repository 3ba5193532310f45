"""From records to rows of a batch. Read next: pipeline.py, packing.py.

F image slots per row, S pixels a side, T text length, R conversations that a
record can have at most. The arrays are described in pipeline.py.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import transformers
from jaxtyping import UInt8

from vocojax.config import DataConfig, PromptConfig
from vocojax.data import images, prompt
from vocojax.data.sources import Record
from vocojax.errors import DataError, OddRecord, shorten

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record that is left out, and why."""

  error: DataError

  @property
  def stops(self) -> bool:
    """Whether it stops a run unless `on_bad_record` is 'skip'.

    A text of which `truncate` leaves nothing to train on does not.
    """
    return not isinstance(self.error, OddRecord) or self.error.kind != "cut"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A record with all that is drawn and tokenised, but no pixels yet.

  Attributes:
    record: whose images are to be decoded.
    flips: whether to mirror them up and down, and left and right.
    conversations: ids and labels of each.
    num_voco_tokens: how many text sees of each image; 0 is all.
  """

  record: Record
  flips: tuple[bool, bool]
  conversations: tuple[tuple[list[int], list[int]], ...]
  num_voco_tokens: int = 0

  @property
  def length(self) -> int:
    return sum(len(ids) for ids, _ in self.conversations)

  @property
  def num_images(self) -> int:
    return len(self.record.images)


class Encoder:
  """Turns records into a row of a batch; can be pickled for workers."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompt_config: PromptConfig,
    data: DataConfig,
    image_size: int,
    budgets: tuple[int, ...] = (),
    image_positions: tuple[int, int] = (0, 0),
  ):
    """Makes rows as the config says.

    Args:
      tokenizer: of the text.
      prompt_config: layout of conversations.
      data: sizes of a row, and what is drawn.
      image_size: S.
      budgets: numbers of VoCo tokens, one of which is drawn for each record;
        () if text sees all of them.
      image_positions: how many positions images take before a text: so many of
        all images together, and of each.
    """
    self._image_positions = image_positions
    self._budgets = budgets
    self._tokenizer = tokenizer
    self._layout = prompt.LAYOUTS[prompt_config.layout]
    self._strip_newlines = prompt_config.strip_newlines
    self._data = data
    self._image_size = image_size

  def __call__(self, record: Record, rng: np.random.Generator) -> Arrays:
    """The arrays of a row with one record, without the axis B.

    Raises:
      DataError: as `prepare` and `load` do.
    """
    prepared = self.prepare(record, rng)
    return self.lay([(prepared, self.load(prepared))])

  def prepare(self, record: Record, rng: np.random.Generator) -> Prepared:
    """Draws and tokenises.

    Samples `conversations_per_record` conversations of those whose last answer
    is not among `skip_answers`; those that no longer fit in a row beside the
    ones before are left out. A record may stay without text.

    Raises:
      DataError: there are too many images, or a conversation alone is longer
        than a row, or than its slot of it; an OddRecord if only `truncate`
        could help, or has left no answer.
    """
    data = self._data
    _check_number(record, data)
    record = with_system(record, self._layout)
    # One draw a record: its images may be compared with each other.
    flips = (False, False)
    if data.flip_images:
      flips = (bool(rng.integers(2)), bool(rng.integers(2)))
    conversations, room = [], data.max_text_length
    longest = self.longest(record)
    sampled = self._sample(record, rng)
    for turns in sampled:
      ids, labels = self.tokenize(record, turns)
      if len(ids) > longest:
        if data.on_long_text == "refuse":
          raise _too_long(record, len(ids), longest)
        ids, labels = ids[:longest], labels[:longest]
        if all(label == prompt.IGNORE for label in labels):
          continue
      room -= len(ids)
      if room < 0:
        break
      conversations.append((ids, labels))
    if sampled and not conversations:
      raise _nothing_left(record, longest)
    # Last, so that all else is drawn as without it.
    seen = int(rng.choice(self._budgets)) if self._budgets else 0
    return Prepared(record, flips, tuple(conversations), seen)

  def tokenize(
    self, record: Record, turns: Sequence[prompt.Turn]
  ) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation of a record, however long.

    Raises:
      DataError: the prompt layout cannot hold it.
    """
    try:
      return prompt.encode(
        self._layout,
        self._tokenizer,
        turns,
        num_images=len(record.images),
        strip_newlines=self._strip_newlines,
      )
    except DataError as e:
      raise e.within(f"record {record.id}") from e

  def longest(self, record: Record) -> int:
    """Most tokens of a conversation of a record.

    Where longer ones are cut, `max_text_length` counts all positions of a
    sequence, and those of the images come off it.
    """
    data = self._data
    longest = data.max_text_length // data.text_slots
    if data.on_long_text == "refuse" or not record.images:
      return longest
    together, each = self._image_positions
    taken = together + each * len(record.images)
    return max(0, min(longest, data.max_text_length - taken))

  def load(self, prepared: Prepared) -> UInt8[np.ndarray, "F S S 3"]:
    """Pixels of the images of a record.

    Raises:
      DataError: an image is bad.
    """
    pixels = load_images(prepared.record, self._image_size, self._data)
    for axis, flip in enumerate(prepared.flips, 1):
      if flip:
        pixels = np.flip(pixels, axis)
    return pixels

  def lay(self, records: Sequence[tuple[Prepared, np.ndarray]]) -> Arrays:
    """The arrays of a row from records that fit in it, and their pixels."""
    data, size = self._data, self._image_size
    row: Arrays = {
      "images": np.zeros((data.max_images, size, size, 3), np.uint8),
      "image_group_ids": np.zeros(data.max_images, np.int32),
      "input_ids": np.full(
        data.max_text_length, self._tokenizer.pad_token_id, np.int32
      ),
      "labels": np.full(data.max_text_length, prompt.IGNORE, np.int32),
      "segment_ids": np.zeros(data.max_text_length, np.int32),
      "text_group_ids": np.zeros(data.max_text_length, np.int32),
    }
    if data.max_conversations:
      row["image_segment_ids"] = np.zeros(
        (data.max_images, data.max_conversations), np.int32
      )
    if self._budgets:
      row["num_voco_tokens"] = np.zeros(data.max_images, np.int32)
    start = slot = group = segment = 0
    for prepared, pixels in records:
      slots = slice(slot, slot + len(pixels))
      group += bool(len(pixels))
      row["images"][slots] = pixels
      row["image_group_ids"][slots] = group
      if self._budgets:
        row["num_voco_tokens"][slots] = prepared.num_voco_tokens
      slot = slots.stop
      for i, (ids, labels) in enumerate(prepared.conversations):
        if data.text_slots > 1:  # the row is this record's alone
          start = i * data.max_text_length // data.text_slots
        stop = start + len(ids)
        segment += 1
        row["input_ids"][start:stop] = ids
        row["labels"][start:stop] = labels
        row["segment_ids"][start:stop] = segment
        row["text_group_ids"][start:stop] = group if len(pixels) else 0
        if data.max_conversations:
          row["image_segment_ids"][slots, i] = segment
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


def with_system(record: Record, layout: prompt.Layout) -> Record:
  """A record whose system turn, if any, is part of the first questions.

  Raises:
    DataError: there is one, and the layout has no place for it.
  """
  if not record.system:
    return record
  if layout.system_end is None:
    places = [x.name for x in prompt.LAYOUTS.values() if x.system_end]
    raise DataError(
      f"record {record.id}: system turn",
      shorten(record.system),
      f"none, as prompt layout {layout.name} has no place for another text",
      f"remove the turn, or set config.prompt.layout to {' or '.join(places)}",
    )
  conversations = tuple(
    ((f"{record.system}{layout.system_end}{question}", answer), *later)
    for (question, answer), *later in record.conversations
  )
  return dataclasses.replace(record, conversations=conversations, system="")


def load_images(
  record: Record, image_size: int, data: DataConfig
) -> UInt8[np.ndarray, "F S S 3"]:
  """Decoded and scaled images of a record, as many as it has.

  Raises:
    DataError: an image is bad, or there are more than `data.max_images`.
  """
  _check_number(record, data)
  processor = images.ImageProcessor(image_size, data.pad_to_square)
  result = np.zeros((len(record.images), image_size, image_size, 3), np.uint8)
  for i, source in enumerate(record.images):
    try:
      result[i] = processor(source, _image_name(source, i))
    except DataError as e:
      raise e.within(f"record {record.id}") from e
  return result


def _image_name(source: bytes | pathlib.Path, index: int) -> str:
  return f"image {index}" if isinstance(source, bytes) else str(source)


def _check_number(record: Record, data: DataConfig) -> None:
  if len(record.images) > data.max_images:
    raise DataError(
      f"record {record.id}",
      f"{len(record.images)} images",
      f"at most {data.max_images}",
      "raise config.data.max_images, or remove the record",
    )


def _too_long(record: Record, length: int, longest: int) -> OddRecord:
  return OddRecord(
    f"record {record.id}",
    f"a conversation of {length} tokens",
    f"at most {longest}",
    "raise config.data.max_text_length, shorten it, or have it cut by "
    "config.data.on_long_text=truncate",
    kind="long",
  )


def _nothing_left(record: Record, longest: int) -> OddRecord:
  return OddRecord(
    f"record {record.id}",
    f"no answer among its first {longest} tokens",
    "some of one",
    "shorten the question, or raise config.data.max_text_length",
    kind="cut",
  )
