"""Checksums of a checkpoint: what is read is what was written.

STEP/checksums.json holds the number of the step and, for each file of its
items, the size and a digest of every 64 MiB of it. It is written before the
folder gets its final name. On several hosts each one sums the arrays that it
wrote itself, and when they load, each compares a part of the files. Read next:
`checkpoint.py`.

The digests find damage, such as a flipped bit or a file of another step. They
are no protection against someone who means to deceive.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vocojax.core import files
from vocojax.errors import CheckpointError, UserError, shorten
from vocojax.training import distributed

FILE = "checksums.json"
_FORMAT = "vocojax-checksums/1"
_BLOCK = 2**26  # bytes that a digest is of
_SMALL = 2**22  # bytes of a file that is compared before anything is read
_WORKERS = min(8, os.cpu_count() or 1)
_FIX = "use another step, or copy this one again"

# By the name of a file: its size, and the digest of each block of it.
_Sums = dict[str, list[int]]


def write_own(item: str | os.PathLike) -> None:
  """Sums what this process wrote of an item of arrays, for `write` to collect.

  To be called by each process, when all of its own files are on disk.
  """
  index = jax.process_index()
  folder = files.to_path(item)
  own = folder / f"ocdbt.process_{index}"  # as Orbax calls it
  files.write_atomic(
    folder / f"{FILE}.process_{index}",
    json.dumps(_sum(folder, _regular_files(own))),
    CheckpointError,
  )


def write(folder: pathlib.Path, step: int) -> None:
  """Writes the checksums of all items in the folder of a step."""
  sums: _Sums = {}
  for part in folder.glob(f"*/{FILE}.process_*"):
    own = files.read_json(part, dict, CheckpointError)
    sums |= {f"{part.parent.name}/{name}": x for name, x in own.items()}
    part.unlink()
  items = [path for path in folder.iterdir() if path.is_dir()]
  others = (
    path
    for item in items
    for path in _regular_files(item)
    if path.relative_to(folder).as_posix() not in sums
  )
  sums |= _sum(folder, others)
  content = {"format": _FORMAT, "step": step, "files": sums}
  files.write_atomic(folder / FILE, json.dumps(content), CheckpointError)


@contextlib.contextmanager
def checked(
  folder: pathlib.Path,
  step: int,
  items: Iterable[str],
  together: bool = False,
) -> Iterator[bool]:
  """Compares files with their checksums while a block reads them.

  Sizes and small files are compared before the block begins, large ones
  meanwhile: only its end says that what it has read is right.

  Args:
    folder: of the step.
    step: its number.
    items: which are read; the files of no others are compared.
    together: all processes do this with the same arguments, and each compares
      a part of the files.

  Yields:
    Whether there are checksums.

  Raises:
    CheckpointError: a file is missing, damaged or of another step, or it is a
      pipe or a device. It comes instead of what the block raised, unless that
      is a UserError.
  """
  if not (folder / FILE).exists():
    for item in items:
      for _ in _regular_files(folder / item):
        pass
    yield False
    return
  blocks = _expected(folder, step, items)
  if together:
    blocks = blocks[jax.process_index() :: jax.process_count()]
  pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
  compared = zip(blocks, pool.map(_digest, blocks), strict=True)
  small = sum(block.size <= _SMALL for block in blocks)
  try:
    _raise_damage(itertools.islice(compared, small), step, together)
    try:
      yield True
    except UserError:
      raise
    except Exception:
      _raise_damage(compared, step, together)
      raise
    _raise_damage(compared, step, together)
  finally:
    pool.shutdown(cancel_futures=True)


@functools.cache
def say_missing(folder: pathlib.Path) -> None:
  """Says, once, that the checkpoint of a step has no checksums."""
  if jax.process_index() == 0:
    print(
      f"{folder}: has no {FILE}, so damage to it goes unnoticed; checkpoints "
      "that this version writes have one",
      file=sys.stderr,
    )


class _Block(NamedTuple):
  path: pathlib.Path
  size: int  # of the file
  offset: int
  digest: int = 0  # what it is expected to be


def _expected(
  folder: pathlib.Path, step: int, items: Iterable[str]
) -> list[_Block]:
  """All blocks of items, of small files first."""
  sums, blocks = _read(folder, step), []
  for item in items:
    names = [name for name in sums if name.startswith(f"{item}/")]
    if not names:
      raise CheckpointError(
        folder / FILE, f"no file of {item}", "those of all items", _FIX
      )
    for name in names:
      path = files.path_inside(folder, name, folder / FILE, CheckpointError)
      size, *digests = sums[name]
      with _open(path) as file:
        found = files.size_of(file)
      if found != size:
        raise CheckpointError(
          path, f"{found:,} bytes", f"{size:,} as written", _FIX
        )
      blocks += [
        _Block(path, size, i * _BLOCK, x) for i, x in enumerate(digests)
      ]
  return sorted(blocks, key=lambda block: block.size)


def _raise_damage(
  compared: Iterable[tuple[_Block, int]], step: int, together: bool
) -> None:
  """Raises if a block has another digest than expected, in any process."""
  path = next((str(b.path) for b, x in compared if x != b.digest), "")
  paths = distributed.gather(path) if together else [path]
  for path in filter(None, paths):
    raise CheckpointError(
      path, "damaged content", f"what was written at step {step}", _FIX
    )


def _read(folder: pathlib.Path, step: int) -> _Sums:
  """The checksums of a step, of the right form."""
  where = folder / FILE
  content = files.read_json(where, dict, CheckpointError)
  form = files.get_field(content, "format", str, where, CheckpointError)
  if form != _FORMAT:
    raise CheckpointError(
      where,
      f"format {shorten(form)}",
      _FORMAT,
      "use the vocojax that wrote the checkpoint",
    )
  written = files.get_field(content, "step", int, where, CheckpointError)
  if written != step:
    raise CheckpointError(
      folder,
      f"items of step {written}",
      f"those of step {step}, as the folder is named",
      f"name the folder {written} again, or use another step",
    )
  sums = files.get_field(content, "files", dict, where, CheckpointError)
  for name, values in sums.items():
    if (
      type(values) is not list
      or any(type(x) is not int or x < 0 for x in values)
      or len(values) != 1 + _count(values[0] if values else 0)
    ):
      raise CheckpointError(
        f"{where}: files.{name}",
        shorten(values),
        "a size and its checksums",
        _FIX,
      )
  return sums


def _regular_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """All files in a folder, which may not be a pipe or a device.

  Orbax would wait for somebody to write to a pipe.

  Raises:
    CheckpointError: one is.
  """
  for path in sorted(folder.rglob("*")):
    if not path.is_dir():
      _open(path).close()
      yield path


def _open(path: pathlib.Path) -> Any:
  try:
    return files.open_regular(path, CheckpointError)
  except CheckpointError as e:
    raise CheckpointError(e.where, e.got, e.expected, _FIX) from e


def _sum(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> _Sums:
  """Sizes and digests, by the name in `folder`."""
  sums: _Sums = {}
  blocks = []
  for path in paths:
    size = path.stat().st_size
    sums[path.relative_to(folder).as_posix()] = [size]
    blocks += [_Block(path, size, i * _BLOCK) for i in range(_count(size))]
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    for block, digest in zip(blocks, pool.map(_digest, blocks), strict=True):
      sums[block.path.relative_to(folder).as_posix()].append(digest)
  return sums


def _count(size: int) -> int:
  """How many blocks a file has."""
  return -(-size // _BLOCK)


def _digest(block: _Block) -> int:
  """CRC-32 of the sums over the rows and columns of 256 KiB after the other.

  Either sum shows a flipped bit, and two that cancel out in one differ in the
  other; the CRC shows that sums changed places. Six times as fast as a CRC of
  all bytes, which would take a third of the time of loading.
  """
  digest, end = 0, block.offset + _BLOCK
  words = np.zeros((64, 512), "<u8")
  piece: Any = words.view(np.uint8).reshape(-1).data
  with _open(block.path) as file:
    file.seek(block.offset)
    while file.tell() < end:
      try:
        n = file.readinto(piece)
      except OSError as e:
        raise CheckpointError(
          block.path, e.strerror or str(e), "a readable file", _FIX
        ) from e
      if not n:
        break
      piece[n:] = bytes(len(piece) - n)
      for axis in (0, 1):
        digest = zlib.crc32(words.sum(axis), digest)
  return digest
