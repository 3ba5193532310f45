"""Images and videos. Read next: weight_kinds.py."""

import functools
import io
import pathlib
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from tests.data import videos
from tests.fuzz import files
from tests.fuzz.kinds import Case, Input, Kind, Mutation, Parts, array
from vocojax.data import images, video

_SIZE = 24
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")


def _image(seed: int = 0, mode: str = "RGB") -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
  if mode == "I;16":
    return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  return Image.fromarray(pixels).convert(mode)


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


def _make(folder: pathlib.Path) -> Parts:
  _image().save(folder / "cat.png")
  return _reference(folder / "cat.png")


def _read(folder: pathlib.Path) -> Parts:
  pixels = images.ImageProcessor(_SIZE, True)(folder / "cat.png")
  assert pixels.shape == (_SIZE, _SIZE, 3) and pixels.dtype == np.uint8
  return {"pixels": array(pixels)}


def _saves(format_: str, mode: str = "RGB", **options) -> Mutation:
  """Another image, in a format and mode, to be read as Pillow reads it."""

  def mutate(given: Input) -> None:
    image = _image(given.rng.randrange(99), mode)
    image.save(given.folder / "cat.png", format_, **options)
    given.right = _reference(given.folder / "cat.png")

  return mutate


def _turned(given: Input) -> None:
  exif = Image.Exif()
  exif[0x112] = given.rng.randrange(1, 9)
  _saves("JPEG", exif=exif)(given)


def _damaged(change: Callable, known: bool = True) -> Mutation:
  """An image of any format, damaged."""

  def mutate(given: Input) -> None:
    _saves(given.rng.choice(_FORMATS))(given)
    files.changes(files.one_of("cat.png"), change, known)(given)

  return mutate


def _writes(content: Callable[[], bytes]) -> Mutation:
  """Other content, of which no pixels are known."""
  return files.changes(files.one_of("cat.png"), lambda x, rng: content(), False)


def _of_size(width: int, height: int, mode: str = "RGB") -> Mutation:
  def content() -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height), 1).save(out, "PNG", compress_level=1)
    return out.getvalue()

  return _writes(content)


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
  """A PNG file that says it has these sides."""
  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  content = b"\x89PNG\r\n\x1a\n"
  for kind, data in ((b"IHDR", head), *chunks, (b"IEND", b"")):
    content += struct.pack(">I", len(data)) + kind + data
    content += struct.pack(">I", zlib.crc32(kind + data))
  return content


def _patched(format_: str, at: int, new: bytes) -> bytes:
  """A small file whose sides in the header are others."""
  out = io.BytesIO()
  _image().save(out, format_)
  data = out.getvalue()
  if format_ == "JPEG":  # behind the marker of the frame and its length
    at = data.index(b"\xff\xc0") + 5
  return data[:at] + new + data[at + len(new) :]


@functools.cache
def _zeros() -> bytes:
  return zlib.compress(bytes(2**27), 9)


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
_PLACES = struct.pack("<7I", 32, 60, *[0] * 5)
_FOREIGN: dict[str, Callable[[], bytes]] = {
  "eps": lambda: _EPS,
  "eps_preview": lambda: b"\xc5\xd0\xd3\xc6" + _PLACES + _EPS,
  "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9"/>',
  "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
  "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
  "html": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
  "git_lfs": lambda: b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
  "tiff_tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(12),
  "png_huge": lambda: _png(60_000, 60_000, (b"IDAT", _zeros()[:200])),
  "png_wide": lambda: _png(2**31 - 1, 1, (b"IDAT", _zeros()[:200])),
  "png_flat": lambda: _png(0, 7, (b"IDAT", _zeros()[:200])),
  "png_bomb": lambda: _png(32_000, 32_000, (b"IDAT", _zeros())),
  "bmp_huge": lambda: _patched("BMP", 18, struct.pack("<ii", 90_000, 90_000)),
  "bmp_sign": lambda: _patched("BMP", 18, struct.pack("<ii", -8, 2**31 - 1)),
  "gif_huge": lambda: _patched("GIF", 6, b"\xff" * 4),
  "jpeg_huge": lambda: _patched("JPEG", 0, b"\xff" * 4),
}  # fmt: skip
_MOVING = {"save_all": True, "append_images": [_image(i) for i in range(3)]}
_CASES: dict[str, Case] = {
  **files.cases(files.one_of("cat.png")),
  **{name: ("refuse", _writes(content)) for name, content in _FOREIGN.items()},
  **{f.lower(): ("read", _saves(f)) for f in _FORMATS},
  **{
    f"png_{mode}": ("read", _saves("PNG", mode))
    for mode in ("1", "L", "P", "RGBA", "LA", "I;16")
  },
  **{
    f"{f.lower()}_moving": ("read", _saves(f, **_MOVING))
    for f in ("GIF", "PNG", "WEBP", "TIFF")
  },
  "jpeg_cmyk": ("read", _saves("JPEG", "CMYK")),
  "jpeg_progressive": ("read", _saves("JPEG", progressive=True)),
  "jpeg_turned": ("read", _turned),
  "tiff_cmyk": ("read", _saves("TIFF", "CMYK")),
  "tiff_32_bit": ("refuse", _saves("TIFF", "F")),
  "one_pixel": ("read", _of_size(1, 1)),
  "thin": ("either", _of_size(1, 40_000)),
  "flat": ("either", _of_size(40_000, 1)),
  "tall": ("either", _of_size(200, 30_000)),
  "tall_one_bit": ("either", _of_size(3, 65_000, "1")),
  "photo": ("read", _of_size(8_000, 6_000)),
  "photo_of_108_mp": ("read", _of_size(12_000, 9_000, "L")),
  "too_large": ("refuse", _of_size(20_000, 20_000, "1")),
  "text_bomb": (
    "either",
    _writes(lambda: _png(8, 8, (b"zTXt", b"a\0\0" + _zeros()))),
  ),
  "profile_bomb": (
    "either",
    _writes(lambda: _png(8, 8, (b"iCCP", b"a\0\0" + _zeros()))),
  ),
  "bits": ("either", _damaged(files.flip_bits, known=False)),
  "bytes": ("either", _damaged(files.set_bytes, known=False)),
  "cut": ("either", _damaged(files.cut)),
  "half": ("refuse", _damaged(lambda data, rng: data[: len(data) // 2])),
  "extended": ("either", _damaged(files.extend)),
}


def _make_video(folder: pathlib.Path) -> Parts:
  videos.write(folder / "a.mp4", 23)
  return {str(i): 5 * i for i in range(5)}


def _read_video(folder: pathlib.Path) -> Parts:
  """Which frames were taken, by their grey."""
  frames = video.read_frames(folder / "a.mp4", 8, 16, False)
  assert frames.shape[1:] == (16, 16, 3)
  greys = [round((float(frame.mean()) - 10) / 8) for frame in frames]
  return {str(i): grey for i, grey in enumerate(greys)}


_DRAWN = ("bits", "bytes", "cut", "half", "extended")
_VIDEO = files.cases(files.one_of("a.mp4"), known=False)
KINDS = {
  "image": Kind(_make, _read, _CASES, _DRAWN),
  "video": Kind(_make_video, _read_video, _VIDEO, ("bits", "bytes", "cut")),
}
