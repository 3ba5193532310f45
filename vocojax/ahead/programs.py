"""The programs that are compiled, from shapes alone. Read next: measure.py.

They are those of training/loop.py and inference/engine.py, for a mesh of
devices that need not be there. Nothing is allocated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vocojax import assemble
from vocojax.config import Config
from vocojax.data.tokenizer import load_tokenizer
from vocojax.inference.engine import cache_sharding
from vocojax.inference.programs import Programs, Rows
from vocojax.models import layers
from vocojax.models.cache import ImageKeyValues, TextCache
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import loop, sharding, state
from vocojax.training.optimizer import make_optimizer

# Ids around the patches, as LLaMA's tokenizer counts them; taken where the
# config names no tokenizer. Which ids they are changes nothing in a program.
STREAM_LENGTHS = {
  "voco_v1": (1, 2),
  "vicuna_v1": (35, 0),
  "plain": (1, 0),
  "qa_v1": (1, 0),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One program and what it is called with.

  Attributes:
    name: of the program.
    arguments: what it holds, by use: trees of shapes with shardings.
    num_layers: of the language model.
    num_tokens: tokens that all its devices read in one call, image streams
      included.
    ideal_flops: of the language model for these tokens on one device: 6 times
      parameters times tokens to train, 2 to infer.
    mesh: of the devices.
    lower: makes it ready to compile, with the mesh in force.
  """

  name: str
  arguments: dict[str, Any]
  num_layers: int
  num_tokens: int
  ideal_flops: float
  mesh: Mesh
  lower: Callable[[], jax.stages.Lowered]

  @property
  def argument_bytes(self) -> dict[str, int]:
    """On one device, by use."""
    return {use: device_bytes(tree) for use, tree in self.arguments.items()}


def device_bytes(tree) -> int:
  """Bytes that a tree of shapes takes on one device."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = getattr(x, "sharding", None)
    shape = x.shape if shape is None else shape.shard_shape(x.shape)
    total += int(np.prod(shape)) * x.dtype.itemsize
  return total


def make_model(config: Config) -> VisionLanguageModel:
  """The model, also where no tokenizer is named."""
  if config.data.tokenizer:
    return assemble.make_model(config, load_tokenizer(config.data.tokenizer))
  before, after = STREAM_LENGTHS[config.prompt.layout]
  tokens = StreamTokens((0,) * before, (0,) * after, 0)
  return VisionLanguageModel(config.model, tokens, config.data.text_slots)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, Any]:
  """Shapes of what data/pipeline.py makes."""
  data, size = config.data, config.model.vision.image_size
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    "images": ((data.max_images, size, size, 3), np.uint8),
    "image_group_ids": ((data.max_images,), np.int32),
  }
  if data.max_conversations:
    shared = (data.max_images, data.max_conversations)
    shapes["image_segment_ids"] = (shared, np.int32)
  if config.model.compressor.budgets:
    shapes["num_voco_tokens"] = ((data.max_images,), np.int32)
  if config.training.loss_mean == "micro_batches":
    shapes["micro_batch_ids"] = ((), np.int32)
  for key in ("input_ids", "labels", "segment_ids", "text_group_ids"):
    shapes[key] = ((data.max_text_length,), np.int32)
  return {
    key: jax.ShapeDtypeStruct(
      (data.batch_size, *shape), dtype, sharding=sharding.rows(mesh)
    )
    for key, (shape, dtype) in shapes.items()
  }


def train(config: Config, mesh: Mesh) -> list[Program]:
  """The training step.

  Raises:
    ConfigError: the batch or a parameter does not divide by the mesh.
  """
  data = config.data
  sharding.check_batch(mesh, data.batch_size, config.training.accumulate)
  model = make_model(config)
  # Their number only goes into constants of the learning rate.
  optimizer = make_optimizer(config.optimizer, config.training.steps or 1000)
  abstract = loop.abstract_state(config, model, mesh, optimizer)
  step = loop.jit_train_step(config, model, mesh, optimizer, abstract)
  batch = abstract_batch(config, mesh)
  teacher = loop.abstract_teacher(config, model, mesh)
  trained, frozen = state.split(abstract.params, config.optimizer.freeze)
  tokens = data.batch_size * (
    data.max_images * model.stream.length + data.max_text_length
  )
  return [
    Program(
      "train step",
      {
        "trained parameters": trained,
        "frozen parameters": frozen,
        "optimiser state": (abstract.step, abstract.opt_state),
        "batch": batch,
        **({"teacher": teacher} if teacher else {}),
      },
      config.model.llm.num_hidden_layers,
      tokens,
      6 * _num_parameters(abstract.params["llm"]) * tokens / mesh.size,
      mesh,
      lambda: step.lower(abstract, batch, teacher),
    )
  ]


def serve(config: Config, mesh: Mesh) -> list[Program]:
  """Compress, prefill and decode for `config.data.batch_size` slots.

  Weights and caches are bfloat16. A row has room for `config.data.max_images`,
  `config.data.max_text_length` and `config.evaluation.max_new_tokens`; a
  quarter of the slots is filled by one prefill.
  """
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, dtype="bfloat16", param_dtype="bfloat16"
    ),
  )
  model, c = make_model(config), config.model.llm
  params = loop.abstract_params(model, mesh)
  params["llm"]["layers"] = _unstack(params["llm"]["layers"])
  slots, num_images = config.data.batch_size, config.data.max_images
  C = num_images * len(model.stream.visible)
  T = config.data.max_text_length + config.evaluation.max_new_tokens
  G, P, R = c.num_key_value_heads, c.head_dim, max(1, slots // 4)
  where = cache_sharding(params["llm"], slots, model)
  programs = Programs(model, where)

  def array(shape, dtype, to=None) -> Any:
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=to or sharding.replicated(mesh)
    )

  layer = array((slots, G, C + T, P), jnp.bfloat16, where)
  cache = TextCache(
    [layer] * c.num_hidden_layers, [layer] * c.num_hidden_layers
  )
  seen = array((c.num_hidden_layers, R, C, G, P), jnp.bfloat16)
  size = config.model.vision.image_size
  pixels = array((slots * num_images, size, size, 3), np.uint8)
  ids, row = array((R, T), np.int32), array((R,), np.int32)
  tokens = array((slots,), np.int32)
  prefill = (ImageKeyValues(seen, seen), array((R, C), np.int32), ids, row, row)
  calls = {
    "compress": (
      programs.compress,
      {"images": pixels},
      slots * num_images * model.stream.length,
    ),
    "prefill": (
      programs.prefill,
      {"cache": cache, "prompts": (*prefill, Rows.empty(R))},
      R * T,
    ),
    "decode": (
      programs.decode,
      {"cache": cache, "tokens": (tokens, Rows.empty(slots))},
      slots,
    ),
  }
  num_parameters = _num_parameters(params["llm"])

  def lower(program, uses):
    flat = []
    for value in uses.values():
      flat += value if isinstance(value, tuple) else [value]
    return lambda: program.lower(params, *flat)

  return [
    Program(
      name,
      {"parameters": params, **uses},
      c.num_hidden_layers,
      count,
      2 * num_parameters * count / mesh.size,
      mesh,
      lower(program, uses),
    )
    for name, (program, uses, count) in calls.items()
  ]


def _num_parameters(params) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def _unstack(stacked) -> list:
  """`layers.unstack` of shapes with shardings."""

  def one(x):
    spec = PartitionSpec(*x.sharding.spec[1:])
    to = NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=to)

  num_layers = len(jax.eval_shape(layers.unstack, stacked))
  return [jax.tree.map(one, stacked)] * num_layers
