"""A folder of image files, read ahead of use, with Grain. Read next: store.py.

S pixels a side of an image as the model wants it.
"""

import dataclasses
import os

import grain
from jaxtyping import UInt8
from numpy import ndarray

from vocojax.core import files, workers
from vocojax.data import images
from vocojax.errors import DataError
from vocojax.inference.cache import image_hash

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageFile:
  """An image file that was read.

  Attributes:
    digest: hash of its bytes; '' if it could not be read.
    pixels: None if they are known already, or cannot be had.
    error: what is wrong with it, if anything.
  """

  digest: str = ""
  pixels: UInt8[ndarray, "S S 3"] | None = None
  error: str = ""


def find_images(folder: str) -> list[str]:
  """Paths of all image files in a folder and its subfolders, sorted.

  Raises:
    DataError: it is no folder, or there are none.
  """
  root = files.expand_user(folder)
  if not root.is_dir():
    raise DataError(
      folder, "no such folder", "a folder of image files", "correct --images"
    )
  paths = sorted(
    os.path.join(where, name)
    for where, _, names in os.walk(root)
    for name in names
    if name.lower().endswith(SUFFIXES)
  )
  if not paths:
    raise DataError(
      folder,
      "no image file",
      f"files that end in {' '.join(SUFFIXES)}",
      "name another folder with --images",
    )
  return paths


def read_images(
  paths: list[str],
  known: frozenset[str],
  size: int,
  pad_to_square: bool,
  ahead: int,
  num_workers: int,
) -> grain.DatasetIterator:
  """An iterator of one `ImageFile` for each path, in their order.

  Args:
    paths: of the files.
    known: hashes of files that are not to be decoded.
    size: S.
    pad_to_square: as in `config.data`.
    ahead: images that are read ahead.
    num_workers: processes that do so; 0 is a thread of this one.
  """
  # One thread: decoding holds the interpreter lock most of the time.
  dataset = (
    grain.MapDataset.source(paths)
    .map(_Read(known, size, pad_to_square))
    .to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    )
  )
  if num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers,
        per_worker_buffer_size=-(-ahead // num_workers),
      ),
      worker_init_fn=workers.begin,
    )
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=1
    )
  files = iter(dataset)
  if num_workers:
    workers.start(files)
  return files


@dataclasses.dataclass(frozen=True)
class _Read(grain.transforms.Map):
  """Path to `ImageFile`."""

  known: frozenset[str]
  size: int
  pad_to_square: bool

  def map(self, path: str) -> ImageFile:
    digest = ""
    try:
      content = files.read_bytes(path, limit=images.MAX_BYTES)
      digest = image_hash(content)
      if digest in self.known:
        return ImageFile(digest)
      processor = images.ImageProcessor(self.size, self.pad_to_square)
      pixels = processor(content, path)
    except DataError as e:
      return ImageFile(digest, error=str(e))
    return ImageFile(digest, pixels)
