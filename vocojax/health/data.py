"""Training data: what the trainer would refuse or leave out. Next: doctor.py.

Each record is judged by the code that trains on it: a source, `prompt.encode`
and `pipeline.Encoder`. JSON, text and whether images exist are checked of all
records; images are decoded for a sample, since that takes far longer.
"""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tqdm
import transformers

from vocojax.config import Config
from vocojax.data import images, pipeline, prompt
from vocojax.data.rows import with_system
from vocojax.data.sources import ODD, Record, Source, record_border
from vocojax.errors import DataError, OddRecord
from vocojax.health.findings import Finding, count

SAMPLE = 1000  # records whose images are decoded
_LONG = 10  # sides of an image as many times each other lose most of it

# Kinds of records that the trainer refuses.
_BAD = {
  "entry": "bad records",
  **ODD,
  "missing": "missing images",
  "images": "too many images",
  "decode": "images that cannot be decoded",
}


@dataclasses.dataclass
class Survey:
  """What one pass over the records of a phase found.

  Attributes:
    records: how many there are.
    decoded: how many of them had their images decoded.
    bad: messages of the trainer about the records that it refuses, by kind.
    odd: the same about images of a size that says little.
    cut: records of which some conversations do not fit in the row.
    shortened: records of which the end of a text is cut off.
    empty: records without a conversation to train on.
    repeated: ids that several records have, with the number of records.
    lengths: tokens of each conversation.
  """

  records: int
  decoded: int = 0
  bad: dict[str, list[str]] = dataclasses.field(
    default_factory=lambda: {kind: [] for kind in _BAD}
  )
  odd: list[str] = dataclasses.field(default_factory=list)
  cut: list[str] = dataclasses.field(default_factory=list)
  shortened: list[str] = dataclasses.field(default_factory=list)
  empty: list[str] = dataclasses.field(default_factory=list)
  repeated: dict[str, int] = dataclasses.field(default_factory=dict)
  lengths: list[int] = dataclasses.field(default_factory=list)

  @property
  def wrong(self) -> list[str]:
    """All that there is something to say about, but repeated ids."""
    return [
      *self.refused,
      *(f"{x}: an image of odd size" for x in self.odd),
      *(f"{x}: conversations left out" for x in self.cut),
      *(f"{x}: the end of its text is cut off" for x in self.shortened),
      *(f"{x}: no text" for x in self.empty),
    ]

  @property
  def refused(self) -> list[str]:
    return [message for kind in self.bad.values() for message in kind]


def survey(
  source: Source,
  tokenizer: transformers.PreTrainedTokenizerFast,
  config: Config,
  image_positions: tuple[int, int] = (0, 0),
  sample: int = SAMPLE,
) -> Survey:
  """Goes through all records, with a progress bar.

  Args:
    source: the records.
    tokenizer: of the run.
    config: one phase.
    image_positions: as of `pipeline.Encoder`.
    sample: how many records have their images decoded, chosen at random.
  """
  result = Survey(len(source))
  encoder = pipeline.Encoder(
    tokenizer,
    config.prompt,
    config.data,
    config.model.vision.image_size,
    image_positions=image_positions,
  )
  surveyor = _Surveyor(result, encoder, config)
  order = np.random.default_rng(config.seed).permutation(len(source))
  chosen = set(order[:sample].tolist())
  ids: collections.Counter[str] = collections.Counter()
  for i in tqdm.tqdm(
    range(len(source)),
    desc=f"data of {config.name}",
    unit="record",
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
  ):
    try:
      with record_border(f"record {i}"):
        record = source[i]
        ids[record.id] += 1
        surveyor.look(record, decode=i in chosen)
    except DataError as e:
      kind = e.kind if isinstance(e, OddRecord) else "entry"
      result.bad[kind].append(str(e))
  result.repeated = {id_: n for id_, n in ids.items() if n > 1}
  return result


class _Surveyor:
  """Looks at one record after the other."""

  def __init__(self, result: Survey, encoder: pipeline.Encoder, config: Config):
    self._result = result
    self._encoder = encoder
    self._layout = prompt.LAYOUTS[config.prompt.layout]
    self._data = config.data
    self._vision = config.model.vision

  def look(self, record: Record, decode: bool) -> None:
    """Adds what there is to say about a record to the result.

    Raises:
      DataError: its text cannot be trained on.
    """
    data, result = self._data, self._result
    record = with_system(record, self._layout)
    turns = [
      c for c in record.conversations if c[-1][1] not in data.skip_answers
    ]
    lengths = [len(self._encoder.tokenize(record, t)[0]) for t in turns]
    result.lengths += lengths
    longest = self._encoder.longest(record)
    kind = "decode"
    if any(
      isinstance(x, pathlib.Path) and not x.is_file() for x in record.images
    ):
      kind = "missing"
    elif len(record.images) > data.max_images:
      kind = "images"
    elif too_long := [
      t for t, n in zip(turns, lengths, strict=True) if n > longest
    ]:
      if data.on_long_text == "refuse":
        record = dataclasses.replace(record, conversations=(too_long[0],))
      self._encoder.prepare(record, np.random.default_rng(0))
      result.shortened.append(f"record {record.id}")
      lengths = [min(n, longest) for n in lengths]
    if decode or kind != "decode":
      result.decoded += kind == "decode"
      try:
        self._encoder(record, np.random.default_rng(0))
      except DataError as e:
        result.bad[kind].append(str(e))
        return
      for image in record.images:
        self._size(record, image)
    if not turns:
      result.empty.append(f"record {record.id}")
    taken = data.conversations_per_record or len(lengths)
    if sum(sorted(lengths)[-taken:]) > data.max_text_length:
      result.cut.append(f"record {record.id}")

  def _size(self, record: Record, image: bytes | pathlib.Path) -> None:
    """Whether an image that can be decoded shows anything."""
    with images.open_image(image) as opened:
      short, long = sorted(opened.size)
      width, height = opened.size
    name = "" if isinstance(image, bytes) else f" {image}"
    if short < self._vision.patch_size or long > _LONG * short:
      self._result.odd.append(f"record {record.id}:{name} {width}x{height}")


def findings(found: Survey, config: Config) -> Iterator[Finding]:
  """The lines of a survey."""
  name = f"data of {config.name}"
  status = "error" if config.data.on_bad_record == "stop" else "warning"
  for kind, title in _BAD.items():
    if messages := found.bad[kind]:
      more = f" (and {len(messages) - 1:,} more)" if len(messages) > 1 else ""
      # The message says what to do.
      yield Finding(
        f"{name}, {title}",
        f"{len(messages):,}",
        "warning" if kind == "cut" else status,
        messages[0] + more,
      )
  if found.odd:
    yield Finding(
      f"{name}, images of odd size",
      _first(found.odd),
      "warning",
      f"look at them: they are below {config.model.vision.patch_size} pixels "
      f"high or wide, or more than {_LONG} times as long as wide",
    )
  if found.cut:
    yield Finding(
      f"{name}, conversations that are left out",
      f"some of {_first(found.cut)}",
      "warning",
      f"all that do not fit into {config.data.max_text_length} tokens with "
      "those before them; raise config.data.max_text_length",
    )
  if found.shortened:
    yield Finding(
      f"{name}, texts that are cut off",
      _first(found.shortened),
      "warning",
      f"sequences end at {config.data.max_text_length} tokens, images counted, "
      "as LLaVA's do (config.data.on_long_text)",
    )
  if found.empty:
    yield Finding(
      f"{name}, records without text",
      _first(found.empty),
      "warning",
      "config.data.skip_answers leaves out all that they have; remove them",
    )
  if found.repeated:
    often = max(found.repeated, key=found.repeated.__getitem__)
    yield Finding(
      f"{name}, repeated ids",
      f"{len(found.repeated):,}, {often} {found.repeated[often]:,} times",
      "warning",
      "harmless in training; other ids would tell the records apart in errors",
    )
  good = found.records - len(found.refused)
  if len(found.refused) == len(found.bad["cut"]):  # they stop no run
    status = "warning"
  yield Finding(
    f"{name}, records",
    f"{good:,} of {found.records:,} can be trained on (images of "
    f"{found.decoded:,} decoded)",
    status if found.refused else "OK",
    ""
    if not found.refused
    else "training stops at the first other one; correct them, or set "
    "config.data.on_bad_record=skip to leave them out"
    if status == "error"
    else "training leaves out the others",
  )
  if found.lengths:
    lengths = np.array(found.lengths)
    yield Finding(
      f"{name}, text",
      f"{count(len(lengths), 'conversation')} of {lengths.mean():.0f} tokens "
      f"on average, half within {np.median(lengths):.0f}, 95 % within "
      f"{np.percentile(lengths, 95):.0f}, the longest {lengths.max()}, a row "
      f"{config.data.max_text_length}",
    )


def _first(messages: list[str]) -> str:
  return f"{len(messages):,}, the first: {messages[0]}"
