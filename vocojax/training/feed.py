"""The data of a run on any number of hosts. Read next: `loop.py`.

Each host loads its share of the rows of every batch; JAX puts the shares
together to global arrays. Which hosts load which share follows from the mesh.
"""

import contextlib
import threading

import jax
from absl import logging
from jax.sharding import Mesh

from vocojax.config import DataConfig
from vocojax.core import workers
from vocojax.data import grouping, pipeline
from vocojax.data.sources import Source
from vocojax.errors import DataError, one_line
from vocojax.training import distributed, sharding

SLOW_SECONDS = 30  # a batch that takes longer is reported


class Feed:
  """Batches as global arrays, and how far they were read.

  With `micro_batches`, a batch also says which each of its rows belongs to, as
  `micro_batch_ids` [B]; see data/grouping.py.

  Attributes:
    shard_count: shares that every batch consists of.
    bad_records: how many of this share were skipped since the start.
    fill: of this share of the last batch; see `pipeline.Batch`.
  """

  def __init__(
    self,
    source: Source,
    encoder: pipeline.Encoder,
    data: DataConfig,
    seed: int,
    mesh: Mesh,
    micro_batches: bool = False,
  ):
    self._rows = sharding.rows(mesh)
    self._index, self.shard_count = sharding.data_share(mesh, data.batch_size)
    self._has_workers = data.num_workers > 0
    self._extra = {}
    if micro_batches:
      self._extra["micro_batch_ids"] = grouping.micro_batch_ids(
        data, self._index, self.shard_count
      )
    self._may_skip = data.on_bad_record == "skip" or (
      data.on_long_text == "truncate"
    )
    self.bad_records = 0
    self.fill: dict[str, int] = {}
    self._iterator = iter(
      pipeline.train_dataset(
        source,
        encoder,
        data,
        seed,
        self._index,
        self.shard_count,
        data.batch_size // self.shard_count,
      )
    )

  def __next__(self) -> dict[str, jax.Array]:
    """The next batch; bad records that were skipped for it are logged.

    Raises:
      DataError: a record is bad, or a worker process died.
    """
    if self._has_workers:
      workers.start(self._iterator)
    with self._named():
      batch = next(self._iterator)
    for message in batch.bad_records:
      logging.warning(
        "%s skipped a bad record: %s", distributed.name(), message
      )
    self.bad_records += len(batch.bad_records)
    self.fill = batch.fill
    return {
      key: jax.make_array_from_process_local_data(self._rows, x)
      for key, x in (batch.arrays | self._extra).items()
    }

  @contextlib.contextmanager
  def _named(self):
    """Says which process waits long for data or fails to get it, and where."""
    where = (
      f"the batch after record {self._iterator.get_state()['next_record']}"
    )
    slow = threading.Timer(
      SLOW_SECONDS,
      logging.warning,
      (
        "%s has waited %g s for data, %s of its share; its data workers, disk "
        "or network are slow, and all hosts wait for it",
        distributed.name(),
        SLOW_SECONDS,
        where,
      ),
    )
    slow.daemon = True
    slow.start()
    try:
      yield
    except RuntimeError as e:
      if "terminated unexpectedly" not in str(e):
        e.add_note(f"{distributed.name()} was reading {where} of its share")
        raise
      raise DataError(
        f"{distributed.name()}: {where} of its share",
        f"a data worker that died ({one_line(e)[:120]})",
        "workers that live as long as the run",
        "lower config.data.num_workers or config.data.prefetch_batches if it "
        "was out of memory, and run the same command again",
      ) from e
    finally:
      slow.cancel()

  def total(self, count: int) -> int:
    """The sum of `bad_records` at one step over all shares.

    It waits for what the devices are doing, unless bad records stop the run
    anyway.
    """
    if not self._may_skip:
      return 0
    # By share: several processes may load the same.
    return sum(dict(distributed.gather((self._index, count))).values())

  def states(self) -> list[dict]:
    """How far each share was read; the same on all processes."""
    states = dict(distributed.gather((self._index, self._iterator.get_state())))
    return [states[index] for index in range(self.shard_count)]

  def go_to(self, states: list[dict]) -> None:
    """Goes on from what `states` gave, one for each share."""
    self._iterator.set_state(states[self._index])

  def close(self) -> None:
    self._iterator.close()
