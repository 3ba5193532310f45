"""The `qformer` compressor against torch, and the `blind` control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.models import builders
from vocojax.models.compressors import image_stream
from vocojax.models.qformer import QFormer


def build(name="qformer", k=3, attention="two_stream"):
  return builders.model(
    {
      "compressor.name": name,
      "compressor.num_voco_tokens": k,
      "vision.image_size": 16,
      "attention": attention,
    }
  )


def reference(params, patches, num_heads):
  """The same in torch, from the weights."""

  def at(tree, *names):
    for name in names:
      tree = tree[name]
    return {k: torch.tensor(np.asarray(v)) for k, v in tree.items()}

  def norm(x, p):
    return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)

  def linear(x, p):
    return F.linear(x, p["kernel"].T, p["bias"])

  def attend(x, to, *names):
    def heads(y, name):
      y = linear(y, at(params, *names, name))
      return y.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    y = F.scaled_dot_product_attention(
      heads(x, "q_proj"), heads(to, "k_proj"), heads(to, "v_proj")
    )
    return linear(y.transpose(1, 2).flatten(2), at(params, *names, "out_proj"))

  patches = norm(torch.tensor(patches), at(params, "patch_norm"))
  x = torch.tensor(np.asarray(params["queries"])).expand(len(patches), -1, -1)
  for i in range(2):
    block = f"block_{i}"
    y = norm(x, at(params, block, "self_norm"))
    x = x + attend(y, y, block, "self_attention")
    y = norm(x, at(params, block, "cross_norm"))
    x = x + attend(y, patches, block, "cross_attention")
    y = linear(norm(x, at(params, block, "mlp_norm")), at(params, block, "fc1"))
    x = x + linear(F.gelu(y), at(params, block, "fc2"))
  return linear(norm(x, at(params, "norm")), at(params, "linear"))


def test_equals_torch():
  vlm = build()
  params = builders.init(vlm)["compressor"]
  rng = np.random.default_rng(0)
  # Norms and biases begin as ones and zeros, which hides what they do.
  params = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params
  )
  patches = rng.normal(size=(2, 16, 16)).astype(np.float32)
  ours = QFormer(vlm.config).apply({"params": params}, jnp.asarray(patches))
  theirs = reference(params, patches, 2).numpy()
  assert ours.shape == (2, 3, 16)
  np.testing.assert_allclose(
    np.asarray(ours), theirs, atol=1e-5 * np.abs(theirs).max()
  )


@pytest.mark.parametrize(
  ("name", "visible"), [("qformer", (0, 1, 2, 3)), ("blind", (0,))]
)
def test_stream(name, visible):
  stream = image_stream(build(name).config, builders.TOKENS)
  assert stream.length == len(visible) and stream.visible == visible


@pytest.mark.parametrize("name", ["qformer", "blind"])
def test_two_streams_equal_the_joint_pass(name):
  builders.check_both_passes(lambda attention: build(name, attention=attention))


@pytest.mark.parametrize(
  ("name", "sees"), [("qformer", True), ("blind", False)]
)
def test_who_sees_the_image(name, sees):
  rng = np.random.default_rng(1)
  vlm = build(name)
  rows = builders.batch(rng, vlm, [((1,), [(1, 6)])], 8)
  batch = jax.tree.map(jnp.asarray, rows)
  params = builders.init(vlm)

  def loss(params, images):
    logits = vlm.text_logits(params, batch | {"images": images})
    return builders.loss_of(logits, batch)[0]

  images = batch["images"]
  other = jnp.asarray(rng.integers(0, 256, images.shape, np.uint8))
  assert (loss(params, images) != loss(params, other)) == sees
  grads = jax.grad(loss)(params, images)
  for part in ("vision", "projector"):
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[part]))
    assert (largest > 0) == sees
