"""Counts of executed work against counts by hand, on small programs.

Each is compiled for this machine and for a TPU that is not there. Read next:
vocojax/ahead/work.py, hlo.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vocojax.ahead import hlo, topology, work

P = PartitionSpec


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def mesh(request) -> jax.sharding.Mesh:
  """Four devices."""
  devices = jax.devices()[:4]
  if request.param == "tpu":
    _, devices = topology.describe("v5e:2x2")
  return jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=devices)


def compiled(mesh, f, *arrays: jax.ShapeDtypeStruct) -> hlo.Module:
  """Arrays without a sharding are everywhere."""
  placed = [
    jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=a.sharding or NamedSharding(mesh, P())
    )
    for a in arrays
  ]
  with jax.set_mesh(mesh):
    return hlo.parse(jax.jit(f).lower(*placed).compile().as_text())


def array(*shape: int, dtype=jnp.float32, to=None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=to)


def flops(mesh, f, *arrays) -> int:
  counted = work.count(compiled(mesh, f, *arrays))
  assert not counted.unknown_loops
  return counted.flops


def product(a, b):
  return jnp.einsum("ij,jk->ik", a, b)


def test_product(mesh):
  found = flops(mesh, product, array(48, 256), array(256, 384))
  assert found == 2 * 48 * 256 * 384


def test_batched_product_with_transposed_operands(mesh):
  def f(a, b):
    return jnp.einsum("hbij,kjbh->bhik", a, b)

  found = flops(mesh, f, array(3, 5, 16, 256), array(128, 256, 5, 3))
  assert found == 2 * 3 * 5 * 16 * 256 * 128


def test_scan_and_its_gradient(mesh):
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0].sum()

  x, w = array(16, 128), array(7, 128, 128)
  once = 2 * 16 * 128 * 128
  assert flops(mesh, f, x, w) == 7 * once
  # Of x the first turn needs no gradient, but the loop is one for all.
  assert flops(mesh, jax.grad(f, argnums=1), x, w) == 7 * 3 * once


def test_nested_scans(mesh):
  def f(x, w):
    def inner(x, _):
      return jnp.sin(x @ w), None

    def outer(x, _):
      return jnp.cos(jax.lax.scan(inner, x, None, length=3)[0] @ w), None

    return jax.lax.scan(outer, x, None, length=5)[0]

  found = flops(mesh, f, array(16, 128), array(128, 128))
  assert found == 5 * (3 + 1) * 2 * 16 * 128 * 128


def test_loop_in_steps_up_to_and_with_its_bound(mesh):
  def f(x, w):
    def turn(state):
      i, x = state
      return i + 3, jnp.sin(x @ w)

    # 2, 5, 8, 11
    return jax.lax.while_loop(lambda state: state[0] <= 11, turn, (2, x))[1]

  found = flops(mesh, f, array(16, 128), array(128, 128))
  assert found == 4 * 2 * 16 * 128 * 128


def test_loop_of_unknown_length(mesh):
  def f(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)

  counted = work.count(compiled(mesh, f, array(16, 128), array(128, 128)))
  assert len(counted.unknown_loops) == 1
  assert counted.flops == 2 * 16 * 128 * 128


def test_of_a_conditional_the_branch_with_most_work_counts(mesh):
  def f(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

  found = flops(mesh, f, array(16, 128), array(128, 128))
  assert found == 2 * 2 * 16 * 128 * 128


def test_convolution_counts_no_padding(mesh):
  def f(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (2, 2),
      [(1, 1), (1, 1)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  found = flops(mesh, f, array(2, 9, 9, 64), array(3, 3, 64, 128))
  # 5 outputs a side; the first and the last see padding in one row of three.
  valid = 5 * 3 - 2
  assert found == 2 * 2 * valid**2 * 64 * 128


def test_collectives_in_and_outside_a_loop(mesh):
  def body(x, _):
    gathered = jax.lax.all_gather(x, "x", tiled=True)  # [32, 256]
    scattered = jax.lax.psum_scatter(jnp.sin(gathered), "x", tiled=True)
    turned = jax.lax.ppermute(
      scattered, "x", [(i, (i + 1) % 4) for i in range(4)]
    )
    return jnp.cos(turned), None

  def local(x):
    x, _ = jax.lax.scan(body, x, None, length=6)
    x = jax.lax.all_to_all(x, "x", 1, 0, tiled=True)  # [32, 64]
    return jax.lax.psum(jnp.sin(x), "x")

  def f(x):
    return jax.shard_map(
      local, in_specs=P("x"), out_specs=P(), check_vma=False
    )(x)

  x = array(32, 256, to=NamedSharding(mesh, P("x")))
  counted = work.count(compiled(mesh, f, x))
  rows = {
    c.kind: (c.times, c.depth, c.nbytes, c.nbytes_received)
    for c in counted.collectives
  }
  assert len(rows) == len(counted.collectives)
  whole, part = 32 * 256 * 4, 8 * 256 * 4
  assert rows == {
    "all-gather": (6, 1, 6 * whole, 6 * whole * 3 / 4),
    "reduce-scatter": (6, 1, 6 * whole, 6 * whole * 3 / 4),
    "collective-permute": (6, 1, 6 * part, 6 * part),
    "all-to-all": (1, 0, part, part * 3 / 4),
    "all-reduce": (1, 0, part, 2 * part * 3 / 4),
  }


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    # As the 7B step has them with tensor parallelism over 4 of 16 chips.
    (
      "mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) "
      "{'axis_0','axis_1'}",
      16,
    ),
    ("mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_1'}", 4),
    ("mesh['a'=2,'b'=8] {'b'}", 8),
    ("mesh['a'=2,'b'=8] {'b':(2)4}", 4),
    ("[4,4]<=[16]", 4),
    ("{{0,1},{2,3}}", 2),
  ],
)
def test_sizes_of_groups_as_they_are_printed(groups, size):
  text = (
    "HloModule m\n\n"
    "%add (a: f32[], b: f32[]) -> f32[] {\n"
    "  %a = f32[] parameter(0)\n"
    "  %b = f32[] parameter(1)\n"
    "  ROOT %sum = f32[] add(%a, %b)\n}\n\n"
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    "  %x = f32[8]{0} parameter(0)\n"
    "  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, "
    f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add\n}}\n"
  )
  [found] = work.count(hlo.parse(text)).collectives
  assert (found.kind, found.group) == ("all-reduce", size)


def test_sharded_weights_are_gathered_in_the_loop(mesh):
  """Asynchronous collectives, cut into several pieces on a TPU, count once."""

  def f(x, w):
    def body(x, w):
      return jnp.tanh(x @ w.astype(jnp.bfloat16)), None

    return jnp.sum(jax.lax.scan(body, x, w)[0].astype(jnp.float32))

  x = array(512, 1024, dtype=jnp.bfloat16, to=NamedSharding(mesh, P("x")))
  w = array(7, 1024, 1024, to=NamedSharding(mesh, P(None, "x")))
  counted = work.count(compiled(mesh, jax.grad(f, argnums=1), x, w))
  assert counted.flops == 7 * 3 * 2 * 128 * 1024 * 1024
  gathers = [c for c in counted.collectives if c.kind == "all-gather"]
  inside = [c for c in gathers if c.depth == 1]
  assert sum(c.times for c in inside) == 2 * 7
  if mesh.devices.flat[0].platform == "tpu":
    assert gathers == inside
    assert {c.shapes[0].dtype for c in inside} == {"bf16"}
    assert sum(c.nbytes for c in inside) == 2 * 7 * 1024 * 1024 * 2


def splash(x):
  """Three layers of causal attention of 256 tokens with 2 heads of 128."""
  mask = splash_attention_mask.CausalMask((256, 256))
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * 2),
    head_shards=1,
    q_seq_shards=1,
  )

  def body(x, _):
    return kernel(x, x, x), None

  return jnp.sum(jax.lax.scan(body, x, None, length=3)[0].astype(jnp.float32))


def dense(x):
  """The same with a square of scores."""

  def body(x, _):
    scores = jnp.einsum("hqd,hkd->hqk", x, x)
    return jax.nn.softmax(scores) @ x, None

  return jnp.sum(jax.lax.scan(body, x, None, length=3)[0].astype(jnp.float32))


def test_pallas_kernels_and_squares_of_scores():
  _, devices = topology.describe("v5e:2x2")
  one = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=devices[:1])
  x = array(2, 256, 128, dtype=jnp.bfloat16)
  with_kernel = compiled(one, jax.grad(splash), x)
  kernels = work.count(with_kernel).kernels
  assert len(kernels) == 3, kernels  # forward, of keys and values, of queries
  assert set(kernels.values()) == {3}
  assert not with_kernel.shapes_with(256, 256)
  without = compiled(one, jax.grad(dense), x)
  squares = {(s.dtype, s.dims) for s in without.shapes_with(256, 256)}
  assert ("bf16", (2, 256, 256)) in squares
  assert without.shapes_with(2, 128)
  assert not without.shapes_with(3, 7)


def test_kernel_with_an_estimate():
  _, devices = topology.describe("v5e:2x2")
  one = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=devices[:1])

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  kernel = pl.pallas_call(
    double,
    jax.ShapeDtypeStruct((8, 128), jnp.float32),
    cost_estimate=pl.CostEstimate(
      flops=1000, transcendentals=0, bytes_accessed=0
    ),
  )

  def f(x):
    return jax.lax.scan(lambda x, _: (kernel(x), None), x, None, length=4)[0]

  counted = work.count(compiled(one, f, array(8, 128)))
  assert (counted.flops, counted.kernel_flops) == (0, 4000)
  assert list(counted.kernels.values()) == [4]


def test_valid_positions_against_a_convolution():
  """The counter of pairs against numpy, with holes and strides."""
  rng = np.random.default_rng(0)
  for _ in range(50):
    left, kernel = rng.integers(1, 9, 2)
    pad, stride, left_gap, right_gap = rng.integers(1, 4, 4)
    ones = np.zeros((left - 1) * left_gap + 1)
    ones[::left_gap] = 1
    ones = np.pad(ones, pad)
    taps = np.zeros((kernel - 1) * right_gap + 1)
    taps[::right_gap] = 1
    if len(taps) > len(ones):
      continue
    out = np.correlate(ones, taps, "valid")[::stride]
    found = work._valid_positions(
      *map(int, (left, kernel, len(out), pad, stride, left_gap, right_gap))
    )
    assert found == out.sum()
