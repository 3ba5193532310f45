"""The speed benchmark compares equals, and runs. Next: benchmarks/."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from benchmarks import torch_voco, train_step
from tests.models import builders

TINY = {
  "model.llm.vocab_size": 29,
  "model.llm.vocab_multiple": 8,
  "model.llm.hidden_size": 16,
  "model.llm.intermediate_size": 24,
  "model.llm.num_hidden_layers": 2,
  "model.llm.num_attention_heads": 2,
  "model.llm.num_key_value_heads": 2,
  "model.llm.head_dim": 8,
  "model.vision.image_size": 8,
  "model.vision.patch_size": 4,
  "model.vision.hidden_size": 8,
  "model.vision.intermediate_size": 12,
  "model.vision.num_hidden_layers": 2,
  "model.vision.num_attention_heads": 2,
  "data.max_text_length": 12,
  "data.conversations_per_record": 3,
  "data.batch_size": 2,
}
MODELS = {
  "one VoCo token": {"optimizer.freeze": ()},
  "three, frozen vision": {
    "model.compressor.num_voco_tokens": 3,
    "model.vision.hidden_act": "gelu",
    "model.vision.feature_layer": -2,
    "optimizer.freeze": ("^vision/",),
  },
}
TOLERANCE = 1e-4  # of the loss


@pytest.fixture(autouse=True)
def one_thread():
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@functools.cache
def _ours(name):
  """Our side, initialised, its batch, and its losses of three steps."""
  config = train_step.make_config(TINY | MODELS[name])
  batch = train_step.random_batch(config)
  batch["segment_ids"][1, 9:] = 0  # padding
  batch["labels"][1, 9:] = -100
  ours = train_step.Ours(config)
  # Sharp attention, so that a wrong mask or position shows.
  ours.params = builders.init(ours.model)
  ours.compile(batch, builders.QUICK_COMPILE)
  return ours, batch, np.array(ours.run(batch, 3))


def _errors(name="one VoCo token"):
  """Relative differences of the losses of three steps."""
  ours, batch, expected = _ours(name)
  losses = train_step.Torch(ours, compiled=False).run(batch, 3)
  errors = np.abs(np.array(losses) / expected - 1)
  print("\nrelative errors:", errors)
  return errors


@pytest.mark.parametrize("name", MODELS)
def test_torch_trains_the_same_model(name):
  assert _errors(name).max() <= TOLERANCE


def _sees_a_patch(stream, mask, position_ids):
  mask[:, :, stream.length :, 2] = 0
  return mask, position_ids


def _sees_another_conversation(stream, mask, position_ids):
  mask[:, :, -4:, stream.length] = 0
  return mask, position_ids


def _late_text(stream, mask, position_ids):
  position_ids[:, stream.length :] += 1
  return mask, position_ids


@pytest.mark.parametrize(
  "spoil", [_sees_a_patch, _sees_another_conversation, _late_text]
)
def test_a_wrong_mask_is_noticed(spoil, monkeypatch):
  right = torch_voco.joint_mask

  def wrong(segment_ids, stream):
    return spoil(stream, *right(segment_ids, stream))

  monkeypatch.setattr(torch_voco, "joint_mask", wrong)
  assert _errors()[0] > TOLERANCE


@pytest.mark.parametrize(
  "change",
  [
    {"learning_rate": 1.1e-3},
    {"grad_clip": 1e-6},
    {"freeze": ("^projector/",)},
  ],
)
def test_a_wrong_update_is_noticed(change, monkeypatch):
  right = torch_voco.make_train_step

  def wrong(model, config, *dtype):
    return right(model, dataclasses.replace(config, **change), *dtype)

  monkeypatch.setattr(torch_voco, "make_train_step", wrong)
  first, *later = _errors()
  assert first <= TOLERANCE
  assert max(later) > TOLERANCE


def test_report(monkeypatch):
  monkeypatch.setattr(train_step, "_REPETITION_SECONDS", 0.0)
  one_layer = {
    "model.llm.num_hidden_layers": 1,
    "model.vision.num_hidden_layers": 1,
  }
  result = train_step.measure("tiny", TINY | one_layer, 2, torch_compile=False)
  speed, parts = train_step.report([result]).split("\n\nWhere")
  print("\n" + speed)
  head, _, row = speed.splitlines()
  assert row.startswith("| tiny | 20 | 2 |")
  assert head.count("|") == row.count("|") == 8
  assert parts.splitlines()[-1].count("%") == 4
