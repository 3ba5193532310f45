"""The compiled half of the engine: compress, prefill, decode. Next: engine.py.

B slots of the engine, R rows read by one prefill, C slots for the tokens of a
row's images, T prompt length (of a bucket), S = C + text slots.

Every program has fixed shapes, and no row looks at another, so what comes out
for a row depends on nothing else in the batch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float32, Int, Int32, UInt8

from vocojax.inference.sampling import SamplingRows, sample
from vocojax.models.cache import ImageKeyValues, TextCache
from vocojax.models.vlm import VisionLanguageModel


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["slot", "position", "sampling"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Where each row is: the slot and position of its next token to be read."""

  slot: Int32[Array | np.ndarray, " B"]
  position: Int32[Array | np.ndarray, " B"]
  sampling: SamplingRows

  @classmethod
  def empty(cls, num_rows: int) -> "Rows":
    """Arrays on the host, to be written to."""
    slot, position = np.zeros((2, num_rows), np.int32)
    return cls(slot, position, SamplingRows.greedy(num_rows))


class Programs:
  """The programs of one model, compiled on first use for each shape.

  The text cache lies as `cache_sharding` says, before and after every call.
  """

  def __init__(self, model: VisionLanguageModel, cache_sharding: Sharding):
    # What saves memory in a backward pass only costs time here.
    config = dataclasses.replace(model.config, mlp_chunks=1, remat="none")
    model = dataclasses.replace(model, config=config)
    self.compress = jax.jit(functools.partial(_compress, model))
    step = functools.partial(
      jax.jit, donate_argnames="cache", out_shardings=(None, cache_sharding)
    )
    self.foretell = jax.jit(functools.partial(_foretell, model))
    self.prefill = step(functools.partial(_prefill, model))
    self.decode = step(functools.partial(_decode, model))

  @property
  def num_compilations(self) -> int:
    """Of compress, prefill and decode; one for each new shape or layout."""
    programs: tuple[Any, ...] = (self.compress, self.prefill, self.decode)
    return sum(program._cache_size() for program in programs)


def _compress(
  model: VisionLanguageModel, params, images: UInt8[Array, "N S S 3"]
) -> ImageKeyValues:
  cache, _ = model.compress(params, images)
  return cache


def _foretell(
  model: VisionLanguageModel,
  params,
  images: ImageKeyValues,
  image_positions: Int[Array, "R C"],
  input_ids: Int[Array, "R T"],
  lengths: Int[Array, " R"],
  rows: Rows,
) -> Float32[Array, "R V"]:
  """Probabilities of what follows each prompt."""
  fresh = model.place(images, image_positions, input_ids.shape[1])
  logits, _ = model.extend(
    params, input_ids, fresh, rows.slot, rows.position, lengths - 1
  )
  return jax.nn.softmax(logits, axis=-1)


def _prefill(
  model: VisionLanguageModel,
  params,
  cache: TextCache,
  images: ImageKeyValues,
  image_positions: Int[Array, "R C"],
  input_ids: Int[Array, "R T"],
  lengths: Int[Array, " R"],
  target: Int[Array, " R"],
  rows: Rows,
) -> tuple[Int32[Array, " R"], TextCache]:
  """Reads prompts into the slots `target` (none if there is no such slot).

  Returns:
    The first token of each answer, and the cache.
  """
  fresh = model.place(images, image_positions, input_ids.shape[1])
  logits, fresh = model.extend(
    params, input_ids, fresh, rows.slot, rows.position, lengths - 1
  )
  width = fresh.keys[0].shape[2]
  cache = jax.tree.map(
    lambda all_rows, new: all_rows.at[target, :, :width].set(new, mode="drop"),
    cache,
    fresh,
  )
  return sample(logits, rows.sampling), cache


def _decode(
  model: VisionLanguageModel,
  params,
  cache: TextCache,
  tokens: Int[Array, " B"],
  rows: Rows,
) -> tuple[Int32[Array, " B"], TextCache]:
  """Reads one token of each row and chooses the next."""
  logits, cache = model.extend(
    params,
    tokens[:, None],
    cache,
    rows.slot,
    rows.position,
    jnp.zeros_like(rows.slot),
  )
  return sample(logits, rows.sampling), cache
