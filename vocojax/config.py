"""Typed, frozen view of the config. Read next: configs/common.py.

`configs/common.py` holds every key with its default; the dataclasses here hold
its type and the values it may take. All errors about a config are raised here,
before any device is touched. A key that came later has a default here, so that
checkpoints from before it can still be read.
"""

import dataclasses
import difflib
import json
import math
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ml_collections

from vocojax.errors import ConfigError, shorten


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; the names are those of HF `rope_scaling`."""

  theta: float
  scaling: Literal["none", "llama3"]
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  round_positions: Literal["none", "bfloat16"] = "none"

  def __post_init__(self):
    _above_zero(self, "model.llm.rope", "theta factor low_freq_factor")
    _positive(self, "model.llm.rope", "original_max_position_embeddings")
    low, high = self.low_freq_factor, self.high_freq_factor
    if self.scaling == "llama3" and high <= low:
      raise ConfigError(
        "config.model.llm.rope.high_freq_factor",
        str(high),
        f"more than low_freq_factor ({low})",
        "set 4.0, the published value",
      )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Shape of the language model."""

  vocab_size: int
  vocab_multiple: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope: RopeConfig
  tie_word_embeddings: bool
  initializer_range: float

  @property
  def padded_vocab_size(self) -> int:
    multiple = self.vocab_multiple
    return -(-self.vocab_size // multiple) * multiple

  def __post_init__(self):
    _positive(
      self,
      "model.llm",
      "vocab_size vocab_multiple hidden_size intermediate_size "
      "num_hidden_layers num_attention_heads num_key_value_heads head_dim",
    )
    _above_zero(self, "model.llm", "rms_norm_eps initializer_range")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ConfigError(
        "config.model.llm.num_key_value_heads",
        str(self.num_key_value_heads),
        f"a divisor of num_attention_heads ({self.num_attention_heads})",
        "choose a divisor",
      )
    if self.head_dim % 2:
      raise ConfigError(
        "config.model.llm.head_dim",
        str(self.head_dim),
        "an even number, which rotary position embedding needs",
        "choose an even number",
      )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Shape of the CLIP vision tower."""

  image_size: int
  patch_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  layer_norm_eps: float
  hidden_act: Literal["quick_gelu", "gelu"]
  feature_layer: int
  initializer_range: float

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def num_feature_layers(self) -> int:
    """How many layers run: `hidden_states[feature_layer]` counts from 0."""
    if self.feature_layer < 0:
      return self.num_hidden_layers + 1 + self.feature_layer
    return self.feature_layer

  def __post_init__(self):
    _positive(
      self,
      "model.vision",
      "image_size patch_size hidden_size intermediate_size "
      "num_hidden_layers num_attention_heads",
    )
    _above_zero(self, "model.vision", "layer_norm_eps initializer_range")
    if self.image_size % self.patch_size:
      raise ConfigError(
        "config.model.vision.patch_size",
        str(self.patch_size),
        f"a divisor of image_size ({self.image_size})",
        "choose a divisor",
      )
    if self.hidden_size % self.num_attention_heads:
      raise ConfigError(
        "config.model.vision.num_attention_heads",
        str(self.num_attention_heads),
        f"a divisor of hidden_size ({self.hidden_size})",
        "choose a divisor",
      )
    if not 0 <= self.num_feature_layers <= self.num_hidden_layers:
      raise ConfigError(
        "config.model.vision.feature_layer",
        str(self.feature_layer),
        f"one of the {self.num_hidden_layers} layers, or below 0 from the end",
        "set -2, the original's choice",
      )


CompressorName = Literal[
  "voco", "voco_causal", "full", "avgpool", "qformer", "blind"
]


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
  """What stands for an image when text is read: see models/compressors.py."""

  name: CompressorName
  num_voco_tokens: int
  text_sees_bos: bool
  qformer_layers: int = 2
  train_num_voco_tokens: Literal["fixed", "elastic"] = "fixed"

  @property
  def has_voco_tokens(self) -> bool:
    """Whether VoCo tokens stand in the image stream."""
    return self.name in ("voco", "voco_causal")

  @property
  def budgets(self) -> tuple[int, ...]:
    """Numbers of VoCo tokens that an example may be trained with; () is k.

    Drawn alike, powers of two make each doubling equally frequent: of 1 to 128
    drawn alike, one image in 128 would have one token, and half of them more
    than 64, where one more changes little.
    """
    if self.train_num_voco_tokens == "fixed" or self.name != "voco":
      return ()
    return budgets(self.num_voco_tokens)

  def __post_init__(self):
    _positive(self, "model.compressor", "num_voco_tokens qformer_layers")


# Keys of config.model that say how a model is computed, not which it is.
HOW_COMPUTED = (
  "attention",
  "attention_kernel",
  "attention_block_size",
  "logits_chunk",
  "mlp_chunks",
  "remat",
  "scan_layers",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The vision-language model."""

  llm: LlamaConfig
  vision: VisionConfig
  projector: Literal["linear", "mlp2x_gelu"]
  compressor: CompressorConfig
  attention: Literal["two_stream", "bias"]
  attention_kernel: Literal["auto", "splash", "cudnn", "xla"]
  attention_block_size: int
  logits_chunk: int
  mlp_chunks: int
  dtype: Literal["float32", "bfloat16", "float16"]
  param_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "full", "dots"]
  scan_layers: bool

  def __post_init__(self):
    _positive(self, "model", "attention_block_size logits_chunk mlp_chunks")
    if self.llm.intermediate_size % self.mlp_chunks:
      raise ConfigError(
        "config.model.mlp_chunks",
        str(self.mlp_chunks),
        f"a divisor of intermediate_size ({self.llm.intermediate_size})",
        "choose a divisor",
      )
    if self.attention_kernel == "cudnn" and self.dtype == "float32":
      raise ConfigError(
        "config.model.attention_kernel",
        "'cudnn' with config.model.dtype 'float32'",
        "a kernel that takes this dtype",
        "set the one to 'auto' or the other to 'bfloat16'",
      )
    width, heads = self.llm.hidden_size, self.vision.num_attention_heads
    if self.compressor.name == "qformer" and width % heads:
      raise ConfigError(
        "config.model.vision.num_attention_heads",
        str(heads),
        "with the Q-Former, which has as many heads, a divisor of "
        f"config.model.llm.hidden_size ({width})",
        "choose a divisor",
      )
    if self.attention_block_size % 128:
      raise ConfigError(
        "config.model.attention_block_size",
        str(self.attention_block_size),
        "a multiple of 128",
        "set 640, the default",
      )


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """How a conversation becomes tokens: see data/prompt.py."""

  layout: Literal["voco_v1", "vicuna_v1", "plain", "qa_v1"]
  strip_newlines: Literal["original", "none"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples come from and how they are batched."""

  source: Literal["easy_vqa", "grid_vqa", "llava_json"]
  path: str
  image_folder: str
  tokenizer: str
  train_split: str
  max_text_length: int
  max_images: int
  conversations_per_record: int
  skip_answers: tuple[str, ...]
  batching: Literal["shuffle", "slots", "pack", "group_by_length"]
  pack_lookahead: int
  batch_size: int
  flip_images: bool
  pad_to_square: bool
  num_workers: int
  prefetch_batches: int
  on_bad_record: Literal["skip", "stop"]
  grid_size: int = 2
  micro_batch_size: int = 8
  on_changed_data: Literal["stop", "accept"] = "stop"
  on_long_text: Literal["refuse", "truncate"] = "refuse"

  def __post_init__(self):
    _positive(
      self,
      "data",
      "max_text_length max_images pack_lookahead batch_size prefetch_batches "
      "micro_batch_size",
    )
    _not_negative(self, "data", "conversations_per_record num_workers")
    if self.grid_size not in (2, 3, 4):
      raise ConfigError(
        "config.data.grid_size",
        str(self.grid_size),
        "2, 3 or 4",
        "choose one of them",
      )
    count, length = self.conversations_per_record, self.max_text_length
    if self.batching == "slots" and (not count or length % count):
      raise ConfigError(
        "config.data.batching",
        f"'slots' with conversations_per_record {count} and max_text_length "
        f"{length}",
        "the one to divide the other",
        "set config.data.conversations_per_record to a divisor of "
        "config.data.max_text_length",
      )
    if self.flip_images and self.source == "grid_vqa":
      raise ConfigError(
        "config.data.flip_images",
        "True with config.data.source 'grid_vqa'",
        "False, since its questions say left and right",
        "set it to False",
      )

  @property
  def text_slots(self) -> int:
    """Equal parts of a text row, each with one conversation; 1 for no parts."""
    return self.conversations_per_record if self.batching == "slots" else 1

  @property
  def max_conversations(self) -> int:
    """Of a record, in training; 0 if that is not known beforehand."""
    if self.conversations_per_record:
      return self.conversations_per_record
    return 1 if self.source == "llava_json" else 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Optimiser, schedule, and what is trained."""

  name: Literal["adamw", "muon", "lion", "adafactor"]
  learning_rate: float
  adam_learning_rate: float
  b1: float
  b2: float
  eps: float
  first_moment_dtype: Literal["float32", "bfloat16"]
  weight_decay: float
  no_decay: tuple[str, ...]
  grad_clip: float
  warmup_ratio: float
  schedule: Literal["cosine", "hf_cosine", "linear", "constant"]
  end_learning_rate: float
  freeze: tuple[str, ...]

  def __post_init__(self):
    for key in ("no_decay", "freeze"):
      for pattern in getattr(self, key):
        if not pattern:
          raise ConfigError(
            f"config.optimizer.{key}",
            "an empty pattern, which matches every parameter",
            "patterns of parameters, or none",
            "write () for none",
          )
        try:
          re.compile(pattern)
        except re.error as e:
          raise ConfigError(
            f"config.optimizer.{key}",
            f"{pattern!r} ({e})",
            "a regular expression",
            "correct it",
          ) from e


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """Length of the run, logging and checkpoints."""

  steps: int
  epochs: float
  accumulate: int
  log_every: int
  checkpoint_every: int
  keep_checkpoints: int
  evaluate: bool
  distill_weight: float = 0.0
  teacher: str = "self"
  loss_mean: Literal["tokens", "micro_batches"] = "tokens"

  def __post_init__(self):
    _not_negative(self, "training", "distill_weight")
    _positive(
      self, "training", "accumulate log_every checkpoint_every keep_checkpoints"
    )
    if (self.steps > 0) == (self.epochs > 0):
      raise ConfigError(
        "config.training",
        f"steps={self.steps} and epochs={self.epochs}",
        "exactly one of them above 0",
        "set the other to 0",
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; one of them may be -1, 'all the rest'."""

  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Generation on held-out questions."""

  split: str
  batch_size: int
  max_new_tokens: int
  max_records: int
  bounds: bool
  adaptive_threshold: float = 0.1

  def __post_init__(self):
    if not 0 <= self.adaptive_threshold <= 1:
      raise ConfigError(
        "config.evaluation.adaptive_threshold",
        str(self.adaptive_threshold),
        "0 to 1, a total variation",
        "set 0.1, the default",
      )
    _positive(self, "evaluation", "batch_size max_new_tokens")
    _not_negative(self, "evaluation", "max_records")


@dataclasses.dataclass(frozen=True)
class Config:
  """One phase of a run, complete."""

  name: str
  seed: int
  init_from: str
  model: ModelConfig
  prompt: PromptConfig
  data: DataConfig
  optimizer: OptimizerConfig
  training: TrainingConfig
  mesh: MeshConfig
  evaluation: EvaluationConfig

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

  @classmethod
  def from_saved(cls, values: Any, where: str) -> "Config":
    """A config from what `to_json` wrote, parsed; `where` names the file.

    Raises:
      ConfigError: it is not one of this version, or of any.
    """
    try:
      return from_mapping(cls, values)
    except ConfigError as e:
      raise e.within(where) from e


def budgets(k: int) -> tuple[int, ...]:
  """1, 2, 4, ... as long as they are below k, and k."""
  return (*(2**i for i in range((k - 1).bit_length())), k)


def phases(config: ml_collections.ConfigDict) -> tuple[Config, ...]:
  """Splits a config into its phases, each complete, in running order.

  Phase `p` is the config with the keys under `config.phase.p` laid over it.
  A config without phases is one phase, named by its compressor. Groups of
  phases that are not named in `config.phases` are left aside.

  Raises:
    ConfigError: a key is unknown, has a wrong type or a useless value.
  """
  values = config.to_dict()
  names = values.pop("phases")
  overrides = values.pop("phase")
  if not names:
    name = values["model"]["compressor"]["name"]
    return (_phase(values | {"name": name}, "config"),)
  result = []
  for name in names:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
      raise ConfigError(
        "config.phases",
        repr(name),
        "letters, digits, '_' and '-', since it names a folder",
        "rename the phase",
      )
    where = f"config.phase.{name}"
    merged = _overlay(values, overrides.get(name, {}), where)
    result.append(_phase(merged | {"name": name}, where))
  return tuple(result)


def _phase(values: Mapping, where: str) -> Config:
  """One phase, checked as a whole; `where` is the group with its own keys.

  A checkpoint of it may be used with another compressor, so this is asked of
  what is to be trained only.
  """
  config = from_mapping(Config, values)
  compressor = config.model.compressor
  if compressor.train_num_voco_tokens != "fixed" and compressor.name != "voco":
    raise ConfigError(
      f"{where}.model.compressor.train_num_voco_tokens",
      f"{compressor.train_num_voco_tokens!r} with compressor "
      f"{compressor.name!r}",
      "'fixed', since only the tokens of 'voco' can be cut",
      "set it in the phases with that",
    )
  if config.training.distill_weight and compressor.name != "voco":
    raise ConfigError(
      f"{where}.training.distill_weight",
      f"{config.training.distill_weight} with compressor {compressor.name!r}",
      "0, since only 'voco' has a teacher that sees more of the same stream",
      "set it in the phases with that",
    )
  if config.model.dtype == "float16":
    raise ConfigError(
      f"{where}.model.dtype",
      "'float16'",
      "'bfloat16' or 'float32' to train in, since gradients overflow float16",
      "set 'bfloat16'; vocojax.evaluate has --float16",
    )
  data = config.data
  in_runs = config.training.loss_mean == "micro_batches"
  in_runs |= data.batching == "group_by_length"
  if in_runs and data.batch_size % data.micro_batch_size:
    raise ConfigError(
      f"{where}.data.micro_batch_size",
      str(data.micro_batch_size),
      f"a divisor of config.data.batch_size ({data.batch_size})",
      "choose a divisor",
    )
  return config


def load_module(path: str) -> ml_collections.ConfigDict:
  """Runs `get_config()` of a config file; for tests and notebooks."""
  namespace: dict[str, Any] = {"__file__": str(path), "__name__": "config"}
  source = pathlib.Path(path).read_text()
  exec(compile(source, str(path), "exec"), namespace)
  return namespace["get_config"]()


def nearest(name: str, names: Iterable[str]) -> str | None:
  """The one of `names` that `name` is most like, if any is like it."""
  return next(iter(difflib.get_close_matches(name, list(names), 1, 0.5)), None)


def unknown_key(where: str, key: str, keys: Iterable[str]) -> ConfigError:
  """What to raise for a key that is none of `keys`."""
  near = nearest(key, keys)
  return ConfigError(
    where,
    "an unknown key",
    f"such a key as {near!r}" if near else "one of configs/common.py",
    f"write {near!r}" if near else "see configs/common.py for all keys",
  )


def from_mapping(cls: type, values: Any, path: str = "config"):
  """Builds a config dataclass from nested mappings, checking every key.

  Raises:
    ConfigError: a key is unknown or missing, or a value has a wrong type.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(
      path, shorten(values), "a group of keys", "set its keys one by one"
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise unknown_key(f"{path}.{key}", key, fields)
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for key in fields:
    if key not in values:
      if fields[key].default is not dataclasses.MISSING:
        continue
      raise ConfigError(
        f"{path}.{key}", "nothing", "a value", "see configs/common.py"
      )
    kwargs[key] = _check(hints[key], values[key], f"{path}.{key}")
  return cls(**kwargs)


def _check(hint, value, path: str):
  """Returns `value` as type `hint`, or raises a ConfigError."""
  if dataclasses.is_dataclass(hint):
    return from_mapping(hint, value, path)
  if typing.get_origin(hint) is Literal:
    choices = typing.get_args(hint)
    if value not in choices:
      near = nearest(str(value), choices)
      raise ConfigError(
        path,
        shorten(value),
        f"one of {', '.join(map(str, choices))}",
        f"set {near or choices[0]!r}",
      )
    return value
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if not isinstance(value, (tuple, list)):
      raise ConfigError(
        path,
        f"{shorten(value)} ({type(value).__name__})",
        f"a tuple of {item.__name__}",
        f"write ({value!r},)" if isinstance(value, item) else "write a tuple",
      )
    return tuple(_check(item, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and type(value) in (int, float):
    if not math.isfinite(value):
      raise ConfigError(path, str(value), "a finite number", "correct it")
    return float(value)
  if type(value) is not hint:
    raise ConfigError(
      path,
      f"{shorten(value)} ({type(value).__name__})",
      hint.__name__,
      f"set a value of type {hint.__name__}",
    )
  return value


def _overlay(base, over, path: str):
  result = dict(base)
  for key, value in over.items():
    if key not in base:
      raise unknown_key(f"{path}.{key}", key, base)
    if isinstance(base[key], Mapping) and isinstance(value, Mapping):
      value = _overlay(base[key], value, f"{path}.{key}")
    result[key] = value
  return result


def _positive(config, path: str, keys: str):
  for key in keys.split():
    if getattr(config, key) < 1:
      raise ConfigError(
        f"config.{path}.{key}",
        str(getattr(config, key)),
        "at least 1",
        "set a larger number",
      )


def _above_zero(config, path: str, keys: str):
  for key in keys.split():
    if getattr(config, key) <= 0:
      raise ConfigError(
        f"config.{path}.{key}",
        str(getattr(config, key)),
        "a number above 0",
        "set the value of the published model",
      )


def _not_negative(config, path: str, keys: str):
  for key in keys.split():
    if getattr(config, key) < 0:
      raise ConfigError(
        f"config.{path}.{key}",
        str(getattr(config, key)),
        "0 or more",
        "set 0 or a larger number",
      )
