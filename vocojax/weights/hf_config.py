"""config.json of published models and our ModelConfig. Next: `hf.py`.

What a published model asks for and ours cannot do is refused with the key.
"""

import dataclasses
import json
import pathlib
from typing import Any

import transformers

from vocojax import config as config_lib
from vocojax.config import LlamaConfig, ModelConfig, VisionConfig
from vocojax.errors import WeightsError
from vocojax.weights.hf import Layout

# Towers that LLaVA names and does not describe.
_PUBLISHER = "openai/"
_TOWERS = {
  "clip-vit-large-patch14-336": {"image_size": 336},
  "clip-vit-large-patch14": {"image_size": 224},
}
_CLIP_LARGE = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "patch_size": 14,
}
_VOCAB_MULTIPLE = 128


def read(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a model folder.

  Raises:
    WeightsError: there is none, or the model is quantised.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise WeightsError(
      f"{path}: no such file; name the folder of a Hugging Face model"
    )
  try:
    values = json.loads(path.read_text())
  except ValueError as e:
    raise WeightsError(f"{path}: not JSON ({e}); download it again") from e
  if "quantization_config" in values:
    raise WeightsError(
      f"{path}: quantization_config, expected plain weights; use the model "
      "that it was made from"
    )
  return values


def layout_of(values: dict[str, Any]) -> Layout | None:
  """How a config.json lays out a vision-language model; None for an LLM."""
  if "text_config" in values and values.get("model_type") == "llava":
    return "llava_hf"
  return "original" if "mm_projector_type" in values else None


def vision_values(
  values: dict[str, Any], folder: pathlib.Path
) -> dict[str, Any] | None:
  """Settings of the vision tower that a config.json names or describes."""
  if "vision_config" in values:
    return values["vision_config"]
  tower = values.get("mm_vision_tower", "")
  local = folder / tower
  if tower and (local / "config.json").is_file():
    return clip_values(local)
  known = _TOWERS.get(pathlib.PurePath(tower).name)  # of any publisher's disk
  return known and _CLIP_LARGE | known


def clip_values(folder: pathlib.Path) -> dict[str, Any]:
  """Settings of the vision half of a CLIP folder.

  Raises:
    WeightsError: it is another model.
  """
  values = read(folder)
  if values.get("model_type") == "clip":
    return values.get("vision_config", {})
  if values.get("model_type") != "clip_vision_model":
    raise WeightsError(
      f"{folder / 'config.json'}: model_type {values.get('model_type')!r}, "
      "expected 'clip' or 'clip_vision_model'; use a CLIP folder such as "
      "openai/clip-vit-large-patch14-336"
    )
  return values


def llama(values: dict[str, Any], where: str, vocab_size: int) -> LlamaConfig:
  """The language model.

  Args:
    values: config.json of a LLaMA, or the `text_config` of another.
    where: names them in errors.
    vocab_size: with `<voco>`.

  Raises:
    WeightsError: it is no LLaMA, or a variant that we cannot represent.
  """
  if values.get("model_type", "llama") not in ("llama", "llava", "llava_llama"):
    if "mm_projector_type" not in values:
      raise WeightsError(
        f"{where}: model_type {values['model_type']!r}, expected 'llama'; only "
        "models of the LLaMA architecture can be converted"
      )
  hf = _fill(transformers.LlamaConfig, values | {"model_type": "llama"}, where)
  for key, expected in (
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
  ):
    _expect(where, key, getattr(hf, key), expected)
  rope = dict(hf.rope_parameters or {})
  kind = rope.pop("rope_type", "default")
  if kind not in ("default", "llama3"):
    raise WeightsError(
      f"{where}: rope type {kind!r}, expected 'default' or 'llama3'; others "
      "are not supported"
    )
  _expect(
    where, "partial_rotary_factor", rope.pop("partial_rotary_factor", 1.0), 1.0
  )
  scaling = {
    "theta": rope.pop("rope_theta", 10000.0),
    "scaling": "llama3" if kind == "llama3" else "none",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  if kind == "llama3":
    scaling |= rope
  result = {
    "vocab_size": vocab_size,
    "vocab_multiple": _VOCAB_MULTIPLE,
    "head_dim": hf.head_dim or hf.hidden_size // hf.num_attention_heads,
    "rope": scaling,
  }
  for field in dataclasses.fields(LlamaConfig):
    if field.name not in result:
      result[field.name] = getattr(hf, field.name)
  return config_lib.from_mapping(LlamaConfig, result, where)


def vision(values: dict[str, Any], where: str, layer: Any) -> VisionConfig:
  """The vision tower; `layer` is the hidden state that is used.

  Raises:
    WeightsError: it is no CLIP.
  """
  if values.get("model_type", "clip_vision_model") != "clip_vision_model":
    raise WeightsError(
      f"{where}: model_type {values['model_type']!r}, expected "
      "'clip_vision_model'; only CLIP towers can be converted"
    )
  if not isinstance(layer, int):
    raise WeightsError(
      f"{where}: vision_feature_layer {layer!r}, expected one number; several "
      "layers at once are not supported"
    )
  hf = _fill(transformers.CLIPVisionConfig, values, where)
  _expect(where, "num_channels", hf.num_channels, 3)
  result = {"feature_layer": layer}
  for field in dataclasses.fields(VisionConfig):
    if field.name not in result:
      result[field.name] = getattr(hf, field.name)
  return config_lib.from_mapping(VisionConfig, result, where)


def projector(values: dict[str, Any], layout: Layout, where: str) -> str:
  """Our name of the projector.

  Raises:
    WeightsError: it is one we do not have.
  """
  if layout == "llava_hf":
    for key, expected in (
      ("projector_hidden_act", "gelu"),
      ("multimodal_projector_bias", True),
      ("vision_feature_select_strategy", "default"),
    ):
      _expect(where, key, values.get(key, expected), expected)
    return "mlp2x_gelu"
  _expect(
    where,
    "mm_vision_select_feature",
    values.get("mm_vision_select_feature", "patch"),
    "patch",
  )
  _expect(
    where,
    "mm_use_im_start_end",
    values.get("mm_use_im_start_end", False),
    False,
  )
  kind = values["mm_projector_type"]
  if kind not in ("linear", "mlp2x_gelu"):
    raise WeightsError(
      f"{where}: mm_projector_type {kind!r}, expected 'linear' or "
      "'mlp2x_gelu'; others are not supported"
    )
  return kind


def _fill(cls: type, values: dict[str, Any], where: str):
  """As transformers reads it: with defaults, older spellings of the rope."""
  try:
    return cls.from_dict(values)
  except Exception as e:  # of many types, and of several lines
    raise WeightsError(
      f"{where}: transformers cannot read it ({' '.join(str(e).split())}); "
      "download it again"
    ) from e


def _expect(where: str, key: str, found, expected) -> None:
  if found != expected:
    raise WeightsError(
      f"{where}: {key} is {found!r}, expected {expected!r}; a model with "
      "another cannot be represented"
    )


def published_llama(
  config: LlamaConfig, vocab_size: int, max_position_embeddings: int
) -> dict[str, Any]:
  """Settings of the language model for config.json.

  The rope is spelled as before transformers 5, which all versions read.
  """
  values: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": vocab_size,
    "max_position_embeddings": max_position_embeddings,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
  }
  for field in dataclasses.fields(LlamaConfig):
    if field.name not in ("vocab_size", "vocab_multiple", "rope"):
      values[field.name] = getattr(config, field.name)
  rope = dataclasses.asdict(config.rope)
  theta, scaling = rope.pop("theta"), rope.pop("scaling")
  values["rope_theta"] = theta
  if scaling != "none":
    values["rope_scaling"] = rope | {"rope_type": scaling}
  return values


def published_vision(config: VisionConfig) -> dict[str, Any]:
  """Settings of the vision tower for config.json."""
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name != "feature_layer"
  }
  return values | {"model_type": "clip_vision_model", "num_channels": 3}


def tower_name(config: ModelConfig) -> str | None:
  """The published name of a tower of this shape."""
  values = published_vision(config.vision)
  for name, own in _TOWERS.items():
    if (_CLIP_LARGE | own).items() <= values.items():
      return _PUBLISHER + name
  return None
