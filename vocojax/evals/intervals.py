"""Means over seeds with their 95 % intervals. Read next: rows.py."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

# Student's t, 97.5 % quantile for 1, 2, ... 30 degrees of freedom, as printed
# in the NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
_T = (
  *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
  *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
  *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean, and half the width of its interval.

  Attributes:
    value: the mean.
    half_width: the mean of all seeds is within so much of `value`, in 95 of
      100 such experiments; None of one seed, which says nothing about others.
    count: how many seeds.
  """

  value: float
  half_width: float | None
  count: int

  def __str__(self) -> str:
    if self.half_width is None:
      return f"{self.value:.1f}"
    return f"{self.value:.1f} ± {self.half_width:.1f}"


def mean(values: Sequence[float]) -> Mean:
  """The mean of one value a seed, with the interval by Student's t.

  Beyond 31 values the quantile stays that of 31, which makes the interval up to
  4 % too wide.

  Raises:
    ValueError: there are no values.
  """
  if not values:
    raise ValueError("a mean of nothing")
  count = len(values)
  if count == 1:
    return Mean(float(values[0]), None, 1)
  quantile = _T[min(count - 1, len(_T)) - 1]
  error = statistics.stdev(values) / math.sqrt(count)
  return Mean(statistics.fmean(values), quantile * error, count)
