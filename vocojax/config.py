"""Every key of a config: type, default, and what follows from it.

A config file (`configs/*.py`) changes some of what `default_config` returns; on
the command line, `--config=voco_1tok --config.training.steps=100` does. The
defaults are VoCo-LLaMA 7B with one VoCo token. `phases` checks a config and
returns it frozen. All errors about a config are raised here, before any device
is touched. Read next: training/loop.py.
"""

import dataclasses
import difflib
import json
import math
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, Literal

import ml_collections

from vocojax.errors import ConfigError, shorten

# Keys that are None unless a config file sets them: as what a phase starts from
# has them, or else the defaults below.
_AS_START = re.compile(
  r"model\.(llm|vision|compressor)\.(?!rope\.round_positions).*|"
  r"model\.projector|"
  r"prompt\..*|data\.pad_to_square"
)
# Those of them that may be set to something else than the start has.
_MAY_DIFFER = re.compile(
  r"prompt\..*|data\.pad_to_square|model\.compressor\..*|"
  r"model\.llm\.rope\.(?!theta$).*|"
  r".*\.initializer_range"
)
# Keys that came later: a checkpoint of before them has their defaults.
_LATER = {
  "CompressorConfig": ("qformer_layers", "train_num_voco_tokens"),
  "DataConfig": (
    "grid_size",
    "micro_batch_size",
    "on_changed_data",
    "on_long_text",
    "weights",
  ),
  "EvaluationConfig": (
    "adaptive_threshold",
    "every",
    "holdout",
    "image_folder",
    "path",
  ),
  "RopeConfig": ("round_positions",),
  "TrainingConfig": ("distill_weight", "loss_mean", "teacher"),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; the names are those of HF `rope_scaling`."""

  theta: float = 10000.0  # base of the wavelengths; larger reaches further
  scaling: Literal["none", "llama3"] = "none"  # 'llama3' needs what follows
  factor: float = 8.0  # longest wavelengths are stretched by it
  low_freq_factor: float = 1.0  # above context / this: stretched in full
  high_freq_factor: float = 4.0  # below context / this: left alone
  original_max_position_embeddings: int = 8192  # that context, tokens
  # 'bfloat16': positions are rounded to 8 bits in training only, as happens in
  # the original under ZeRO-3. From 512 on, four neighbours share an angle.
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

  # Tokens of the tokenizer, <voco> included; None is the tokenizer's own.
  vocab_size: int = 32001
  vocab_multiple: int = 128  # rows are padded to this; never sampled
  hidden_size: int = 4096  # width of the residual stream
  intermediate_size: int = 11008  # width inside the SwiGLU
  num_hidden_layers: int = 32  # each has keys and values of every VoCo token
  num_attention_heads: int = 32  # query heads
  num_key_value_heads: int = 32  # fewer than the above: grouped heads
  head_dim: int = 128  # even; times the heads it need not be hidden_size
  rms_norm_eps: float = 1e-5  # added to the mean square
  rope: RopeConfig = field(default_factory=RopeConfig)
  tie_word_embeddings: bool = False  # True: output head = input embedding
  initializer_range: float = 0.02  # standard deviation of new weights

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

  image_size: int = 336  # pixels a side
  patch_size: int = 14  # pixels a side; (336/14)^2 = 576 patches
  hidden_size: int = 1024  # width of a patch
  intermediate_size: int = 4096  # width inside the MLP
  num_hidden_layers: int = 24  # of the published tower, also if fewer run
  num_attention_heads: int = 16  # divides hidden_size
  layer_norm_eps: float = 1e-5  # added to the variance
  hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"  # of the MLP
  feature_layer: int = -2  # hidden_states index; -1 is the last layer
  initializer_range: float = 0.02  # standard deviation of new weights

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

  # 'voco_causal': text sees all, VoCo tokens too (the upper bound); 'full': all
  # patches, no VoCo tokens (LLaVA); 'avgpool': k means; 'qformer': k learned
  # queries; 'blind': nothing of the image.
  name: CompressorName = "voco"
  num_voco_tokens: int = 1  # k, 1 to 128
  text_sees_bos: bool = False  # True: text also sees BOS
  qformer_layers: int = 2  # blocks of 'qformer'
  # 'elastic' (voco only): text sees the first 1, 2, 4, ... or k of them, drawn
  # for each record, so that one checkpoint answers from any such number.
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

  llm: LlamaConfig = field(default_factory=LlamaConfig)
  vision: VisionConfig = field(default_factory=VisionConfig)
  # From vision width to LLM width.
  projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
  compressor: CompressorConfig = field(default_factory=CompressorConfig)
  # 'bias' is one joint masked pass, slow.
  attention: Literal["two_stream", "bias"] = "two_stream"
  # 'splash' (TPU), 'cudnn' (GPU) or 'xla'; 'auto' is what suits the platform.
  attention_kernel: Literal["auto", "splash", "cudnn", "xla"] = "auto"
  attention_block_size: int = 640  # of splash: most tokens of a block
  logits_chunk: int = 8192  # rows of the vocabulary scored at a time
  # Parts of the MLP's width computed one after the other: less memory. Divides
  # it; no effect where config.mesh.tensor splits the width.
  mlp_chunks: int = 1
  # Of activations and matrix products.
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
  # Of weights and optimiser state.
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  # Recompute layers in the backward pass; 'dots' keeps matrix products.
  remat: Literal["none", "full", "dots"] = "full"
  scan_layers: bool = True  # False unrolls: longer compile, faster on CPU

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

  # 'voco_v1' is that of VoCo-LLaMA, 'vicuna_v1' that of LLaVA-1.5, 'plain' an
  # image and its caption, 'qa_v1' a bare question and answer.
  layout: Literal["voco_v1", "vicuna_v1", "plain", "qa_v1"] = "voco_v1"
  # 'original' deletes every newline of a conversation with images, as the
  # released training code did.
  strip_newlines: Literal["original", "none"] = "none"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples come from and how they are batched."""

  # A data set of vocojax, or files in the format of LLaVA.
  source: Literal["easy_vqa", "grid_vqa", "llava_json"] = "llava_json"
  grid_size: int = 2  # grid_vqa: cells a side, 2 to 4
  # The JSON file, or several, separated by commas; of the other sources the
  # TFDS folder ('' is its default).
  path: str = ""
  # Image paths in the JSON are relative to it; one for each file, or for all.
  image_folder: str = ""
  # Shares of an epoch that come of each file, in any unit; () takes every
  # record once. An epoch is as many records as the files have together.
  weights: tuple[float, ...] = ()
  # Folder of a Hugging Face tokenizer; '' is that of init_from; 'words' makes
  # one of the words of the training split, for small models.
  tokenizer: str = ""
  train_split: str = "train"  # or a slice of it, such as 'train[:1000]'
  max_text_length: int = 2048 - 580  # tokens of a text row
  max_images: int = 1  # image slots of a text row
  conversations_per_record: int = 0  # sampled from those of a record; 0 all
  # Training leaves out conversations that end in one of these answers, such as
  # ('yes', 'no') to begin with open questions.
  skip_answers: tuple[str, ...] = ()
  # 'shuffle' gives each record a row of its own. So does 'slots', but its
  # conversations_per_record have equal parts of the row, which saves attention
  # where they are many and about equally long. 'pack' puts as many as fit
  # into a row; metrics.jsonl says how full text rows and image slots are, and
  # both are if max_text_length / max_images is what a record has of each.
  # 'group_by_length' is LLaVA's order: records with and without images in
  # batches of their own; rows keep their length, so nothing is saved.
  batching: Literal["shuffle", "slots", "pack", "group_by_length"] = "shuffle"
  pack_lookahead: int = 256  # records that may wait for a fitting row
  batch_size: int = 128  # text rows per step, over all devices and hosts
  # Rows that the original has on a device at a time. 'group_by_length' gives
  # each such run of rows about equally many words; see training.loss_mean.
  micro_batch_size: int = 8
  flip_images: bool = False  # mirror at random, both ways
  pad_to_square: bool = True  # False: centre crop loses the long side's ends
  num_workers: int = 0  # processes that decode; 0 decodes in a thread
  prefetch_batches: int = 4  # ready ahead of the step, in host memory
  # 'truncate' cuts longer texts, as LLaVA does: max_text_length then counts the
  # positions of images and text together, so a text with an image is cut
  # earlier, and only text is. A record whose answers are all cut is left out.
  on_long_text: Literal["refuse", "truncate"] = "refuse"
  on_bad_record: Literal["skip", "stop"] = "stop"  # 'skip' counts and logs it
  # When a run resumes on data other than it began with: 'accept' goes on, from
  # the beginning of the data if the number of records has changed.
  on_changed_data: Literal["stop", "accept"] = "stop"

  def __post_init__(self):
    _positive(
      self,
      "data",
      "max_text_length max_images pack_lookahead batch_size prefetch_batches "
      "micro_batch_size",
    )
    _not_negative(self, "data", "conversations_per_record num_workers")
    if not all(weight > 0 for weight in self.weights):
      raise ConfigError(
        "config.data.weights",
        str(self.weights),
        "numbers above 0",
        "leave out the files that are not to be trained on",
      )
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

  # 'muon': matrices by muon, the rest by adamw. 'lion' keeps one moment of a
  # weight, 'adafactor' two vectors of a matrix, adamw two numbers of a weight.
  name: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"
  learning_rate: float = 2e-5  # peak
  adam_learning_rate: float = 0.0  # muon only: peak of its adamw part
  b1: float = 0.9  # Adam: memory of the gradient
  b2: float = 0.999  # Adam: memory of its square
  eps: float = 1e-8  # Adam: smallest divisor
  # 'bfloat16' saves 2 bytes a weight. The second moment stays: its steps of
  # 1 - b2 would be lost in rounding.
  first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
  weight_decay: float = 0.0  # times learning rate, per step
  # Parameters whose path matches one of these are not decayed.
  no_decay: tuple[str, ...] = ("norm", "bias", "embed")
  grad_clip: float = 1.0  # global norm; 0 is off
  warmup_ratio: float = 0.03  # of all steps
  # 'hf_cosine' is transformers': the first step is at rate 0, and learns
  # nothing.
  schedule: Literal["cosine", "hf_cosine", "linear", "constant"] = "cosine"
  end_learning_rate: float = 0.0  # as a fraction of the peak
  # Parameters whose path matches one of these are not trained: they get no
  # gradient and no optimiser state.
  freeze: tuple[str, ...] = ("^vision/",)

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

  steps: int = 0  # optimiser steps; this or epochs
  epochs: float = 0.0  # passes over the training split; packed: about
  accumulate: int = 1  # parts of a batch, in turn; divides batch_size
  # What a step's loss is the mean over: all trained tokens of its batch; or
  # 'micro_batches': the tokens of each run of data.micro_batch_size rows, and
  # then the runs. An answer among short ones then counts more than one among
  # long ones. Runs are of the order of rows, whatever the mesh and accumulate;
  # a packed row counts as one, however many records it holds.
  loss_mean: Literal["tokens", "micro_batches"] = "tokens"
  log_every: int = 10  # steps
  checkpoint_every: int = 500  # steps
  keep_checkpoints: int = 2  # newest ones
  # Times KL(teacher || model) of the next token, added to the loss (voco only);
  # 0 is off. The teacher reads the same text, but sees all patches.
  distill_weight: float = 0.0
  # 'self': the weights as they are now, for one more pass over the text. Or a
  # phase folder with compressor 'full': its weights are held in memory too.
  teacher: str = "self"
  evaluate: bool = False  # generate answers and score them at the end

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

  data: int = 1  # replicas; a multiple of the number of TPU slices
  fsdp: int = -1  # shards of weights, gradients and optimiser state
  tensor: int = 1  # shards within a layer


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Generation on held-out questions."""

  # Of JSON files, 'test' is what path or holdout says.
  split: str = "test"
  path: str = ""  # JSON files to evaluate on, which are not trained on
  image_folder: str = ""  # of these; '' is config.data.image_folder
  # Share of the records of config.data.path that is evaluated on instead, and
  # not trained on. A hash of a record's first image's name chooses, of its text
  # if it has none, so records that come or move change nothing for the others.
  holdout: float = 0.0
  batch_size: int = 64  # records at once
  max_new_tokens: int = 16  # answers are cut there
  max_records: int = 0  # 0 is all
  # Also score the last 'voco_causal' phase (the upper bound) and its weights
  # read as 'voco' (the lower bound).
  bounds: bool = False
  # vocojax.evaluate --adaptive reads 1, 2, 4, ... VoCo tokens until no event
  # among an answer's first tokens changes its probability by more than this.
  adaptive_threshold: float = 0.1
  # Steps between two validations in training, 0 for none: loss and accuracy on
  # this split, with the true answers as context; also after the last step. The
  # checkpoint of the lowest loss is kept, and named PHASE/best.
  every: int = 0

  def __post_init__(self):
    if not 0 <= self.adaptive_threshold <= 1:
      raise ConfigError(
        "config.evaluation.adaptive_threshold",
        str(self.adaptive_threshold),
        "0 to 1, a total variation",
        "set 0.1, the default",
      )
    if not 0 <= self.holdout < 1:
      raise ConfigError(
        "config.evaluation.holdout",
        str(self.holdout),
        "0, or a share of the records below 1",
        "set 0.05, or 0 for none",
      )
    for key, value, useless in (
      ("holdout", self.holdout, self.path),
      ("image_folder", self.image_folder, not self.path),
      ("split", self.split, self.path and not self.split.startswith("test")),
    ):
      if value and useless:
        raise ConfigError(
          f"config.evaluation.{key}",
          f"{value!r} with config.evaluation.path {self.path!r}",
          "a key that has an effect",
          f"leave out config.evaluation.{key}, or change the path",
        )
    _positive(self, "evaluation", "batch_size max_new_tokens")
    _not_negative(self, "evaluation", "max_records every")


@dataclasses.dataclass(frozen=True)
class Config:
  """One phase of a run, complete."""

  name: str = ""  # of the phase, which names its folder
  seed: int = 0  # of initial weights, data order and question sampling
  # What to start from ('' for none): a phase folder of a workdir, or a model as
  # it is published. Only parameters it lacks are initialised. In a later phase
  # '' means the phase before.
  init_from: str = ""
  model: ModelConfig = field(default_factory=ModelConfig)
  prompt: PromptConfig = field(default_factory=PromptConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  training: TrainingConfig = field(default_factory=TrainingConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

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


def default_config() -> ml_collections.ConfigDict:
  """What a config file changes: all keys, with their defaults.

  `phases` names phases, run in this order, each from the weights of the one
  before; () is a single phase. `phase.NAME` holds the keys that differ in phase
  NAME. Keys that what a phase starts from decides are None.
  """
  config = _optional(default_values(), "", Config)
  config.phases = ()
  config.phase = ml_collections.ConfigDict()
  return config


def default_values(group: type = Config) -> dict[str, Any]:
  """All keys of a config or of a group of it, as nested dicts."""
  return {
    f.name: default_values(f.default_factory)
    if isinstance(f.default_factory, type)
    else f.default
    for f in dataclasses.fields(group)
    if not (group is Config and f.name == "name")
  }


def _optional(values: dict, path: str, group: type) -> Any:
  """Values as a ConfigDict, with None in place of what a start decides."""
  result, hints = ml_collections.ConfigDict(), typing.get_type_hints(group)
  for key, value in values.items():
    if isinstance(value, dict):
      result[key] = _optional(value, f"{path}{key}.", hints[key])
    elif _AS_START.fullmatch(f"{path}{key}"):
      result[key] = ml_collections.config_dict.placeholder(type(value))
    else:
      result[key] = value
  return result


def phases(
  config: ml_collections.ConfigDict,
  start_config: Callable[[str, str], Config] | None = None,
  vocab_size: Callable[[Config], int] | None = None,
) -> tuple[Config, ...]:
  """Splits a config into its phases, each complete, in running order.

  Phase `p` is the config with the keys under `config.phase.p` laid over it.
  A config without phases is one phase, named by its compressor. Groups of
  phases that are not named in `config.phases` are left aside. What is None is
  as in what the phase starts from: `config.init_from`, or the phase before, of
  which the compressor is not taken. The first phase alone starts from an
  `init_from` that is no phase's own.

  Args:
    config: as `default_config` makes it, changed.
    start_config: reads the config of what `config.init_from` names, in the
      prompt layout that is set, if it is; without it that is left unread.
    vocab_size: tokens of the tokenizer of a phase that starts from nothing and
      leaves `model.llm.vocab_size` to it.

  Raises:
    ConfigError: a key is unknown, has a wrong type or a useless value, or what
      the phase starts from has another.
  """
  values = config.to_dict()
  names = values.pop("phases")
  overrides = values.pop("phase")
  result: list[Config] = []
  for name in names or (None,):
    where, merged = "config", values
    if name is not None:
      if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(
          "config.phases",
          repr(name),
          "letters, digits, '_' and '-', since it names a folder",
          "rename the phase",
        )
      where = f"config.phase.{name}"
      own = overrides.get(name, {})
      merged = _overlay(values, own, where)
      if result and "init_from" not in own:
        merged["init_from"] = ""
    start, before = None, ""
    if merged["init_from"] and start_config:
      before = f"config.init_from ({merged['init_from']})"
      layout = merged["prompt"]["layout"] or ""
      start = start_config(merged["init_from"], layout)
    elif result:
      before, start = f"phase {result[-1].name}", result[-1]
    base: Any = dataclasses.asdict(start) if start else default_values()
    if not merged["init_from"]:
      # Phases of one config mostly differ in it.
      base["model"]["compressor"] = default_values(CompressorConfig)
    resolved = _resolved(merged, base, before, where, "")
    own_name = {"name": name or _compressor(resolved)}
    phase = _phase(resolved | own_name, where)
    if start is None and vocab_size and _is_unset(merged):
      llm = dataclasses.replace(phase.model.llm, vocab_size=vocab_size(phase))
      model = dataclasses.replace(phase.model, llm=llm)
      phase = dataclasses.replace(phase, model=model)
    result.append(phase)
  return tuple(result)


def _compressor(values: Mapping) -> str:
  return values["model"]["compressor"]["name"]


def _is_unset(values: Mapping) -> bool:
  return values["model"]["llm"]["vocab_size"] is None


def check_same_model(config: Config, other: Config, name: str) -> None:
  """Makes sure that a config has the model of another one.

  Raises:
    ConfigError: a key differs that says which model it is.
  """
  values, base = dataclasses.asdict(config), dataclasses.asdict(other)
  _resolved(values, base, name, "config", "")


def _resolved(
  values: Any, base: Any, before: str, where: str, path: str
) -> Any:
  """Values with those of `base` in place of None.

  Args:
    values: a group of keys, or one.
    base: the same of what the phase starts from, or defaults.
    before: names what it starts from; '' is nothing.
    where: names the group of the phase in errors.
    path: dotted key of `values`.

  Raises:
    ConfigError: a key that must be as in `base` is not.
  """
  if isinstance(values, Mapping):
    if not isinstance(base, Mapping):
      return values  # no such group, which is found later
    prefix = f"{path}." if path else ""
    return {
      key: _resolved(value, base.get(key), before, where, f"{prefix}{key}")
      for key, value in values.items()
    }
  if not _AS_START.fullmatch(path):
    return values
  if values is None:
    return base
  if before and values != base and not _MAY_DIFFER.fullmatch(path):
    raise ConfigError(
      f"{where}.{path}",
      shorten(values),
      f"{shorten(base)}, as {before} has it",
      "leave the key out, or start from another model",
    )
  return values


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
    f"such a key as {near!r}" if near else "one of vocojax/config.py",
    f"write {near!r}" if near else "see vocojax/config.py for all keys",
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
      if key in _LATER.get(cls.__name__, ()):
        continue
      raise ConfigError(
        f"{path}.{key}", "nothing", "a value", "see vocojax/config.py"
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
