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

from vocojax.models import layers

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
  query_block, query_padding = _blocks(T, block_size)
  key_block, key_padding = _blocks(S, block_size)
  if query_segments is None and causal and T == S:
    # Padding that follows both is seen by no real query.
    offset, before, after = 0, 0, key_padding
  else:
    offset, before, after = S + key_padding - T, key_padding, 0
    if query_segments is None and key_padding:  # it must not be seen
      query_segments = jnp.ones(query.shape[:2], jnp.int32)
      key_segments = jnp.ones(key.shape[:2], jnp.int32)
  width = ((0, 0), (before, after), (0, 0), (0, 0))
  query = jnp.pad(query, ((0, 0), (0, query_padding), (0, 0), (0, 0)))
  key, value = jnp.pad(key, width), jnp.pad(value, width)
  segments = None
  if query_segments is not None:
    segments = kernel_lib.SegmentIds(
      jnp.pad(query_segments, ((0, 0), (0, query_padding))),
      jnp.pad(key_segments, width[:2]),
    )
  run = functools.partial(
    _on_one_device,
    offset=offset if causal else None,
    blocks=(query_block, key_block),
    interpret=interpret,
  )
  return _on_all_devices(run, query, key, value, segments)[:, :T]


def _on_one_device(query, key, value, segments, *, offset, blocks, interpret):
  """The kernel on padded rows; query t sees the first t + offset + 1 keys."""
  (_, T, H, P), S = query.shape, key.shape[1]
  if offset is None:
    mask = mask_lib.FullMask((T, S))
  else:
    mask = mask_lib.CausalMask((T, S), offset)
  q, kv = blocks
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
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(query, key, value, segments)
  B, G = key.shape[0], key.shape[2]
  axes = layers.row_axes(B)
  tensor = None if G % mesh.shape["tensor"] else "tensor"
  heads = PartitionSpec(axes, None, tensor, None)
  rows = PartitionSpec(axes, None)
  return jax.shard_map(
    run,
    in_specs=(heads, heads, heads, None if segments is None else rows),
    out_specs=heads,
    check_vma=False,  # the kernel does not say what its output varies over
  )(query, key, value, segments)


def _blocks(length: int, limit: int) -> tuple[int, int]:
  """Size of equal blocks up to `limit` for a sequence, and its padding."""
  count = -(-length // limit)
  size = -(-length // (count * _LANES)) * _LANES
  return size, count * size - length
