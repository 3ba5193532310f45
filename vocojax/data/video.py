"""Video files to frames, as an image model wants them. Read next: images.py.

Alphabet: F frames, S pixels a side. One frame a second is taken. Where frames
follow each other evenly, they are counted as LLaMA-VID counts: frames 0, r, 2r,
... of the file, r being its frames per second rounded to a whole number. Where
they do not, as in videos of phones and screens, it is the frame that is shown
at each second.
"""

import os
import pathlib
import types
from collections.abc import Iterator

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from vocojax.core import files
from vocojax.data import images
from vocojax.errors import DataError, UserError

# Endings of the names of video files, in small letters.
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
# FFmpeg opens nothing else: a playlist would have it open other files.
_CONTAINERS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"
)


def find_video(stem: pathlib.Path) -> pathlib.Path:
  """The video file with one of the `SUFFIXES`, in small letters or capitals.

  Args:
    stem: the path without its ending.

  Raises:
    DataError: there is none.
  """
  paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
  for path in paths:
    if os.path.isfile(path):
      return path
  if os.path.isdir(stem.parent):
    for path in sorted(stem.parent.iterdir()):
      ending = path.name.removeprefix(stem.name)
      if stem.name + ending == path.name and ending.lower() in SUFFIXES:
        return path
  raise DataError(
    stem,
    "no such video",
    f"one that ends in {', '.join(SUFFIXES)}",
    "put it there",
  )


def read_frames(
  path: str | os.PathLike, max_frames: int, size: int, pad_to_square: bool
) -> UInt8[np.ndarray, "F S S 3"]:
  """One frame a second of a video, each as `images.ImageProcessor` makes it.

  Frames are turned upright, as the file says. A cover is no video.

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
  try:
    times = _times(av, path)
    with _open(av, path) as container:
      stream = _stream(av, container, path)
      rate = stream.average_rate or stream.guessed_rate or 1
      decoded = _decode(av, container, stream)
      chosen = (
        _counted(decoded, max(1, round(rate)))
        if times is None
        else _at_seconds(decoded, times, max_frames)
      )
      frames = [processor(_upright(av, frame), str(path)) for frame in chosen]
  except (av.FFmpegError, ValueError) as e:
    raise DataError(
      path,
      str(e),
      "a video that can be read",
      "replace the file",
    ) from e
  if not frames:
    raise DataError(path, "no frame in it", "a video", "replace the file")
  return np.stack([frames[i] for i in _spread(len(frames), max_frames)])


def _open(av: types.ModuleType, path: str | os.PathLike):
  """The container of a regular file; nothing else is opened for it."""
  files.open_regular(path).close()
  return av.open(
    f"file:{os.fspath(path)}", options={"format_whitelist": _CONTAINERS}
  )


def _stream(av: types.ModuleType, container, path: str | os.PathLike):
  """The first stream of pictures that is no cover."""
  cover = av.stream.Disposition.attached_pic
  for stream in container.streams.video:
    if not stream.disposition & cover:
      stream.thread_type = "AUTO"
      return stream
  raise DataError(
    path,
    "no pictures in it but a cover"
    if container.streams.video
    else "no pictures in it",
    "a video",
    "replace the file",
  )


def _times(av: types.ModuleType, path: str | os.PathLike) -> list[float] | None:
  """When the frames are shown, in seconds from the first.

  None if they follow each other evenly, within the length of one, or if the
  file does not say. Nothing is decoded.
  """
  with _open(av, path) as container:
    stream = _stream(av, container, path)
    found = [packet.pts for packet in container.demux(stream) if packet.size]
  if None in found or len(found) < 2 or not stream.time_base:
    return None
  ticks = np.sort(np.array(found, np.float64))
  even = np.linspace(ticks[0], ticks[-1], len(ticks))
  if np.abs(ticks - even).max() <= even[1] - even[0]:
    return None
  return ((ticks - ticks[0]) * float(stream.time_base)).tolist()


def _counted(frames: Iterator, step: int) -> Iterator:
  """Frames 0, `step`, 2 `step` and so on."""
  for index, frame in enumerate(frames):
    if index % step == 0:
      yield frame


def _at_seconds(
  frames: Iterator, times: list[float], max_frames: int
) -> Iterator:
  """The frame that is shown at each whole second, at most `max_frames`."""
  seconds = _spread(int(times[-1] + 1e-6) + 1, max_frames)
  start, shown, at = None, None, 0
  for frame in frames:
    if frame.time is None:
      continue
    start = frame.time if start is None else start
    while at < len(seconds) and seconds[at] + 1e-6 < frame.time - start:
      yield shown
      at += 1
    shown = frame
  if shown is not None:
    for _ in seconds[at:]:
      yield shown


def _upright(av: types.ModuleType, frame) -> Image.Image:
  """A frame as it is to be shown: turned, or mirrored."""
  image = frame.to_image()
  kind = av.sidedata.sidedata.Type.DISPLAYMATRIX
  if (found := frame.side_data.get(kind)) is None:
    return image
  a, b, _, c, d = np.frombuffer(bytes(found)[:20], np.int32).astype(int)
  # A point (x, y) goes to (a x + c y, b x + d y), y counted downwards.
  if abs(b) > abs(a):
    image = image.transpose(Image.Transpose.TRANSPOSE)
    a, d = c, b
  if a < 0:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if d < 0:
    image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
  return image


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
      path,
      "a video",
      "PyAV, which reads videos, to be installed",
      "pip install av, or this package with its extra 'video'",
    ) from e
  return av
