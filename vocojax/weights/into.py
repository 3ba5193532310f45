"""Published weights to a plan of our checkpoint. Read next: `stream.py`.

A plan is everything but the values: the config, the tokenizer, and for each
parameter the tensors it is read from. Making it opens every file and checks
every name and shape, so that what follows can only fail for lack of room.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from vocojax import config as config_lib
from vocojax.config import Config, ModelConfig
from vocojax.core.files import get_field
from vocojax.errors import WeightsError, shorten
from vocojax.models.compressors import StreamTokens
from vocojax.models.projector import Projector
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import state
from vocojax.weights import hf, hf_config, leaves, vocabulary
from vocojax.weights.source import Found, Request, Source
from vocojax.weights.stored import Stored

_VOCO_DEVIATION = np.float32(0.02)  # as VoCo-LLaMA draws its new rows
_FLOATS = ("bfloat16", "float16", "float32")
_SAME_MODEL = "use config and weights of the same model"
_GUESS = (
  "a guess: row {} of the embedding, which no token of the tokenizer has, is "
  "taken for <voco>; if it is not, convert with --compressor=full"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A checkpoint to be written.

  Attributes:
    source: where everything comes from.
    config: of the checkpoint.
    tokenizer: of the checkpoint.
    leaves: its parameters.
    origin: what the way back must know; JSON.
    ignored: tensors left aside, with the reason.
    random: parameters, or parts of them, that are drawn.
    notes: what a person may want to know of the rest.
  """

  source: Source
  config: Config
  tokenizer: transformers.PreTrainedTokenizerFast
  leaves: tuple[leaves.Leaf, ...]
  origin: dict[str, Any]
  ignored: tuple[tuple[str, str], ...]
  random: tuple[str, ...]
  notes: tuple[str, ...] = ()

  @property
  def model(self) -> ModelConfig:
    return self.config.model

  @property
  def nbytes(self) -> int:
    return sum(leaf.nbytes for leaf in self.leaves)


def make_plan(request: Request) -> Plan:
  """Finds and checks everything that the checkpoint is made of.

  Raises:
    WeightsError: files, names, shapes or the model itself do not fit.
  """
  source = Source(request)
  llm = source.require("llm")
  embedding_name = llm.prefix + llm.part.probe
  embedding = llm.tensors[embedding_name]
  words = _vocabulary(source, request, embedding_name, embedding)
  found = {
    "llm": llm,
    "vision": source.require("vision"),
    "projector": source.find("projector"),
  }
  if found["projector"] is None and source.layout:
    source.require("projector")
  model = _model(source, request, words, found)
  if not model.llm.tie_word_embeddings:
    found["head"] = source.require("head")
  reader = _Reader(model, words, request)
  read: list[leaves.Leaf] = [
    leaf for part in found.values() if part for leaf in reader.leaves(part)
  ]
  if found["projector"] is None:
    read += reader.random_projector()
  ignored = _leftovers(source, reader, model, embedding)
  missing = reader.shapes.keys() - {leaf.path for leaf in read}
  if missing:
    raise WeightsError(
      source.folder,
      f"nothing for our parameter {sorted(missing)[0]}",
      "tensors for all of them",
      "use the complete model",
    )
  has_voco = words.source_voco is not None
  config = _config(request, model, source, has_voco, read)
  text = source.text_values
  origin = {
    "layout": source.layout,
    "num_rows": words.num_rows,
    "voco_row": words.source_voco,
    "max_position_embeddings": text.get("max_position_embeddings"),
    "vision_tower": source.values.get("mm_vision_tower"),
  }
  return Plan(
    source,
    config,
    words.tokenizer,
    tuple(sorted(read, key=lambda leaf: leaf.path)),
    origin,
    tuple(ignored),
    tuple(reader.random),
    (_GUESS.format(words.source_voco),) if words.voco_is_guessed else (),
  )


def _vocabulary(source, request, name, embedding) -> vocabulary.Vocabulary:
  if len(embedding.shape) != 2:
    raise WeightsError(
      f"{source.folder}: {name}",
      f"shape {shorten(embedding.shape)}",
      "rows of numbers, one for each token",
      "use the complete model",
    )
  rows, said = embedding.shape[0], source.text_values.get("vocab_size")
  if said not in (None, rows):
    raise WeightsError(
      f"{source.text_where}: vocab_size",
      shorten(said),
      f"{rows}, the rows of {name}",
      _SAME_MODEL,
    )
  image_token_id = None
  if source.layout == "llava_hf":
    ids = {
      source.values.get(key) for key in ("image_token_index", "image_token_id")
    } - {None}
    image_token_id = ids.pop() if len(ids) == 1 else None
    if image_token_id is None:
      raise WeightsError(
        f"{source.where}: image_token_index",
        "another than image_token_id" if ids else "nothing",
        "the id of <image>",
        "use the config.json of the model",
      )
  return vocabulary.read(
    source.folder,
    rows,
    name,
    image_token_id,
    last_row_is_voco=source.layout == "original"
    and request.compressor != "full"
    and not source.values.get("mm_use_im_patch_token"),
  )


def _model(source, request, words, found) -> ModelConfig:
  """The shape of the whole model."""
  values, where = source.values, source.where
  if source.vision_values is None:
    raise WeightsError(
      f"{where}: mm_vision_tower",
      shorten(values.get("mm_vision_tower")),
      "a tower of known shape",
      "put what its config.json says under 'vision_config' in this one",
    )
  llm = hf_config.llama(source.text_values, source.text_where, words.size)
  tied = llm.tie_word_embeddings or get_field(
    values, "tie_word_embeddings", bool, where, WeightsError, False
  )
  llm = dataclasses.replace(
    llm,
    tie_word_embeddings=tied,
    vocab_multiple=words.multiple(llm.vocab_multiple),
  )
  key = "vision_feature_layer"
  if source.layout == "original":
    key = "mm_vision_select_layer"
  if source.layout is None:
    projector = "mlp2x_gelu"
    if found["projector"] and len(found["projector"].part.rules) == 2:
      projector = "linear"
  else:
    projector = hf_config.projector(values, source.layout, where)
  compressor = request.compressor
  if not compressor:
    plain = source.layout is not None and words.source_voco is None
    compressor = "full" if plain else "voco"
  common = config_lib.default_values(ModelConfig)
  common |= {
    "llm": dataclasses.asdict(llm),
    "vision": dataclasses.asdict(
      hf_config.vision(
        source.vision_values,
        source.vision_where,
        values.get(key, -2),
        f"{where}: {key}",
      )
    ),
    "projector": projector,
    "compressor": common["compressor"]
    | {"name": compressor, "num_voco_tokens": request.num_voco_tokens},
  }
  return config_lib.from_mapping(ModelConfig, common, "config.model")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of each parameter of a model, by its path."""
  tokens = StreamTokens((0,), (), 0)  # of no influence on shapes
  init = VisionLanguageModel(model, tokens).init
  abstract = state.flatten(jax.eval_shape(init, jax.random.key(0)))
  return {path: tuple(x.shape) for path, x in abstract.items()}


class _Reader:
  """Makes leaves, remembers which tensors they use."""

  def __init__(self, model, words: vocabulary.Vocabulary, request: Request):
    self.model, self._words, self._request = model, words, request
    self.shapes = parameter_shapes(model)
    self.used: set[tuple[str, str]] = set()  # (file or folder, name)
    self.random: list[str] = []

  def leaves(self, found: Found):
    """The parameters of one part."""
    for rule in found.part.rules:
      if rule.path not in self.shapes:
        raise WeightsError(
          f"{found.where}: {found.prefix}{rule.name}",
          "a tensor that the config has no place for",
          "those of the config",
          _SAME_MODEL,
        )
      shape = self.shapes[rule.path]
      layers = shape[0] if rule.stacked else 1
      names = found.part.names(rule, found.prefix, layers)
      expected = rule.published_shape(shape, self.model)
      if rule.vocabulary:
        expected = (self._words.num_rows, expected[1])
      tensors = [self._tensor(found, name, expected) for name in names]
      dtype = self._dtype(*(t.dtype for t in tensors))
      if rule.vocabulary:
        yield leaves.VocabularyTensor(
          rule.path,
          shape,
          dtype,
          tuple(names),
          rule,
          tensors[0],
          self._words.moves,
          self._words.voco_id,
          self._voco_row(rule.path, expected[1]),
        )
      else:
        yield leaves.Tensors(
          rule.path, shape, dtype, tuple(names), rule, tuple(tensors)
        )

  def _tensor(self, found: Found, name: str, expected) -> Stored:
    tensor = found.tensors.get(name)
    where = f"{found.where}: {name}"
    if tensor is None:
      raise WeightsError(
        where, "no such tensor", "one by the config", "use the complete model"
      )
    if tensor.shape != expected:
      raise WeightsError(
        where,
        f"shape {shorten(tensor.shape)}",
        f"{expected} by the config",
        "use parts that belong together",
      )
    if tensor.dtype.name not in _FLOATS:
      raise WeightsError(
        where,
        f"numbers of type {tensor.dtype.name}",
        " or ".join(_FLOATS),
        "use the model as it was published in one of them",
      )
    self.used.add((found.where, name))
    return tensor

  def _dtype(self, *dtypes) -> np.dtype:
    if self._request.dtype:
      return jnp.dtype(self._request.dtype)
    result = dtypes[0]
    for dtype in dtypes[1:]:
      result = jnp.promote_types(result, dtype)
    return jnp.dtype(result)

  def _voco_row(self, path: str, width: int) -> np.ndarray | None:
    words = self._words
    if words.source_voco is not None or words.voco_id + 1 < words.size:
      return None
    self.random.append(f"{path}, the row of <voco>")
    rng = np.random.default_rng([self._request.seed, len(self.random)])
    return _VOCO_DEVIATION * rng.standard_normal(width, np.float32)

  def random_projector(self):
    """The projector of a model that is put together from its parts."""
    features = jnp.zeros((1, self.model.vision.hidden_size))
    key = jax.random.key(self._request.seed)
    values: Any = Projector(self.model).init(key, features)
    for path, x in state.flatten(values["params"], "projector/").items():
      self.random.append(path)
      x = np.asarray(x)
      yield leaves.Values(path, x.shape, self._dtype(x.dtype), (), x)


def _leftovers(source, reader, model, embedding):
  """Tensors that no rule asks for, with the reason they may be left aside.

  Raises:
    WeightsError: there is no reason.
  """
  for tensors, where in source.files:
    for name in sorted(tensors):
      if (where, name) in reader.used:
        continue
      why = hf.why_ignorable(name)
      if why is None and _is_tied_head(name, model):
        if not _same(tensors[name], embedding):
          raise WeightsError(
            f"{where}: {name}",
            "other values than the embedding's",
            f"the same, by tie_word_embeddings in {source.where}",
            "set that key to false if the two are apart",
          )
        why = "the same as the embedding"
      if why is None:
        raise WeightsError(
          f"{where}: {name}",
          "a tensor that the config has no place for",
          "those of the config",
          _SAME_MODEL,
        )
      yield name, why


def _is_tied_head(name: str, model: ModelConfig) -> bool:
  return model.llm.tie_word_embeddings and bool(hf.find_part("head", [name]))


def _same(a: Stored, b: Stored, rows: int = 4096) -> bool:
  return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
    a.rows(i, min(i + rows, a.shape[0])).tobytes()
    == b.rows(i, min(i + rows, b.shape[0])).tobytes()
    for i in range(0, a.shape[0], rows)
  )


def _config(request, model, source, has_voco, read) -> Config:
  """A config that validates, with everything the weights say."""
  dtypes = {leaf.dtype.name for leaf in read}
  llm_dtype = next(x.dtype.name for x in read if x.path.startswith("llm/"))
  model = dataclasses.replace(
    model,
    dtype="float32" if llm_dtype == "float32" else "bfloat16",
    # What loses nothing.
    param_dtype="bfloat16" if dtypes == {"bfloat16"} else "float32",
  )
  values = config_lib.default_values()
  values["model"] = json.loads(json.dumps(dataclasses.asdict(model)))
  values["seed"] = request.seed
  plain = source.layout is not None and not has_voco
  values["prompt"] = {
    "layout": request.layout or ("vicuna_v1" if plain else "voco_v1"),
    # The released VoCo-LLaMA was trained without newlines.
    "strip_newlines": "original" if has_voco else "none",
  }
  values["data"]["pad_to_square"] = source.pads(model.vision.image_size)
  values["training"]["epochs"] = 1.0
  values["name"] = model.compressor.name
  return config_lib.from_mapping(Config, values)
