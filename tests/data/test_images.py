"""Images: against transformers' CLIPImageProcessor, odd modes, bad files."""

import io
import warnings

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
        ours = images.preprocess(image.convert("RGB"), size, pad_to_square)
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
  whole = images.preprocess(image, 112, False)
  monkeypatch.setattr(images, "_MAX_SCALED_PIXELS", 0)
  part = images.preprocess(image, 112, False)
  gap = np.abs(part.astype(int) - whole)
  assert gap.max() <= 1 and np.count_nonzero(gap) < 1e-3 * gap.size
  monkeypatch.undo()
  longer = smooth(10000, 3)
  assert images.preprocess(longer, 336, False).shape == (336, 336, 3)
  assert images.preprocess(longer, 336, True).shape == (336, 336, 3)


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


def test_bad_files(tmp_path, monkeypatch):
  png = encoded(smooth(60, 60), format="PNG")
  jpeg = encoded(smooth(60, 60), format="JPEG")
  bad = {
    "truncated.png": png[: len(png) // 2],
    "truncated.jpg": jpeg[: len(jpeg) // 2],
    "header.png": png[:20],
    "text.png": b"not an image",
    "float.tif": encoded(
      Image.fromarray(np.ones((4, 4), np.float32)), format="TIFF"
    ),
  }
  for name, data in bad.items():
    for source in (data, tmp_path / name):
      (tmp_path / name).write_bytes(data)
      with pytest.raises(DataError) as e:
        images.decode_image(source, name)
      assert str(e.value).startswith(f"{name}: ")
      assert "replace the file" in str(e.value) or "convert" in str(e.value)
      assert "\n" not in str(e.value)
  with pytest.raises(DataError, match=r"empty\.png: an empty file"):
    images.decode_image(b"", "empty.png")
  with pytest.raises(DataError, match=r"gone\.png: no such image file"):
    images.decode_image(tmp_path / "gone.png")
  with pytest.raises(DataError, match="cannot be read"):
    images.decode_image(tmp_path, "a folder")


@pytest.mark.parametrize("limit", [3000, 1000])  # Pillow warns, Pillow raises
def test_huge_images_are_refused(limit, monkeypatch):
  data = encoded(smooth(60, 60), format="PNG")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with pytest.raises(DataError, match=r"bomb\.png: .*(3600|60x60)"):
      images.decode_image(data, "bomb.png")
