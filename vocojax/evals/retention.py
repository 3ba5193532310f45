"""How much of the full image survives compression. Read next: report.py.

A score alone does not tell how good a compression is: the benchmark may be
easy without the image. Retention places the score between two bounds that are
runs of the same model: text that sees every patch and the VoCo tokens, and the
same weights with the patches hidden behind VoCo tokens they were never trained
to fill (VoCo-LLaMA paper, section 4.2).
"""

import math
from collections.abc import Iterable

from vocojax.errors import UserError


def retention(result: float, lower: float, upper: float) -> float:
  """Returns 100 * (result - lower) / (upper - lower), in percent.

  All three are scores of one benchmark in one unit. The value may exceed 100,
  when compression helps, or be negative (VoCo-LLaMA paper, table 1).

  Raises:
    UserError: a score is not finite, or both bounds are the same number.
  """
  for name, score in (("result", result), ("lower", lower), ("upper", upper)):
    if not math.isfinite(score):
      raise UserError(
        f"retention: {name} score",
        str(score),
        "a finite number",
        "evaluate that model again",
      )
  if upper == lower:
    raise UserError(
      "retention: bounds",
      f"{upper} twice",
      "two numbers",
      "train the upper bound further",
    )
  return 100 * (result - lower) / (upper - lower)


def average_retention(scores: Iterable[tuple[float, float, float]]) -> float:
  """Returns the plain mean of `retention` over (result, lower, upper) triples.

  Each benchmark counts once, whatever its unit or size.

  Raises:
    UserError: there are no scores, or `retention` cannot use one.
  """
  values = [retention(*triple) for triple in scores]
  if not values:
    raise UserError(
      "retention", "no benchmark", "at least one", "evaluate on one first"
    )
  return sum(values) / len(values)
