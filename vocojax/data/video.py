"""Video files to frames, as an image model wants them. Read next: images.py.

Alphabet: F frames, S pixels a side. One frame a second is taken, counted as
LLaMA-VID counts: frames 0, r, 2r, ... of the file, r being its frames per
second rounded to a whole number.
"""

import os
import types
from collections.abc import Iterator

import numpy as np
from absl import logging
from jaxtyping import UInt8

from vocojax.data import images
from vocojax.errors import DataError, UserError


def read_frames(
  path: str | os.PathLike, max_frames: int, size: int, pad_to_square: bool
) -> UInt8[np.ndarray, "F S S 3"]:
  """One frame a second of a video, each scaled as `images.ImageProcessor` does.

  Args:
    path: a video file of any format that FFmpeg reads.
    max_frames: of more frames, the middles of so many equal parts are kept.
    size: S.
    pad_to_square: as in `config.data`.

  Raises:
    UserError: PyAV is not installed.
    DataError: the file is missing or damaged, or has no picture.
  """
  av = _library(path)
  processor = images.ImageProcessor(size, pad_to_square)
  frames: list[np.ndarray] = []
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise DataError(
          f"{path}: found no pictures in it, expected a video; replace the file"
        )
      stream = container.streams.video[0]
      stream.thread_type = "AUTO"
      rate = stream.average_rate or stream.guessed_rate or 1
      step = max(1, round(rate))
      for index, frame in enumerate(_decode(av, container, stream)):
        if index % step == 0:
          image = frame.to_image()
          frames.append(processor.scale(image))
  except (av.FFmpegError, ValueError) as e:
    raise DataError(
      f"{path}: not a video that can be read ({' '.join(str(e).split())}); "
      "replace the file"
    ) from e
  if not frames:
    raise DataError(
      f"{path}: found no frame in it, expected a video; replace the file"
    )
  return np.stack([frames[i] for i in _spread(len(frames), max_frames)])


def _decode(av: types.ModuleType, container, stream) -> Iterator:
  """The frames of a stream without its damaged packets, which are logged."""
  damaged = 0
  for packet in container.demux(stream):
    try:
      yield from packet.decode()
    except av.error.InvalidDataError:
      damaged += 1
  if damaged:
    logging.warning("%s: left out %d damaged packets", container.name, damaged)


def _spread(found: int, most: int) -> list[int]:
  """All indices, or the middles of `most` equal parts.

  >>> _spread(10, 2)
  [2, 7]
  """
  count = min(found, most)
  return [(2 * i + 1) * found // (2 * count) for i in range(count)]


def _library(path: str | os.PathLike) -> types.ModuleType:
  try:
    import av
  except ImportError as e:
    raise UserError(
      f"{path}: a video, but PyAV is not installed, which reads videos; pip "
      "install av, or this package with its extra 'video'"
    ) from e
  return av
