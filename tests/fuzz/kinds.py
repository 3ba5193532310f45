"""What a kind of input is, and when what was read of it is right.

Read next: child.py, then any *_kinds.py.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable
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
    also: rewrites the input to one of which the same may be read.
  """

  folder: pathlib.Path
  rng: random.Random
  right: Parts | None
  also: Callable[[], object] | None = None


Mutation = Callable[[Input], object]
Case = tuple[Literal["read", "refuse", "either"], Mutation]


@dataclasses.dataclass(frozen=True)
class Kind:
  """Inputs that one reader of the package reads.

  Attributes:
    make: writes a sound input into a folder; returns what must be read of it.
    read: reads a folder as the programs do.
    cases: what each mutation declares, and the mutation, by name.
    drawn: mutations that differ widely by seed, and are drawn more often.
  """

  make: Callable[[pathlib.Path], Parts]
  read: Callable[[pathlib.Path], Parts]
  cases: dict[str, Case]
  drawn: tuple[str, ...] = ()


def array(x: np.ndarray) -> tuple:
  """An array as a value that `==` compares to the bit."""
  return str(x.dtype), x.shape, x.tobytes()


def attempt(read: Callable, *arguments: Any) -> Any:
  """What is read, or the error that refuses it."""
  try:
    return read(*arguments)
  except UserError as e:
    return e


def judge(kind: Kind, case: str, given: Input) -> tuple[str, str]:
  """Mutates an input and reads it; what came of it, and more in words.

  Returns:
    'read' or 'refused', if that was declared. Else 'wrong' if other values than
    the right ones were read, 'taken' if it had to be refused, 'rejected' if it
    had to be read, 'message' if an error is not in one line or lacks a field.
  """
  declared, mutate = kind.cases[case]
  mutate(given)
  parts = attempt(kind.read, given.folder)
  found = [parts] if isinstance(parts, UserError) else parts.values()
  refused = [x for x in found if isinstance(x, UserError)]
  shown = f"{refused[0]}" if refused else ""
  if declared == "read" and refused:
    return "rejected", shown
  if declared == "refuse" and not refused:
    return "taken", f"{parts!r:.300}"
  if given.right is not None and (wrong := _difference(parts, given.right)):
    if given.also:
      given.also()
      if not _difference(parts, attempt(kind.read, given.folder)):
        wrong = ""
    if wrong:
      return "wrong", wrong
  for error in refused:
    fields = (error.where, error.got, error.expected, error.fix)
    if not all(fields) or not str(error).isprintable() or len(shown) > 1500:
      return "message", f"{error!s:.300}"
  return ("refused", shown) if refused else ("read", "")


def _difference(parts: Any, right: Any) -> str:
  """What of that which was not refused differs; '' if nothing does."""
  if isinstance(parts, UserError):
    return ""
  if isinstance(right, UserError):
    return f"read {parts!r:.300}, expected a refusal"
  read = {k: x for k, x in parts.items() if not isinstance(x, UserError)}
  # A refused part may be without its name, or stand for several.
  missing = right.keys() - read.keys() if read == parts else ()
  if missing or read.keys() - right.keys():
    return f"read {sorted(read)[:9]}, expected {sorted(right)[:9]}"
  for name, x in read.items():
    if x != right[name]:
      return f"{name}: read {x!r:.300}, expected {right[name]!r:.300}"
  return ""
