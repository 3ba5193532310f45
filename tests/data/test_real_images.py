"""Photographs, scans and drawings, against transformers' CLIPImageProcessor.

The files are those that scikit-image and scikit-learn ship; some are saved
again in other ways. Nothing here looks at how vocojax decodes: the reference
opens a file as LLaVA does, with Pillow's `convert("RGB")`.
"""

import importlib.util
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.data.test_images import encoded, reference
from vocojax.data import images

FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))
SUFFIXES = (".png", ".jpg", ".gif", ".tif")
UNREADABLE = "multipage_rgb.tif"  # 64-bit floats; Pillow knows no such file
FILES = sorted(
  path
  for package, folder in FOLDERS
  for path in (
    pathlib.Path(importlib.util.find_spec(package).origin).parent / folder
  ).iterdir()
  if path.suffix in SUFFIXES and path.name != UNREADABLE
)
# How a camera held in another way stores its picture, by EXIF orientation.
TURNED = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x.swapaxes(0, 1)[::-1],
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}


def file_of(name):
  (path,) = (path for path in FILES if path.name == name)
  return path


def opened(source):
  source = io.BytesIO(source) if isinstance(source, bytes) else source
  with Image.open(source) as image:
    return image.convert("RGB")


class Gaps:
  """Differences in 1/255 before normalisation, over several images."""

  def __init__(self):
    self.largest = self.different = self.total = 0

  def add(self, source, upright, size=336, padded=(True, False)):
    """`source` through vocojax against `upright`, an RGB image, through HF."""
    for pad_to_square in padded:
      ours = images.ImageProcessor(size, pad_to_square)(source)
      theirs = reference(upright, size, pad_to_square)
      gap = np.abs(ours.astype(int) - theirs)
      self.largest = max(self.largest, int(gap.max()))
      self.different += np.count_nonzero(gap)
      self.total += gap.size

  def __str__(self):
    return f"largest {self.largest}, {self.different} of {self.total} differ"


def test_files_as_they_are():
  """Greyscale, palette, alpha, several pages, up to 1411 x 1411 pixels."""
  gaps = Gaps()
  for path in FILES:
    gaps.add(path, opened(path))
  print(f"\n{len(FILES)} files: {gaps}")
  assert len(FILES) >= 30
  assert (gaps.largest, gaps.different) == (0, 0)


def saved_again():
  """Name, file and what is to be seen in it, of pictures stored otherwise."""
  photos = [opened(file_of(n)) for n in ("china.jpg", "chelsea.png")]
  for photo in photos:
    for mode in ("L", "LA", "P", "RGBA", "1"):
      data = encoded(photo.convert(mode), format="PNG")
      yield mode, data, opened(data)
    clear = photo.copy()
    clear.putalpha(photo.convert("L"))
    yield "alpha", encoded(clear, format="PNG"), photo
    for format_ in ("JPEG", "TIFF"):
      data = encoded(photo.convert("CMYK"), format=format_)
      yield f"CMYK {format_}", data, opened(data)
    palette = photo.quantize(50)
    data = encoded(palette, format="PNG", transparency=7)
    yield "palette", data, palette.convert("RGB")
    grey = photo.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield "16 bits", encoded(deep, format="PNG"), grey.convert("RGB")
    frames = [photo.quantize(64), photo.rotate(180).quantize(64)]
    data = encoded(
      frames[0], format="GIF", save_all=True, append_images=frames[1:]
    )
    yield "animation", data, frames[0].convert("RGB")
    rng = np.random.default_rng(0)
    for _ in range(3):
      left, top = (int(rng.integers(n // 2)) for n in photo.size)
      width, height = rng.integers(2, np.array(photo.size) // 2)
      part = photo.crop((left, top, left + int(width), top + int(height)))
      yield "cropped", encoded(part, format="PNG"), part
    for size in ((1, 1), (1, 200), (200, 1)):
      small = photo.resize(size)
      yield f"{size}", encoded(small, format="PNG"), small


def test_saved_again():
  gaps = Gaps()
  for name, source, upright in saved_again():
    gaps.add(source, upright)
    assert gaps.largest == 0, name
  print(f"\n{gaps}")


@pytest.mark.parametrize("size", [(10000, 3), (3, 10000)])
def test_strips(size):
  """Of 333,333 columns only the middle is made; at 336 HF needs gigabytes."""
  strip = opened(file_of("china.jpg")).resize(size)
  gaps = Gaps()
  gaps.add(encoded(strip, format="PNG"), strip, size=100, padded=(False,))
  assert (gaps.largest, gaps.different) == (0, 0)


def test_padded_strip():
  strip = opened(file_of("china.jpg")).resize((10000, 3))
  gaps = Gaps()
  gaps.add(encoded(strip, format="PNG"), strip, size=56, padded=(True,))
  assert (gaps.largest, gaps.different) == (0, 0)


@pytest.mark.parametrize("orientation", TURNED)
def test_held_in_another_way(orientation):
  gaps = Gaps()
  for name in ("flower.jpg", "coffee.png"):
    upright = opened(file_of(name))
    stored = Image.fromarray(
      np.ascontiguousarray(TURNED[orientation](np.asarray(upright)))
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    gaps.add(encoded(stored, format="PNG", exif=exif), upright)
  assert (gaps.largest, gaps.different) == (0, 0)
