"""The `avgpool` compressor: what the regions are, and both passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.errors import ConfigError
from vocojax.models.compressors import AveragePool, image_stream


def build(k, attention="two_stream", side=4):
  return builders.model(
    {
      "compressor.name": "avgpool",
      "compressor.num_voco_tokens": k,
      "vision.image_size": 4 * side,
      "attention": attention,
    }
  )


@pytest.mark.parametrize(
  ("k", "regions"),
  [
    (1, [slice(0, 16)]),
    (2, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
    (4, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
  ],
)
def test_regions(k, regions):
  vlm = build(k)
  params = builders.init(vlm)["compressor"]
  rng = np.random.default_rng(k)
  patches = rng.normal(size=(2, 16, 16)).astype(np.float32)
  pooled = AveragePool(vlm.config).apply(
    {"params": params}, jnp.asarray(patches)
  )
  means = np.stack([patches[:, region].mean(1) for region in regions], axis=1)
  linear = params["linear"]
  np.testing.assert_allclose(
    pooled, means @ linear["kernel"] + linear["bias"], atol=1e-5
  )


def test_stream():
  stream = image_stream(build(4).config, builders.TOKENS)
  assert stream.length == 1 + 4  # BOS and the pooled tokens
  assert stream.visible == (0, 1, 2, 3, 4)


def test_regions_must_divide_the_patches():
  with pytest.raises(ConfigError, match="3 regions of 1 x 3 do not divide 4"):
    image_stream(build(3).config, builders.TOKENS)


def test_two_streams_equal_the_joint_pass():
  builders.check_both_passes(lambda attention: build(4, attention))
