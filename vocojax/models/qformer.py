"""A Q-Former: learned queries that read the patches. Read next: `vlm.py`.

N images, K queries, D width of the language model. Source: BLIP-2 (arXiv
2301.12597), but on projected patches, without its text branch, norms first. A
block is attention among the queries, attention to the patches, and an MLP.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vocojax.config import ModelConfig
from vocojax.models import attention, layers


class QFormer(nn.Module):
  """K queries, `compressor.qformer_layers` blocks, a norm and a linear layer.

  Queries begin at random and heads are those of the vision tower.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, patches: Float[Array, "N patches D"]
  ) -> Float[Array, "N K D"]:
    c = self.config
    width, k = c.llm.hidden_size, c.compressor.num_voco_tokens
    normal = nn.initializers.normal(c.llm.initializer_range)
    queries = self.param("queries", normal, (k, width), c.param_dtype)
    x = jnp.broadcast_to(
      queries.astype(patches.dtype), (len(patches), k, width)
    )
    patches = _norm(c, "patch_norm")(patches)
    for i in range(c.compressor.qformer_layers):
      x = Block(c, name=f"block_{i}")(x, patches)
    return _dense(c)(width, name="linear")(_norm(c, "norm")(x))


class Block(nn.Module):
  """One block: among the queries, to the patches, MLP."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "N K D"], patches: Float[Array, "N patches D"]
  ) -> Float[Array, "N K D"]:
    c = self.config
    y = _norm(c, "self_norm")(x)
    x = x + Attention(c, name="self_attention")(y, y)
    y = _norm(c, "cross_norm")(x)
    x = x + Attention(c, name="cross_attention")(y, patches)
    y = _dense(c)(4 * x.shape[-1], name="fc1")(_norm(c, "mlp_norm")(x))
    y = nn.gelu(y, approximate=False)
    return x + _dense(c)(x.shape[-1], name="fc2")(y)


class Attention(nn.Module):
  """Multi-head attention of some tokens to others, without a mask."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "N K D"], to: Float[Array, "N S D"]
  ) -> Float[Array, "N K D"]:
    c = self.config
    dense, width = _dense(c), x.shape[-1]

    def heads(y, name):
      y = dense(width, name=name)(y)
      return y.reshape(*y.shape[:2], c.vision.num_attention_heads, -1)

    q, k, v = heads(x, "q_proj"), heads(to, "k_proj"), heads(to, "v_proj")
    # Attention has no parameters, and the one row of `init` no mesh to lie on.
    y = q if self.is_initializing() else attention.attend(q, k, v, c)
    return dense(width, name="out_proj")(y.reshape(x.shape))


def _dense(config: ModelConfig):
  return functools.partial(
    layers.Dense, dtype=config.dtype, param_dtype=config.param_dtype
  )


def _norm(config: ModelConfig, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.vision.layer_norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,
    name=name,
  )
