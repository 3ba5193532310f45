"""Our model against transformers' on the same weights, for `--check`.

The other side runs in a program of its own, torch_reference.py, and its memory
is free before ours is needed. Both compute in float32. Read next: `into.py`.
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import MeshConfig, ModelConfig
from vocojax.data import prompt
from vocojax.data.tokenizer import VOCO_TOKEN
from vocojax.errors import WeightsError
from vocojax.models.clip import IMAGE_MEAN, IMAGE_STD
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, loop, sharding
from vocojax.weights import into
from vocojax.weights.source import Source

TOLERANCE = 1e-3  # of the largest logit
_PARTS = ("llm", "vision", "projector")
_QUESTION = "What is the color of the object in the middle of the image?"


def require_torch() -> None:
  """Raises a WeightsError where there is no torch."""
  if importlib.util.find_spec("torch") is None:
    raise WeightsError(
      "--check",
      "no torch",
      "torch, which runs the model to compare with",
      "leave --check out or `pip install torch`",
    )


def compare(plan: into.Plan, path: str) -> float:
  """Largest difference of the logits, as a fraction of the largest logit.

  Args:
    plan: published weights, the model of the other side.
    path: a checkpoint of the same weights.

  Raises:
    WeightsError: the difference is above TOLERANCE, or torch gave up.
  """
  loaded = checkpoint.load(path)
  config = dataclasses.replace(
    loaded.config.model, dtype="float32", param_dtype="float32", remat="none"
  )
  layout = prompt.LAYOUTS[loaded.config.prompt.layout]
  tokenizer = loaded.tokenizer
  prefix, suffix = prompt.stream_ids(layout, tokenizer)
  voco = tokenizer.get_vocab()[VOCO_TOKEN]
  model = VisionLanguageModel(config, StreamTokens(prefix, suffix, voco))
  params, _ = checkpoint.load_params(
    path,
    loop.abstract_params(model, sharding.make_mesh(MeshConfig(1, -1, 1))),
    config,
  )
  text, _ = prompt.encode(
    layout,
    tokenizer,
    [(_QUESTION, None)],
    num_images=1,
    strip_newlines="none",
  )
  size = config.vision.image_size
  image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
  row = np.asarray(params["llm"]["embed_tokens"]["embedding"][voco])
  n = len(tokenizer) - (voco == len(tokenizer) - 1)  # text tokens
  theirs = _reference(plan, model, text, image, row)[:, :n]
  ours = _ours(model, params, text, image)[:, :n]
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= TOLERANCE:
    raise WeightsError(
      path,
      f"logits that differ from those of {plan.source.folder} by {error:.1e} "
      "of the largest",
      f"at most {TOLERANCE:.0e}",
      "report it, with both models",
    )
  return error


def _ours(model: VisionLanguageModel, params, text, image) -> np.ndarray:
  """Logits [T, V] of the text."""
  ids = np.array([text], np.int32)
  batch = {
    "images": image[None, None],
    "image_group_ids": np.ones((1, 1), np.int32),
    "input_ids": ids,
    "segment_ids": np.ones_like(ids),
    "text_group_ids": np.ones_like(ids),
  }
  batch = jax.tree.map(jnp.asarray, batch)
  return np.asarray(jax.jit(model.text_logits)(params, batch))[0]


def _reference(plan: into.Plan, model, text, image, voco_row) -> np.ndarray:
  """The same by torch, from the published files."""
  source = plan.source
  pixels = (image.astype(np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
  recipe = _recipe(source, model.config) | {
    "voco_row": plan.origin["voco_row"],
    "before": model.stream.before,
    "between": [
      i for i in model.stream.after if i != model.tokens.voco_token_id
    ],
    "num_voco": model.stream.after.count(model.tokens.voco_token_id),
    "visible": model.stream.visible,
    "text": text,
  }
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    np.savez(
      folder / "inputs.npz",
      pixels=pixels.transpose(2, 0, 1),
      voco_row=voco_row,
    )
    done = subprocess.run(
      [sys.executable, "-m", "vocojax.weights.torch_reference", temporary],
      stderr=subprocess.PIPE,
      text=True,
    )
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ["killed"])[-1]
      raise WeightsError(
        f"--check: {source.folder} in torch",
        last[:200],
        "logits",
        "give it memory for the whole model in float32, or leave --check out",
      )
    return np.load(folder / "logits.npy")


def _recipe(source: Source, config: ModelConfig) -> dict[str, Any]:
  """Where the parts of the published model are."""
  parts = {name: source.require(name) for name in _PARTS}
  if not config.llm.tie_word_embeddings:
    parts["head"] = source.require("head")
  projector = parts["projector"]
  names = [projector.prefix + rule.name for rule in projector.part.rules]
  return {
    "files": sorted(
      {str(t.path) for part in parts.values() for t in part.tensors.values()}
    ),
    "prefixes": {name: part.prefix for name, part in parts.items()},
    "projector": list(zip(names[::2], names[1::2], strict=True)),
    "llm_config": source.text_values,
    "vision_config": source.vision_values,
    "feature_layer": config.vision.feature_layer,
    "tied": config.llm.tie_word_embeddings,
  }
