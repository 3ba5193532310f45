"""Parameters that are read from files piece by piece. Next: `stream.py`.

A leaf knows shape and dtype of one of our parameters and gives any box of it:
a chunk to be written, or the shard of a device. Only the rows of the published
tensors that are in the box are mapped.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Shaped

from vocojax.weights import hf
from vocojax.weights.stored import Stored

Box = tuple[slice, ...]  # start and stop of every axis


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(abc.ABC):
  """One parameter.

  Attributes:
    path: 'a/b/c' in the tree of parameters.
    shape: of the whole.
    dtype: that it is given in.
    names: the published tensors it is made of; empty for random values.
  """

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  names: tuple[str, ...]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize

  @property
  @abc.abstractmethod
  def stacked(self) -> bool:
    """Whether axis 0 is that of the layers."""

  @property
  @abc.abstractmethod
  def row_axis(self) -> int:
    """Where the first axis of the published tensors is; split for reading."""

  @abc.abstractmethod
  def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
    """A part of the parameter, contiguous."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors(Leaf):
  """One published tensor, or one for each layer."""

  rule: hf.Rule
  tensors: tuple[Stored, ...]

  @property
  def stacked(self) -> bool:
    return self.rule.stacked

  @property
  def row_axis(self) -> int:
    last = self.rule.transform != "copy"
    return len(self.shape) - 1 if last else int(self.stacked)

  def read(self, box):
    if not self.stacked:
      return self._one(self.tensors[0], box)
    layers = [self._one(t, box[1:]) for t in self.tensors[box[0]]]
    return layers[0][None] if len(layers) == 1 else np.stack(layers)

  def _one(self, tensor: Stored, box: Box):
    if self.rule.transform == "copy":
      rows, *rest = box
      x = tensor.rows(rows.start, rows.stop)[(slice(None), *rest)]
    else:
      *rest, rows = box
      x = tensor.rows(rows.start, rows.stop)
      if self.rule.transform == "transpose":
        x = hf.to_ours(x[:, rest[0]], "transpose")
      else:
        x = hf.to_ours(x, "patches")[rest[0]]
    return np.ascontiguousarray(x, self.dtype)


@dataclasses.dataclass(frozen=True)
class Move:
  """`count` rows of a vocabulary, from `source` on, go to `target` on."""

  target: int
  source: int
  count: int


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyTensor(Leaf):
  """An embedding or head, its rows put where our vocabulary has them.

  Rows that nothing is moved to are 0, but for a new `<voco>`.
  """

  rule: hf.Rule
  tensor: Stored
  moves: Sequence[Move]
  voco_id: int
  voco_row: Float32[np.ndarray, " D"] | None  # where the source has none

  @property
  def stacked(self) -> bool:
    return False

  @property
  def row_axis(self) -> int:
    return 1 if self.rule.transform == "transpose" else 0

  def read(self, box):
    rows, columns = box[self.row_axis], box[1 - self.row_axis]
    x = self._rows(rows.start, rows.stop, columns)
    return hf.to_ours(x, self.rule.transform)

  def _rows(self, start: int, stop: int, columns: slice):
    x = np.zeros((stop - start, columns.stop - columns.start), self.dtype)
    for move in self.moves:
      first = max(start, move.target)
      last = min(stop, move.target + move.count)
      if first < last:
        shift = move.source - move.target
        found = self.tensor.rows(first + shift, last + shift)
        x[first - start : last - start] = found[:, columns]
    if self.voco_row is not None and start <= self.voco_id < stop:
      x[self.voco_id - start] = self.voco_row[columns].astype(self.dtype)
    return x


@dataclasses.dataclass(frozen=True, eq=False)
class Values(Leaf):
  """A parameter that is at hand, such as a random one."""

  values: Shaped[np.ndarray, "..."]

  @property
  def stacked(self) -> bool:
    return False

  @property
  def row_axis(self) -> int:
    return 0

  def read(self, box):
    return np.ascontiguousarray(self.values[box], self.dtype)
