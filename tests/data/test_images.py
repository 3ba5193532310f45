"""Images: against transformers' CLIPImageProcessor, odd modes, bad files."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip import image_processing_pil_clip

from vocojax.data import images
from vocojax.errors import DataError
from vocojax.models import clip

SIZES = [
  *[(640, 480), (480, 640), (336, 336), (64, 64), (500, 375), (333, 1000)],
  *[(1, 1), (1, 50), (17, 3), (1024, 768), (337, 335), (90, 400), (800, 31)],
  *[(336, 335), (335, 336), (400, 399), (399, 400), (336, 100), (100, 336)],
]


def smooth(width, height, mode="RGB", seed=0):
  """Noise over a gradient: neither flat nor white noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (9, 9, 3), np.uint8)
  image = Image.fromarray(coarse).resize((width, height))
  noise = rng.integers(-20, 21, (height, width, 3))
  pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
  return Image.fromarray(pixels).convert(mode)


def encoded(image, **options):
  file = io.BytesIO()
  image.save(file, **options)
  return file.getvalue()


def reference(image, size, pad_to_square):
  """LLaVA's padding, then Hugging Face's numbers before normalisation."""
  image = image.convert("RGB")
  if pad_to_square:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    x, y = (side - image.width) // 2, (side - image.height) // 2
    square.paste(image, (x, y))
    image = square
  processor = image_processing_pil_clip.CLIPImageProcessorPil(
    size={"shortest_edge": size},
    crop_size={"height": size, "width": size},
    do_rescale=False,
    do_normalize=False,
  )
  output = processor(image, return_tensors="np")["pixel_values"][0]
  return np.asarray(output).transpose(1, 2, 0)


@pytest.mark.parametrize("pad_to_square", [True, False])
def test_equals_hugging_face(pad_to_square):
  """At most 1 of 255 apart, and nearly everywhere the same."""
  different = total = 0
  for i, (width, height) in enumerate(SIZES):
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1"):
      for size in (336, 64) if mode == "RGB" else (224,):
        image = smooth(width, height, mode, seed=i)
        ours = images.ImageProcessor(size, pad_to_square)(image)
        theirs = reference(image, size, pad_to_square)
        gap = np.abs(ours.astype(int) - theirs)
        assert gap.max() <= 1, (width, height, mode)
        different += np.count_nonzero(gap)
        total += gap.size
  print(f"exact: {1 - different / total:.6%} of {total} values")
  assert different / total < 1e-4


def test_constants_are_clips():
  processor = image_processing_pil_clip.CLIPImageProcessorPil()
  mean, std = np.float32(processor.image_mean), np.float32(processor.image_std)
  np.testing.assert_array_equal(clip.IMAGE_MEAN, mean)
  np.testing.assert_array_equal(clip.IMAGE_STD, std)


@pytest.mark.parametrize("width, height", [(900, 3), (3, 900), (5000, 30)])
def test_long_images(width, height, monkeypatch):
  """What is cut off is not made; of what is left a few values differ by 1."""
  image = smooth(width, height)
  processor = images.ImageProcessor(112, False)
  whole = processor(image)
  monkeypatch.setattr(images, "_MAX_SCALED_PIXELS", 0)
  part = processor(image)
  gap = np.abs(part.astype(int) - whole)
  assert gap.max() <= 1 and np.count_nonzero(gap) < 1e-3 * gap.size
  monkeypatch.undo()
  longer = smooth(10000, 3)
  for pad_to_square in (True, False):
    processor = images.ImageProcessor(336, pad_to_square)
    assert processor(longer).shape == (336, 336, 3)


def test_exif_orientation():
  image = smooth(40, 20)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  turned = images.decode_image(encoded(image, format="PNG", exif=exif), "a")
  assert turned.size == (20, 40)
  assert (
    turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
  )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_modes(mode):
  image = smooth(20, 30).convert("L" if mode == "LA" else "RGB").convert(mode)
  decoded = images.decode_image(encoded(image, format="PNG"), "a")
  assert decoded.mode == "RGB"
  assert decoded.tobytes() == image.convert("RGB").tobytes()


def test_palette_with_transparency():
  image = smooth(20, 30, "P")
  want = image.convert("RGB").tobytes()
  for transparency in (bytes(range(200)), 7):
    data = encoded(image, format="PNG", transparency=transparency)
    assert images.decode_image(data, "a").tobytes() == want


def test_cmyk():
  image = smooth(20, 30, "CMYK")
  data = encoded(image, format="TIFF")
  decoded = images.decode_image(data, "a")
  assert decoded.tobytes() == image.convert("RGB").tobytes()


def test_sixteen_bits():
  grey = np.asarray(smooth(20, 30, "L"))
  wide = Image.fromarray(grey.astype(np.uint16) * 257)
  for format_ in ("PNG", "TIFF"):
    decoded = images.decode_image(encoded(wide, format=format_), "a")
    assert (np.asarray(decoded) == grey[..., None]).all()


def test_animation_gives_its_first_frame():
  frames = [smooth(20, 30, "P", seed) for seed in range(3)]
  data = encoded(
    frames[0], format="GIF", save_all=True, append_images=frames[1:]
  )
  decoded = images.decode_image(data, "a")
  assert decoded.tobytes() == frames[0].convert("RGB").tobytes()


# As Pillow, libheif and Ghostscript would find them.
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
KNOWN = "an image (AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)"


def png_header(width, height):
  """A PNG file of black and white pixels that is cut off after its header."""
  data = encoded(Image.new("1", (1, 1)), format="PNG")
  size = struct.pack(">II", width, height)
  header = b"IHDR" + size + data[24:29]
  return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def bad_files():
  png = encoded(smooth(60, 60), format="PNG")
  jpeg = encoded(smooth(60, 60), format="JPEG")
  yield "empty.png", b"", "an empty file", KNOWN
  yield "text.png", b"no image", "a file that begins with b'no image'", KNOWN
  yield "photo.heic", HEIC, "a HEIC image", KNOWN
  yield "cat.png", EPS, "a file that begins with b'%!PS-Ado'", KNOWN
  read = "an image that can be read"
  yield "half.png", png[: len(png) // 2], "image file is truncated", read
  yield "half.jpg", jpeg[: len(jpeg) // 2], "image file is truncated", read
  yield "chunk.png", png[:40], "a damaged header", read
  yield "header.png", png[:20], "Truncated File Read", read
  floats = Image.fromarray(np.ones((4, 4), np.float32))
  yield (
    *("float.tif", encoded(floats, format="TIFF")),
    *("pixels of mode F (32 bits)", "a mode with an agreed range"),
  )
  limit = "at most 134,217,728 pixels, and 65,535 a side"
  for width, height in ((11586, 11586), (65536, 1)):
    pixels = f"{width:,} x {height:,} pixels"
    yield f"{width}.png", png_header(width, height), pixels, limit
  # Pillow refuses this one.
  pixels = "Image size (4294836225 pixels)"
  yield "both.png", png_header(65535, 65535), pixels, limit


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
  "name, data, got, expected",
  list(bad_files()),
  ids=lambda x: x if isinstance(x, str) and "." in x[-6:] else "",
)
def test_bad_files(tmp_path, name, data, got, expected):
  path = tmp_path / name
  path.write_bytes(data)
  for source, where in ((data, name), (path, ""), (str(path), "")):
    with pytest.raises(DataError) as e:
      images.decode_image(source, where)
    assert e.value.where == (where or str(path))
    assert e.value.got.startswith(got)
    assert e.value.expected == expected
    assert e.value.fix


def test_files_that_are_none(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  for name, got in (
    ("gone.png", "no such file"),
    ("pipe.png", "a pipe"),
    ("", "a folder"),
    ("a\0.png", "embedded null byte"),
  ):
    path = os.path.join(tmp_path, name)
    with pytest.raises(DataError) as e:
      images.decode_image(path)
    assert e.value.got == got
  with pytest.raises(DataError) as e:
    images.decode_image("/dev/zero")
  assert e.value.got == "a device"


def test_ghostscript_is_never_started(tmp_path, monkeypatch):
  """A file that is no image by its content, whatever its name, starts it."""
  gs = tmp_path / "gs"
  gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
  gs.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  (tmp_path / "cat.png").write_bytes(EPS)
  with pytest.raises(DataError):
    images.ImageProcessor(8, True)(tmp_path / "cat.png")
  assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
  "array",
  [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), "B")],
)
def test_arrays(array):
  with pytest.raises(DataError) as e:
    images.decode_image(array)
  assert e.value.where == "image"
  pixels = np.asarray(smooth(8, 8))
  np.testing.assert_array_equal(images.ImageProcessor(8, True)(pixels), pixels)


def padded_and_scaled(image, size):
  """Literally: the whole square, then Pillow."""
  side = max(image.size)
  square = Image.new("RGB", (side, side), (122, 116, 104))
  left, top = (side - n for n in image.size)
  square.paste(image, (left // 2, top // 2))
  return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("band", [2**12, 2**22])
def test_equals_padding_before_scaling(band, monkeypatch):
  """Bit for bit, for 500 random sizes, in many bands or one."""
  monkeypatch.setattr(images, "_BAND", band)
  rng = np.random.default_rng(0)
  narrow = 0
  for i in range(500):
    most = (40, 700) if i % 2 else (700, 700)
    width, height = (int(np.exp(rng.uniform(0, np.log(n)))) for n in most)
    size = int(rng.choice([1, 14, 56, 112, 336]))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    ours = images.ImageProcessor(size, True)(image)
    np.testing.assert_array_equal(
      ours, padded_and_scaled(image, size), f"{width} x {height} to {size}"
    )
    narrow += height > 8 * width
  assert narrow > 100


# Prints how many MiB more one image takes.
_MEMORY = """
import resource, sys
from vocojax.data import images
def used():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = used()
pixels = images.ImageProcessor(336, sys.argv[2] == "True")(sys.argv[1])
assert pixels.shape == (336, 336, 3)
print(used() - before)
"""


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize(
  "mode, width, height",
  [("RGB", 200, 30000), ("1", 1, 40000), ("1", 40000, 1), ("1", 65535, 9)],
)
def test_memory_of_long_images(tmp_path, mode, width, height, pad_to_square):
  """Their pixels, and no more than 200 MiB besides."""
  path = tmp_path / "long.png"
  Image.new(mode, (width, height)).save(path)
  run = subprocess.run(
    [sys.executable, "-c", _MEMORY, path, str(pad_to_square)],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-300:]
  assert float(run.stdout) < 200


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_photo(tmp_path):
  """108 million pixels, as phones take them."""
  path = tmp_path / "photo.png"
  Image.linear_gradient("L").resize((12000, 9000)).save(path, compress_level=1)
  pixels = images.ImageProcessor(8, True)(path)
  assert (np.diff(pixels[1:7, 4, 0].astype(int)) > 0).all()


def test_photo_of_several_pictures(tmp_path):
  """MPO, as some cameras write it under the name of a JPEG: the first one."""
  first, second = smooth(40, 30), smooth(40, 30, seed=1)
  data = encoded(
    first, format="MPO", save_all=True, append_images=[second], quality=95
  )
  alone = encoded(first, format="JPEG", quality=95)
  assert (
    images.decode_image(data).tobytes() == images.decode_image(alone).tobytes()
  )
