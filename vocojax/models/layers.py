"""What the transformer stacks share: running layers, and sharding of rows.

Weights of a stack are stacked on axis 0. Read next: `llama.py`, `clip.py`.
"""

import contextlib
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from vocojax.config import ModelConfig
from vocojax.models import precision

BATCH_AXES = ("data", "fsdp")

_REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.custom_vjp
def _flat_matmul(x, kernel):
  return x @ kernel


def _flat_matmul_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _flat_matmul_backward(saved, grad):
  x, kernel = saved
  # Without the barrier XLA on CPU computes the elementwise operations before
  # `grad` a second time, in transposed order: twice as slow as the products.
  grad = jax.lax.optimization_barrier(grad.reshape(-1, grad.shape[-1]))
  x_grad = (grad @ kernel.T).reshape(x.shape)
  return x_grad, x.reshape(-1, x.shape[-1]).T @ grad


_flat_matmul.defvjp(_flat_matmul_forward, _flat_matmul_backward)


def product(
  x: Shaped[Array, "... In"], kernel: Shaped[Array, "In Out"]
) -> Shaped[Array, "... Out"]:
  """Rows times a matrix, with a backward pass that suits the platform."""
  return _flat_matmul(x, kernel) if platform() == "cpu" else x @ kernel


def _dot_general(x, kernel, dimension_numbers, precision=None):
  """`product` for `nn.Dense`, whose one contraction is the last axis."""
  del dimension_numbers, precision
  return product(x, kernel)


@typing.no_type_check  # a field that it inherits has an uncheckable type
class Dense(nn.Dense):
  """`nn.Dense` by `product`."""

  def __post_init__(self):
    self.dot_general = _dot_general
    super().__post_init__()


def init_stack(layer, key, num_layers: int, *inputs):
  """Parameters of `num_layers` copies of a Linen module, stacked on axis 0."""
  keys = jax.random.split(key, num_layers)
  return jax.vmap(lambda k: layer.init(k, *inputs)["params"])(keys)


def unstack(stacked) -> list:
  """Weights stacked on axis 0 to a list with one tree a layer.

  XLA on CPU copies each layer's weights out of a stack before it uses them,
  which costs a decoding step more than the step itself. A list stays one.
  """
  if isinstance(stacked, list):
    return stacked
  num_layers = len(jax.tree.leaves(stacked)[0])
  return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(num_layers)]


def run_stack(
  body,
  carry,
  stacked,
  config: ModelConfig,
  *,
  num_layers: int | None = None,
  last=None,
):
  """`body(carry, layer) -> (carry, y)` over weights stacked on axis 0.

  Recomputes as `config.remat` says. `config.scan_layers=False` unrolls, so that
  the compiler drops what the last layer computes for nobody; so does a list
  from `unstack`.

  Args:
    body: one layer.
    carry: what the first layer reads.
    stacked: weights, with slots (see precision.py) or without.
    config: of the model.
    num_layers: how many of them run; None is all.
    last: `last(carry, layer) -> carry` instead of `body` for the last of them.
      What it computes is never recomputed: it is needed at once.

  Returns:
    The last carry, and the `y` of all that `body` ran, stacked.
  """
  scan = config.scan_layers and not isinstance(stacked, list)
  if num_layers is None:
    stack = (
      stacked if isinstance(stacked, list) else jax.tree.leaves(stacked)[0]
    )
    num_layers = len(stack)
  num_scanned = num_layers - (last is not None)

  def run(carry, layer):
    return body(carry, precision.read(layer))

  def run_one_of(carry, index_and_slots):
    # The stack itself is no `xs` of the scan, which would copy a part of it.
    return run(carry, precision.layer_of(stacked, *index_and_slots))

  def remat(f):
    if config.remat == "none":
      return f
    policy = _REMAT_POLICIES[config.remat]
    return jax.checkpoint(f, policy=policy, prevent_cse=not scan)

  if scan:
    slots = jax.tree.map(lambda s: s[:num_scanned], precision.slots_of(stacked))
    carry, outputs = jax.lax.scan(
      remat(run_one_of), carry, (jnp.arange(num_scanned), slots)
    )
  else:
    outputs = []
    for layer in unstack(stacked)[:num_scanned]:
      carry, y = remat(run)(carry, layer)
      outputs.append(y)
    if outputs:
      outputs = jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)
  if last is not None:
    layer = unstack(stacked)[num_scanned]
    carry = last(carry, precision.read(layer))
  return carry, outputs


def platform() -> str:
  """What is compiled for: 'cpu', 'gpu' or 'tpu'.

  That of the mesh in force, which need not be of this machine.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def mesh_of(x: Array) -> contextlib.AbstractContextManager:
  """Puts the mesh that an array lies on in force, if it lies on one."""
  if isinstance(x.sharding, NamedSharding):
    return jax.set_mesh(x.sharding.mesh)
  return contextlib.nullcontext()


def num_shards(axis: str) -> int:
  """Size of an axis of the mesh in force, 1 if there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def row_axes(num_rows: int) -> tuple[str, ...] | None:
  """Mesh axes that rows are split over, None where they do not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return None if num_rows % shards else BATCH_AXES


def shard_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
  """Splits axis 0 over the data and fsdp axes of the mesh in force, if any."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = PartitionSpec(row_axes(len(x)), *[None] * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)
