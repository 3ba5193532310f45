"""Flash attention on TPU: JAX's Pallas splash kernel. Read next: attention.py.

B rows, T query length, S key length, H heads, G key/value heads, P head dim.

Every mask here is `causal, after some keys that all may see` within segments,
which the kernel computes block by block: nothing of size T x S is ever made.
Off TPU the kernel is interpreted, which is slow and for tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as mask_lib,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vocojax.models.layers import BATCH_AXES

_LANES = 128  # of a TPU register; sequences and heads are padded to it


def attend(
  query: Float[Array, "B T H P"],
  key: Float[Array, "B S G P"],
  value: Float[Array, "B S G P"],
  query_segments: Int[Array, "B T"] | None = None,
  key_segments: Int[Array, "B S"] | None = None,
  *,
  causal: bool,
  block_size: int,
  interpret: bool,
) -> Float[Array, "B T H P"]:
  """Attention within segments.

  Args:
    query: of T tokens.
    key: of S tokens, the last T of which are those of the queries if causal.
    value: of the same.
    query_segments: a query sees only keys of its own segment; without segments
      it sees those of all.
    key_segments: of the keys.
    causal: whether token t sees only the first S - T + t + 1 keys.
    block_size: greatest number of queries, or of keys, that the kernel takes at
      a time; a multiple of 128.
    interpret: run the kernel as plain JAX.
  """
  T, S = query.shape[1], key.shape[1]
  query = query * np.asarray(query.shape[-1] ** -0.5, query.dtype)
  before, after = -S % _LANES, -T % _LANES
  if causal:
    # Padding of the keys comes first, so that queries and keys still end
    # together; then that of both follows, which no real query sees.
    before = -(S + after) % _LANES
    width = ((0, 0), (before, after), (0, 0), (0, 0))
  else:
    width = ((0, 0), (0, before), (0, 0), (0, 0))
  if query_segments is None and before:  # the padding must not be seen
    query_segments = jnp.ones(query.shape[:2], jnp.int32)
    key_segments = jnp.ones(key.shape[:2], jnp.int32)
  query = jnp.pad(query, ((0, 0), (0, after), (0, 0), (0, 0)))
  key, value = jnp.pad(key, width), jnp.pad(value, width)
  segments = None
  if query_segments is not None:
    segments = kernel_lib.SegmentIds(
      jnp.pad(query_segments, ((0, 0), (0, after))),
      jnp.pad(key_segments, width[:2]),
    )
  run = functools.partial(
    _on_one_device, causal=causal, block_size=block_size, interpret=interpret
  )
  return _on_all_devices(run, query, key, value, segments)[:, :T]


def _on_one_device(
  query, key, value, segments, *, causal, block_size, interpret
):
  """The kernel on padded rows."""
  (_, T, H, P), S = query.shape, key.shape[1]
  shape = (T, S)
  mask = (
    mask_lib.CausalMask(shape, S - T) if causal else mask_lib.FullMask(shape)
  )
  q, kv = _block(T, block_size), _block(S, block_size)
  kernel = kernel_lib.make_splash_mha_single_device(
    mask_lib.MultiHeadMask([mask] * H),
    block_sizes=kernel_lib.BlockSizes(
      block_q=q,
      block_kv=kv,
      block_q_dkv=q,
      block_kv_dkv=kv,
      block_q_dq=q,
      block_kv_dq=kv,
    ),
    interpret=interpret,
  )

  def heads_first(x):
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -P % _LANES)))
    return x.swapaxes(1, 2)

  out = jax.vmap(kernel)(
    heads_first(query), heads_first(key), heads_first(value), segments
  )
  return out.swapaxes(1, 2)[..., :P]


def _on_all_devices(run, query, key, value, segments):
  """A kernel cannot be split by the compiler: each device gets its share."""
  if jax.sharding.get_abstract_mesh().empty:
    return run(query, key, value, segments)
  heads = PartitionSpec(BATCH_AXES, None, "tensor", None)
  rows = PartitionSpec(BATCH_AXES, None)
  return jax.shard_map(
    run,
    in_specs=(heads, heads, heads, None if segments is None else rows),
    out_specs=heads,
    check_vma=False,  # the kernel does not say what its output varies over
  )(query, key, value, segments)


def _block(length: int, limit: int) -> int:
  """The largest multiple of 128 up to `limit` that divides `length`."""
  return max(
    size
    for size in range(_LANES, max(limit, _LANES) + 1, _LANES)
    if length % size == 0
  )
