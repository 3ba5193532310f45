"""Workdirs in buckets, with real servers and programs; see core/bucket.py."""

import importlib.util
import json
import os
import signal
import time

import fsspec
import fsspec.config
import numpy as np
import pytest

from tests import buckets, runs
from tests.training import test_resume
from vocojax import assemble
from vocojax.core import files, journal, lock
from vocojax.errors import CheckpointError, UserError
from vocojax.training import checkpoint

TAIL = """\
  c.training.update(steps=12, log_every=2, checkpoint_every=4)
  c.training.update(keep_checkpoints=1, evaluate=True)
"""


@pytest.fixture(scope="module", params=["gs", "s3"])
def url(request):
  """A bucket for this process and those it starts."""
  serve = {"gs": buckets.serve_gs, "s3": buckets.serve_s3}[request.param]
  if request.param == "s3":
    pytest.importorskip("s3fs", reason="needs pip install s3fs")
  with serve() as env, pytest.MonkeyPatch.context() as patch:
    for name, value in env.items():
      patch.setenv(name, value)
    patch.setattr(fsspec.config, "conf", fsspec.config.conf | {})
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield f"{request.param}://bucket"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bucket")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  return folder


def start(folder, workdir, config="one.py"):
  return runs.start_cached(
    folder,
    "vocojax.train",
    f"--config={folder / config}",
    f"--workdir={workdir}",
  )


@pytest.fixture(scope="module")
def uninterrupted(folder):
  """The same run in a folder of this machine."""
  test_resume.finish(start(folder, folder / "local"))
  return folder / "local"


def lines(text):
  """Metrics without what depends on time."""
  loose = ("time", "images_per_second")
  found = map(json.loads, text.splitlines())
  return [{k: v for k, v in x.items() if k not in loose} for x in found]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_like_one_that_was_not(
  url, folder, uninterrupted, tmp_path
):
  workdir = files.to_path(f"{url}/some/run")
  process = start(folder, workdir)
  done = workdir / "voco/checkpoints/4/commit_success.txt"
  while not done.exists():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.2)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  (workdir / ".training.lock").unlink()  # or a minute later
  out, err = test_resume.finish(start(folder, workdir))
  assert "voco: resuming after step" in err
  assert f"report: {workdir}/report.md" in out
  (workdir / "evaluation/voco.json").unlink()
  out, _ = test_resume.finish(
    runs.start_cached(
      folder, "vocojax.evaluate", f"--checkpoint={workdir}/voco"
    )
  )
  assert f"report: {workdir}/report.md" in out
  expected = (uninterrupted / "evaluation/voco.json").read_text()
  found = (workdir / "evaluation/voco.json").read_text()
  keys = ("accuracy", "total", "by_category", "step")
  expected, found = json.loads(expected), json.loads(found)
  assert [found[k] for k in keys] == [expected[k] for k in keys]
  predictions = "evaluation/voco.predictions.jsonl"
  assert (workdir / predictions).read_text() == (
    uninterrupted / predictions
  ).read_text()
  assert "## Training" in (workdir / "report.md").read_text()
  assert list((workdir / "voco/tensorboard").iterdir())

  copy = tmp_path / "copy"
  system, path = fsspec.core.url_to_fs(str(workdir))
  system.get(path, str(copy), recursive=True)
  assert lines((copy / "voco/metrics.jsonl").read_text()) == lines(
    (uninterrupted / "voco/metrics.jsonl").read_text()
  )
  step, arrays, *rest = test_resume.saved(copy / "voco")
  step_1, arrays_1, *rest_1 = test_resume.saved(uninterrupted / "voco")
  assert (step, rest) == (step_1, rest_1)
  assert arrays.keys() == arrays_1.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, arrays_1[name], name)


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_a_start_and_answers(
  url, folder, uninterrupted, tmp_path
):
  phase = f"{url}/elsewhere/voco"
  system, path = fsspec.core.url_to_fs(phase)
  system.put(f"{uninterrupted}/voco/", f"{path}/", recursive=True)
  runs.write_config(
    folder, "from.py", f"  c.init_from = {phase!r}\n" + TAIL + runs.ONE_PHASE
  )
  test_resume.finish(start(folder, tmp_path / "from", "from.py"))
  saved = (tmp_path / "from/voco/config.json").read_text()
  assert json.loads(saved)["init_from"] == phase
  process = runs.start_cached(
    folder,
    "vocojax.ask",
    f"--checkpoint={phase}",
    f"--image={folder}/0.png",
    "what color is this ?",
  )
  out, _ = test_resume.finish(process)
  assert out.strip()

  args = f"--source={phase}", "--to=original", f"--out={tmp_path}/out"
  test_resume.finish(runs.start_cached(folder, "vocojax.convert", *args))
  assert (tmp_path / "out/model.safetensors").stat().st_size > 2**15

  step = files.to_path(f"{phase}/checkpoints/12")
  damaged = next(step.glob("params/d/*"))
  content = bytearray(damaged.read_bytes())
  content[len(content) // 2] ^= 1
  damaged.write_bytes(bytes(content))
  with pytest.raises(CheckpointError) as caught:
    loaded = checkpoint.load(phase)
    assemble.load_model(loaded, loaded.config)
  assert (caught.value.where, caught.value.got) == (
    str(damaged),
    "damaged content",
  )


def test_files_in_a_bucket(url):
  workdir = assemble.make_workdir(f"{url}/files")
  path = workdir / "a/b.json"
  with pytest.raises(UserError) as caught:
    files.read_bytes(path)
  assert (caught.value.where, caught.value.got) == (str(path), "nothing")
  files.write_atomic(path, '{"x": 1}')
  assert files.read_json(path) == {"x": 1}
  assert files.read_json(str(path)) == {"x": 1}
  with pytest.raises(UserError) as caught:
    files.read_bytes(path, limit=7)
  assert caught.value.got == "8 bytes"
  assert (path.is_file(), path.is_dir(), path.parent.is_dir()) == (1, 0, 1)
  files.write_atomic(workdir / "a/c/d", b"")
  assert sorted(workdir.rglob("*")) == [path, workdir / "a/c/d"]
  assert files.path_inside(workdir, "a/b.json", "here") == path
  with pytest.raises(UserError):
    files.path_inside(workdir, "../b.json", "here")


def test_lines_are_added_to_a_file_in_a_bucket(url):
  path = files.to_path(f"{url}/journal/lines.jsonl")
  first = journal.Journal(path)
  first.add({"i": 0})
  assert path.read_bytes() == b""  # not with each line
  first.flush()
  path.write_bytes(path.read_bytes() + b'{"i": 1')  # as one that was copied
  second = journal.Journal(path)
  assert [entry for _, entry in second.entries] == [{"i": 0}]
  second.add({"i": 2})
  second.flush()
  assert [x for _, x in journal.read_journal(path)] == [{"i": 0}, {"i": 2}]


def test_one_writer_of_a_folder_in_a_bucket(url, monkeypatch):
  for name, seconds in (("STALE", 4), ("BEAT", 0.5), ("SETTLE", 0.5)):
    monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)
  folder = files.to_path(f"{url}/locked")
  path = folder / ".training.lock"
  for _ in range(2):  # the second finds what a process that died left behind
    with lock.held(folder, "training"):
      left = path.read_bytes()
      with pytest.raises(UserError) as caught, lock.held(folder, "training"):
        pass
      assert caught.value.got.startswith(f"training by process {os.getpid()}")
    assert not path.exists()
    path.write_bytes(left)


@pytest.mark.parametrize(
  ("place", "got", "fix"),
  [
    ("hdfs://host/run", "the scheme 'hdfs'", "choose another place"),
    ("gs://", "no bucket", "choose another place"),
    ("gs:///run", "no bucket", "choose another place"),
    (
      "s3://bucket/run",
      "no package s3fs, which reads s3://",
      "pip install s3fs, or this package with its extra 's3'",
    ),
  ],
)
def test_places_that_are_not_supported(place, got, fix, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError) as caught:
    assemble.make_workdir(place)
  assert (caught.value.where, caught.value.got, caught.value.fix) == (
    place,
    got,
    fix,
  )


def test_a_bucket_that_is_not_there(url):
  with pytest.raises(UserError) as caught:
    assemble.make_workdir(url.replace("bucket", "nobody") + "/run")
  assert caught.value.where == f"--workdir={url[:5]}nobody/run"
  assert caught.value.expected == "a place that can be written"
