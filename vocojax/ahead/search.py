"""How many samples a chip takes. Read next: measure.py."""

from collections.abc import Callable

from vocojax.ahead.measure import DoesNotFitError, Measurement


def largest(
  compile_with: Callable[[int], Measurement],
  first: Measurement | None,
  samples: int,
  capacity: float,
  report: Callable[[str], None],
) -> tuple[int, Measurement] | None:
  """The most samples a chip with which a program compiles.

  Memory is close to linear in them, so that a few of the slow compilations are
  enough: from two of them the limit is guessed, then made sure of. What the
  compiler refuses is what does not fit.

  Args:
    compile_with: compiles for so many samples a chip; raises DoesNotFitError.
    first: result for `samples`, None if that does not fit.
    samples: where to begin.
    capacity: bytes of a chip.
    report: takes a line about each compilation.

  Returns:
    How many, and their measurement; None if not even one fits.
  """
  fits: dict[int, Measurement] = {}
  too_many = None
  if first is None:
    too_many = samples
  else:
    fits[samples] = first
  while too_many is None or too_many > max(fits, default=0) + 1:
    candidate = _next(fits, too_many, capacity)
    try:
      fits[candidate] = compile_with(candidate)
    except DoesNotFitError as e:
      too_many = candidate
      report(f"{candidate} samples a chip: does not fit ({e})")
      continue
    peak = fits[candidate].peak_bytes / 2**30
    report(f"{candidate} samples a chip: fits, peak {peak:.2f} GiB")
  best = max(fits, default=0)
  return (best, fits[best]) if best else None


def _next(
  fits: dict[int, Measurement], too_many: int | None, capacity: float
) -> int:
  """What to try next: more than fits, less than does not."""
  best = max(fits, default=0)
  if len(fits) < 2:
    return 2 * best if too_many is None else (best + too_many) // 2
  before = max(n for n in fits if n != best)
  peak = fits[best].peak_bytes
  slope = (peak - fits[before].peak_bytes) / (best - before)
  guess = best + int((capacity - peak) / slope) if slope > 0 else 2 * best
  guess = max(guess, best + 1)
  return guess if too_many is None else min(guess, too_many - 1)
