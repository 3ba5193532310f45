"""What the transformer stacks share: running layers, and sharding of rows.

Weights of a stack are stacked on axis 0. Read next: `llama.py`, `clip.py`.
"""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from vocojax.config import ModelConfig

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


def _cpu_dot_general(x, kernel, dimension_numbers, precision=None):
  """`dot_general` for `nn.Dense`, whose one contraction is the last axis."""
  del dimension_numbers, precision
  return _flat_matmul(x, kernel)


@typing.no_type_check  # a field that it inherits has an uncheckable type
class Dense(nn.Dense):
  """`nn.Dense` with a backward pass that suits the platform."""

  def __post_init__(self):
    if jax.default_backend() == "cpu":
      self.dot_general = _cpu_dot_general
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


def run_stack(body, carry, stacked, config: ModelConfig):
  """`jax.lax.scan` of `body(carry, slice) -> (carry, y)` over axis 0.

  Recomputes as `config.remat` says. `config.scan_layers=False` unrolls, so that
  the compiler drops what the last layer computes for nobody; so does a list
  from `unstack`.
  """
  if config.remat != "none":
    body = jax.checkpoint(body, policy=_REMAT_POLICIES[config.remat])
  if config.scan_layers and not isinstance(stacked, list):
    return jax.lax.scan(body, carry, stacked)
  outputs = []
  for layer in unstack(stacked):
    carry, y = body(carry, layer)
    outputs.append(y)
  return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def shard_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
  """Splits axis 0 over the data and fsdp axes of the mesh in force, if any."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)
