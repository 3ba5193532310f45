"""What phases start from and are taught by is checked before any is run."""

import dataclasses
import shutil

import jax
import pytest

from tests import runs
from tests.health.setups import changed, config_of
from tests.training.test_checkpoint import save
from vocojax import assemble
from vocojax.errors import CheckpointError, ConfigError
from vocojax.training import loop

FROZEN = {"optimizer__freeze": ("^vision/",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, a config, and a run whose checkpoint can be started from."""
  folder = tmp_path_factory.mktemp("starts")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  full = {"model__compressor": compressor(folder, "full"), "name": "full"}
  save(changed(config_of(folder), **full), folder / "run/full")
  return folder


def compressor(folder, name):
  return dataclasses.replace(config_of(folder).model.compressor, name=name)


def plan(folder, *changes):
  """Phases `a`, `b`, ... as training makes them."""
  config = changed(config_of(folder), data__batch_size=8)
  configs = [
    changed(config, name=name, **change)
    for name, change in zip("abc", changes, strict=False)
  ]
  return list(assemble.make_phases(configs, folder / "new"))


@pytest.mark.parametrize("start", ["", "run/full"])
def test_what_is_frozen_has_a_start(folder, start):
  start = start and str(folder / start)
  # Neither is anything read that phase `a` is going to write.
  _, second = plan(folder, {"init_from": start}, FROZEN)
  assert second.config.init_from == f"{folder}/new/a"
  if start:
    plan(folder, {"init_from": start} | FROZEN)
    # A Q-Former is new, and would stay as it is.
    new = {"model__compressor": compressor(folder, "qformer")}
    freeze = {"optimizer__freeze": ("^compressor/",)}
    for phases_ in (({"init_from": start} | new | freeze,), ({}, new | freeze)):
      with pytest.raises(ConfigError) as e:
        plan(folder, *phases_)
      assert e.value.where == "config.init_from"
      assert "which lacks compressor/" in e.value.got
    return
  with pytest.raises(ConfigError) as e:
    plan(folder, FROZEN)
  assert e.value.where == "config.init_from"
  assert e.value.got.startswith("'', which lacks vision/")


def test_a_run_that_resumes_needs_no_start(folder, tmp_path):
  shutil.copytree(folder / "run/full", folder / "new/a")
  plan(folder, FROZEN)
  shutil.rmtree(folder / "new/a/checkpoints/3")
  with pytest.raises(ConfigError):
    plan(folder, FROZEN)
  shutil.rmtree(folder / "new")


def test_a_start_of_another_shape(folder):
  """Found before any array is read."""
  llm = dataclasses.replace(config_of(folder).model.llm, intermediate_size=40)
  start = folder / "run/full"
  plan(folder, {"init_from": str(start)})
  with pytest.raises(CheckpointError) as e:
    plan(folder, {"init_from": str(start), "model__llm": llm})
  assert f"{start}/checkpoints/3/params: llm/layers/mlp/" in e.value.where


def test_a_teacher(folder):
  """One that is there, one that an earlier phase makes, and none."""
  taught = {"training__distill_weight": 1.0}
  full = {"model__compressor": compressor(folder, "full")}
  plan(folder, taught | {"training__teacher": f"{folder}/run/full"})
  plan(folder, full, taught | {"training__teacher": f"{folder}/new/a"})
  for first, teacher, where in (
    (full, "new/b", "config.training.teacher"),
    ({}, "new/a", "config.training.teacher"),
  ):
    with pytest.raises(CheckpointError) as e:
      plan(folder, first, taught | {"training__teacher": f"{folder}/{teacher}"})
    assert e.value.where.startswith(where)


def test_parameters_are_held_once(folder, tmp_path, monkeypatch):
  """While a run lasts there is its state, a batch, and little else."""
  config = changed(config_of(folder), data__batch_size=4, training__steps=2)
  config = changed(config, training__checkpoint_every=9)
  phase = runs.phase(config, tmp_path / "run")
  jit_train_step, held = loop.jit_train_step, []

  def bytes_held():
    # Several arrays may be one buffer.
    shards = [x.addressable_data(0) for x in jax.live_arrays()]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())

  def counted(*arguments):
    step = jit_train_step(*arguments)

    def call(state, *rest):
      own = sum(x.nbytes for x in jax.tree.leaves(state))
      held.append((bytes_held() - before, own))
      return step(state, *rest)

    return call

  before = bytes_held()
  monkeypatch.setattr(loop, "jit_train_step", counted)
  with runs.quick_compile():
    loop.run(phase)
  assert len(held) == 2
  for found, own in held:
    assert found < own + 2 * 4 * 64 * 64 * 3
