"""Weights in the compute dtype, with gradients in it. Read next: layers.py.

Weights are kept in `param_dtype`. A layer reads them in the compute dtype, so
that is what travels between chips and what a gradient is: half the bytes where
that is bfloat16. JAX gives a gradient the dtype of what it is taken by, so it
is taken by a *slot*: zeros of the compute dtype beside each trained weight,
which nothing reads and the compiler leaves out.

The slots have a second use: a weight that a scan over layers reads from one
stack would get a gradient as large as the stack in every step of the scan. A
slot is sliced by the scan, and so is its gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["value", "slot"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Trained:
  """A weight, and where its gradient goes."""

  value: Float[Array, "..."]
  slot: Float[Array, "..."]


def slots(params: dict[str, Any], dtype: str) -> dict[str, Any]:
  """Where gradients go: zeros like each array of a tree.

  Those of matrices are of the compute dtype. Those of norms and biases, which
  no matrix product reads, are of their own, and so is that of the table of
  embeddings, in which a row is the sum over all places of its token.
  """

  def slot(path, x):
    is_matrix = path[-1].key == "kernel"
    return jnp.zeros(x.shape, dtype if is_matrix else x.dtype)

  return jax.tree_util.tree_map_with_path(slot, params)


def with_slots(params: dict[str, Any], slots: dict[str, Any]) -> dict[str, Any]:
  """Params as a model reads them, to be differentiated by the slots."""
  return jax.tree.map(Trained, params, slots)


def is_trained(x: Any) -> bool:
  """For `is_leaf` of the functions in `jax.tree`."""
  return isinstance(x, Trained)


def read(params: Any) -> Any:
  """Weights with slots in the dtype of these; other weights as they are."""

  def one(x):
    return _read(x.value, x.slot) if is_trained(x) else x

  return jax.tree.map(one, params, is_leaf=is_trained)


def read_all_but_layers(params: dict[str, Any]) -> dict[str, Any]:
  """`read`, except below a key `layers`, where each layer is read in turn."""
  return {
    key: (
      x
      if key == "layers"
      else read_all_but_layers(x)
      if isinstance(x, dict)
      else read(x)
    )
    for key, x in params.items()
  }


def slots_of(stacked: Any) -> Any:
  """The slots of a tree, None for weights without one."""
  return jax.tree.map(
    lambda x: x.slot if is_trained(x) else None, stacked, is_leaf=is_trained
  )


def layer_of(stacked: Any, index, slots: Any) -> Any:
  """One layer of weights stacked on axis 0.

  Args:
    stacked: the weights.
    index: of the layer; may be traced.
    slots: of this layer, as `slots_of` arranges them.
  """

  def one(x, slot):
    value = jax.lax.dynamic_index_in_dim(
      x.value if is_trained(x) else x, index, keepdims=False
    )
    return value if slot is None else Trained(value, slot)

  return jax.tree.map(one, stacked, slots, is_leaf=is_trained)


@jax.custom_vjp
def _read(value, slot):
  return value.astype(slot.dtype)


def _read_forward(value, slot):
  return _read(value, slot), None


def _read_backward(_, grad):
  return None, grad


_read.defvjp(_read_forward, _read_backward)
