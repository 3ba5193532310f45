"""Frames of real video files, known by their greys; see videos.py."""

import fractions
import os
import re
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data import videos
from vocojax.data import video
from vocojax.errors import DataError, UserError

SIZE = 16
PADDING = np.array((122, 116, 104))


def indices(frames):
  """Which frames of the file these are, by the grey of their middles."""
  greys = frames[:, SIZE // 2, SIZE // 2].astype(float).mean(-1)
  found = np.rint((greys - videos.level(0)) / 8).astype(int)
  assert np.abs(greys - [videos.level(i) for i in found]).max() < 3
  return found.tolist()


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv", "mov"])
def test_one_frame_a_second(tmp_path, ending):
  path = tmp_path / f"a.{ending}"
  videos.write(path, 23, fps=5)
  frames = video.read_frames(path, 100, SIZE, pad_to_square=True)
  assert frames.shape == (5, SIZE, SIZE, 3) and frames.dtype == np.uint8
  assert indices(frames) == [0, 5, 10, 15, 20]


@pytest.mark.parametrize(
  ("fps", "step"),
  [
    (fractions.Fraction(30000, 1001), 30),
    (fractions.Fraction(24000, 1001), 24),
    (fractions.Fraction(5, 2), 2),  # a half goes to the even number
    (fractions.Fraction(1, 4), 1),  # slower than one a second: all frames
  ],
)
def test_frames_a_second_are_rounded(tmp_path, fps, step):
  videos.write(tmp_path / "a.mp4", 29, fps)
  frames = video.read_frames(tmp_path / "a.mp4", 100, SIZE, True)
  assert indices(frames) == list(range(0, 29, step))


@pytest.mark.parametrize(
  ("most", "expected"),
  [
    (1, [10]),  # of 0, 2, ... 20: the middle one
    (2, [4, 16]),
    (4, [2, 8, 12, 18]),
    (10, [0, 2, 4, 6, 8, 12, 14, 16, 18, 20]),
    (11, list(range(0, 21, 2))),
  ],
)
def test_too_many_are_thinned_out_evenly(tmp_path, most, expected):
  videos.write(tmp_path / "a.mp4", 22, fps=2)
  frames = video.read_frames(tmp_path / "a.mp4", most, SIZE, True)
  assert indices(frames) == expected


def test_frames_are_padded_or_cut_as_images_are(tmp_path):
  videos.write(tmp_path / "a.mp4", 1)
  (padded,) = video.read_frames(tmp_path / "a.mp4", 1, SIZE, True)
  (cut,) = video.read_frames(tmp_path / "a.mp4", 1, SIZE, False)
  edges = padded[[0, -1]].astype(int)
  assert np.abs(edges - PADDING).max() < 6  # bicubic swings over a little
  assert np.abs(cut.astype(int) - videos.level(0)).max() < 3


def test_errors_name_file_and_remedy(tmp_path):
  bad, sound, cut, cover, script = (
    tmp_path / f"{x}.mp4" for x in ("bad", "sound", "cut", "cover", "script")
  )
  bad.write_bytes(b"not a video" * 100)
  videos.write_sound(sound)
  videos.write(cut, 20)
  cut.write_bytes(cut.read_bytes()[:700])
  videos.write(cover, 0, cover="only")
  videos.write(tmp_path / "other.mp4", 3)
  script.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n")
  os.mkfifo(tmp_path / "pipe.mp4")
  for path, got in (
    (bad, ".*Invalid data.*"),
    (cut, ".*"),
    (sound, "no pictures in it"),
    (cover, "no pictures in it but a cover"),
    (script, ".*Invalid data.*"),
    (tmp_path / "none.mp4", "no such file"),
    (tmp_path / "pipe.mp4", "a pipe"),
    (tmp_path / "a\0.mp4", "embedded null byte"),
  ):
    with pytest.raises(DataError) as e:
      video.read_frames(path, 4, SIZE, True)
    assert e.value.where.startswith(str(path)[: len(str(tmp_path)) + 2])
    assert re.fullmatch(got, e.value.got), e.value


def turn(path, matrix):
  """Writes a display matrix into an mp4 file, as phones do."""
  content = bytearray(path.read_bytes())
  at = content.index(b"tkhd") + 4 + 4 + 36
  a, b, c, d = matrix
  values = (a, b, 0, c, d, 0, 0, 0)
  content[at : at + 36] = struct.pack(
    ">9i", *(x << 16 for x in values), 1 << 30
  )
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("matrix", "transform"),
  [
    ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # held upright
    ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
    ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
    ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
    ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
    ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
  ],
)
def test_frames_are_upright(tmp_path, matrix, transform):
  rows = np.arange(videos.HEIGHT)[:, None, None] * 4
  columns = np.arange(videos.WIDTH)[None, :, None] // 2
  picture = np.broadcast_to(rows + columns, (48, 64, 3)).astype(np.uint8)
  path = tmp_path / "a.mp4"
  videos.write(path, 1, levels=lambda _: picture)
  (flat,) = video.read_frames(path, 1, 64, True)
  turn(path, matrix)
  (found,) = video.read_frames(path, 1, 64, True)
  expected = np.asarray(Image.fromarray(flat).transpose(transform))
  assert np.abs(found.astype(int) - expected).max() < 8


def test_frames_by_time_where_they_are_uneven(tmp_path):
  """A busy second, then one frame a second, then none for three."""
  times = [*range(0, 30, 3), 30, 60, 90, 180, 210]
  path = tmp_path / "a.mp4"
  videos.write(path, len(times), 30, times=times)
  frames = video.read_frames(path, 100, SIZE, True)
  assert indices(frames) == [0, 10, 11, 12, 12, 12, 13, 14]
  assert indices(video.read_frames(path, 2, SIZE, True)) == [11, 13]
  # A frame or two that come late leave the count of the others.
  late = [*range(0, 40), *range(41, 60)]
  videos.write(path, len(late), 10, times=late)
  frames = video.read_frames(path, 100, SIZE, True)
  assert indices(frames) == [0, 10, 20, 0, 10, 20]


def test_a_cover_is_no_video(tmp_path):
  videos.write(tmp_path / "a.mp4", 8, cover="too")
  frames = video.read_frames(tmp_path / "a.mp4", 9, SIZE, True)
  assert indices(frames) == [0, 5]


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".webm", ".Mov", ".MKV"])
def test_endings(tmp_path, suffix):
  (tmp_path / f"v.x{suffix}").touch()
  (tmp_path / "v.xy.mp4").touch()
  (tmp_path / "V.X.avi").touch()
  assert video.find_video(tmp_path / "v.x") == tmp_path / f"v.x{suffix}"
  for name in ("v", "a/b", "v.x.mp4", "a\0b"):
    with pytest.raises(DataError) as e:
      video.find_video(tmp_path / name)
    assert e.value.got == "no such video"


def test_damaged_packets_are_left_out(tmp_path, caplog):
  path = tmp_path / "a.avi"
  videos.write(path, 40, fps=5)
  content = bytearray(path.read_bytes())
  # Four of the chunks of pictures hold none.
  starts = [m.start() for m in re.finditer(b"00dc", content)][20:24]
  for start in starts:
    content[start + 8 : start + 72] = b"\xff" * 64
  path.write_bytes(content)
  frames = video.read_frames(path, 100, SIZE, pad_to_square=True)
  assert indices(frames)[:3] == [0, 5, 10]
  assert len(frames) == 8 and "a.avi: left out 4 damaged" in caplog.text


def test_without_pyav(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)  # cannot be imported
  with pytest.raises(UserError) as e:
    video.read_frames(tmp_path / "a.mp4", 4, SIZE, True)
  assert e.value.where == f"{tmp_path}/a.mp4"
  assert e.value.fix.startswith("pip install av")
