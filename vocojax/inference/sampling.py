"""From logits to the next token: greedy, temperature, top-k, top-p.

B rows, V padded vocabulary. Read next: programs.py, which calls `sample`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from vocojax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of one answer are chosen.

  Attributes:
    temperature: logits are divided by it, 1e-6 to 1e6; 0 always takes the
      likeliest token.
    top_k: only the so many likeliest tokens may be drawn; 0 is all.
    top_p: only the likeliest tokens may be drawn, as few as reach this
      probability together, after `temperature` and `top_k`; 1 is all.
    seed: 0 to 2^32 - 1. The same seed gives the same answer, whatever else the
      engine is doing.

  Raises:
    UserError: a value is out of its range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    # Within it no float32 logit becomes infinite, or padding likely.
    within = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
    _require(within, self, "temperature", "0, or 1e-6 to 1e6")
    _require(0 <= self.top_k < 2**31, self, "top_k", "0 or more")
    _require(0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
    _require(0 <= self.seed < 2**32, self, "seed", "0 to 2^32 - 1")


def _require(holds: bool, sampling: Sampling, field: str, expected: str):
  if not holds:
    raise UserError(
      field, f"{getattr(sampling, field)}", expected, "choose a value within it"
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature", "top_k", "top_p", "seed", "count"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingRows:
  """`Sampling` of each row, and how many tokens it has drawn so far."""

  temperature: Float32[Array | np.ndarray, " B"]
  top_k: Int32[Array | np.ndarray, " B"]
  top_p: Float32[Array | np.ndarray, " B"]
  seed: UInt32[Array | np.ndarray, " B"]
  count: Int32[Array | np.ndarray, " B"]

  @classmethod
  def greedy(cls, num_rows: int) -> "SamplingRows":
    """Arrays on the host, to be written to."""
    return cls(
      temperature=np.zeros(num_rows, np.float32),
      top_k=np.zeros(num_rows, np.int32),
      top_p=np.ones(num_rows, np.float32),
      seed=np.zeros(num_rows, np.uint32),
      count=np.zeros(num_rows, np.int32),
    )

  def start(self, row: int, sampling: Sampling) -> None:
    """Writes one row of arrays from `greedy`, for an answer's first token."""
    for field in dataclasses.fields(sampling):
      getattr(self, field.name)[row] = getattr(sampling, field.name)
    self.count[row] = 0


def sample(
  logits: Float32[Array, "B V"], rows: SamplingRows
) -> Int32[Array, " B"]:
  """One token for each row; a row never depends on the others.

  The noise is that of key(seed) folded with the number of the token within its
  answer. The padded vocabulary, at the float32 minimum, is never drawn.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  drawn = jax.lax.cond(
    jnp.any(rows.temperature > 0),
    lambda: _draw(distribution(logits, rows), rows),
    lambda: greedy,
  )
  return jnp.where(rows.temperature > 0, drawn, greedy)


def _draw(log_weights, rows: SamplingRows) -> Int32[Array, " B"]:
  def one(log_weights, seed, count):
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.categorical(key, log_weights)

  return jax.vmap(one)(log_weights, rows.seed, rows.count).astype(jnp.int32)


def distribution(
  logits: Float32[Array, "B V"], rows: SamplingRows
) -> Float32[Array, "B V"]:
  """What tokens are drawn from, as logarithms, not normalised.

  -inf for what `top_k` and `top_p` leave out. Of equally likely tokens all stay
  if one does.
  """
  temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)
  log_weights = logits / temperature[:, None]
  # Sorting costs more than the rest: only if a row needs it.
  return jax.lax.cond(
    jnp.any((rows.top_k > 0) | (rows.top_p < 1)),
    lambda: _cut(log_weights, rows.top_k, rows.top_p),
    lambda: log_weights,
  )


def _cut(
  log_weights: Float[Array, "B V"],
  top_k: Int32[Array | np.ndarray, " B"],
  top_p: Float32[Array | np.ndarray, " B"],
) -> Float[Array, "B V"]:
  V = log_weights.shape[-1]
  ordered = jnp.sort(log_weights, axis=-1, descending=True)
  among_k = (jnp.arange(V) < top_k[:, None]) | (top_k == 0)[:, None]
  probability = jax.nn.softmax(jnp.where(among_k, ordered, -jnp.inf), axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  among_p = (before < top_p[:, None]) | (top_p == 1)[:, None]
  kept = jnp.sum(among_k & among_p, axis=-1)
  least = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=-1)
  return jnp.where(log_weights >= least, log_weights, -jnp.inf)
