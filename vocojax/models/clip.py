"""The CLIP vision transformer. Read next: `projector.py`, `vlm.py`.

N images, S pixels a side, I = 1 + patches tokens (class token first), D width.
Source: CLIP (arXiv 2103.00020), in the arithmetic of HF transformers'
`modeling_clip.py`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vocojax.config import ModelConfig, VisionConfig
from vocojax.models import attention, layers

# Channel statistics of openai/clip-vit-large-patch14-336, of values in 0..1.
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

_ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": functools.partial(nn.gelu, approximate=False),
}


class Embeddings(nn.Module):
  """Class token and linear patches, plus learned positions."""

  config: VisionConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N I D"]:
    c = self.config
    normal = nn.initializers.normal(c.initializer_range)
    side, p = c.image_size // c.patch_size, c.patch_size
    patches = pixels.reshape(-1, side, p, side, p, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(
      -1, side * side, p * p * 3
    )
    x = layers.Dense(
      c.hidden_size,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=normal,
      name="patch_embedding",
    )(patches)
    class_token = self.param(
      "class_embedding", normal, (c.hidden_size,), self.param_dtype
    )
    positions = self.param(
      "position_embedding",
      normal,
      (1 + side * side, c.hidden_size),
      self.param_dtype,
    )
    class_token = jnp.broadcast_to(class_token, (len(x), 1, c.hidden_size))
    x = jnp.concatenate([class_token.astype(self.dtype), x], axis=1)
    return x + positions.astype(self.dtype)


class EncoderLayer(nn.Module):
  """Pre-norm transformer block without a mask."""

  model: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
    c, dtypes = self.model.vision, (self.model.dtype, self.model.param_dtype)
    dense = functools.partial(
      layers.Dense,
      dtype=self.model.dtype,
      param_dtype=self.model.param_dtype,
      kernel_init=nn.initializers.normal(c.initializer_range),
    )
    norm = _layer_norm(c, *dtypes)
    H = c.num_attention_heads
    y = norm(name="layer_norm1")(x)
    q, k, v = (
      dense(c.hidden_size, name=name)(y).reshape(*y.shape[:2], H, -1)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    # Attention has no parameters, and the one row of `init` no mesh to lie on.
    y = v if self.is_initializing() else attention.attend(q, k, v, self.model)
    y = y.reshape(x.shape)
    x = x + dense(c.hidden_size, name="out_proj")(y)
    y = norm(name="layer_norm2")(x)
    y = _ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="fc1")(y))
    return x + dense(c.hidden_size, name="fc2")(y)


def _layer_norm(config: VisionConfig, dtype: str, param_dtype: str):
  return functools.partial(
    nn.LayerNorm,
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    param_dtype=param_dtype,
    use_fast_variance=False,
  )


@dataclasses.dataclass(frozen=True)
class ClipVision:
  """The vision tower as pure functions of its parameters.

  Parameters: `embeddings/...`, `pre_layernorm`, `layers/...` stacked on axis 0,
  `post_layernorm` (kept for conversion; patch features do not use it).
  """

  model: ModelConfig

  @property
  def _parts(self):
    c, dtypes = self.model.vision, (self.model.dtype, self.model.param_dtype)
    return (
      Embeddings(c, *dtypes),
      _layer_norm(c, *dtypes)(),
      EncoderLayer(self.model),
    )

  def init(self, key) -> dict:
    """Random parameters."""
    c = self.model.vision
    embeddings, norm, layer = self._parts
    embed_key, norm_key, layer_key = jax.random.split(key, 3)
    pixels = jnp.zeros((1, c.image_size, c.image_size, 3), self.model.dtype)
    x = jnp.zeros((1, 1, c.hidden_size), self.model.dtype)
    return {
      "embeddings": embeddings.init(embed_key, pixels)["params"],
      "pre_layernorm": norm.init(norm_key, x)["params"],
      "layers": layers.init_stack(layer, layer_key, c.num_hidden_layers, x),
      "post_layernorm": norm.init(norm_key, x)["params"],
    }

  def hidden_states(
    self, params, pixels: Float[Array, "N S S 3"], num_layers: int
  ) -> tuple[Float[Array, "N I D"], Float[Array, "L N I D"] | None]:
    """Output of layer `num_layers`, and of every layer up to it."""
    embeddings, norm, layer = self._parts
    x = embeddings.apply({"params": params["embeddings"]}, pixels)
    x = norm.apply({"params": params["pre_layernorm"]}, x)

    def body(x, layer_params):
      x = layers.shard_rows(layer.apply({"params": layer_params}, x))
      return x, x

    if num_layers == 0:
      return x, None
    return layers.run_stack(
      body, x, params["layers"], self.model, num_layers=num_layers
    )

  def features(
    self, params, images: UInt8[Array, "N S S 3"]
  ) -> Float[Array, "N patches D"]:
    """Patch features of the configured layer, class token dropped."""
    pixels = (images.astype(jnp.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
    num_layers = self.model.vision.num_feature_layers
    x, _ = self.hidden_states(
      params, pixels.astype(self.model.dtype), num_layers
    )
    return x[:, 1:]
