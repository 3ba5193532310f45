"""A checkpoint to a plan of published weights. Read next: `write_out.py`."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vocojax.config import ModelConfig
from vocojax.core.files import get_field
from vocojax.data.tokenizer import VOCO_TOKEN
from vocojax.errors import CheckpointError, WeightsError, shorten
from vocojax.training import checkpoint, state
from vocojax.weights import config_keys, hf, into, stream

_ROWS_MULTIPLE = 64  # of llava-hf's vocabulary


@dataclasses.dataclass(frozen=True)
class Rows:
  """Which row of our vocabulary is each of the published one.

  Attributes:
    source: a row of ours for each; -1 is a row that we have none for.
    num_text: how many of ours are text tokens.
    image_token_id: of llava-hf's `<image>`; `<pad>` follows.
    voco_id: of `<voco>`, where it is published.
  """

  source: tuple[int, ...]
  num_text: int
  image_token_id: int
  voco_id: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
  """One tensor of the model that is written."""

  name: str
  path: str  # of our parameter
  layer: int | None  # of the stack
  rule: hf.Rule
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Weights to be written.

  Attributes:
    loaded: the checkpoint.
    layout: whose names and files.
    tensors: in the order of the files.
    rows: of the vocabulary.
    origin: what the converter stored of the source; {} if it was not there.
  """

  loaded: checkpoint.Loaded
  layout: hf.Layout
  tensors: tuple[Published, ...]
  rows: Rows
  origin: dict[str, Any]

  @property
  def model(self) -> ModelConfig:
    return self.loaded.config.model

  @property
  def nbytes(self) -> int:
    return sum(t.nbytes for t in self.tensors)


def make_plan(path: str, layout: hf.Layout, dtype: str = "") -> Plan:
  """Finds and checks all that is to be written.

  Args:
    path: a checkpoint, as for `checkpoint.find`.
    layout: how to publish it.
    dtype: of the weights; '' is as stored.

  Raises:
    CheckpointError: there is none.
    WeightsError: the layout cannot hold such a model.
  """
  loaded = checkpoint.load(path)
  model, where = loaded.config.model, loaded.path
  if model.compressor.name in ("avgpool", "qformer"):
    raise WeightsError(
      f"{where}: compressor",
      f"{model.compressor.name!r}, whose weights no published layout has",
      "'voco', 'voco_causal' or 'full'",
      "convert a checkpoint with one of them",
    )
  if layout == "llava_hf" and model.projector != "mlp2x_gelu":
    raise WeightsError(
      f"{where}: projector",
      repr(model.projector),
      "'mlp2x_gelu', the only one of llava-hf",
      "use --to=original",
    )
  saved = _saved(where, into.parameter_shapes(model))
  num_rows = saved["llm/embed_tokens/embedding"].shape[0]
  origin = _origin(where, num_rows)
  rows = _rows(loaded, layout, origin)
  if max(rows.source) >= num_rows:
    raise WeightsError(
      f"{where}: {stream.ORIGIN}",
      f"a place of <voco> in row {max(rows.source)}",
      f"one of the {num_rows} rows of the embedding",
      "convert the source again",
    )
  tensors = tuple(_tensors(model, layout, rows, saved, dtype))
  unused = saved.keys() - {t.path for t in tensors}
  if unused:
    raise WeightsError(
      f"{where}: {sorted(unused)[0]}",
      f"a parameter without a place in the layout {layout}",
      "those of a whole model alone",
      "use a checkpoint of a model without it",
    )
  return Plan(loaded, layout, tensors, rows, origin)


def _saved(where: pathlib.Path, shapes: dict[str, tuple]) -> dict[str, Any]:
  """Metadata of the parameters, all of which the config must ask for."""
  try:
    handler = ocp.StandardCheckpointHandler()
    tree = handler.metadata(epath.Path(where) / "params").tree
    saved = state.flatten(tree)
  except (OSError, ValueError, KeyError) as e:
    raise CheckpointError(
      f"{where}: params",
      shorten(str(e), 200),
      "the parameters of a model",
      "use another step, or copy this one again",
    ) from e
  for path, shape in shapes.items():
    found = tuple(saved[path].shape) if path in saved else "nothing"
    if found != shape:
      raise CheckpointError(
        f"{where}: {path}",
        str(found),
        f"{shape} by its config",
        "use a checkpoint of a whole model",
      )
  return saved


def _origin(where: pathlib.Path, num_rows: int) -> dict[str, Any]:
  """What the converter stored of the source; {} where it did not write."""
  if not (where / stream.ORIGIN).is_dir():
    return {}
  values = checkpoint.read_json(where, stream.ORIGIN)
  where = where / stream.ORIGIN
  keys = config_keys.Keys(
    {
      "num_rows": config_keys.Number(int, 1, num_rows),
      "voco_row": config_keys.Number(int, 0, num_rows, optional=True),
      "max_position_embeddings": config_keys.Number(
        int, 1, 2**40, optional=True
      ),
    },
    "layout vision_tower",
    {},
    "",
  )
  keys.check(values, str(where))
  for key in ("num_rows", "voco_row"):
    get_field(values, key, object, where, WeightsError)
  for key in ("layout", "vision_tower"):
    get_field(values, key, (str, type(None)), where, WeightsError)
  return values


def _tensors(model, layout, rows, saved, dtype) -> Iterator[Published]:
  for part, prefix in hf.written_parts(layout, model):
    for rule in part.rules:
      ours = saved[rule.path]
      shape = rule.published_shape(tuple(ours.shape), model)
      if rule.vocabulary:
        shape = (len(rows.source), shape[1])
      written = jnp.dtype(dtype or ours.dtype)
      names = part.names(rule, prefix, ours.shape[0])
      for i, name in enumerate(names):
        layer = i if rule.stacked else None
        yield Published(name, rule.path, layer, rule, shape, written)


def _rows(loaded: checkpoint.Loaded, layout, origin) -> Rows:
  """Undoes what `vocabulary.py` does, or does what the layout expects."""
  llm = loaded.config.model.llm
  voco = loaded.tokenizer.get_vocab()[VOCO_TOKEN]
  inside = voco + 1 < llm.vocab_size  # among the text tokens
  n = llm.vocab_size if inside else voco
  published = inside or loaded.config.model.compressor.has_voco_tokens
  same = origin.get("layout") == layout
  special = 2 if layout == "llava_hf" else 0  # <image> and <pad>
  voco_id = voco if inside else n + special
  needed = max(n + special, voco_id + 1 if published else 0)
  if same and origin["num_rows"] >= needed:
    R = origin["num_rows"]
  elif layout == "llava_hf":
    R = -(-needed // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
  else:
    R = needed
  # Rows from n on are those of the source, if it was of this layout.
  known = origin["num_rows"] if same else n
  source = [i if i < known else -1 for i in range(R)]
  if not inside and known > n and origin["voco_row"] != n:
    source[n] = known
  if not inside and published:
    source[voco_id] = voco
  return Rows(tuple(source), n, n, voco_id if published else None)
