"""A folder of easy-VQA's images into a store: damaged, killed, interrupted."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import easy_vqa
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import vocojax
from tests import disks, runs
from vocojax import assemble
from vocojax.config import load_module, phases
from vocojax.data import tokenizer
from vocojax.inference.cache import image_hash
from vocojax.inference.store import CacheStore
from vocojax.training import checkpoint, checksums

TAIL = """\
  c.model.compressor.num_voco_tokens = 2
"""
REAL = pathlib.Path(easy_vqa.__file__).parent / "data" / "test" / "images"
MANY = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in `voco`, and 400 images in `many`."""
  folder = tmp_path_factory.mktemp("compress")
  runs.write_data(folder)
  path = runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  (config,) = phases(load_module(str(path)))
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  with runs.quick_compile():
    params = jax.jit(assemble.make_model(config, words).init)(jax.random.key(0))
  where = folder / "voco" / checkpoint.FOLDER / "0"
  checkpoint.write_settings(where, config, words)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(where / "params", args=ocp.args.StandardSave(params))
  checksums.write(where, 0)
  (folder / "many").mkdir()
  for i in range(MANY):
    shutil.copy(REAL / f"{i}.png", folder / "many")
  return folder


@pytest.fixture(scope="module")
def engine(folder):
  with runs.quick_compile():
    yield vocojax.load(str(folder / "voco"))


@pytest.fixture(scope="module")
def program(folder):
  forks = runs.Forks(folder, "vocojax.compress")
  yield lambda images, store, *arguments: forks.run(
    *command(folder, images, store), *arguments
  )
  forks.close()


def command(folder, images, store):
  return (
    f"--checkpoint={folder}/voco",
    f"--images={images}",
    f"--store={store}",
    "--batch_size=4",
  )


def entries(store):
  found = pathlib.Path(store, "vocojax-cache").rglob("k2/*")
  return [path for path in found if path.suffix != ".__lock"]


def contents(store):
  """Bytes of all entries, by image."""
  return {path.name: path.read_bytes() for path in entries(store)}


@pytest.fixture(scope="module")
def whole(folder, program):
  """The entries of an uninterrupted run over `many`."""
  status, out, _ = program(folder / "many", folder / "whole")
  assert status == 0
  assert f"{MANY} files: {MANY} compressed (" in out
  found = contents(folder / "whole")
  assert len(found) == MANY
  return found


def test_folder_with_all_sorts_of_files(tmp_path, program, engine):
  images, store = tmp_path / "images", tmp_path / "store"
  good = {"0.png": 0, "a/1.png": 1, "a/b/2.PNG": 2, "c d/é.png": 3}
  good |= {f"e/{i}.png": i for i in range(4, 20)}
  for name, i in good.items():
    (images / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(REAL / f"{i}.png", images / name)
  shutil.copy(REAL / "1.png", images / "again.png")
  (images / "a" / "text.png").write_text("not an image")
  (images / "empty.jpg").write_bytes(b"")
  (images / "half.jpeg").write_bytes((REAL / "30.png").read_bytes()[:200])
  (images / "gone.webp").symlink_to("nowhere")
  os.mkfifo(images / "pipe.png")
  (images / "zero.png").symlink_to("/dev/zero")
  Image.new("L", (70_000, 1)).save(images / "wide.png")
  Image.new("RGB", (1, 40_000), "red").save(images / "tall.png")
  named = os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")
  shutil.copy(REAL / "40.png", named)
  (images / "notes.txt").write_text("not meant")
  status, out, err = program(images, store)
  assert status == 1
  failed = [x for x in err.splitlines() if x.startswith("failed: ")]
  names = ["a/text.png", "empty.jpg", "gone.webp", "half.jpeg"]
  names += ["pipe.png", "wide.png", "zero.png"]
  assert [x.split(": ")[1] for x in failed] == [f"{images}/{x}" for x in names]
  for line, words in zip(
    failed,
    (
      "a file that begins with b'not an i'",
      "an empty file",
      "got no such file, expected a file",
      "an image that can be read",
      "got a pipe, expected a regular file",
      "got 70,000 x 1 pixels, expected at most ",
      "got a device, expected a regular file",
    ),
    strict=True,
  ):
    assert words in line
  lines = out.splitlines()
  assert lines[0] == "each image: 16 patches -> 2 tokens, 512 bytes (float32)"
  assert lines[1].startswith("30 files: 22 compressed (")
  assert lines[1].endswith(f" images/s), 1 already in {store}, 7 failed")
  with CacheStore(str(store)) as opened:
    for name in good:
      content = (images / name).read_bytes()
      found = opened.get(engine.origin, 2, image_hash(content))
      expected = engine.compress(content)
      assert found.image_hashes == expected.image_hashes
      np.testing.assert_allclose(found.keys, expected.keys, atol=1e-5)
      np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    assert len(opened.ls()) == 22
  # Nothing is left to do but what failed.
  (images / "empty.jpg").unlink()
  status, out, _ = program(images, store)
  assert status == 1
  assert out.startswith(f"29 files: 0 compressed, 23 already in {store}, 6")


def test_int8_and_fewer_tokens(tmp_path, folder, program, engine):
  images = tmp_path / "images"
  images.mkdir()
  for i in range(9):
    shutil.copy(REAL / f"{i}.png", images)
  status, out, _ = program(
    images, tmp_path / "store", "--int8", "--num_voco_tokens=1"
  )
  assert status == 0
  # 2 x 2 layers x 2 heads x 8 bytes and 2 x 2 x 2 scales.
  assert "each image: 16 patches -> 1 token, 96 bytes (int8)" in out
  store = CacheStore(str(tmp_path / "store"))
  for path in images.iterdir():
    found = store.get(engine.origin, 1, image_hash(path.read_bytes()))
    assert found.dtype == "int8"
    # The first of two tokens is what the only one would be.
    expected = engine.compress(path).truncate(1)
    for x, y in (("keys", "key_scales"), ("values", "value_scales")):
      step = getattr(found, y)[:, :, None, :, None]
      difference = getattr(found.dequantize(), x) - getattr(expected, x)
      assert (np.abs(difference) <= 0.501 * step + 1e-6).all()


@pytest.fixture
def start(folder):
  """Starts a process group of its own, as a terminal's Ctrl-C wants it."""
  started = []

  def start(store, *arguments):
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "vocojax.compress",
        *command(folder, folder / "many", store),
        *arguments,
      ],
      cwd=runs.ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | runs.cached(folder),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()


def wait_for_entries(process, store, count):
  end = time.monotonic() + 200
  while process.poll() is None and len(entries(store)) < count:
    assert time.monotonic() < end
    time.sleep(0.002)
  assert len(entries(store)) >= count, process.stderr.read()


def signal_midway(tmp_path, start, number, count, *arguments):
  """Store, exit status, stdout and stderr of a run that got a signal midway.

  It is held while its entries are counted. On a busy machine it may have been
  past the middle by then; then another run is held.
  """
  for i in range(8):
    store = tmp_path / f"store{i}"
    process = start(store, *arguments)
    wait_for_entries(process, store, count)
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGSTOP)
    if len(entries(store)) > MANY // 2:
      continue
    assert process.returncode is None, process.stderr.read()
    os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    return store, process.returncode, out, err
  raise AssertionError("8 runs were past the middle before they were held")


def test_killed_and_resumed(tmp_path, folder, start, program, whole):
  """The second run compresses what the first did not store, and only that."""
  store, status, _, err = signal_midway(tmp_path, start, signal.SIGKILL, 30)
  assert status == -signal.SIGKILL, err
  before = contents(store)
  assert 30 <= len(before) < MANY
  status, out, _ = program(folder / "many", store)
  left = MANY - len(before)
  assert status == 0
  assert f"{MANY} files: {left} compressed (" in out
  assert f"{len(before)} already in {store}, 0 failed" in out
  assert contents(store) == whole
  assert before.items() <= whole.items()


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed(
  tmp_path, folder, start, program, whole, workers
):
  store, status, out, err = signal_midway(
    tmp_path, start, signal.SIGINT, 20, f"--num_workers={workers}"
  )
  assert status == 130, err
  assert "Traceback" not in err
  done = len(contents(store))
  assert 20 <= done < MANY
  assert out.splitlines()[-1] == (
    f"stopped: {done} of {MANY} are in the store; the same command resumes "
    "from there"
  )
  status, out, _ = program(folder / "many", store)
  assert status == 0 and f" {MANY - done} compressed (" in out
  assert contents(store) == whole


def test_workers_end_with_a_killed_run(tmp_path, start):
  memory = runs.shared_memory()
  process = start(tmp_path / "store", "--num_workers=2")
  wait_for_entries(process, tmp_path / "store", 1)
  workers = runs.children(process.pid)
  memory = runs.shared_memory() - memory
  assert len(workers) == 3  # and the resource tracker
  process.kill()
  process.communicate(timeout=60)  # workers that live would hold its output
  assert not runs.running(workers)
  runs.wait_until(lambda: not memory & runs.unused_memory(), 300)


def test_shards_share_the_work(tmp_path, folder, program, whole):
  store = tmp_path / "store"
  seen = []
  for i in range(3):
    status, out, _ = program(folder / "many", store, f"--shard={i}/3")
    assert status == 0
    seen.append(int(out.splitlines()[-1].split(" files: ")[0]))
    assert f"{seen[-1]} files: {seen[-1]} compressed (" in out
    assert len(contents(store)) == sum(seen)
  assert seen == [134, 133, 133]
  assert contents(store) == whole


def test_a_disk_that_is_full_or_read_only(tmp_path, folder, program, whole):
  """One line, nothing half written, and the run resumes with room."""
  with disks.mounted(tmp_path / "disk", "256k") as disk:
    for got in ("no space left", "Read-only file system"):
      status, _, err = program(folder / "many", disk / "store")
      assert status == 2
      lines = [x for x in err.split("\n") if x and "image/s]" not in x]
      assert len(lines) == 1, err
      assert lines[0].startswith(f"error: {disk}/store: got {got}, ")
      assert not list(disk.rglob("*.__lock"))
      disks.remount(disk, "ro")
    before = contents(disk / "store")
    assert 10 < len(before) < MANY and before.items() <= whole.items()
    disks.remount(disk, "rw,size=16m")
    assert program(folder / "many", disk / "store")[0] == 0
    assert contents(disk / "store") == whole


@pytest.mark.parametrize(
  ("arguments", "where", "got"),
  [
    (["--images=/nowhere"], "/nowhere", "no such folder"),
    (["--images=~nosuchuser/x"], "~nosuchuser/x", "a user that does not exist"),
    (["--images=EMPTY"], "EMPTY", "no image file"),
    (["--store=x://y"], "--store", "'x://y'"),
    (["--store=EMPTY/file"], "EMPTY/file", "a file"),
    (["--shard=2/2"], "--shard", "'2/2'"),
    (["--shard=2"], "--shard", "'2'"),
    ([f"--shard=1/{'9' * 5000}"], "--shard", "'1/9999"),
    (["--num_voco_tokens=3"], "num_voco_tokens", ""),
    (["--checkpoint=/nowhere"], "/nowhere", ""),
    (["--batch_size=0"], "--batch_size", ""),
  ],
)
def test_mistakes(tmp_path, folder, program, arguments, where, got):
  (tmp_path / "file").write_text("mine")
  arguments = [x.replace("EMPTY", str(tmp_path)) for x in arguments]
  status, out, err = program(folder / "many", tmp_path / "s", *arguments)
  assert (status, out, err.count("\n")) == (2, "", 1), err
  where = where.replace("EMPTY", str(tmp_path))
  assert (
    err.startswith(f"error: {where}") and f": got {got}" in err
  ) or not got
