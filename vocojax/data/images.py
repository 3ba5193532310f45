"""Image files to uint8 pixels, as CLIP wants them. Read next: sources.py.

Alphabet: S pixels a side of the square result, H and W those of an image.
Pixels stay uint8 until they are on the device, where models/clip.py normalises
them.
"""

import dataclasses
import io
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vocojax.core import files
from vocojax.errors import DataError, shorten

T = TypeVar("T")
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

# Pillow opens nothing else: of EPS files it would have Ghostscript run.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 2**30  # of a file
MAX_PIXELS = 2**27  # 134 million; the largest phones take 108 and 200
MAX_SIDE = 2**16 - 1  # as JPEG has it
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*", b"MM\0")
# Pillow warns of images of more than 89 million pixels. The limits are ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# LLaVA pads with CLIP's mean colour: int(255 * mean) of each channel.
_PADDING = (122, 116, 104)
# Of a padded image so many pixels are made at a time.
_BAND = 2**22
# A 10000x3 image would grow to 376 million pixels before it is cut. Above this
# many, what is to be cut off is not made; a few values then differ by 1.
_MAX_SCALED_PIXELS = 2**24
_ONE = 2**22  # Pillow's weights are whole multiples of 1 / _ONE


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """Makes of any image the square of pixels that the model sees.

  The numbers are those of transformers' CLIPImageProcessor before it
  normalises, after LLaVA's padding: the image is padded to a square if
  `pad_to_square`, its shorter side is scaled to `size` (bicubic), and the
  middle of the longer side is cut out.

  Attributes:
    size: S.
    pad_to_square: as in `config.data`.
  """

  size: int
  pad_to_square: bool

  def __call__(
    self, image: ImageLike, name: str = ""
  ) -> UInt8[np.ndarray, "S S 3"]:
    """Pixels of an image.

    Args:
      image: as of `decode_image`.
      name: what to call it in errors; the path by default.

    Raises:
      DataError: as of `decode_image`.
    """
    name = name or _name(image)
    return _readable(name, lambda: self.scale(decode_image(image, name)))

  def scale(self, image: Image.Image) -> UInt8[np.ndarray, "S S 3"]:
    """Pixels of an image that `decode_image` gave."""
    if self.pad_to_square:
      return _pad_and_scale(image, self.size)
    return _scale_and_crop(image, self.size)


def decode_image(image: ImageLike, name: str = "") -> Image.Image:
  """Opens an image, upright and in RGB.

  The EXIF orientation is applied. Of an animation the first frame counts.
  Transparency is dropped, not blended (as LLaVA does). 16-bit grey becomes
  8-bit by its high byte.

  Args:
    image: the path of a file of one of the `FORMATS`, its bytes, an opened
      image, or uint8 [H, W, 3] in RGB.
    name: what to call it in errors; the path by default.

  Raises:
    DataError: the file is missing, empty, damaged or of another format, the
      image is larger than `MAX_PIXELS` or `MAX_SIDE`, or has pixels without a
      known range.
  """
  name = name or _name(image)
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise DataError(
        name,
        f"an array of {image.dtype} {list(image.shape)}",
        "uint8 [height, width, 3] in RGB",
        "convert the array",
      )
    _check_size(image.shape[1], image.shape[0], name)
    return Image.fromarray(image)
  if isinstance(image, Image.Image):
    _check_size(image.width, image.height, name)
    return _readable(name, lambda: _to_rgb(image.copy(), name))
  with open_image(image, name) as opened:
    return _readable(name, lambda: _to_rgb(opened, name))


def open_image(image: bytes | str | os.PathLike, name: str = "") -> Image.Image:
  """Opens an image file without decoding it: its size and mode are known.

  Raises:
    DataError: the file is missing, empty or of another format, or the image is
      too large.
  """
  name = name or _name(image)
  if not isinstance(image, bytes):
    image = files.read_bytes(image, limit=MAX_BYTES)
  opened = _readable(name, lambda: _identify(image, name))
  _check_size(opened.width, opened.height, name)
  return opened


def _name(image: ImageLike) -> str:
  return os.fspath(image) if isinstance(image, str | os.PathLike) else "image"


def _identify(content: bytes, name: str) -> Image.Image:
  try:
    return Image.open(io.BytesIO(content), formats=FORMATS)
  except Image.DecompressionBombError as e:
    raise _too_large(name, str(e).partition(" exceeds")[0]) from e
  except UnidentifiedImageError as e:  # its message holds an address
    if content.startswith(_BEGINNINGS):
      raise _unreadable(name, "a damaged header") from e
    if not content:
      got = "an empty file"
    elif content[4:8] == b"ftyp" and (
      brand := re.search(rb"hei[cmsx]|hev[cmsx]|avi[fs]", content[8:64])
    ):
      got = f"{'an AVIF' if b'avi' in brand[0] else 'a HEIC'} image"
    else:
      got = f"a file that begins with {shorten(content[:8])}"
    raise DataError(
      name,
      got,
      f"an image ({', '.join(FORMATS)})",
      "save it as PNG or JPEG",
    ) from e


def _check_size(width: int, height: int, name: str) -> None:
  if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
    raise _too_large(name, f"{width:,} x {height:,} pixels")


def _too_large(name: str, got: str) -> DataError:
  return DataError(
    name,
    got,
    f"at most {MAX_PIXELS:,} pixels, and {MAX_SIDE:,} a side",
    "scale it down",
  )


def _readable(name: str, read: Callable[[], T]) -> T:
  """What `read()` gives; whatever it raises is an error of the image."""
  try:
    return read()
  except DataError:
    raise
  # Pillow's decoders raise nearly anything on a damaged file (SyntaxError,
  # struct.error, zlib.error, ...).
  except Exception as e:
    raise _unreadable(name, str(e) or type(e).__name__) from e


def _unreadable(name: str, got: str) -> DataError:
  return DataError(name, got, "an image that can be read", "replace the file")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
  """An image upright and in RGB; changes `image`."""
  image.load()
  if image.mode in ("I", "F"):
    raise DataError(
      name,
      f"pixels of mode {image.mode} (32 bits)",
      "a mode with an agreed range",
      "convert the file to 8 or 16 bits",
    )
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I;16"):
    # Pillow would turn everything above 255 to white.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  image.info.pop("transparency", None)  # dropped by convert, with a warning
  return image if image.mode == "RGB" else image.convert("RGB")


def _pad_and_scale(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
  """Pads an image to a square and scales it, without making the square.

  Pillow scales rows before columns, and rows of padding would come out as they
  went in. So they are added in between.
  """
  side = max(image.size)
  left, top = (side - image.width) // 2, (side - image.height) // 2
  scaled = Image.new("RGB", (size, side), _PADDING)
  rows = max(1, _BAND // side)
  # Padding costs time, too: of a narrow image its pixels are scaled alone.
  narrow = side * side > _BAND and side > 8 * image.width
  weights = _Weights.of(side, size, left, image.width) if narrow else None
  for start in range(0, image.height, rows):
    stop = min(start + rows, image.height)
    band = image.crop((0, start, image.width, stop))
    if weights:
      band = weights.scale(band)
    else:
      padded = Image.new("RGB", (side, stop - start), _PADDING)
      padded.paste(band, (left, 0))
      band = padded.resize((size, stop - start), Image.Resampling.BICUBIC)
    scaled.paste(band, (0, top + start))
  return np.array(scaled.resize((size, size), Image.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True)
class _Weights:
  """How Pillow scales rows with W pixels in the midst of padding to S.

  Attributes:
    pixels: of each pixel in each scaled one, times _ONE; whole numbers.
    padding: the same of all padding together.
  """

  pixels: Float[np.ndarray, "W S"]
  padding: Float[np.ndarray, " S"]

  @classmethod
  def of(cls, side: int, size: int, left: int, width: int) -> "_Weights":
    """Those of W=`width` pixels from `left` on, in rows of `side`.

    Term by term what `precompute_coeffs` in Pillow's Resample.c computes, since
    other roundings would give other pixels.
    """
    scale = side / size
    wide = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum(centers - 2 * wide + 0.5, 0).astype(int)
    last = np.minimum(centers + 2 * wide + 0.5, side).astype(int)
    x = first[:, None] + np.arange((last - first).max())
    d = np.abs((x - centers[:, None] + 0.5) * (1 / wide))
    weights = np.where(
      d < 1, (1.5 * d - 2.5) * d * d + 1, (((d - 5) * d + 8) * d - 4) * -0.5
    )
    weights = np.where((d < 2) & (x < last[:, None]), weights, 0)
    weights *= 1 / np.cumsum(weights, axis=1)[:, -1:]
    weights = np.trunc(weights * _ONE + np.copysign(0.5, weights))
    pixels = np.zeros((width, size))
    inside = (x >= left) & (x < left + width)
    to = np.broadcast_to(np.arange(size)[:, None], x.shape)
    pixels[x[inside] - left, to[inside]] = weights[inside]
    return cls(pixels, weights.sum(axis=1) - pixels.sum(axis=0))

  def scale(self, image: Image.Image) -> Image.Image:
    """A padded image of W columns in RGB, scaled to S columns."""
    used = np.flatnonzero(self.pixels.any(axis=0))
    bands = np.asarray(image, np.float64).transpose(0, 2, 1)  # [H, 3, W]
    sums = np.multiply.outer(np.asarray(_PADDING), self.padding) + _ONE / 2
    sums = np.repeat(sums[None], len(bands), axis=0)  # [H, 3, S]
    sums[:, :, used] += bands @ self.pixels[:, used]
    pixels = np.clip(sums // _ONE, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(0, 2, 1)))


def _scale_and_crop(
  image: Image.Image, size: int
) -> UInt8[np.ndarray, "S S 3"]:
  """Scales the shorter side to `size` and cuts out the middle."""
  short = min(image.size)
  width, height = (int(size * n / short) for n in image.size)
  left, top = (width - size) // 2, (height - size) // 2
  if width * height <= _MAX_SCALED_PIXELS:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))
  for axis, (length, start) in enumerate(((width, left), (height, top))):
    image = _scale_window(image, axis, length, start, size)
  return np.array(image)


def _scale_window(
  image: Image.Image, axis: int, length: int, start: int, size: int
) -> Image.Image:
  """Scales one axis to `length`, but makes only `size` pixels from `start`.

  Pillow too scales columns before rows. It keeps the ends of a box in single
  precision, so the box is counted from a cut nearby, not from the far edge.
  """
  scale = image.size[axis] / length
  margin = 2 * max(scale, 1) + 1  # bicubic reads that far beyond
  begin, end = start * scale, (start + size) * scale
  cut = [0, 0, *image.size]
  cut[axis] = max(0, math.floor(begin - margin))
  cut[axis + 2] = min(image.size[axis], math.ceil(end + margin))
  image = image.crop((cut[0], cut[1], cut[2], cut[3]))
  box, scaled = [0.0, 0.0, *map(float, image.size)], [*image.size]
  box[axis], box[axis + 2] = begin - cut[axis], end - cut[axis]
  scaled[axis] = size
  return image.resize(
    (scaled[0], scaled[1]),
    Image.Resampling.BICUBIC,
    (box[0], box[1], box[2], box[3]),
  )
