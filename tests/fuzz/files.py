"""Mutations of a file, whatever is in it. Read next: documents.py."""

import os
import pathlib
from collections.abc import Callable

from tests.fuzz.kinds import Case, Declared, Input

Pick = Callable[[Input], pathlib.Path]  # the file to change
Change = Callable[[Input], object]


def one_of(*patterns: str) -> Pick:
  """Any file of an input whose path matches one of the patterns."""

  def pick(given: Input) -> pathlib.Path:
    found = {p for x in patterns for p in given.folder.glob(x) if p.is_file()}
    return given.rng.choice(sorted(found))

  return pick


def cases(pick: Pick, flips: Declared = "either") -> dict[str, Case]:
  """Damage that no format survives; `flips` is what flipped bits declare."""
  damage = {
    "empty": lambda data, rng: b"",
    "zeros": lambda data, rng: bytes(len(data)),
    "noise": lambda data, rng: rng.randbytes(len(data)),
  }
  result: dict[str, Case] = {
    name: ("refuse", changes(pick, change)) for name, change in damage.items()
  }
  result |= {
    name: ("refuse", _replaces(pick, put)) for name, put in TARGETS.items()
  }
  result["bits"] = flips, changes(pick, flip_bits)
  result["bytes"] = flips, changes(pick, set_bytes)
  return result


def changes(
  pick: Pick, change: Callable, known: bool = True
) -> Callable[[Input], None]:
  """A mutation of a file's bytes; `known` as for `documents`: the values stay.

  Args:
    pick: the file.
    change: makes other bytes of bytes and a random generator.
    known: whether what is read must be the original values.
  """

  def mutate(given: Input) -> None:
    path = pick(given)
    path.write_bytes(change(path.read_bytes(), given.rng))
    if not known:
      given.right = None

  return mutate


def flip_bits(data: bytes, rng) -> bytes:
  """One to three bits flipped; half of the time near the beginning."""
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 3))):
    end = len(data) if rng.random() < 0.5 else min(len(data), 200)
    result[rng.randrange(end)] ^= 1 << rng.randrange(8)
  return bytes(result)


def set_bytes(data: bytes, rng) -> bytes:
  """A few bytes at one place set to what programs stumble over."""
  at = rng.randrange(len(data))
  odd = (b"\0", b"\xff", b"\xff" * 4, b"\x7f" * 8, b"\x80", b"9" * 8, b'"')
  new = rng.choice(odd)
  return data[:at] + new + data[at + len(new) :]


def cut(data: bytes, rng) -> bytes:
  """The beginning, at least a byte short."""
  return data[: rng.randrange(1, len(data) - 1)]


def extend(data: bytes, rng) -> bytes:
  """Something after the end."""
  return data + rng.choice((b"\0", b"x", b"\xff" * 5000, data, b"]"))


TARGETS: dict[str, Callable[[pathlib.Path], object]] = {
  "missing": lambda path: None,
  "folder": lambda path: path.mkdir(),
  "pipe": lambda path: os.mkfifo(path),
  "endless_device": lambda path: path.symlink_to("/dev/zero"),
  "dangling_link": lambda path: path.symlink_to("nowhere"),
  "link_to_itself": lambda path: path.symlink_to(path),
}


def _replaces(pick: Pick, put: Callable) -> Callable[[Input], None]:
  def mutate(given: Input) -> None:
    path = pick(given)
    path.unlink()
    put(path)

  return mutate
