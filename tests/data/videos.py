"""Small videos whose frames are known, written with PyAV."""

import fractions
import os

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def level(index: int) -> int:
  """Grey of a frame: a lossy codec keeps it apart from its neighbours'."""
  return 10 + 8 * (index % 30)


def write(
  path: str | os.PathLike,
  num_frames: int,
  fps: int | fractions.Fraction = 5,
  levels=level,
  times=None,
  cover: str = "",
) -> None:
  """Writes `num_frames` frames, each of one colour, at `fps` a second.

  Or at `times`, in frames. A `cover` is a picture before the video: 'too' or
  'only'.
  """
  with av.open(os.fspath(path), "w") as container:
    if cover:
      picture = container.add_stream("mjpeg", rate=1)
      picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
      picture.disposition = av.stream.Disposition.attached_pic
      white = np.full((16, 16, 3), 255, np.uint8)
      frame = av.VideoFrame.from_ndarray(white, "rgb24").reformat(
        format="yuvj420p"
      )
    if cover == "only":
      container.mux([*picture.encode(frame), *picture.encode()])
      return
    stream = container.add_stream("mpeg4", rate=fps)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    stream.bit_rate = 4_000_000
    for index in range(num_frames):
      pixels = np.full((HEIGHT, WIDTH, 3), levels(index), np.uint8)
      shown = av.VideoFrame.from_ndarray(pixels, "rgb24")
      if times:
        shown.pts, shown.time_base = times[index], 1 / fractions.Fraction(fps)
      for packet in stream.encode(shown):
        container.mux(packet)
      if cover and not index:
        container.mux([*picture.encode(frame), *picture.encode()])
    for packet in stream.encode():
      container.mux(packet)


def write_sound(path: str | os.PathLike) -> None:
  """Writes an mp4 file without pictures."""
  with av.open(os.fspath(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    silence = np.zeros((1, 1024), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
    frame.sample_rate = 8000
    for packet in [*stream.encode(frame), *stream.encode()]:
      container.mux(packet)
