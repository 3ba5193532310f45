"""What a checkpoint holds, who may read it, and what is not one."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from tests.models import builders
from vocojax.config import load_module, phases
from vocojax.data import pipeline
from vocojax.errors import CheckpointError, ConfigError, UserError, shorten
from vocojax.training import (
  checkpoint,
  checksums,
  loop,
  metrics,
  sharding,
  starts,
  state,
  step,
)

STEP = 3
SHARES = [{"next_record": 4 * STEP}]  # of the data, after STEP batches
PROGRESS = {"loss": 0.1 + 0.2, "tokens": 7.0, "bad_records": 2}
OPTIMIZER = optax.adam(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  return folder


def config_of(folder, **model):
  (config,) = phases(load_module(str(folder / "one.py")))
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, **model)
  )


def tied(config):
  llm = dataclasses.replace(config.model.llm, tie_word_embeddings=True)
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, llm=llm)
  )


def batches(phase):
  config = phase.config
  encoder = pipeline.Encoder(
    phase.tokenizer, config.prompt, config.data, config.model.vision.image_size
  )
  return iter(
    pipeline.train_dataset(
      phase.source, encoder, config.data, config.seed, 0, 1, 4
    )
  )


def random_state(model, at=STEP):
  params = jax.tree.map(jnp.asarray, builders.init(model, at))
  shapes = jax.eval_shape(lambda p: step.init_state(p, OPTIMIZER, ()), params)
  moments = jax.tree.map(
    lambda s: jnp.asarray(np.full(s.shape, at, s.dtype)), shapes.opt_state
  )
  return state.TrainState(jnp.int32(at), params, moments)


def save(config, folder, steps=(STEP,)):
  """A phase folder with a checkpoint of random weights."""
  phase = runs.phase(config, folder)
  checkpoints = checkpoint.Checkpointer(folder, config, phase.tokenizer)
  for at in steps:
    checkpoints.save(random_state(phase.model, at), SHARES, dict(PROGRESS))
  checkpoints.close()
  return phase


@pytest.fixture(scope="module")
def saved(folder):
  """The phase, and the batch that comes after the checkpoint."""
  config = config_of(folder)
  phase = runs.phase(config, folder / "run")
  iterator = batches(phase)
  for _ in range(STEP):
    next(iterator)
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  shares = [iterator.get_state()]
  assert shares == SHARES
  checkpoints.save(random_state(phase.model), shares, dict(PROGRESS))
  following = next(iterator)
  # The same step again: what is there stays.
  other = random_state(phase.model, 5)
  other = dataclasses.replace(other, step=jnp.int32(STEP))
  checkpoints.save(other, [], {})
  checkpoints.close()
  iterator.close()
  return phase, following


def abstract(phase, sizes=()):
  mesh = runs.mesh(*sizes)
  params = loop.abstract_params(phase.model, mesh)
  shapes = jax.eval_shape(lambda p: step.init_state(p, OPTIMIZER, ()), params)
  to = state.TrainState(
    sharding.replicated(mesh),
    sharding.param_shardings(params, mesh),
    sharding.opt_state_shardings(shapes.opt_state, params, mesh),
  )
  return jax.tree.map(
    lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to),
    shapes,
    to,
  )


def assert_equal_trees(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_restore_gives_everything_back(saved, sizes):
  phase, following = saved
  checkpoints = checkpoint.Checkpointer(
    phase.folder, phase.config, phase.tokenizer
  )
  assert checkpoints.latest == STEP
  iterator = batches(phase)
  wanted = abstract(phase, sizes)
  found, (share,), progress = checkpoints.restore(STEP, wanted, 1)
  iterator.set_state(share)
  checkpoints.close()
  assert_equal_trees(found, random_state(phase.model))
  for x, want in zip(
    jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
  ):
    assert x.sharding == want.sharding
  assert progress == PROGRESS
  batch = next(iterator)
  iterator.close()
  for key, x in batch.arrays.items():
    np.testing.assert_array_equal(x, following.arrays[key], key)


def test_progress_is_that_of_the_moment_of_saving(folder, monkeypatch):
  """Writing goes on in the background, and so does training."""
  dumps = json.dumps

  def slow_dumps(x, *args, **kwargs):
    if isinstance(x, dict) and "bad_records" in x:
      time.sleep(0.3)
    return dumps(x, *args, **kwargs)

  monkeypatch.setattr(json, "dumps", slow_dumps)
  config = config_of(folder)
  phase = runs.phase(config, folder / "race")
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  sums = metrics.Sums()
  before = dict(sums.values)
  checkpoints.save(random_state(phase.model), SHARES, sums.values)
  sums.add(dict.fromkeys(before, 1.0))
  sums.values["bad_records"] += 1
  checkpoints.wait()
  assert sums.values != before
  path = checkpoints.path(STEP) / "progress" / "metadata"
  assert json.loads(path.read_text()) == before
  checkpoints.close()


def test_keeps_the_newest(folder):
  config = config_of(folder)
  save(config, folder / "many", steps=(2, 4, 6, 8))
  assert config.training.keep_checkpoints == 2
  assert checkpoint.find(str(folder / "many"))[1] == 8
  names = {p.name for p in (folder / "many/checkpoints").iterdir()}
  assert names == {"6", "8"}


def test_relative_path(saved, folder, monkeypatch):
  """As README writes them."""
  phase, _ = saved
  monkeypatch.chdir(folder)
  abstract = loop.abstract_params(phase.model, phase.mesh)
  found, missing = checkpoint.load_params("run", abstract, phase.config.model)
  expected = random_state(phase.model).params
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert not missing and checkpoint.load("run").step == STEP


def test_another_way_to_compute_it_is_not(saved, folder):
  """Whoever runs out of memory may go on with less of it."""
  phase, _ = saved
  config = config_of(folder, remat="full", mlp_chunks=2, scan_layers=False)
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  found, _, _ = checkpoints.restore(STEP, abstract(phase), 1)
  checkpoints.close()
  assert int(found.step) == STEP


def test_another_order_of_the_data_is_refused(saved, folder):
  phase, _ = saved
  config = config_of(folder)
  data = dataclasses.replace(config.data, batching="pack")
  config = dataclasses.replace(config, data=data)
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  with pytest.raises(CheckpointError) as e:
    checkpoints.restore(STEP, abstract(phase), 1)
  checkpoints.close()
  where = f"{phase.folder}/checkpoints/3: config.data.batching"
  assert (e.value.where, e.value.got) == (where, "'shuffle'")
  assert e.value.expected == "'pack', which this run has"


def test_another_model_is_refused(saved, folder):
  phase, _ = saved
  rope = dataclasses.replace(phase.config.model.llm.rope, theta=5000.0)
  llm = dataclasses.replace(phase.config.model.llm, rope=rope)
  config = config_of(folder, llm=llm)
  checkpoints = checkpoint.Checkpointer(phase.folder, config, phase.tokenizer)
  with pytest.raises(CheckpointError) as e:
    checkpoints.restore(STEP, abstract(phase), 1)
  checkpoints.close()
  where = f"{phase.folder}/checkpoints/3: config.model.llm.rope.theta"
  assert (e.value.where, e.value.got) == (where, "10000.0")
  assert e.value.expected == "5000.0, which this run has"


def with_layout(saved, folder, layout):
  """A copy of the phase whose checkpoint names another prompt layout."""
  phase, _ = saved
  shutil.copytree(phase.folder, folder)
  path = folder / "checkpoints" / "3" / "layout" / "metadata"
  assert json.loads(path.read_text()) == {"name": "qa_v1", "version": 1}
  path.write_text(json.dumps(layout))
  checksums.write(folder / "checkpoints" / "3", 3)
  return folder / "checkpoints" / "3"


@pytest.mark.parametrize(
  "layout, got, expected",
  [
    (
      {"name": "qa_v1", "version": 2},
      "prompt layout 'qa_v1' version 2",
      "version 1 of it, which this vocojax has",
    ),
    (
      {"name": "chat_v9", "version": 1},
      "prompt layout 'chat_v9' version 1",
      "a layout that this vocojax has",
    ),
  ],
)
def test_another_prompt_layout_is_refused(
  saved, tmp_path, layout, got, expected
):
  phase, _ = saved
  where = with_layout(saved, tmp_path / "run", layout)
  with pytest.raises(CheckpointError) as e:
    checkpoint.load(str(where))
  assert (e.value.where, e.value.got) == (f"{where}/layout", got)
  assert e.value.expected == expected
  assert "--layout" in e.value.fix
  checkpoints = checkpoint.Checkpointer(
    tmp_path / "run", phase.config, phase.tokenizer
  )
  with pytest.raises(CheckpointError) as e:
    checkpoints.restore(STEP, abstract(phase), 1)
  checkpoints.close()
  assert (e.value.where, e.value.got) == (f"{where}/layout", got)
  assert "config.init_from" in e.value.fix
  # Weights alone are worth something with any layout.
  found = fresh_params(phase.model, str(where))
  assert_equal_trees(found, random_state(phase.model).params)


def test_another_tokenizer_is_refused(saved, tmp_path):
  """Of as many tokens."""
  phase, _ = saved
  where = copy(saved, tmp_path)
  checkpoints = checkpoint.Checkpointer(
    tmp_path / "run", phase.config, runs.permuted(phase.tokenizer)
  )
  with pytest.raises(ConfigError) as e:
    checkpoints.restore(STEP, abstract(phase), 1)
  checkpoints.close()
  assert e.value.where == "config.data.tokenizer"
  assert f"{where}, which it resumes" in e.value.expected


def test_a_layout_may_be_chosen(saved, tmp_path):
  phase, _ = saved
  own = checkpoint.load(str(phase.folder))
  assert (own.config.prompt.layout, own.chosen_layout) == ("qa_v1", "")
  where = with_layout(saved, tmp_path / "run", {"name": "x", "version": 1})
  chosen = checkpoint.load(str(where), "vicuna_v1")
  assert chosen.chosen_layout == "vicuna_v1"
  layout = dataclasses.replace(phase.config.prompt, layout="vicuna_v1")
  assert chosen.config == dataclasses.replace(phase.config, prompt=layout)
  with pytest.raises(UserError) as e:
    checkpoint.load(str(where), "vicuna")
  assert (e.value.where, e.value.got) == ("layout", "'vicuna'")


def test_weights_without_a_run(saved, tmp_path):
  """What a converter leaves: step 0 and none of a run's own items."""
  phase, _ = saved
  where = tmp_path / "out" / "checkpoints" / "0"
  for item in ("params", "config", "tokenizer", "layout"):
    shutil.copytree(phase.folder / "checkpoints" / "3" / item, where / item)
  checksums.write(where, 0)
  for path in (tmp_path / "out", where):
    assert checkpoint.find(str(path)) == (where.parent, 0)
    assert checkpoint.load(str(path)).config == phase.config
    found = fresh_params(phase.model, str(path))
    assert_equal_trees(found, random_state(phase.model).params)
  checkpoints = checkpoint.Checkpointer(
    tmp_path / "out", phase.config, phase.tokenizer
  )
  assert checkpoints.latest == 0
  with pytest.raises(CheckpointError) as e:
    checkpoints.restore(0, abstract(phase), 1)
  checkpoints.close()
  assert e.value.where == str(where)
  assert e.value.got == "weights without a run to resume"


def test_find(saved, folder, monkeypatch):
  phase, _ = saved
  where = phase.folder / "checkpoints"
  for path in (phase.folder, where, where / "3", f"{where}/3/"):
    assert checkpoint.find(str(path)) == (where, STEP)
  monkeypatch.setenv("HOME", str(folder))
  assert checkpoint.find("~/run") == (where, STEP)
  (folder / "empty/checkpoints").mkdir(parents=True)
  for path, got in (
    (folder, "the phases "),
    (folder / "nowhere", "no folder checkpoints"),
    (folder / "empty", "no complete step"),
    ("~nosuchuser/run", "a user that does not exist"),
  ):
    with pytest.raises(CheckpointError) as e:
      checkpoint.find(str(path))
    assert e.value.where == str(path)
    assert e.value.got.startswith(got)


def test_half_written_checkpoint_is_ignored(saved, tmp_path):
  """What a killed process leaves: Orbax renames the folder at the end."""
  phase, _ = saved
  shutil.copytree(phase.folder, tmp_path / "run")
  where = tmp_path / "run" / "checkpoints"
  shutil.copytree(where / "3", where / "9.orbax-checkpoint-tmp")
  assert checkpoint.find(str(tmp_path / "run")) == (where, STEP)
  assert checkpoint.load(str(tmp_path / "run")).step == STEP
  checkpoints = checkpoint.Checkpointer(
    tmp_path / "run", phase.config, phase.tokenizer
  )
  assert checkpoints.latest == STEP
  checkpoints.close()


def test_holds_config_and_tokenizer(saved, tmp_path):
  """A checkpoint can be used alone, elsewhere, without the data set."""
  phase, _ = saved
  shutil.copytree(
    phase.folder / "checkpoints" / "3", tmp_path / "checkpoints/3"
  )
  loaded = checkpoint.load(str(tmp_path))
  assert (loaded.step, loaded.config) == (STEP, phase.config)
  text = "what color is this ? <voco> nothing"
  assert loaded.tokenizer(text) == phase.tokenizer(text)
  assert loaded.tokenizer.get_vocab() == phase.tokenizer.get_vocab()


def write_item(where, item, content):
  """Puts other bytes where a JSON item is, as a stranger could."""
  (where / item / "metadata").write_bytes(content)
  (where / checksums.FILE).unlink()


@pytest.mark.parametrize(
  "name",
  [
    "{outside}",
    "../{up}",
    "tokenizer.json/../../{up}",
    "../tokenizer.json",
    ".bashrc",
    "chat_template.jinja",
    "a\0b",
    "",
  ],
)
def test_tokenizer_with_another_file(saved, tmp_path, monkeypatch, name):
  """Opening a checkpoint writes nothing where it should not."""
  where = copy(saved, tmp_path)
  inside = tmp_path / "a" / "b"  # of temporary folders
  inside.mkdir(parents=True)
  monkeypatch.setattr(tempfile, "tempdir", str(inside))
  name = name.format(outside=tmp_path / "evil.json", up="evil.json")
  item = json.loads((where / "tokenizer/metadata").read_text())
  content = json.dumps({name: {"a": 1}} | item)
  before = sorted(tmp_path.rglob("*"))
  write_item(where, "tokenizer", content.encode())
  with pytest.raises(CheckpointError) as e:
    checkpoint.load(str(where))
  assert e.value.where == f"{where}/tokenizer: {shorten(name)}"
  assert e.value.got == "a file of this name"
  gone = {where / checksums.FILE}
  assert sorted(tmp_path.rglob("*")) == sorted(set(before) - gone)


_ANY = (b"", b"[]", b"null", b"\xff{}", b"[" * 10**6, b'{"a": 1' + b"0" * 5000)


@pytest.mark.parametrize(
  "item, content",
  [
    *(
      (item, content)
      for item in ("config", "layout", "tokenizer", "data", "progress")
      for content in (*_ANY, None)
    ),
    ("config", b'{"model": 3}'),
    ("config", b'{"seed": 1e999}'),
    ("layout", b'{"name": ["qa_v1"], "version": 1}'),
    ("layout", b'{"name": "qa_v1", "version": {"a": []}}'),
    ("tokenizer", b"{}"),
    ("tokenizer", b'{"tokenizer.json": []}'),
    ("tokenizer", b'{"tokenizer.json": {}, "tokenizer_config.json": {}}'),
    ("data", b'{"shares": {}}'),
    ("data", b'{"shares": []}'),
    ("data", b'{"shares": [3]}'),
    ("data", b'{"shares": [{"next_record": "x"}]}'),
    ("progress", b'{"loss": null}'),
    ("progress", b'{"loss": NaN}'),
  ],
)
def test_json_item_of_another_form(saved, tmp_path, item, content):
  """None is a pipe, which nobody writes to."""
  where = copy(saved, tmp_path)
  write_item(where, item, content or b"")
  if content is None:
    (where / item / "metadata").unlink()
    os.mkfifo(where / item / "metadata")
  with opened(saved, tmp_path) as checkpoints:
    with pytest.raises(CheckpointError) as e:
      if item == "tokenizer":
        checkpoint.load(str(where))
      checkpoints.restore(STEP, abstract(saved[0]), 1)
  assert e.value.where.startswith(f"{where}/{item}")
  assert e.value.got and e.value.expected and e.value.fix


def test_pipe_among_arrays(saved, tmp_path):
  where = copy(saved, tmp_path)
  (where / "params/_METADATA").unlink()
  os.mkfifo(where / "params/_METADATA")
  for _ in range(2):  # with checksums, and without
    with pytest.raises(CheckpointError) as e:
      fresh_params(saved[0].model, str(where))
    assert e.value.where == f"{where}/params/_METADATA"
    assert e.value.got == "a pipe"
    (where / checksums.FILE).unlink(missing_ok=True)


# Whether or not there are checksums, which find it first.
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize(
  "part",
  ["config", "tokenizer/metadata", "layout", "params", "params/_METADATA"],
)
def test_damaged_checkpoint(saved, tmp_path, part, summed):
  where, broken = copy(saved, tmp_path, summed), tmp_path / "run/checkpoints/3"
  broken /= part
  if broken.is_dir():
    shutil.rmtree(broken)
  else:
    broken.write_text('{"a": ')
  with pytest.raises(CheckpointError) as e:
    checkpoint.load(str(tmp_path / "run"))
    fresh_params(saved[0].model, str(tmp_path / "run"))
  assert e.value.where.startswith(str(where))
  if part != "params/_METADATA" or summed:
    assert part in e.value.where
  assert e.value.fix


def copy(saved, tmp_path, summed=True):
  """The step in a copy of the run."""
  shutil.copytree(saved[0].folder, tmp_path / "run")
  where = tmp_path / "run/checkpoints/3"
  if not summed:
    (where / checksums.FILE).unlink()
  return where


@contextlib.contextmanager
def opened(saved, tmp_path):
  phase, _ = saved
  checkpoints = checkpoint.Checkpointer(
    tmp_path / "run", phase.config, phase.tokenizer
  )
  with contextlib.closing(checkpoints):
    yield checkpoints


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_array_that_is_cut_off(saved, tmp_path, item, summed):
  """Orbax reads arrays side by side: all that fail are heard of in one line."""
  where = copy(saved, tmp_path, summed)
  files = [p for p in (where / item).rglob("d/*") if p.is_file()]
  for path in files:
    os.truncate(path, path.stat().st_size // 2)
  assert files
  with opened(saved, tmp_path) as checkpoints:
    with pytest.raises(CheckpointError) as e:
      checkpoints.restore(STEP, abstract(saved[0]), 1)
  assert e.value.where in [str(where), *map(str, files)]
  if item == "params":
    with pytest.raises(CheckpointError):
      fresh_params(saved[0].model, str(tmp_path / "run"))


@pytest.mark.parametrize("item", ["params", "data"])
def test_item_that_is_missing(saved, tmp_path, item):
  where = copy(saved, tmp_path, summed=False)
  shutil.rmtree(where / item)
  with opened(saved, tmp_path) as checkpoints:
    with pytest.raises(CheckpointError) as e:
      checkpoints.restore(STEP, abstract(saved[0]), 1)
  assert item in e.value.where + e.value.got


def fresh_params(model, init_from="", freeze=(), layout="qa_v1"):
  with runs.quick_compile():
    start = starts.from_checkpoint(init_from, layout) if init_from else None
    return loop.init_params(model, runs.mesh(), 0, start, freeze)


def test_init_from_the_same_model(saved):
  phase, _ = saved
  found = fresh_params(phase.model, str(phase.folder))
  assert_equal_trees(found, random_state(phase.model).params)
  # What a second phase with another compressor does.
  full = dataclasses.replace(phase.config.model.compressor, name="full")
  model = dataclasses.replace(
    phase.model,
    config=dataclasses.replace(phase.config.model, compressor=full),
  )
  assert_equal_trees(fresh_params(model, str(phase.folder)), found)


def test_init_from_initialises_only_what_is_missing(folder, saved):
  """From tied embeddings to a head of its own."""
  save(tied(config_of(folder)), folder / "tied")
  model = saved[0].model
  found = state.flatten(fresh_params(model, str(folder / "tied")))
  new = "llm/lm_head/kernel"
  tied_model = runs.model_of(checkpoint.load(str(folder / "tied")))
  written = state.flatten(random_state(tied_model).params)
  assert found.keys() == written.keys() | {new}
  for path, x in written.items():
    np.testing.assert_array_equal(found[path], x, path)
  with runs.quick_compile():
    random = state.flatten(jax.jit(model.init)(jax.random.key(0)))
  np.testing.assert_array_equal(found[new], random[new])
  assert np.std(found[new]) > 0


def test_init_from_drops_what_is_not_wanted(saved):
  """From a head of its own to tied embeddings."""
  phase, _ = saved
  model = dataclasses.replace(phase.model, config=tied(phase.config).model)
  found = state.flatten(fresh_params(model, str(phase.folder)))
  written = state.flatten(random_state(phase.model).params)
  assert found.keys() == written.keys() - {"llm/lm_head/kernel"}
  for path, x in found.items():
    np.testing.assert_array_equal(x, written[path], path)


def test_init_from_another_shape(saved):
  phase, _ = saved
  llm = dataclasses.replace(phase.config.model.llm, intermediate_size=40)
  model = dataclasses.replace(
    phase.model, config=dataclasses.replace(phase.config.model, llm=llm)
  )
  with pytest.raises(CheckpointError) as e:
    fresh_params(model, str(phase.folder))
  where = re.escape(f"{phase.folder}/checkpoints/3/params: llm/layers/mlp/")
  assert re.fullmatch(where + "(up|gate|down)_proj/kernel", e.value.where)
  assert re.fullmatch(r"shape \(2, [\d, ]+\)", e.value.got)


def test_frozen_parameters_must_come_from_somewhere(saved, folder):
  phase, _ = saved
  with pytest.raises(ConfigError) as e:
    fresh_params(phase.model, freeze=("^vision/",))
  assert e.value.where == "config.init_from"
  assert e.value.got.startswith("'', which lacks vision/")
  found = fresh_params(phase.model, str(phase.folder), ("^vision/",))
  assert_equal_trees(found, random_state(phase.model).params)


@pytest.mark.parametrize(
  "shares, count, expected",
  [
    ([24], 1, [24]),
    ([24], 3, [8, 8, 8]),
    ([8, 8, 8], 2, [12, 12]),
    ([8, 9], 2, [8, 9]),
    ([{"row": 5}] * 2, 1, [{"row": 5}]),
    ([8, 9], 1, None),
    ([3, 3], 4, None),
  ],
)
def test_data_in_another_number_of_shares(
  saved, tmp_path, shares, count, expected
):
  """Each share has every n-th record of one order; see data/pipeline.py."""
  phase, where = saved[0], copy(saved, tmp_path)

  def states(values):
    return [x if isinstance(x, dict) else {"next_record": x} for x in values]

  (where / "data" / "metadata").write_text(
    json.dumps({"shares": states(shares)})
  )
  checksums.write(where, STEP)
  with opened(saved, tmp_path) as checkpoints:
    if expected:
      _, found, _ = checkpoints.restore(STEP, abstract(phase), count)
      assert found == states(expected)
      return
    with pytest.raises(CheckpointError) as e:
      checkpoints.restore(STEP, abstract(phase), count)
  assert e.value.where == f"{where}/data"
  assert e.value.got.startswith("2 shares of the data that are not equally far")
  assert e.value.expected == f"shares that can be read on as {count}"
