"""The `avgpool` compressor: what the regions are, and both passes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.errors import ConfigError
from vocojax.models.compressors import average_regions, image_stream


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
  features = np.random.default_rng(k).normal(size=(2, 16, 8))
  features = features.astype(np.float32)
  means = np.stack([features[:, region].mean(1) for region in regions], axis=1)
  found = average_regions(jnp.asarray(features), build(k).config)
  np.testing.assert_allclose(found, means, atol=1e-6)


def test_the_mean_is_taken_before_the_projector():
  """As in LLaMA-VID: of the tower's features, then projector and linear."""
  vlm = build(1)
  params = builders.init(vlm)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  features = vlm.vision.features(params["vision"], jnp.asarray(images))
  first, second = (params["projector"][f"linear_{i}"] for i in (1, 2))
  hidden = np.asarray(features).mean(1) @ first["kernel"] + first["bias"]
  erf = np.vectorize(math.erf)(np.asarray(hidden) / math.sqrt(2))
  hidden = np.asarray(hidden) * (1 + erf) / 2
  linear = params["compressor"]["pooled_linear"]
  expected = hidden @ second["kernel"] + second["bias"]
  expected = expected @ linear["kernel"] + linear["bias"]
  found = vlm.embed_images(params, jnp.asarray(images))[:, -1]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_the_mean_of_projected_patches_are_no_such_model():
  """They were called `compressor/linear`, and had the same shapes."""
  shapes = jax.eval_shape(build(1).init, jax.random.key(0))["compressor"]
  assert set(shapes) == {"pooled_linear"}


def test_stream():
  stream = image_stream(build(4).config, builders.TOKENS)
  assert stream.length == 1 + 4  # BOS and the pooled tokens
  assert stream.visible == (0, 1, 2, 3, 4)


def test_regions_must_divide_the_patches():
  with pytest.raises(ConfigError) as e:
    image_stream(build(3).config, builders.TOKENS)
  assert e.value.where == "config.model.compressor.num_voco_tokens"
  assert e.value.got == "3, regions of 1 x 3"


def test_two_streams_equal_the_joint_pass():
  builders.check_both_passes(lambda attention: build(4, attention))
