"""A tensor that lies in a file. Read next: `files.py`, which finds them."""

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_AXES = 64  # of a numpy array
_MAX_SIZE = 2**40  # of an axis


def is_shape(sizes: Sequence[Any]) -> bool:
  """Whether they can be the sizes of the axes of an array."""
  return len(sizes) <= _MAX_AXES and all(
    type(n) is int and 0 <= n <= _MAX_SIZE for n in sizes
  )


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor of a file: contiguous, little endian, last axis fastest."""

  path: pathlib.Path
  offset: int  # bytes
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The part `[start:stop]` of the first axis, mapped and read-only.

    The mapping lasts as long as the array, and takes memory only for the pages
    that were touched.
    """
    stop = self.shape[0] if stop is None else stop
    shape = (stop - start, *self.shape[1:])
    row = self.nbytes // max(1, self.shape[0])
    if not math.prod(shape):
      return np.zeros(shape, self.dtype)
    begin = self.offset + start * row
    aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
    length = self.offset + stop * row - aligned
    with open(self.path, "rb") as f:
      mapped = mmap.mmap(
        f.fileno(), length, access=mmap.ACCESS_READ, offset=aligned
      )
    if hasattr(mapped, "madvise"):  # reads ahead, in long pieces
      mapped.madvise(mmap.MADV_WILLNEED)
    flat = np.frombuffer(mapped, self.dtype, math.prod(shape), begin - aligned)
    return flat.reshape(shape)
