"""Rotary positions as ZeRO-3 rounds them in the original's training."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tests import runs
from tests.models import builders
from vocojax import assemble
from vocojax.config import load_module, phases
from vocojax.models import rope
from vocojax.training import loop

ROUNDED = {"llm.rope.round_positions": "bfloat16"}


def turned(overrides):
  """What a vector becomes at each of 2,048 positions."""
  config = builders.model_config(overrides).llm.rope
  x = jnp.ones((2048, 1, 128))
  return np.asarray(rope.rotate(x, jnp.arange(2048), config))[:, 0]


def test_neighbours_share_a_row():
  """At 576 patches: those of the VoCo token and of the text after it."""
  exact, rounded = turned({}), turned(ROUNDED)
  assert len(np.unique(exact, axis=0)) == 2048
  assert len(np.unique(rounded, axis=0)) == 641
  for group in (range(579, 582), range(582, 587)):
    assert len(np.unique(rounded[list(group)], axis=0)) == 1
  assert (rounded[581] != rounded[582]).any()
  np.testing.assert_array_equal(rounded[:257], exact[:257])
  of = np.arange(2048).astype(ml_dtypes.bfloat16).astype(int)
  below = of < 2048
  np.testing.assert_array_equal(rounded[below], exact[of[below]])


def test_answers_are_exact(tmp_path):
  """Training alone rounds; a checkpoint is read with exact positions."""
  runs.write_data(tmp_path)
  tail = f"  c.model.update_from_flattened_dict({ROUNDED})\n" + runs.ONE_PHASE
  path = runs.write_config(tmp_path, "one.py", tail)
  [config] = phases(load_module(str(path)))
  training = dataclasses.replace(config.training, steps=1)
  config = dataclasses.replace(config, training=training)
  with runs.quick_compile():
    loop.run(runs.phase(config, tmp_path / "voco"))
  loaded = assemble.checkpoint.load(str(tmp_path / "voco"))
  assert loaded.config.model.llm.rope.round_positions == "bfloat16"
  model, _ = assemble.load_model(loaded, loaded.config)
  assert model.config.llm.rope.round_positions == "none"
