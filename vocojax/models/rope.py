"""Rotary position embedding as LLaMA has it. Read next: `llama.py`.

Source: RoFormer (arXiv 2104.09864), in the half-split form of HF transformers;
llama3 scaling as in transformers' `modeling_rope_utils.py`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from vocojax.config import RopeConfig


def inverse_frequencies(
  config: RopeConfig, head_dim: int
) -> Float32[np.ndarray, " half"]:
  """Radians per position of each pair of channels, float32."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  frequencies = 1.0 / np.float32(config.theta) ** exponents
  if config.scaling == "none":
    return frequencies.astype(np.float32)
  # llama3: long wavelengths are stretched by `factor`, short ones kept, those
  # between are blended.
  context = config.original_max_position_embeddings
  wavelength = 2 * math.pi / frequencies
  low, high = config.low_freq_factor, config.high_freq_factor
  blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
  scaled = (1 - blend) * frequencies / config.factor + blend * frequencies
  return scaled.astype(np.float32)


def rotate(
  x: Float[Array, "*batch H P"],
  position_ids: Int[Array, "*#batch"],
  config: RopeConfig,
) -> Float[Array, "*batch H P"]:
  """Rotates queries or keys to their positions; angles in float32."""
  frequencies = inverse_frequencies(config, x.shape[-1])
  if config.round_positions == "bfloat16":
    position_ids = position_ids.astype(jnp.bfloat16)
  angles = position_ids[..., None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
