"""A run that was killed ends bit for bit like one that never was.

Real processes and real signals; `tests/runs.py` starts them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import disks, runs
from vocojax.config import Config, load_module, phases
from vocojax.data import pipeline
from vocojax.data.sources import make_source
from vocojax.errors import CheckpointError
from vocojax.training import checkpoint, loop

# Between two checkpoints a line of metrics is always written, which a resumed
# run writes again; every other checkpoint holds sums that are not logged yet.
TAIL = """\
  c.training.update(steps=21, log_every=2, checkpoint_every=3)
  c.training.keep_checkpoints = 1
  c.data.on_bad_record = "skip"
  c.evaluation.update(every=5, split="train[18:]")
"""
STEPS = 21
# An image that is not one: skipped records must be counted the same, too.
BROKEN = "5.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("resume")
  prepare(folder)
  return folder


def prepare(folder: pathlib.Path) -> None:
  """Data of which some is bad, and the configuration two.py."""
  runs.write_data(folder)
  (folder / BROKEN).write_bytes(b"not an image")
  runs.write_config(folder, "two.py", TAIL + runs.TWO_PHASES)


def start(folder: pathlib.Path, workdir: str) -> subprocess.Popen:
  return runs.start_cached(
    folder,
    "vocojax.train",
    f"--config={folder / 'two.py'}",
    f"--workdir={folder / workdir}",
  )


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
  out, err = process.communicate(timeout=250)
  assert process.returncode == status, err
  return out, err


def steps(phase: pathlib.Path) -> list[int]:
  """Complete checkpoints of a phase."""
  names = [p.name for p in phase.glob("checkpoints/*")]
  return sorted(int(name) for name in names if name.isdigit())


def half_written(phase: pathlib.Path) -> list[pathlib.Path]:
  return list(phase.glob("checkpoints/*checkpoint-tmp*"))


def wait_for(process: subprocess.Popen, condition) -> None:
  deadline = time.monotonic() + 250
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.0005)


def wait_for_step(process, phase: pathlib.Path, rng: random.Random) -> None:
  """Until a moment well inside the phase, after some of its checkpoints."""
  step = rng.choice([3, 6, 9, 12])
  wait_for(process, lambda: max(steps(phase), default=0) >= step)
  time.sleep(rng.uniform(0, 0.03))


def kill(process: subprocess.Popen) -> None:
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(folder):
  out, err = finish(start(folder, "uninterrupted"))
  assert "resuming" not in err and "stopped" not in out
  return folder / "uninterrupted"


def saved(phase: pathlib.Path):
  """Step, arrays by path, iterator states and sums of the last checkpoint."""
  *_, step = steps(phase)
  where = phase / "checkpoints" / str(step)
  arrays = {}
  for item in ("params", "optimizer"):
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
      shapes = handler.metadata(where / item).tree
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
      )
      tree = reader.restore(
        where / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
      )
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      arrays[item + jax.tree_util.keystr(path)] = np.asarray(x)
  data, progress = (
    (where / item / "metadata").read_text() for item in ("data", "progress")
  )
  return step, arrays, data, progress


def next_batch(phase: pathlib.Path) -> pipeline.Batch:
  """What a further step would train on."""
  loaded = checkpoint.load(str(phase))
  # Any number of workers has the same batches.
  data = dataclasses.replace(loaded.config.data, num_workers=0)
  config = dataclasses.replace(loaded.config, data=data)
  encoder = pipeline.Encoder(
    loaded.tokenizer, config.prompt, config.data, config.model.vision.image_size
  )
  source = make_source(config, config.data.train_split)
  iterator = iter(
    pipeline.train_dataset(
      source, encoder, config.data, config.seed, 0, 1, config.data.batch_size
    )
  )
  (share,) = checkpoint.read_json(loaded.path, "data")["shares"]
  iterator.set_state(share)
  batch = next(iterator)
  iterator.close()
  return batch


def best(phase: pathlib.Path) -> int:
  _, step = checkpoint.find(str(phase / "best"))
  return step


def assert_same_end(a: pathlib.Path, b: pathlib.Path) -> None:
  """Bit for bit, of the phase folders of two runs."""
  (step, arrays, iterator, progress), other = saved(a), saved(b)
  assert (step, iterator, progress) == (other[0], other[2], other[3])
  assert step == STEPS
  assert arrays.keys() == other[1].keys()
  assert any(p.startswith("optimizer") and "mu" in p for p in arrays)
  for path, x in arrays.items():
    assert x.dtype == other[1][path].dtype
    assert x.tobytes() == other[1][path].tobytes(), path
  lines = runs.metrics(a)
  assert lines == runs.metrics(b)
  assert steps(a) == steps(b) == sorted({best(b), STEPS})
  assert best(a) == best(b)
  validated = [line["step"] for line in lines if "validation_loss" in line]
  assert validated == [5, 10, 15, 20, 21]
  lines = [line for line in lines if "loss" in line]
  assert [line["step"] for line in lines] == [*range(2, 21, 2), 21]
  assert lines[-1]["bad_records"] > 0
  batch, expected = next_batch(a), next_batch(b)
  assert batch.bad_records == expected.bad_records
  for key, x in batch.arrays.items():
    np.testing.assert_array_equal(x, expected.arrays[key], key)


def test_sigkill_three_times(folder, uninterrupted):
  """Once in the first phase, once during a save and once in the second."""
  rng = random.Random(0)
  workdir = folder / "killed"
  full, voco = workdir / "full", workdir / "voco"

  process = start(folder, "killed")
  wait_for_step(process, full, rng)
  kill(process)
  assert steps(full)[-1] < STEPS and not voco.exists()

  # A save lasts some milliseconds, so one or two kills may come too late.
  for attempt in range(5):
    process = start(folder, "killed")
    wait_for(process, lambda: half_written(voco) or half_written(full))
    kill(process)
    if half := half_written(full) + half_written(voco):
      break
    assert attempt < 4
  print("killed while writing", half)

  process = start(folder, "killed")
  wait_for_step(process, voco, rng)
  before = full / "checkpoints" / str(STEPS) / "_CHECKPOINT_METADATA"
  written = before.stat().st_mtime_ns
  kill(process)
  assert steps(voco)[-1] < STEPS

  _, err = finish(start(folder, "killed"))
  assert "voco: resuming after step " in err
  # The first phase was finished, and nothing of it was done again.
  assert "full: resuming" not in err
  assert before.stat().st_mtime_ns == written
  for phase in ("full", "voco"):
    assert_same_end(workdir / phase, uninterrupted / phase)
    assert not half_written(workdir / phase)


@pytest.fixture(scope="module")
def program(folder):
  program = runs.Forks(folder, "vocojax.train")
  yield program
  program.close()


@pytest.mark.parametrize("size", ["16k", "100k", "500k", "1m"])
def test_a_disk_that_is_full_and_then_read_only(
  folder, uninterrupted, program, tmp_path, size
):
  """One line, nothing half-written, and with room the run resumes."""
  with disks.mounted(tmp_path / "disk", size) as disk:
    command = (f"--config={folder / 'two.py'}", f"--workdir={disk / 'run'}")
    for got in ("No space left on device", "Read-only file system"):
      before = steps(disk / "run/full") + steps(disk / "run/voco")
      status, out, err = program.run(*command)
      *above, line, end = err.split("\n")
      assert (status, out, end) == (2, "", ""), err
      # Progress, and Orbax' warnings on a slow machine.
      assert all(re.match(r"\r|(full|voco): |W\d", x) for x in above), err
      where = rf"error: (--workdir=)?{disk}/run\S*"
      assert re.match(rf"{where}: got {got}, ", line), err
      left = [
        path
        for path in disk.rglob("*")
        if re.search(r"\.part$|tmp|lock", path.name)
      ]
      assert not left
      disks.remount(disk, "ro")
    # Nothing was lost, and nothing was written to the read-only disk.
    assert steps(disk / "run/full") + steps(disk / "run/voco") == before
    disks.remount(disk, "rw,size=64m")
    status, _, err = program.run(*command)
    assert status == 0, err
    for phase in ("full", "voco"):
      assert_same_end(disk / "run" / phase, uninterrupted / phase)


@pytest.mark.parametrize(
  ("number", "name"),
  [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")],
)
def test_a_signal_saves_and_says_so(folder, uninterrupted, number, name):
  workdir = folder / f"stopped_{name}"
  with runs.interruptible():
    process = start(folder, workdir.name)
  wait_for_step(process, workdir / "full", random.Random(1))
  process.send_signal(number)
  out, err = finish(process, 128 + number)
  *_, step = steps(workdir / "full")
  assert 0 < step <= STEPS
  assert out == (
    f"full: stopped by {name} after step {step}, saved as "
    f"{workdir / 'full' / 'checkpoints' / str(step)}; the same command resumes "
    "from there\n"
  )
  said = "Ctrl-C: saving after this step; once more stops at once\n" in err
  assert said == (number == signal.SIGINT)
  assert "error" not in err and "Traceback" not in err
  assert not (workdir / "voco").exists()
  out, _ = finish(start(folder, workdir.name))
  assert "stopped" not in out
  for phase in ("full", "voco"):
    assert_same_end(workdir / phase, uninterrupted / phase)


def test_sigterm_in_the_last_step_is_not_lost(folder, monkeypatch):
  """A run of two phases must not go on with the second."""
  config = phases(load_module(str(folder / "two.py")))[0]
  config = dataclasses.replace(
    config, training=dataclasses.replace(config.training, steps=2)
  )
  phase = runs.phase(config, folder / "last")
  save = checkpoint.Checkpointer.save

  def save_late(self, train_state, *rest):
    assert int(train_state.step) == 2
    os.kill(os.getpid(), signal.SIGTERM)
    save(self, train_state, *rest)

  monkeypatch.setattr(checkpoint.Checkpointer, "save", save_late)
  with runs.quick_compile(), pytest.raises(loop.Stopped) as e:
    loop.run(phase)
  assert e.value.status == 143
  assert steps(phase.folder) == [2]
  # The handler of before is back.
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def changed(folder: pathlib.Path, change: str) -> Config:
  """The configuration with other data."""
  (config,) = phases(load_module(str(folder / "one.py")))
  entries = [runs.entry(i) for i in range(runs.NUM_RECORDS)]
  if change == "an answer":
    entries[0]["conversations"][1]["value"] = "blue"
  elif change == "a record more":
    entries.append(runs.entry(0))
  if change == "split":
    return config_with(config, train_split="train[:20]")
  path = folder / f"{change}.json"
  path.write_text(json.dumps(entries))
  return config_with(config, path=str(path))


def config_with(config: Config, **data) -> Config:
  data = dataclasses.replace(config.data, **data)
  return dataclasses.replace(config, data=data)


def with_steps(config: Config, steps: int) -> Config:
  training = dataclasses.replace(
    config.training, steps=steps, keep_checkpoints=9
  )
  return dataclasses.replace(config, training=training)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """Data without bad records."""
  folder = tmp_path_factory.mktemp("sound")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  return folder


@pytest.fixture(scope="module")
def begun(sound):
  """The phase folder of a run of two steps."""
  (config,) = phases(load_module(str(sound / "one.py")))
  with runs.quick_compile():
    loop.run(runs.phase(with_steps(config, 2), sound / "begun"))
  return sound / "begun"


def resume(config: Config, begun: pathlib.Path, where: pathlib.Path) -> dict:
  """Two steps more, in a copy; how far the data then was read."""
  phase = runs.phase(with_steps(config, 4), where)
  shutil.copytree(begun, where, dirs_exist_ok=True)
  with runs.quick_compile():
    loop.run(phase)
  return checkpoint.read_json(where / "checkpoints/4", "data")


@pytest.mark.parametrize("change", ["an answer", "a record more", "split"])
def test_other_data_is_refused_or_accepted(
  sound, begun, tmp_path, capsys, change
):
  config = changed(sound, change)
  with pytest.raises(CheckpointError) as e:
    resume(config, begun, tmp_path / "refused")
  assert e.value.where == f"{tmp_path}/refused/checkpoints/2: the data"
  records = {"a record more": 25, "split": 20}.get(change, 24)
  assert e.value.got.startswith(f"{records} records (sha256:")
  assert e.value.expected.startswith("24 records (sha256:")
  assert steps(tmp_path / "refused") == [2]
  config = config_with(config, on_changed_data="accept")
  data = resume(config, begun, tmp_path / "accepted")
  assert "the data has changed" in capsys.readouterr().err
  # Four batches of four records, or two where it begins anew.
  read = 16 if records == 24 else 8
  assert data["shares"] == [{"next_record": read}]
  assert data["source"]["records"] == records


def test_the_same_data_elsewhere(sound, begun, tmp_path, capsys):
  (sound / "copy").mkdir()
  shutil.copy(sound / "data.json", sound / "copy")
  (config,) = phases(load_module(str(sound / "one.py")))
  config = config_with(config, path=str(sound / "copy/data.json"))
  data = resume(config, begun, tmp_path / "copy")
  digest = hashlib.sha256((sound / "data.json").read_bytes()).hexdigest()
  assert data["source"] == {"records": 24, "identity": f"sha256:{digest}"}
  assert "data" not in capsys.readouterr().err


def test_a_run_from_before_data_was_compared(
  sound, tmp_path, capsys, monkeypatch
):
  (config,) = phases(load_module(str(sound / "one.py")))
  with runs.quick_compile(), monkeypatch.context() as before:
    before.setattr(loop, "_source", lambda phase: {})
    loop.run(runs.phase(with_steps(config, 2), tmp_path / "old"))
  saved = checkpoint.read_json(tmp_path / "old/checkpoints/2", "data")
  assert saved == {"shares": [{"next_record": 8}]}
  data = resume(config, tmp_path / "old", tmp_path / "new")
  said = [
    line
    for line in capsys.readouterr().err.splitlines()
    if "does not say what data" in line
  ]
  assert len(said) == 1
  assert data["shares"] == [{"next_record": 16}]


def test_done_phases_need_no_data(sound, begun, tmp_path):
  """Such as the first phase of a run whose second one is resumed."""
  shutil.copytree(begun, tmp_path / "done")
  config = with_steps(changed(sound, "an answer"), 2)
  phase = runs.phase(config, tmp_path / "unused")
  done = tmp_path / "done/checkpoints"
  before = sorted(path.name for path in done.iterdir())
  loop.run(dataclasses.replace(phase, folder=tmp_path / "done"))
  assert sorted(path.name for path in done.iterdir()) == before
