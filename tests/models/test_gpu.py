"""bfloat16 with cuDNN attention on an NVIDIA GPU; skipped where there is none.

  VOCOJAX_TEST_PLATFORM=gpu python -m pytest tests/models/test_gpu.py

With that variable other tests of numbers run on the GPU as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import attention
from vocojax.models.vlm import VisionLanguageModel

TOLERANCE = 2e-2  # bfloat16 has eight bits


@pytest.fixture(autouse=True)
def _gpu():
  if jax.default_backend() != "gpu":
    pytest.skip("no GPU; or VOCOJAX_TEST_PLATFORM=gpu is not set")


def _distance(found, expected) -> float:
  """Norm of the difference over the norm of what is right."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _exact(query, key, value, weight, causal):
  """Output and gradients of sum(output * weight) in float64, by numpy."""
  query, key, value, weight = (
    np.asarray(x, np.float64).swapaxes(1, 2)
    for x in (query, key, value, weight)
  )
  scale = query.shape[-1] ** -0.5
  scores = scale * query @ key.swapaxes(2, 3)
  if causal:
    scores = np.where(np.tri(scores.shape[-1]) > 0, scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  grad = weight @ value.swapaxes(2, 3)
  grad = scale * p * (grad - (grad * p).sum(-1, keepdims=True))
  found = p @ value, grad @ key, grad.swapaxes(2, 3) @ query
  found = *found, p.swapaxes(2, 3) @ weight
  return [x.swapaxes(1, 2) for x in found]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [577, 580])
def test_cudnn_attention(length, head_dim, causal):
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(2, length, 4, head_dim))  # noqa: E731
  arrays = [jnp.asarray(draw(), jnp.bfloat16) for _ in range(3)]
  weight = jnp.asarray(draw(), jnp.bfloat16)
  config = builders.model_config({"dtype": "bfloat16"})

  @jax.jit
  def run(arrays):
    out, back = jax.vjp(
      lambda *x: attention.attend(*x, config, causal=causal), *arrays
    )
    return out, *back(weight)

  assert "cudnn$fmha" in run.lower(arrays).compile().as_text()
  expected = _exact(*arrays, weight, causal)
  errors = [_distance(*x) for x in zip(run(arrays), expected, strict=True)]
  print("\noutput and gradients of q, k, v:", errors)
  assert max(errors) <= TOLERANCE
  # Masked the other way it is another function.
  other = _exact(*arrays, weight, not causal)
  assert _distance(run(arrays)[0], other[0]) > 10 * TOLERANCE


@pytest.mark.parametrize("compressor", ["voco", "full"])
def test_half_precision_against_the_joint_pass(compressor):
  """Loss and all gradients together; 576 patches, heads as cuDNN takes them."""
  vlm = builders.model(
    {
      "compressor.name": compressor,
      "dtype": "bfloat16",
      "llm.hidden_size": 256,
      "llm.intermediate_size": 512,
      "llm.num_hidden_layers": 4,
      "llm.head_dim": 64,
      "vision.image_size": 96,
      "vision.hidden_size": 128,
      "vision.intermediate_size": 256,
      "vision.num_hidden_layers": 3,
    }
  )
  rng = np.random.default_rng(0)
  rows = builders.random_rows(rng, 4, 2, 40)
  batch = jax.tree.map(jnp.asarray, builders.batch(rng, vlm, rows, 40))
  params = jax.jit(vlm.init)(jax.random.key(0))
  exact = dataclasses.replace(vlm.config, dtype="float32", attention="bias")

  def run(model):
    def loss(params):
      logits = model.text_logits(params, batch)
      total, count = builders.loss_of(logits, batch)
      return total / count

    step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    value, grads = step(params)
    return (
      step.as_text(),
      value,
      np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]),
    )

  text, loss, grads = run(vlm)
  assert "cudnn$fmha" in text
  _, expected_loss, expected = run(VisionLanguageModel(exact, vlm.tokens))
  errors = _distance(loss, expected_loss), _distance(grads, expected)
  print("\nrelative errors of loss and gradient:", errors)
  assert max(errors) <= TOLERANCE
