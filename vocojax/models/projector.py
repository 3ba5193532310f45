"""From patch features to the language model's width. Read next: `vlm.py`.

Source: LLaVA-1.5 (arXiv 2310.03744): `mlp2x_gelu` is linear, exact GELU and
linear.
"""

import functools

import flax.linen as nn
from jaxtyping import Array, Float

from vocojax.config import ModelConfig
from vocojax.models import layers


class Projector(nn.Module):
  """`linear` or `mlp2x_gelu`, with biases."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    c = self.config
    dense = functools.partial(
      layers.Dense, c.llm.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype
    )
    x = dense(name="linear_1")(x)
    if c.projector == "mlp2x_gelu":
      x = dense(name="linear_2")(nn.gelu(x, approximate=False))
    return x
