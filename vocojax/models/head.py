"""The output head, and cross-entropy in chunks of it. Read next: llama.py.

B rows, T text length, D width, V vocabulary (padded), W rows of it in a chunk.

The logits of a batch are far larger than all that leads to them: 32,000 numbers
for a token of 4,096. So they are made for W rows of the vocabulary at a time,
and made again when gradients are computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

_LANES = 128  # a TPU computes so many columns at once

# Of each token: cross-entropy, whether its target is the likeliest,
# KL(teacher || student), and the teacher's cross-entropy; in nats.
DistilledLosses = tuple[
  Float32[Array, "B T"],
  Bool[Array, "B T"],
  Float32[Array, "B T"],
  Float32[Array, "B T"],
]


def logits(
  x: Float[Array, "... D"], kernel: Float[Array, "D V"], vocab_size: int
) -> Float32[Array, "... V"]:
  """Scores of all tokens; padded rows get the float32 minimum."""
  return _real(_product(x, kernel), jnp.arange(kernel.shape[1]), vocab_size)


def _product(x, kernel):
  """Scores in float32, whose gradient goes on in the compute dtype."""
  return _scores(x, kernel.astype(x.dtype))


@jax.custom_vjp
def _scores(x, kernel):
  return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _scores_forward(x, kernel):
  return _scores(x, kernel), (x, kernel)


def _scores_backward(saved, grad):
  x, kernel = saved
  grad = grad.astype(x.dtype)
  axes = tuple(range(x.ndim - 1))
  return grad @ kernel.T, jnp.tensordot(x, grad, (axes, axes))


_scores.defvjp(_scores_forward, _scores_backward)


def _real(scores, index, vocab_size):
  return jnp.where(index < vocab_size, scores, jnp.finfo(jnp.float32).min)


def token_losses(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  vocab_size: int,
  chunk: int,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
  """Cross-entropy of each token, and whether its target scores highest.

  Args:
    x: output of the final norm.
    kernel: the head.
    targets: token ids.
    vocab_size: rows of the vocabulary that are not padding.
    chunk: about how many of them are scored at a time.
  """
  return _losses(x, kernel, targets, vocab_size, chunk, None)[:2]


def distilled_losses(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  vocab_size: int,
  chunk: int,
  teacher_x: Float[Array, "B T D"],
  teacher_kernel: Float[Array, "D V"],
) -> DistilledLosses:
  """`token_losses`, KL(teacher || student) and the teacher's own losses.

  Of the next token, in nats. The teacher's logits too are made chunk by chunk.
  It gets no gradient, so what led to `teacher_x` has no backward pass either.
  """
  teacher = jax.lax.stop_gradient((teacher_x, teacher_kernel))
  return _losses(x, kernel, targets, vocab_size, chunk, teacher)


def _chunks(kernel: Float[Array, "D V"], chunk: int) -> Float[Array, "C D W"]:
  """C parts of about `chunk` rows of the vocabulary, padded to one width."""
  D, V = kernel.shape
  num_chunks = -(-V // chunk)
  width = V
  if num_chunks > 1:
    width = -(-V // (num_chunks * _LANES)) * _LANES
    kernel = jnp.pad(kernel, ((0, 0), (0, num_chunks * width - V)))
  chunks = kernel.reshape(D, num_chunks, width).swapaxes(0, 1)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and width % mesh.shape["tensor"] == 0:
    # Each chunk is split as the head is, so that all devices have work.
    chunks = jax.lax.with_sharding_constraint(
      chunks, PartitionSpec(None, "fsdp", "tensor")
    )
  return chunks


def _losses(x, kernel, targets, vocab_size, chunk, teacher):
  """Losses and whether right; of a teacher divergence and losses, or None."""
  chunks = _chunks(kernel, chunk)
  num_chunks, _, width = chunks.shape
  taught_chunks = teacher and _chunks(teacher[1], chunk)
  # Its gradient is a sum over chunks, which must not be rounded each time.
  x, dtype = x.astype(jnp.float32), x.dtype

  def add(running, chunk):
    """log-sum-exp with a running maximum (arXiv 1805.02867)."""
    (highest, best, total, found), taught = running
    first, part, taught_part = chunk
    index = first + jnp.arange(width)
    scores = _product(x.astype(dtype), part)
    scores = _real(scores, index, vocab_size)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    best = jnp.where(top > highest, first + jnp.argmax(scores, axis=-1), best)
    new_highest = jnp.maximum(highest, top)
    total = total * jnp.exp(highest - new_highest)
    total += jnp.sum(jnp.exp(scores - new_highest[..., None]), axis=-1)
    is_target = index == targets[..., None]
    found += jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
    if teacher:
      right = _real(_product(teacher[0], taught_part), index, vocab_size)
      taught = _add_teacher(taught, right, scores, is_target)
    return ((new_highest, best, total, found), taught), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  running = (zeros - jnp.inf, jnp.zeros_like(targets), zeros, zeros)
  running = running, teacher and (zeros - jnp.inf, zeros, zeros, zeros)
  parts = (width * jnp.arange(num_chunks), chunks, taught_chunks)
  if num_chunks == 1:
    running, _ = add(running, jax.tree.map(lambda x: x[0], parts))
  else:
    add = functools.partial(jax.checkpoint, prevent_cse=False)(add)
    running, _ = jax.lax.scan(add, running, parts)
  (highest, best, total, found), taught = running
  normalizer = highest + jnp.log(total)
  losses, right = normalizer - found, best == targets
  if not teacher:
    return losses, right, None, None
  highest, total, gap, found = taught
  taught_normalizer = highest + jnp.log(total)
  divergence = gap / total - taught_normalizer + normalizer
  return losses, right, divergence, taught_normalizer - found


def _add_teacher(taught, right, scores, is_target):
  """Adds a chunk to what makes up KL and the teacher's cross-entropy.

  `taught` is its highest score so far, the sums of its weights and of weight
  times gap, and its score of the target. KL is the mean gap, less the
  difference of normalizers.
  """
  highest, total, gap, found = taught
  new_highest = jnp.maximum(highest, jnp.max(right, axis=-1))
  weights = jnp.exp(right - new_highest[..., None])
  kept = jnp.exp(highest - new_highest)
  total = total * kept + jnp.sum(weights, axis=-1)
  gap = gap * kept + jnp.sum(weights * (right - scores), axis=-1)
  found += jnp.sum(jnp.where(is_target, right, 0.0), axis=-1)
  return new_highest, total, gap, found
