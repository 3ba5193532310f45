"""Loss and accuracy on held-out records in training. Read next: `loop.py`.

Every record once, in order, with all its conversations. Nothing is drawn and
nothing of the training's data is read, so a run trains the same without it.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
import transformers
from absl import logging
from jax.sharding import Mesh

from vocojax.config import Config
from vocojax.data.rows import Arrays, Encoder, Prepared, Skipped, load_images
from vocojax.data.sources import Source, record_border
from vocojax.errors import DataError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import distributed, metrics, sharding, state, step

_KEYS = ("loss", "token_accuracy", "answer_accuracy")


class Validation:
  """Held-out records and the compiled pass over them.

  Of several processes each reads a block of the records.
  """

  def __init__(
    self,
    config: Config,
    model: VisionLanguageModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    source: Source,
    params: state.Params,
    mesh: Mesh,
  ):
    """Compiles when first called.

    Args:
      config: of the phase; a batch has the rows of one accumulated part.
      model: that is trained; positions are those that it is used with.
      tokenizer: of its texts.
      source: the held-out records, of which config.evaluation.max_records.
      params: shapes and shardings.
      mesh: as in training.
    """
    data = dataclasses.replace(config.data, flip_images=False, skip_answers=())
    compressor = config.model.compressor
    self._encoder = Encoder(
      tokenizer,
      config.prompt,
      data,
      config.model.vision.image_size,
      (compressor.num_voco_tokens,) if compressor.budgets else (),
      (model.stream.start, model.stream.stride),
    )
    self._config, self._data, self._source = config, data, source
    self._rows_of = sharding.rows(mesh)
    size = data.batch_size // config.training.accumulate
    index, count = sharding.data_share(mesh, size)
    self._local_size = size // count
    total = min(len(source), config.evaluation.max_records or len(source))
    self._block = range(total * index // count, total * (index + 1) // count)
    self._left_out: set[str] = set()
    self._step = jax.jit(
      step.make_eval_step(model.exact),
      in_shardings=(
        jax.tree.map(lambda p: p.sharding, params),
        self._rows_of,
      ),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(self, params: state.Params) -> dict[str, float]:
    """`validation_loss`, `_token_accuracy` and `_answer_accuracy`.

    Raises:
      DataError: a record is bad and config.data.on_bad_record is 'stop', or no
        token is trained.
    """
    total = dict.fromkeys(metrics.Sums().values, 0.0)
    pending = None
    for batch in itertools.chain(self._batches(), [None]):
      sums = None if batch is None else self._step(params, batch)
      # One batch late: the device computes while the next one is read.
      for key, x in (pending or {}).items():
        total[key] += float(x)
      pending = sums
    if not total["tokens"]:
      raise DataError(
        f"config.evaluation.split={self._config.evaluation.split}",
        "no token that is trained",
        "answers to compare with",
        "name another split, or set config.evaluation.every to 0",
      )
    means = metrics.Sums(total).means()
    return {f"validation_{key}": means[key] for key in _KEYS}

  def _batches(self) -> Iterator[dict[str, jax.Array]]:
    """As many on all processes; what a block lacks is empty rows."""
    rows = self._rows()
    while True:
      own = list(itertools.islice(rows, self._local_size))
      if not any(distributed.gather(bool(own))):
        return
      own += [self._encoder.lay([])] * (self._local_size - len(own))
      yield {
        key: jax.make_array_from_process_local_data(
          self._rows_of, np.stack([row[key] for row in own])
        )
        for key in own[0]
      }

  def _rows(self) -> Iterator[Arrays]:
    """Rows of a record each or, where they are packed, of several in order."""
    data = self._data
    most = data.max_conversations or math.inf
    row: list[tuple[Prepared, np.ndarray]] = []
    for one, pixels in self._conversations():
      joins = (
        bool(row)
        and row[-1][1] is pixels
        and len(row[-1][0].conversations) < most
      )
      text = one.length + sum(p.length for p, _ in row)
      images = (not joins) * len(pixels) + sum(len(x) for _, x in row)
      fits = text <= data.max_text_length and images <= data.max_images
      if row and not (fits and (joins or data.batching == "pack")):
        yield self._encoder.lay(row)
        row, joins = [], False
      if joins:
        both = row[-1][0].conversations + one.conversations
        row[-1] = dataclasses.replace(one, conversations=both), pixels
      else:
        row.append((one, pixels))
    if row:
      yield self._encoder.lay(row)

  def _conversations(self) -> Iterator[tuple[Prepared, np.ndarray]]:
    """Each with the pixels of its record, which are one object."""
    size, rng = self._config.model.vision.image_size, np.random.default_rng(0)
    for i in self._block:
      record = pixels = None
      with self._skips_bad(i):
        record = self._source[i]
        pixels = load_images(record, size, self._data)
      if record is None or pixels is None:
        continue
      for conversation in record.conversations:
        one, found = (
          dataclasses.replace(record, conversations=(conversation,)),
          None,
        )
        with self._skips_bad(i):
          found = self._encoder.prepare(one, rng)
        if found:
          yield found, pixels

  @contextlib.contextmanager
  def _skips_bad(self, index: int) -> Iterator[None]:
    """Leaves out what is bad of a record, and says so once; or raises it."""
    try:
      with record_border(f"record {index}"):
        yield
    except DataError as e:
      error = e.within("validation")
      if self._data.on_bad_record == "stop" and Skipped(e).stops:
        raise error from e
      if str(error) not in self._left_out:
        self._left_out.add(str(error))
        logging.warning("%s left out: %s", distributed.name(), error)
