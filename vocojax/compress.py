"""Compresses a folder of images into a store, once for all questions.

  python -m vocojax.compress --checkpoint=WORKDIR/voco --images=DIR --store=URL

What the store has is skipped, so that the same command goes on where it was
stopped. Files that are no images are listed at the end, and the exit status is
1. `python -m vocojax.ask --store=URL` then finds the images without the vision
tower. Read next: inference/folder.py, engine.py, store.py.
"""

import concurrent.futures
import contextlib
import dataclasses
import re
import signal
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from absl import flags, logging

import vocojax
from vocojax import cli
from vocojax.errors import UserError, shorten
from vocojax.inference.cache import VocoCache
from vocojax.inference.engine import Engine
from vocojax.inference.folder import ImageFile, find_images, read_images
from vocojax.inference.store import CacheStore
from vocojax.training import checkpoint

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Phase folder of a workdir, or one step of it.",
  required=True,
)
_IMAGES = flags.DEFINE_string(
  "images", None, "Folder of image files; subfolders count.", required=True
)
_STORE = flags.DEFINE_string(
  "store",
  None,
  "Where to put them: a folder, or a URL file://, gs:// or s3://.",
  required=True,
)
_NUM_VOCO_TOKENS = flags.DEFINE_integer(
  "num_voco_tokens",
  None,
  "Tokens to make of an image; by default as the checkpoint was trained.",
)
_INT8 = flags.DEFINE_boolean(
  "int8",
  False,
  "Store 8-bit numbers: half the bytes of bfloat16. What the store has stays "
  "as it is.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 8, "Images compressed at a time.", lower_bound=1
)
_NUM_WORKERS = flags.DEFINE_integer(
  "num_workers",
  0,
  "Processes that decode images; 0 decodes in a thread of this one.",
  lower_bound=0,
)
_SHARD = flags.DEFINE_string(
  "shard",
  None,
  "I/N: take only every N-th file, from the I-th, counting from 0. By default "
  "JAX's process of all processes.",
)


def main() -> int | None:
  logging.set_verbosity(logging.WARNING)
  paths = find_images(_IMAGES.value)
  index, count = _shard(_SHARD.value)
  paths = paths[index::count]
  with CacheStore(_STORE.value) as store:
    engine = vocojax.load(
      _CHECKPOINT.value,
      num_voco_tokens=_NUM_VOCO_TOKENS.value,
      slots=1,
      max_images=0,
      compress_batch=_BATCH_SIZE.value,
    )
    config = checkpoint.load(_CHECKPOINT.value).config
    there = store.hashes(engine.origin, engine.num_image_tokens)
    files = read_images(
      paths,
      frozenset(there),
      config.model.vision.image_size,
      config.data.pad_to_square,
      2 * _BATCH_SIZE.value,
      _NUM_WORKERS.value,
    )
    work = _Work(engine, store, _INT8.value, len(paths))
    with contextlib.closing(files), _Stop() as stop:
      work.run(files, stop)
  return work.report(stop.arrived)


def _shard(text: str | None) -> tuple[int, int]:
  if text is None:
    return jax.process_index(), jax.process_count()
  match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
  if match is None or int(match[1]) >= int(match[2]):
    raise UserError(
      "--shard",
      shorten(text),
      "I/N with I from 0 to N - 1, such as 0/4",
      "correct it",
    )
  return int(match[1]), int(match[2])


class _Work:
  """Images on their way into the store."""

  def __init__(
    self, engine: Engine, store: CacheStore, int8: bool, num_files: int
  ):
    self._engine = engine
    self._store = store
    self._int8 = int8
    self._num_files = num_files
    self._waiting: dict[str, np.ndarray] = {}  # pixels by hash
    self._seen: set[str] = set()  # read before in this run
    self._compressed = self._skipped = 0
    self._failed: list[str] = []
    self._seconds = 0.0
    self._entry: VocoCache | None = None  # what an image becomes

  def run(self, files: Iterator[ImageFile], stop: "_Stop") -> None:
    """Compresses a batch while the one before is being stored.

    Raises:
      CacheError: the store cannot be written to.
    """
    started = time.perf_counter()
    bar = tqdm.tqdm(
      total=self._num_files,
      desc="compressed",
      unit="image",
      mininterval=1 if sys.stderr.isatty() else 20,
      dynamic_ncols=True,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(1) as writer:
      pending = None
      for image in files:
        self._take(image, bar)
        if len(self._waiting) == self._engine.compress_batch:
          pending = self._flush(writer, pending, bar)
        if stop.arrived:
          break
      else:
        if self._waiting:
          pending = self._flush(writer, pending, bar)
      self._settle(pending, bar)
    self._seconds = time.perf_counter() - started

  def report(self, stopped: bool) -> int:
    """Prints what was done; the exit status."""
    if self._entry is not None:
      entry, k = self._entry, self._entry.num_voco_tokens
      print(
        f"each image: {self._engine.num_patches:,} patches -> {k:,} "
        f"token{'s' if k > 1 else ''}, {entry.nbytes // entry.num_images:,} "
        f"bytes ({entry.dtype})"
      )
    for line in self._failed:
      print(f"failed: {line}", file=sys.stderr)
    rate = f" ({self._compressed / self._seconds:,.1f} images/s)"
    print(
      f"{self._num_files:,} files: {self._compressed:,} compressed"
      f"{rate if self._compressed else ''}, {self._skipped:,} already in "
      f"{self._store.url}, {len(self._failed):,} failed"
    )
    if stopped:
      done = self._compressed + self._skipped
      print(
        f"stopped: {done:,} of {self._num_files:,} are in the store; the same "
        "command resumes from there"
      )
      return 130
    return 1 if self._failed else 0

  def _take(self, image: ImageFile, bar: tqdm.tqdm) -> None:
    if image.error:
      self._failed.append(image.error)
    elif image.pixels is None or image.digest in self._seen:
      self._skipped += 1
    else:
      self._seen.add(image.digest)
      self._waiting[image.digest] = image.pixels
      return
    bar.update()

  def _flush(self, writer, pending, bar: tqdm.tqdm):
    """Compresses what is waiting and starts to store it."""
    cache = self._engine.compress(list(self._waiting.values()))
    # Known by its file, so that it is found without decoding the file.
    cache = dataclasses.replace(cache, image_hashes=tuple(self._waiting))
    if self._int8:
      cache = cache.quantize()
    self._waiting = {}
    self._settle(pending, bar)
    return cache, writer.submit(self._store.put, cache)

  def _settle(self, pending, bar: tqdm.tqdm) -> None:
    """Waits until a batch is in the store."""
    if pending is None:
      return
    cache, written = pending
    written.result()
    self._entry = cache
    self._compressed += cache.num_images
    bar.update(cache.num_images)


class _Stop:
  """Notes Ctrl-C or SIGTERM, so that a batch can be finished.

  A second one ends the program at once.
  """

  def __enter__(self):
    self.arrived = False
    self._before = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _note(self, *_):
    self.arrived = True
    self._restore()

  def _restore(self):
    for number, before in self._before.items():
      signal.signal(number, before)

  def __exit__(self, *_):
    self._restore()


if __name__ == "__main__":
  cli.run(main, __doc__)
