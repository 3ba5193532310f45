"""What the loop over layers carries, on a program with sizes known by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vocojax.ahead import hlo, memory, topology

L, B, D = 32, 4096, 2048


def test_saved_activations_and_gradients_of_a_scan():
  _, devices = topology.describe("v5e:2x2")
  mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=devices[:1])
  to = NamedSharding(mesh, PartitionSpec())
  weights = jax.ShapeDtypeStruct((L, D, D), jnp.bfloat16, sharding=to)
  x = jax.ShapeDtypeStruct((B, D), jnp.bfloat16, sharding=to)

  @jax.checkpoint
  def body(x, w):
    return jnp.sin(x @ w), None

  def loss(weights, x):
    return jnp.sum(jax.lax.scan(body, x, weights)[0].astype(jnp.float32))

  step = jax.jit(jax.grad(loss))
  with jax.set_mesh(mesh):
    text = step.lower(weights, x).compile().as_text()
  found = memory.carried(hlo.parse(text), L, {"w": weights})
  # The input of each layer, and a gradient for each weight. The weights are an
  # argument, so the loop has no copy of them.
  assert found[memory.SAVED] == L * B * D * 2
  assert found[memory.GRADIENTS] == L * D * D * 2
  assert found[memory.COPIES] == 0
