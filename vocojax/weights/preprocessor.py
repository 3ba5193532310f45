"""preprocessor_config.json: how a published model sees an image. Next: hf.py.

We scale, crop and normalise as CLIP does, and pad before it where a config says
so. A model that was trained on other pixels is refused by the key.
"""

import pathlib
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vocojax.core import files
from vocojax.errors import WeightsError
from vocojax.weights import config_keys

_JSON_BYTES = 2**20
_KEYS = config_keys.Keys(
  {},
  "crop_size do_pad image_mean image_processor_type image_std rescale_factor "
  "size",
  {
    "do_center_crop": (True,),
    "do_normalize": (True,),
    "do_rescale": (True,),
    "do_resize": (True,),
    "resample": (3,),  # bicubic
  },
  """
  _processor_class _valid_processor_keys auto_map backend data_format device
  disable_grouping do_convert_rgb feature_extractor_type image_seq_length
  input_data_format processor_class return_tensors
  """,
)
_NUMBERS = {
  "image_mean": OPENAI_CLIP_MEAN,
  "image_std": OPENAI_CLIP_STD,
  "rescale_factor": 1 / 255,
}
_TOLERANCE = 1e-4  # relative; published numbers are rounded


def check(folder: pathlib.Path, image_size: int) -> bool:
  """Checks the settings in a folder, if there are any.

  Args:
    folder: of a model or of its vision tower.
    image_size: of the tower.

  Returns:
    Whether they say that images are padded to squares.

  Raises:
    WeightsError: they are those of other pixels than ours.
  """
  values, where = _read(folder)
  _KEYS.check(values, where)
  for key, expected in _NUMBERS.items():
    if key in values and not _close(values[key], expected):
      raise config_keys.unsupported(where, key, values[key], (expected,))
  n = image_size
  sizes = {
    "crop_size": (n, {"height": n, "width": n}),
    # Height and width would stretch the image.
    "size": (n, {"shortest_edge": n}),
  }
  for key, expected in sizes.items():
    if key in values and values[key] not in expected:
      raise config_keys.unsupported(where, key, values[key], expected)
  # Others ignore do_pad.
  own = str(values.get("image_processor_type")).startswith("Llava")
  return own and values.get("do_pad") is True


def _read(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """The settings, {} without any, and the file that they are in."""
  path = folder / "preprocessor_config.json"
  if path.exists():
    return files.read_json(path, dict, WeightsError, _JSON_BYTES), str(path)
  path = folder / "processor_config.json"  # of transformers 5, all in one
  if not path.exists():
    return {}, str(path)
  values = files.read_json(path, dict, WeightsError, _JSON_BYTES)
  return files.get_field(
    values, "image_processor", dict, path, WeightsError, {}
  ), str(path)


def _close(found: Any, expected: Any) -> bool:
  if not isinstance(expected, list | tuple):
    found, expected = [found], [expected]
  return (
    isinstance(found, list)
    and len(found) == len(expected)
    and all(
      type(x) in (int, float) and abs(x - y) <= _TOLERANCE * y
      for x, y in zip(found, expected, strict=True)
    )
  )
