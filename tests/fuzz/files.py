"""Mutations of a file, whatever is in it. Read next: documents.py."""

import os
import pathlib
from collections.abc import Callable

from tests.fuzz.kinds import Case, Input, Mutation

Pick = Callable[[Input], pathlib.Path]  # the file to change

# What may be in the place of a file.
TARGETS: dict[str, Callable[[pathlib.Path], object]] = {
  "missing": lambda path: None,
  "folder": lambda path: path.mkdir(),
  "pipe": lambda path: os.mkfifo(path),
  "endless_device": lambda path: path.symlink_to("/dev/zero"),
  "dangling_link": lambda path: path.symlink_to("nowhere"),
  "link_to_itself": lambda path: path.symlink_to(path),
}


def one_of(*patterns: str) -> Pick:
  """Any file of an input whose path matches one of the patterns."""

  def pick(given: Input) -> pathlib.Path:
    found = {p for x in patterns for p in given.folder.glob(x) if p.is_file()}
    return given.rng.choice(sorted(found))

  return pick


def cases(pick: Pick, known: bool = True) -> dict[str, Case]:
  """Damage; `known`: what is read in spite of it must be the original."""

  def target(put) -> Mutation:
    def mutate(given: Input) -> None:
      path = pick(given)
      path.unlink()
      put(path)

    return mutate

  return {
    **{name: ("refuse", target(put)) for name, put in TARGETS.items()},
    "empty": ("refuse", changes(pick, lambda data, rng: b"")),
    "zeros": ("refuse", changes(pick, lambda data, rng: bytes(len(data)))),
    "noise": ("refuse", changes(pick, lambda x, rng: rng.randbytes(len(x)))),
    "bits": ("either", changes(pick, flip_bits, known)),
    "bytes": ("either", changes(pick, set_bytes, known)),
    "cut": ("either", changes(pick, cut, known)),
    "extended": ("either", changes(pick, extend, known)),
  }


def changes(pick: Pick, change: Callable, known: bool = True) -> Mutation:
  """A mutation of a file's bytes, which `change` gets with a generator."""

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
  return data[: rng.randrange(len(data) - 1)]


def extend(data: bytes, rng) -> bytes:
  """Something after the end."""
  return data + rng.choice((b"\0", b"x", b"\xff" * 5000, data, b"]"))
