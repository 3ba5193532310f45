"""Image files to uint8 pixels, as CLIP wants them. Read next: sources.py.

Alphabet: S pixels a side of the square result. Pixels stay uint8 until they
are on the device, where models/clip.py normalises them.
"""

import io
import math
import os
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vocojax.errors import DataError

# LLaVA pads with CLIP's mean colour: int(255 * mean) of each channel.
_PADDING = (122, 116, 104)
# A 10000x3 image would grow to 376 million pixels before it is cut. Above this
# many, what is to be cut off is not made; a few values then differ by 1.
_MAX_SCALED_PIXELS = 2**24


def decode_image(
  source: bytes | str | os.PathLike, name: str = ""
) -> Image.Image:
  """Opens an image file, upright and in RGB.

  The EXIF orientation is applied. Of an animation the first frame counts.
  Transparency is dropped, not blended (as LLaVA does). 16-bit grey becomes
  8-bit by its high byte.

  Args:
    source: the file's bytes, or its path.
    name: what to call it in errors; the path by default.

  Raises:
    DataError: the file is missing, empty, truncated, not an image, too large
      (`PIL.Image.MAX_IMAGE_PIXELS`), or has pixels without a known range.
  """
  if not isinstance(source, bytes):
    path = pathlib.Path(source)
    name = name or str(path)
    try:
      source = path.read_bytes()
    except FileNotFoundError as e:
      raise DataError(
        f"{name}: no such image file ({path}); check config.data.image_folder"
      ) from e
    except OSError as e:
      raise DataError(
        f"{name}: cannot be read ({e.strerror}); make {path} a readable file"
      ) from e
  if not source:
    raise DataError(f"{name}: an empty file, expected an image; replace it")
  try:
    with Image.open(io.BytesIO(source)) as image:
      limit = Image.MAX_IMAGE_PIXELS
      if limit and image.width * image.height > limit:
        raise Image.DecompressionBombError(
          f"{image.width}x{image.height} pixels exceed the limit of {limit}"
        )
      return _to_rgb(image, name)
  except DataError:
    raise
  except UnidentifiedImageError as e:  # its message holds an address
    raise DataError(
      f"{name}: not an image of a known format; replace the file"
    ) from e
  # Pillow's decoders raise nearly anything on a damaged file (SyntaxError,
  # struct.error, zlib.error, ...).
  except Exception as e:
    raise DataError(
      f"{name}: not an image that can be read ({' '.join(str(e).split())}); "
      "replace the file"
    ) from e


def preprocess(
  image: Image.Image, size: int, pad_to_square: bool
) -> UInt8[np.ndarray, "S S 3"]:
  """Scales an RGB image to `size` pixels a side.

  The numbers are those of transformers' CLIPImageProcessor before it
  normalises, after LLaVA's padding: the image is padded to a square if
  `pad_to_square`, its shorter side is scaled to `size` (bicubic), and the
  middle of the longer side is cut out.
  """
  if pad_to_square and image.width != image.height:
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    width = side
    if image.width == side:
      # Pillow scales columns before rows, and rows of padding would come out
      # as they went in. So they are added in between.
      width = size
      image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (width, side), _PADDING)
    square.paste(image, (left, top))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))
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


def to_rgb(image: Image.Image, name: str) -> Image.Image:
  """A copy of an image, upright and in RGB, as `decode_image` describes it.

  Raises:
    DataError: its pixels have no known range.
  """
  return _to_rgb(image.copy(), name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
  """The same without a copy where none is needed; changes `image`."""
  image.load()
  if image.mode in ("I", "F"):
    raise DataError(
      f"{name}: pixels of mode {image.mode} (32 bits) have no agreed range; "
      "convert the file to 8 or 16 bits"
    )
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I;16"):
    # Pillow would turn everything above 255 to white.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  image.info.pop("transparency", None)  # dropped by convert, with a warning
  return image if image.mode == "RGB" else image.convert("RGB")
