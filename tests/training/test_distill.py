"""Training on a teacher: the step by hand, and runs with both kinds of it.

Read next: `models/test_distill.py`, for the divergence itself.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from tests.models import builders
from tests.training.test_step import assert_close, batch_of, jit, mean_loss
from vocojax.config import load_module, phases
from vocojax.errors import CheckpointError, ConfigError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, loop, state, step

WEIGHT = 0.7
K = {"compressor.num_voco_tokens": 2}


def _one_step(model, accumulate=1, weight=WEIGHT, teacher=None, freeze=()):
  optimizer = optax.sgd(0.5)
  params = builders.init(model)
  train_step = step.make_train_step(
    model, optimizer, freeze, accumulate, weight
  )
  before = step.init_state(params, optimizer, freeze)
  return jit(train_step)(before, batch_of(model), teacher)


def _losses(model, params, teacher, batch):
  """Mean cross-entropy, KL and the teacher's, from logits of two passes."""
  loss, count = mean_loss(model, params, batch)
  overrides = K | {"compressor.name": "full", "attention": "bias"}
  full = builders.model(overrides)
  teacher_loss, _ = mean_loss(full, teacher, batch)
  taught = full.text_logits(teacher, batch)
  n = model.config.llm.vocab_size
  taught, own = (
    jax.nn.log_softmax(x[:, :-1, :n])
    for x in (taught, model.text_logits(params, batch))
  )
  segments = batch["segment_ids"]
  trained = (batch["labels"][:, 1:] >= 0) & (
    segments[:, 1:] == segments[:, :-1]
  )
  each = jnp.sum(jnp.exp(taught) * (taught - own), axis=-1)
  return loss, jnp.sum(jnp.where(trained, each, 0)) / count, teacher_loss


def _by_hand(model, teacher_seed=None):
  """Parameters after a step, and the losses before it."""
  batch, params = batch_of(model), builders.init(model)

  def total(p):
    teacher = jax.lax.stop_gradient(p)
    if teacher_seed is not None:
      teacher = builders.init(model, teacher_seed)
    found = _losses(model, p, teacher, batch)
    return found[0] + WEIGHT * found[1], found

  (_, found), grads = jit(jax.value_and_grad(total, has_aux=True))(params)
  after = jax.tree.map(lambda p, g: p - 0.5 * np.asarray(g), params, grads)
  names = "loss", "distill_loss", "teacher_loss"
  return after, dict(zip(names, map(float, found), strict=True))


def _check(after, metrics, reference):
  expected, found = reference
  assert_close(after.params, expected)
  for name, value in found.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  assert found["distill_loss"] > 0.1
  assert abs(found["teacher_loss"] - found["loss"]) > 1e-3


@pytest.fixture(scope="module")
def reference():
  return _by_hand(builders.model(K | {"attention": "bias"}))


@pytest.mark.parametrize(
  "overrides, accumulate",
  [
    ({}, 1),
    ({"remat": "full", "mlp_chunks": 2}, 2),
    ({"attention": "bias"}, 4),
    ({"scan_layers": False, "remat": "dots"}, 1),
  ],
)
def test_a_step_equals_that_of_whole_logits(reference, overrides, accumulate):
  _check(*_one_step(builders.model(K | overrides), accumulate), reference)


def test_a_step_with_another_teacher():
  reference = _by_hand(builders.model(K), teacher_seed=1)
  model = builders.model(K)
  found = _one_step(model, 2, teacher=builders.init(model, 1))
  _check(*found, reference)


def test_without_weight_there_is_no_teacher(monkeypatch):
  def asked(self):
    raise AssertionError("a teacher that nobody needs")

  model = builders.model(K)
  plain = _one_step(model, weight=0.0)
  monkeypatch.setattr(VisionLanguageModel, "teacher", property(asked))
  _, metrics = _one_step(model, weight=0.0)
  assert "distill_loss" not in metrics and metrics["loss"] == plain[1]["loss"]
  with pytest.raises(AssertionError, match="nobody needs"):
    _one_step(model)


TAIL = """\
  c.model.compressor.num_voco_tokens = 4
  c.training.update(steps=6, log_every=2, checkpoint_every=3)
  c.training.keep_checkpoints = 9
  return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A `full` phase, and the config of one that learns from it."""
  folder = tmp_path_factory.mktemp("distill")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", TAIL)
  with runs.quick_compile():
    loop.run(runs.phase(_config(folder, "full"), folder / "full"))
  return folder


def _config(folder, compressor="voco", elastic="elastic", **training):
  c = load_module(str(folder / "one.py"))
  c.model.compressor.name = compressor
  if compressor == "voco":
    c.model.compressor.train_num_voco_tokens = elastic
  c.training.update(training)
  (config,) = phases(c)
  return config


def _leaves(params):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def test_a_run_with_a_teacher_goes_on_bit_for_bit(folder):
  """Its teacher is in no checkpoint; who stops in the middle loses nothing."""
  path = str(folder / "full")
  config = _config(folder, distill_weight=WEIGHT, teacher=path)
  with runs.quick_compile():
    phase = runs.phase(config, folder / "whole")
    whole = loop.run(phase)
    part = runs.phase(config, folder / "part")
    steps = folder / "whole" / "checkpoints"
    shutil.copytree(steps / "3", folder / "part" / "checkpoints" / "3")
    shutil.copy(folder / "whole" / "metrics.jsonl", folder / "part")
    resumed = loop.run(part)
  assert _leaves(whole) == _leaves(resumed)
  lines = runs.metrics(folder / "whole")
  assert lines == runs.metrics(folder / "part")
  assert all(line["distill_loss"] > 0 for line in lines) and len(lines) == 3
  loaded = checkpoint.load(str(folder / "whole"))
  assert loaded.config.training.teacher == path
  saved = {p.name for p in loaded.path.iterdir() if p.is_dir()}
  assert saved == {
    p.name for p in (folder / "full/checkpoints/6").iterdir() if p.is_dir()
  }
  teacher = loop.load_teacher(phase)
  abstract = loop.abstract_params(phase.model, phase.mesh)
  full, _ = checkpoint.load_params(path, abstract, phase.model.config)
  assert _leaves(teacher) == _leaves(full)
  # Another weight is another run.
  other = _config(folder, distill_weight=1.0, teacher=path)
  phase = dataclasses.replace(phase, config=other)
  with pytest.raises(CheckpointError) as e:
    loop.run(phase)
  assert "config.training.distill_weight" in str(e.value)


@pytest.mark.parametrize("other", ["model", "tokenizer"])
def test_a_teacher_of_another_model(folder, other):
  """Of the same shapes."""
  path = str(folder / "full")
  config = _config(folder, distill_weight=WEIGHT, teacher=path)
  phase = runs.phase(config, folder / f"taught_{other}")
  where = "config.data.tokenizer"
  if other == "model":
    rope = dataclasses.replace(config.model.llm.rope, theta=5e5)
    llm = dataclasses.replace(config.model.llm, rope=rope)
    model = dataclasses.replace(config.model, llm=llm)
    phase.config = dataclasses.replace(config, model=model)
    where = "config.model.llm.rope.theta"
  else:
    phase.tokenizer = runs.permuted(phase.tokenizer)
  with pytest.raises(ConfigError) as e:
    loop.load_teacher(phase)
  assert e.value.where == where
  assert f"config.training.teacher ({path})" in e.value.expected


def test_a_run_that_teaches_itself(folder):
  with runs.quick_compile():
    taught, plain = (
      loop.run(runs.phase(config, folder / config.training.teacher / str(i)))
      for i, config in enumerate(
        _config(folder, "voco", "fixed", distill_weight=weight)
        for weight in (WEIGHT, 0.0)
      )
    )
  assert _leaves(taught) != _leaves(plain)
  taught, plain = (runs.metrics(folder / "self" / str(i)) for i in range(2))
  assert all(
    line.keys() - plain[0].keys() == {"distill_loss", "teacher_loss"}
    for line in taught
  )
  assert all(line.keys() == plain[0].keys() for line in plain)


@pytest.mark.parametrize("compressor", ["full", "avgpool"])
def test_only_voco_has_a_teacher(folder, compressor):
  with pytest.raises(ConfigError) as e:
    _config(folder, compressor, distill_weight=WEIGHT)
  assert e.value.where == "config.training.distill_weight"


def test_a_teacher_that_saw_no_patches(folder):
  config = _config(folder)
  phase = runs.phase(config, folder / "student")
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  params = builders.init(phase.model)
  blank = state.TrainState(jnp.int32(1), params, {})
  checkpoints.save(blank, [{"next_record": 1}], {})
  checkpoints.close()
  config = _config(folder, distill_weight=WEIGHT, teacher=str(phase.folder))
  with pytest.raises(CheckpointError) as e:
    loop.load_teacher(dataclasses.replace(phase, config=config))
  assert e.value.where == "config.training.teacher"
  assert e.value.got.endswith("config.model.compressor.name 'voco'")
  gone = str(folder / "gone")
  config = _config(folder, distill_weight=WEIGHT, teacher=gone)
  with pytest.raises(CheckpointError) as e:
    loop.load_teacher(dataclasses.replace(phase, config=config))
  assert e.value.where.startswith(f"config.training.teacher: {gone}")
