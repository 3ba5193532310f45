"""Small models and random batches for the tests of this folder.

Read next: `test_masks.py`, then `test_two_stream.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vocojax import config as config_lib
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel

TOKENS = StreamTokens(prefix_ids=(1,), suffix_ids=(4, 5), voco_token_id=3)

_SMALL = {
  "dtype": "float32",
  "remat": "none",
  "llm.vocab_size": 29,
  "llm.vocab_multiple": 8,
  "llm.hidden_size": 16,
  "llm.intermediate_size": 24,
  "llm.num_hidden_layers": 2,
  "llm.num_attention_heads": 4,
  "llm.num_key_value_heads": 2,
  "llm.head_dim": 4,
  "vision.image_size": 8,
  "vision.patch_size": 4,
  "vision.hidden_size": 8,
  "vision.intermediate_size": 12,
  "vision.num_hidden_layers": 2,
  "vision.num_attention_heads": 2,
}


def model_config(overrides: dict | None = None) -> config_lib.ModelConfig:
  """A model of a few thousand parameters; keys are dotted paths."""
  config = ConfigDict(config_lib.default_values(config_lib.ModelConfig))
  for path, value in (_SMALL | (overrides or {})).items():
    config.update_from_flattened_dict({path: value})
  return config_lib.from_mapping(
    config_lib.ModelConfig, config.to_dict(), "config.model"
  )


def model(
  overrides: dict | None = None, tokens: StreamTokens = TOKENS
) -> VisionLanguageModel:
  return VisionLanguageModel(model_config(overrides), tokens)


# Compiling takes far longer than running here. XLA knows these on CPU alone.
QUICK_COMPILE: dict = {}
if jax.config.jax_platforms != "cuda":
  QUICK_COMPILE.update(
    xla_backend_optimization_level=0,
    xla_llvm_disable_expensive_passes=True,
    xla_cpu_use_fusion_emitters=False,
  )


def init(vlm: VisionLanguageModel, seed: int = 0) -> dict:
  """Random parameters of the right shapes, with no bias 0 and no norm 1.

  Weights of standard deviation 0.3 keep attention far from uniform, so that a
  wrong mask or position shows.
  """
  rng = np.random.default_rng(seed)

  def draw(path, x):
    noise = rng.normal(0, 1, x.shape).astype(x.dtype)
    if path[-1].key == "scale":
      return 1 + 0.2 * noise
    return (0.2 if path[-1].key == "bias" else 0.3) * noise

  shapes = jax.eval_shape(vlm.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def batch(
  rng: np.random.Generator,
  vlm: VisionLanguageModel,
  rows: list,
  text_length: int,
) -> dict[str, np.ndarray]:
  """Random content in a given layout.

  Args:
    rng: draws pixels, tokens, and which tokens are trained.
    vlm: gives image size and vocabulary.
    rows: of (group of each image slot, (group, length) of each conversation).
    text_length: T; what the conversations leave is padding.
  """
  size = vlm.config.vision.image_size
  B, F, T = len(rows), len(rows[0][0]), text_length
  segments, groups = np.zeros((2, B, T), np.int32)
  R = max(1, *(len(conversations) for _, conversations in rows))
  image_segments = np.zeros((B, F, R), np.int32)
  for b, (slots, conversations) in enumerate(rows):
    start = 0
    for i, (group, length) in enumerate(conversations):
      segments[b, start : start + length] = i + 1
      groups[b, start : start + length] = group
      start += length
      if group:
        image_segments[b, np.array(slots) == group, i] = i + 1
    assert start <= T
  ids = rng.integers(0, vlm.config.llm.vocab_size, (B, T), np.int32)
  trained = (rng.random((B, T)) < 0.6) & (segments > 0)
  image_groups = np.array([row[0] for row in rows], np.int32)
  result = {
    "images": rng.integers(0, 256, (B, F, size, size, 3), np.uint8),
    "image_group_ids": image_groups,
    "image_segment_ids": image_segments,
    "input_ids": ids,
    "labels": np.where(trained, ids, -100).astype(np.int32),
    "segment_ids": segments,
    "text_group_ids": groups,
  }
  compressor = vlm.config.compressor
  if compressor.budgets:
    # One number for each group of a row, those between the powers of 2 too.
    shape = (B, F + 1)
    drawn = rng.integers(1, compressor.num_voco_tokens, shape, np.int32, True)
    drawn[:, 0] = 0  # of empty slots
    result["num_voco_tokens"] = np.take_along_axis(drawn, image_groups, axis=1)
  return result


def loss_of(logits, batch) -> tuple[jax.Array, jax.Array]:
  """Sum of cross-entropy over trained tokens, and their number; from logits."""
  labels, segments = batch["labels"][:, 1:], batch["segment_ids"]
  trained = (labels >= 0) & (segments[:, 1:] == segments[:, :-1])
  trained &= segments[:, 1:] > 0
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], jnp.maximum(labels, 0)
  )
  return jnp.sum(jnp.where(trained, each, 0.0)), jnp.sum(trained)


def random_rows(
  rng: np.random.Generator, num_rows: int, num_slots: int, text_length: int
) -> list:
  """Layouts with shared groups, empty slots, text-only parts and padding."""
  rows = []
  for _ in range(num_rows):
    num_groups = rng.integers(0, num_slots + 1)
    slots = rng.integers(0, num_groups + 1, num_slots)
    conversations, left = [], text_length - rng.integers(0, text_length // 2)
    while left:
      length = int(rng.integers(1, left + 1))
      group = int(rng.choice([0, *slots]))  # the group of an image, or none
      conversations.append((group, length))
      left -= length
    rows.append((tuple(int(g) for g in slots), conversations))
  return rows


def check_both_passes(build) -> None:
  """Loss and every gradient of both passes, for rows of one to two images.

  Args:
    build: a model for each value of `config.model.attention`.
  """
  rng = np.random.default_rng(0)
  vlm = build("two_stream")
  rows = [((1, 2), [(1, 4), (2, 3)]), ((1, 0), [(1, 5), (0, 4)])]
  arrays = jax.tree.map(jnp.asarray, batch(rng, vlm, rows, 10))
  params = init(vlm)

  def loss(params, vlm):
    return loss_of(vlm.text_logits(params, arrays), arrays)[0]

  (a, grads_a), (b, grads_b) = (
    jax.value_and_grad(loss)(params, build(attention))
    for attention in ("two_stream", "bias")
  )
  assert abs(a - b) <= 1e-5 * abs(b)
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_b))
  for x, y in zip(
    jax.tree.leaves(grads_a), jax.tree.leaves(grads_b), strict=True
  ):
    scale = max(float(jnp.abs(y).max()), 1e-2 * largest)
    assert float(jnp.abs(x - y).max()) <= 1e-5 * scale
