"""config.json of published models and our ModelConfig. Next: `hf.py`.

What a published model asks for and ours cannot do is refused with the key.
"""

import dataclasses
import pathlib
from typing import Any

import transformers

from vocojax import config as config_lib
from vocojax.config import LlamaConfig, ModelConfig, VisionConfig
from vocojax.core import files
from vocojax.errors import ConfigError, WeightsError, shorten
from vocojax.weights import config_keys
from vocojax.weights.files import other_format
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
_JSON_BYTES = 2**22  # of a file of settings
_DOWNLOAD = "download the file again"


def read(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a model folder.

  Raises:
    WeightsError: there is none, or the model is quantised.
  """
  path = folder / "config.json"
  if not path.exists():
    if other := other_format(folder):
      raise WeightsError(folder, other[0], "a Hugging Face model", other[1])
    raise WeightsError(
      path, "no such file", "one", "name the folder of a Hugging Face model"
    )
  values = files.read_json(path, dict, WeightsError, _JSON_BYTES)
  if values.get("quantization_config") is not None:
    raise WeightsError(
      f"{path}: quantization_config",
      shorten(values["quantization_config"]),
      "plain weights",
      "use the model that it was made from",
    )
  return values


def layout_of(values: dict[str, Any], where: str) -> Layout | None:
  """How a config.json lays out a vision-language model; None for an LLM.

  Raises:
    WeightsError: it is another model, or one with keys that we do not know.
  """
  kind = values.get("model_type", "llama")
  llava = ("llava", "llava_llama")
  if "mm_projector_type" in values:
    layout, known, keys = "original", llava, config_keys.LLAVA
  elif "text_config" in values:
    layout, known, keys = "llava_hf", llava[:1], config_keys.LLAVA_HF
  else:
    layout, known, keys = None, ("llama",), config_keys.LLAMA
  if layout is None and kind in llava:
    raise WeightsError(
      f"{where}: mm_projector_type",
      "nothing",
      "'linear' or 'mlp2x_gelu'",
      "add the projector of this model to its config.json",
    )
  if kind not in known:
    raise WeightsError(
      f"{where}: model_type",
      shorten(kind),
      " or ".join(map(repr, known)),
      "use a LLaMA, a LLaVA-1.5 or a VoCo-LLaMA",
    )
  keys.check(values, where)
  return layout


def text_values(
  values: dict[str, Any], layout: Layout | None, where: str
) -> tuple[dict[str, Any], str]:
  """Settings of the language model in a config.json, and where they are."""
  if layout != "llava_hf":
    return values, where
  text = files.get_field(values, "text_config", dict, where, WeightsError)
  where = f"{where}: text_config"
  if text.get("model_type", "llama") != "llama":
    raise config_keys.unsupported(
      where, "model_type", text["model_type"], ("llama",)
    )
  config_keys.LLAMA.check(text, where)
  return text, where


def tower_folder(
  values: dict[str, Any], folder: pathlib.Path
) -> pathlib.Path | None:
  """The folder of the vision tower inside a model folder, if it has one.

  The name is that of a folder or of a model on a hub. What leads out of the
  model's folder is not followed.
  """
  where = folder / "config.json"
  name = files.get_field(
    values, "mm_vision_tower", (str, type(None)), where, WeightsError, None
  )
  if not name:
    return None
  try:
    tower = files.path_inside(folder, name, where, WeightsError)
    return tower if tower.is_dir() else None
  except (WeightsError, OSError):  # OSError: no file can have such a name
    return None


def vision_values(
  values: dict[str, Any], folder: pathlib.Path
) -> tuple[dict[str, Any] | None, str]:
  """Settings of the tower that a config.json names or describes; and where."""
  if "vision_config" in values:
    where = f"{folder / 'config.json'}: vision_config"
    found = files.check_kind(values["vision_config"], where, dict, WeightsError)
    return _clip_vision(found, where), where
  if tower := tower_folder(values, folder):
    return clip_values(tower)
  name = pathlib.PurePath(values.get("mm_vision_tower") or "").name
  known = _TOWERS.get(name)  # of any publisher's disk
  return known and _CLIP_LARGE | known, str(folder / "config.json")


def clip_values(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Settings of the vision half of a CLIP folder, and where they are.

  Raises:
    WeightsError: it is another model.
  """
  values, where = read(folder), str(folder / "config.json")
  kind = values.get("model_type")
  if kind == "clip_vision_model":
    return _clip_vision(values, where), where
  if kind != "clip":
    raise WeightsError(
      f"{where}: model_type",
      shorten(kind),
      "'clip' or 'clip_vision_model'",
      "use a CLIP folder such as openai/clip-vit-large-patch14-336",
    )
  config_keys.CLIP.check(values, where)
  vision, older = (
    files.get_field(values, key, (dict, type(None)), where, WeightsError, None)
    or {}
    for key in ("vision_config", "vision_config_dict")
  )
  for key in vision.keys() & older.keys():
    if vision[key] != older[key]:
      raise WeightsError(
        f"{where}: vision_config_dict: {key}",
        shorten(older[key]),
        f"{shorten(vision[key])}, as in vision_config",
        "remove the one that is wrong",
      )
  where = f"{where}: vision_config"
  return _clip_vision(older | vision, where), where


def _clip_vision(values: dict[str, Any], where: str) -> dict[str, Any]:
  kind = values.get("model_type", "clip_vision_model")
  if kind != "clip_vision_model":
    raise config_keys.unsupported(
      where, "model_type", kind, ("clip_vision_model",)
    )
  config_keys.CLIP_VISION.check(values, where)
  return values


def llama(values: dict[str, Any], where: str, vocab_size: int) -> LlamaConfig:
  """The language model.

  Args:
    values: config.json of a LLaMA, or the `text_config` of another.
    where: names them in errors.
    vocab_size: with `<voco>`.

  Raises:
    WeightsError: it is a variant that we cannot represent.
  """
  hf = transformers.LlamaConfig()
  heads = values.get("num_attention_heads", hf.num_attention_heads)
  width = values.get("hidden_size", hf.hidden_size)
  own = {
    "vocab_size": vocab_size,
    "vocab_multiple": _VOCAB_MULTIPLE,
    "num_key_value_heads": values.get("num_key_value_heads") or heads,
    "head_dim": values.get("head_dim") or max(1, width // heads),
    "rope": _rope(values, where),
    "tie_word_embeddings": files.get_field(
      values, "tie_word_embeddings", bool, where, WeightsError, False
    ),
  }
  return _ours(LlamaConfig, hf, values, own, where)


# Of a rope; other types of it have other keys.
_FACTOR = config_keys.Number(float, 1e-3, 1e6)
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_LLAMA3 += ("original_max_position_embeddings",)
_ROPE = config_keys.Keys(
  dict.fromkeys(_LLAMA3, _FACTOR)
  | {
    "original_max_position_embeddings": config_keys.Number(int, 1, 2**40),
    "rope_theta": config_keys.LLAMA.numbers["rope_theta"],
  },
  "",
  {
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", "llama3"),
    "type": ("default", "llama3"),
  },
  "",
)


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
  """The rotary position embedding, in the spelling of any transformers."""
  found: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
  for group in ("rope_parameters", "rope_scaling"):
    kinds = (dict, type(None))
    given = files.get_field(values, group, kinds, where, WeightsError, None)
    inside = f"{where}: {group}"
    given = dict(given or {})
    if "type" in given:  # the older name
      given.setdefault("rope_type", given["type"])
    _ROPE.check(given, inside)
    for key, value in given.items():
      if found.get(key) not in (None, value):
        raise WeightsError(
          f"{inside}: {key}",
          shorten(value),
          f"{shorten(found[key])}, as elsewhere in the file",
          "remove the one that is wrong",
        )
      found[key] = value
  rope = {
    "theta": found["rope_theta"] or 10000.0,
    "scaling": "none",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  if found.get("rope_type") == "llama3":
    rope["scaling"] = "llama3"
    for key in _LLAMA3:
      if key not in found:
        raise WeightsError(
          f"{where}: {key}", "nothing", "a number", "download the file again"
        )
      rope[key] = found[key]
  return rope


def vision(
  values: dict[str, Any], where: str, layer: Any, layer_where: str
) -> VisionConfig:
  """The vision tower.

  Args:
    values: config.json of a CLIP's vision half, or the `vision_config` of
      another.
    where: names them in errors.
    layer: the hidden state that is used; below 0 it counts from the end.
    layer_where: names that in errors.

  Raises:
    WeightsError: it is a variant that we cannot represent.
  """
  hf = transformers.CLIPVisionConfig()
  count = values.get("num_hidden_layers", hf.num_hidden_layers)
  if type(layer) is not int or not -count - 1 <= layer <= count:
    raise WeightsError(
      layer_where,
      shorten(layer),
      f"the number of one of {count} layers",
      "use a model with one; several layers at once are not supported",
    )
  return _ours(VisionConfig, hf, values, {"feature_layer": layer}, where)


def projector(values: dict[str, Any], layout: Layout, where: str) -> str:
  """Our name of the projector.

  Raises:
    WeightsError: it is one we do not have.
  """
  if layout == "llava_hf":
    return "mlp2x_gelu"
  known = ("linear", "mlp2x_gelu")
  if values["mm_projector_type"] not in known:
    raise config_keys.unsupported(
      where, "mm_projector_type", values["mm_projector_type"], known
    )
  return values["mm_projector_type"]


def _ours(
  cls: type, hf: Any, given: dict[str, Any], own: dict[str, Any], where: str
) -> Any:
  """Our group of keys: `own`, then those given, then transformers' defaults."""
  values = dict(own)
  for key in {field.name for field in dataclasses.fields(cls)} - own.keys():
    value = given.get(key)
    values[key] = getattr(hf, key) if value is None else value
  try:
    return config_lib.from_mapping(cls, values, where)
  except ConfigError as e:
    key = e.where.rsplit(".", 1)[-1]  # ours are named as theirs
    raise WeightsError(
      f"{where}: {key}", e.got, e.expected, "use another model"
    ) from e


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
  rope: dict[str, Any] = dataclasses.asdict(config.rope)
  theta, scaling = rope.pop("theta"), rope.pop("scaling")
  del rope["round_positions"]  # of training
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
