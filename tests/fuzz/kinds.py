"""What a kind of input is, and when what was read of it is right.

Read next: child.py, then any *_kinds.py.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from vocojax.errors import UserError

Parts = dict[str, Any]  # by name, of plain values; a refused one is an error


@dataclasses.dataclass
class Input:
  """A sound input, for a mutation to change.

  Attributes:
    folder: holds it.
    rng: all that a mutation draws comes from here.
    right: what must be read of it; None where that cannot be known.
    also: each rewrites the input to one of which the same must be read.
  """

  folder: pathlib.Path
  rng: random.Random
  right: Parts | None
  also: list[Callable[[], object]] = dataclasses.field(default_factory=list)


Declared = Literal["read", "refuse", "either"]
Case = tuple[Declared, Callable[[Input], object]]


@dataclasses.dataclass(frozen=True)
class Kind:
  """Inputs that one reader of the package reads.

  Attributes:
    make: writes a sound input into a folder; returns what must be read of it.
    read: reads a folder as the programs do.
    cases: mutations by name, and what each declares.
    drawn: names of mutations that differ widely by seed; drawn more often.
  """

  make: Callable[[pathlib.Path], Parts]
  read: Callable[[pathlib.Path], Parts]
  cases: dict[str, Case]
  drawn: tuple[str, ...] = ()


def array(x: np.ndarray) -> tuple:
  """An array as a value that `==` compares to the bit."""
  x = np.asarray(x)
  return str(x.dtype), x.shape, x.tobytes()


def attempt(read: Callable[[], Any]) -> Any:
  """What is read, or the error that refuses it."""
  try:
    return read()
  except UserError as e:
    return e


def judge(kind: Kind, declared: Declared, given: Input) -> tuple[str, str]:
  """Reads a mutated input; what came of it, and more in words.

  Returns:
    'read' or 'refused', if that was declared. Else 'wrong' if other values than
    the right ones were read, 'taken' if it had to be refused, 'rejected' if it
    had to be read, 'message' if an error is not in one line or lacks a field.
  """
  parts = attempt(lambda: kind.read(given.folder))
  refused = list(_refusals(parts))
  shown = f"{refused[0]}" if refused else ""
  if declared == "read" and refused:
    return "rejected", shown
  if declared == "refuse" and not refused:
    return "taken", f"{parts!r}"[:300]
  if given.right is not None and not _is_right(parts, given.right):
    for rewrite in given.also:
      rewrite()
      other = attempt(lambda: kind.read(given.folder))
      if _is_right(parts, other):
        break
    else:
      return "wrong", _difference(parts, given.right)
  for error in refused:
    if fault := _fault_of(error):
      return "message", fault
  return ("refused", shown) if refused else ("read", "")


def _refusals(parts: Any) -> Iterator[UserError]:
  if isinstance(parts, UserError):
    yield parts
  else:
    yield from (x for x in parts.values() if isinstance(x, UserError))


def _is_right(parts: Any, right: Any) -> bool:
  """Whether everything that was not refused is as it should be."""
  if isinstance(parts, UserError):
    return True
  if isinstance(right, UserError):
    return False
  if parts.keys() != right.keys():
    return False
  return all(
    isinstance(x, UserError) or x == right[name] for name, x in parts.items()
  )


def _difference(parts: Parts, right: Parts) -> str:
  if parts.keys() != right.keys():
    return f"read {sorted(parts)[:9]}, expected {sorted(right)[:9]}"
  name = next(
    name
    for name, x in parts.items()
    if not isinstance(x, UserError) and x != right[name]
  )
  return f"{name}: read {parts[name]!r:.300}, expected {right[name]!r:.300}"


def _fault_of(error: UserError) -> str:
  """What is wrong with the error itself."""
  text = str(error)
  if not text.isprintable():
    return f"not one printable line: {text!r:.300}"
  if len(text) > 1500:
    return f"{len(text):,} characters: {text:.300}"
  fields = (error.where, error.got, error.expected, error.fix)
  return "" if all(fields) else f"a field is empty: {text:.300}"
