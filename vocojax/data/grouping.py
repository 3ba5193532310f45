"""Orders of records: mixtures of files, LLaVA's order. Read next: pipeline.py.

The latter is what LLaVA and VoCo-LLaMA train with as `group_by_modality_length`
(llava_trainer.py, commit c121f04), for runs that are compared with theirs:
records with and without images in batches of their own, and the text of a batch
in equal shares on all devices of one host: each gets a micro-batch, a run of
`config.data.micro_batch_size` rows. Rows keep their fixed length here, so
nothing is saved: `packing.py` does that.
"""

import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from vocojax.config import DataConfig
from vocojax.data.sources import Files, Source, record_border
from vocojax.errors import DataError


def micro_batch_ids(
  data: DataConfig, shard_index: int, shard_count: int
) -> Int32[np.ndarray, " B"]:
  """The micro-batch of each of a share's rows of a batch.

  Micro-batches are runs of rows in the order of `pipeline.train_dataset`, of
  which a share has every `shard_count`-th. They keep their size where bad
  records are skipped: the next ones move up.
  """
  places = np.arange(shard_index, data.batch_size, shard_count)
  return (places // data.micro_batch_size).astype(np.int32)


def signed_lengths(source: Source) -> Int64[np.ndarray, " R"]:
  """Words of each of the R records, below 0 where it has no image.

  Words are what white space separates, over all questions and answers. A bad
  record counts as one word.
  """
  result = np.ones(len(source), np.int64)
  for i in range(len(source)):
    try:
      with record_border(f"record {i}"):
        record = source[i]
    except DataError:  # comes again when the record's turn comes
      continue
    texts = (t for c in record.conversations for turn in c for t in turn)
    words = max(1, sum(len(text.split()) for text in texts))
    result[i] = words if record.images else -words
  return result


def order(
  signed_lengths: Int64[np.ndarray, " R"],
  batch_size: int,
  num_chunks: int,
  rng: np.random.Generator,
) -> Int64[np.ndarray, " R"]:
  """Indices of all records in the order of one epoch.

  Records with images and those without are shuffled apart and cut into batches.
  A batch is sorted, the longest first, and dealt out to chunks of equal size,
  each record to the chunk with the fewest words so far; chunks are what the
  original gives to one device at a time. Batches are shuffled. The last of
  either kind, which are seldom full, come at the end as one, sorted by index.
  """
  kinds = []
  for chosen in (signed_lengths > 0, signed_lengths < 0):
    indices = rng.permutation(np.flatnonzero(chosen))
    kinds.append(
      [
        _chunked(indices[i : i + batch_size], signed_lengths, num_chunks)
        for i in range(0, len(indices), batch_size)
      ]
    )
  with_images, without = kinds
  if not with_images or not without:
    return np.concatenate(with_images or without)
  batches = with_images[:-1] + without[:-1]
  batches = [batches[i] for i in rng.permutation(len(batches))]
  rest = np.sort(np.concatenate([with_images[-1], without[-1]]))
  return np.concatenate([*batches, rest])


def _chunked(indices, signed_lengths, num_chunks: int):
  """The indices of a batch sorted by length, chunk after chunk."""
  lengths = np.abs(signed_lengths[indices])
  # Stable, as the sort of the original is.
  indices = indices[np.argsort(-lengths, kind="stable")]
  size, rest = divmod(len(indices), num_chunks)
  if rest:
    return np.concatenate([indices[i::num_chunks] for i in range(num_chunks)])
  chunks = [[] for _ in range(num_chunks)]
  sums = np.zeros(num_chunks)
  for i in indices:
    shortest = int(np.argmin(sums))
    chunks[shortest].append(i)
    full = len(chunks[shortest]) == size
    sums[shortest] += np.inf if full else abs(signed_lengths[i])
  return np.concatenate(chunks)


def mixture(
  sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> Int64[np.ndarray, " R"]:
  """Indices of the records of one epoch of a mixture, file after file.

  Each file is read on from where the epoch before left it, in an order that is
  drawn anew whenever it begins again. So a small file may come several times in
  an epoch, and of a large one all records come in the end.

  Args:
    sizes: records of each file.
    weights: of each file; of the R records it gives its share, rounded.
    seed: of the orders.
    epoch: from 0.

  Raises:
    DataError: a file gives none.
  """
  ends = np.rint(np.cumsum(weights) / np.sum(weights) * sum(sizes))
  counts = np.diff(ends.astype(np.int64), prepend=0).tolist()
  if not all(sizes) or not all(counts):
    raise DataError(
      "config.data.weights",
      f"{tuple(weights)}: {counts} of {list(sizes)} records an epoch",
      "some of each file",
      "leave out the files that have or give none",
    )
  found = []
  for i, (size, count) in enumerate(zip(sizes, counts, strict=True)):
    passes, at = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
    for n in np.unique(passes):
      indices = np.random.default_rng([seed, i, n]).permutation(size)
      found.append(sum(sizes[:i]) + indices[at[passes == n]])
  return np.concatenate(found)


class _EpochOrder:
  """Indices of records for ever, in an order that depends on the seed only.

  A source for Grain.
  """

  def __init__(self, source: Source, data: DataConfig, seed: int):
    self._sizes = source.sizes if isinstance(source, Files) else (len(source),)
    self._weights = data.weights
    self._seed = seed
    self._epoch: tuple[int, np.ndarray] | None = None
    self._rows = len(source)  # of an epoch

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> int:
    epoch, at = divmod(index, self._rows)
    if self._epoch is None or self._epoch[0] != epoch:
      records = np.arange(sum(self._sizes))
      if self._weights:
        records = mixture(self._sizes, self._weights, self._seed, epoch)
      rng = np.random.default_rng([self._seed, epoch])
      self._epoch = (epoch, self._order(records, rng))
    return int(self._epoch[1][at % len(self._epoch[1])])

  def _order(self, records, rng: np.random.Generator):
    raise NotImplementedError


class MixedOrder(_EpochOrder):
  """All records of a mixture's epoch, shuffled."""

  def _order(self, records, rng):
    return rng.permutation(records)


class GroupedOrder(_EpochOrder):
  """LLaVA's order.

  The last batch of an epoch is filled up with the first records of the epoch,
  so that the batches of the next are whole again.
  """

  def __init__(
    self, source: Source, data: DataConfig, batch_size: int, seed: int
  ):
    super().__init__(source, data, seed)
    self._signed_lengths = signed_lengths(source)
    self._batch_size = batch_size
    self._num_chunks = batch_size // data.micro_batch_size
    self._rows = -(-len(source) // batch_size) * batch_size

  def _order(self, records, rng):
    return records[
      order(
        self._signed_lengths[records], self._batch_size, self._num_chunks, rng
      )
    ]
