"""Frames of real video files, known by their greys; see videos.py."""

import fractions
import re
import sys

import numpy as np
import pytest

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
  bad, sound, cut = (tmp_path / f"{x}.mp4" for x in ("bad", "sound", "cut"))
  bad.write_bytes(b"not a video" * 100)
  videos.write_sound(sound)
  videos.write(cut, 20)
  cut.write_bytes(cut.read_bytes()[:700])
  for path, words in (
    (bad, r"bad.mp4: not a video that can be read \(.*Invalid data.*\); rep"),
    (cut, r"cut.mp4: not a video that can be read \(.*\); replace the file"),
    (sound, "sound.mp4: found no pictures in it, expected a video; replace"),
    (tmp_path / "none.mp4", r"none.mp4: not a video .*\(.*No such file.*\)"),
  ):
    with pytest.raises(DataError, match=words) as e:
      video.read_frames(path, 4, SIZE, True)
    assert "\n" not in str(e.value)


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
  words = "a.mp4: a video, but PyAV is not installed, .*; pip install av"
  with pytest.raises(UserError, match=words):
    video.read_frames(tmp_path / "a.mp4", 4, SIZE, True)
