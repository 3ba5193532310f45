"""Images and videos. Read next: weight_kinds.py."""

import io
import pathlib
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from tests.data import videos
from tests.fuzz import files
from tests.fuzz.kinds import Case, Input, Kind, Parts, array
from vocojax.data import video
from vocojax.inference import requests

_SIZE = 24
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
_PICK = files.one_of("cat.png")  # whatever format is in it


def _pixels(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _make(folder: pathlib.Path) -> Parts:
  Image.fromarray(_pixels()).save(folder / "cat.png")
  return _reference(folder / "cat.png")


def _reference(path: pathlib.Path) -> Parts:
  """The image as LLaVA pads and CLIP's processor scales it, by Pillow alone."""
  image = Image.open(path)
  image.load()
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I;16"):
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  image.info.pop("transparency", None)
  image = image.convert("RGB")
  side = max(image.size)
  square = Image.new("RGB", (side, side), (122, 116, 104))
  left, top = (side - image.width) // 2, (side - image.height) // 2
  square.paste(image, (left, top))
  square = square.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
  return {"pixels": array(np.asarray(square))}


def _read(folder: pathlib.Path) -> Parts:
  pixels, _ = requests.read_image(folder / "cat.png", _SIZE, True)
  assert pixels.shape == (_SIZE, _SIZE, 3) and pixels.dtype == np.uint8
  return {"pixels": array(pixels)}


def _saves(format_: str, mode: str = "RGB", **options) -> files.Change:
  """Another image, in a format and mode, to be read as Pillow reads it."""

  def mutate(given: Input) -> None:
    image = Image.fromarray(_pixels(seed=given.rng.randrange(99)))
    if mode == "I;16":
      rows = _pixels()[..., 0].astype(np.uint16) * 257
      image = Image.fromarray(rows)
    path = given.folder / "cat.png"
    image = image if mode == "I;16" else image.convert(mode)
    image.save(path, format_, **options)
    given.right = _reference(path)

  return mutate


def _turned(given: Input) -> None:
  exif = Image.Exif()
  exif[0x112] = given.rng.randrange(1, 9)
  _saves("JPEG", exif=exif)(given)


def _moving(format_: str) -> files.Change:
  """Of an animation the first picture counts."""
  more = [Image.fromarray(_pixels(seed=100 + i)) for i in range(3)]
  return _saves(format_, save_all=True, append_images=more)


def _of_size(width: int, height: int, mode: str = "RGB") -> files.Change:
  """An image of one colour; too large for a reference of its pixels."""

  def mutate(given: Input) -> None:
    image = Image.new(mode, (width, height), 1)
    image.save(given.folder / "cat.png", "PNG", compress_level=1)
    given.right = None

  return mutate


def _in_any_format(change: Callable, known: bool) -> files.Change:
  """Damages an image of a random format."""

  def mutate(given: Input) -> None:
    _saves(given.rng.choice(_FORMATS))(given)
    path = given.folder / "cat.png"
    path.write_bytes(change(path.read_bytes(), given.rng))
    if not known:
      given.right = None

  return mutate


def _half(data: bytes, rng) -> bytes:
  return data[: rng.randrange(len(data) // 8, len(data) // 2)]


def _writes(content: bytes) -> files.Change:
  return files.changes(_PICK, lambda data, rng: content)


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
  """A PNG file that says it has these sides."""
  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  content = b"\x89PNG\r\n\x1a\n"
  for kind, data in ((b"IHDR", head), *chunks, (b"IEND", b"")):
    crc = zlib.crc32(kind + data)
    content += struct.pack(">I", len(data)) + kind + data
    content += struct.pack(">I", crc)
  return content


def _patched(format_: str, at: int, new: bytes) -> bytes:
  """A small file whose sides in the header are others."""
  out = io.BytesIO()
  Image.fromarray(_pixels(8, 8)).save(out, format_)
  data = out.getvalue()
  if format_ == "JPEG":  # behind the marker of the frame and its length
    at = data.index(b"\xff\xc0") + 5
  return data[:at] + new + data[at + len(new) :]


_ZEROS = zlib.compress(bytes(2**27), 9)
_EPS = (
  b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
)
_FOREIGN = {
  "eps": _EPS,
  "eps_with_preview": b"\xc5\xd0\xd3\xc6"
  + struct.pack("<6IH", 30, len(_EPS), *[0] * 5)
  + _EPS,
  "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
  "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
  "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
  "html": b"<!DOCTYPE html><html><body>404</body></html>",
  "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
  "png_huge": _png(60_000, 60_000, (b"IDAT", _ZEROS[:200])),
  "png_no_end": _png(2**31 - 1, 1, (b"IDAT", _ZEROS[:200])),
  "png_no_side": _png(0, 7, (b"IDAT", _ZEROS[:200])),
  "png_real_bomb": _png(32_000, 32_000, (b"IDAT", _ZEROS)),
  "bmp_huge": _patched("BMP", 18, struct.pack("<ii", 90_000, 90_000)),
  "bmp_negative": _patched("BMP", 18, struct.pack("<ii", -8, 2**31 - 1)),
  "gif_huge": _patched("GIF", 6, b"\xff" * 4),
  "jpeg_huge": _patched("JPEG", 0, b"\xff" * 4),
  "tiff_no_tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(12),
}
_CASES: dict[str, Case] = {
  **{name: ("refuse", _writes(data)) for name, data in _FOREIGN.items()},
  **{f.lower(): ("read", _saves(f)) for f in _FORMATS},
  **{
    f"png_{mode}": ("read", _saves("PNG", mode))
    for mode in ("1", "L", "P", "RGBA", "LA", "I;16")
  },
  "jpeg_cmyk": ("read", _saves("JPEG", "CMYK")),
  "jpeg_progressive": ("read", _saves("JPEG", progressive=True)),
  "jpeg_turned": ("read", _turned),
  "tiff_cmyk": ("read", _saves("TIFF", "CMYK")),
  "tiff_32_bit": ("refuse", _saves("TIFF", "F")),
  "gif_moving": ("read", _moving("GIF")),
  "png_moving": ("read", _moving("PNG")),
  "webp_moving": ("read", _moving("WEBP")),
  "tiff_pages": ("read", _moving("TIFF")),
  "one_pixel": ("read", _writes(b"")),
  "thin": ("either", _of_size(1, 40_000)),
  "flat": ("either", _of_size(40_000, 1)),
  "tall": ("either", _of_size(200, 30_000)),
  "tall_one_bit": ("either", _of_size(3, 65_000, "1")),
  "photo": ("either", _of_size(8_000, 6_000)),
  "larger_photo": ("either", _of_size(12_000, 9_000, "1")),
  "too_large": ("refuse", _of_size(20_000, 20_000, "1")),
  "text_bomb": (
    "either",
    _writes(_png(8, 8, (b"zTXt", b"a\0\0" + _ZEROS), (b"IDAT", _ZEROS[:99]))),
  ),
  "profile_bomb": (
    "either",
    _writes(_png(8, 8, (b"iCCP", b"a\0\0" + _ZEROS), (b"IDAT", _ZEROS[:99]))),
  ),
  "bits": ("either", _in_any_format(files.flip_bits, known=False)),
  "bytes": ("either", _in_any_format(files.set_bytes, known=False)),
  "cut": ("either", _in_any_format(files.cut, known=True)),
  "half": ("refuse", _in_any_format(_half, known=False)),
  "extended": ("either", _in_any_format(files.extend, known=True)),
}
_CASES["one_pixel"] = "read", _of_size(1, 1)


def _make_video(folder: pathlib.Path) -> Parts:
  videos.write(folder / "a.mp4", 23)
  return {str(i): 5 * i for i in range(5)}


def _read_video(folder: pathlib.Path) -> Parts:
  """Which frames were taken, by their grey."""
  frames = video.read_frames(folder / "a.mp4", 8, 16, False)
  assert frames.shape[1:] == (16, 16, 3)
  return {
    str(i): round((float(frame.mean()) - 10) / 8)
    for i, frame in enumerate(frames)
  }


_VIDEO = files.one_of("a.mp4")
KINDS = {
  "image": Kind(
    _make,
    _read,
    files.cases(_PICK) | _CASES,
    ("bits", "bytes", "cut", "half", "extended"),
  ),
  "video": Kind(
    _make_video,
    _read_video,
    files.cases(_VIDEO)
    | {
      "bits": ("either", files.changes(_VIDEO, files.flip_bits, known=False)),
      "bytes": ("either", files.changes(_VIDEO, files.set_bytes, known=False)),
      "cut": ("either", files.changes(_VIDEO, files.cut, known=False)),
    },
    ("bits", "bytes", "cut"),
  ),
}
