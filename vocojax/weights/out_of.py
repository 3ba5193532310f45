"""A checkpoint to a plan of published weights. Read next: `write_out.py`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vocojax.config import ModelConfig
from vocojax.data.tokenizer import VOCO_TOKEN
from vocojax.errors import WeightsError
from vocojax.training import checkpoint, state
from vocojax.weights import hf, stream

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
      f"{where}: compressor {model.compressor.name!r} has weights of its own, "
      "expected 'voco' or 'full'; no published layout has a place for them"
    )
  if layout == "llava_hf" and model.projector != "mlp2x_gelu":
    raise WeightsError(
      f"{where}: projector {model.projector!r}, llava-hf only has "
      "'mlp2x_gelu'; use --to=original"
    )
  origin = {}
  if (where / stream.ORIGIN).is_dir():
    origin = checkpoint.read_json(where, stream.ORIGIN)
  rows = _rows(loaded, layout, origin)
  saved = state.flatten(
    ocp.StandardCheckpointHandler().metadata(epath.Path(where) / "params").tree
  )
  tensors = tuple(_tensors(model, layout, rows, saved, dtype, where))
  unused = saved.keys() - {t.path for t in tensors}
  if unused:
    raise WeightsError(
      f"{where}: {sorted(unused)[0]} has no place in the layout {layout}"
    )
  return Plan(loaded, layout, tensors, rows, origin)


def _tensors(model, layout, rows, saved, dtype, where) -> Iterator[Published]:
  for part, prefix in hf.written_parts(layout, model):
    for rule in part.rules:
      if rule.path not in saved:
        raise WeightsError(
          f"{where}: lacks {rule.path}; use a checkpoint of a whole model"
        )
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
