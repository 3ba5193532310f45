"""Runs on several hosts, as two real processes; see training/distributed.py.

They talk through gloo on this machine. `tests/runs.py` starts them.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from tests import runs, test_evaluate
from tests.training import test_resume, test_sharding
from vocojax.core import lock
from vocojax.training import checkpoint, checksums, loop, sharding

TAIL = test_sharding.TAIL
# Both shares of the data have bad records, at different places.
STOPPED = """\
  c.optimizer.update(schedule="constant", warmup_ratio=0.0)
  c.training.update(steps=21, log_every=2, checkpoint_every=3)
  c.training.keep_checkpoints = 1
  c.data.on_bad_record = "skip"
"""
BROKEN = ("5.png", "6.png", "11.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("multihost")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """The same with bad images, which are skipped."""
  folder = tmp_path_factory.mktemp("broken")
  runs.write_data(folder)
  for name in BROKEN:
    (folder / name).write_bytes(b"not an image")
  runs.write_config(folder, "one.py", STOPPED + runs.ONE_PHASE)
  return folder


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(
  folder, module: str, *arguments: str, devices: int = 1
) -> list[subprocess.Popen]:
  """Two processes of a program, each with so many devices."""
  port = free_port()
  env = runs.cached(folder) | {"JAX_NUM_CPU_DEVICES": str(devices)}
  return [
    runs.start(
      module,
      *arguments,
      f"--coordinator_address=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      **env,
    )
    for i in range(2)
  ]


def train(folder, workdir: str, *overrides: str, devices: int = 1):
  return start(
    folder,
    "vocojax.train",
    f"--config={folder / 'one.py'}",
    f"--workdir={folder / workdir}",
    *overrides,
    devices=devices,
  )


# What gloo greets its peers with, in pieces, since its threads do not wait for
# each other.
GLOO = re.compile(r"\[Gloo\]|peer ranks|is connected to|^[\d. ]*$")


def finish(processes, status: int = 0) -> list[tuple[str, str]]:
  """What they wrote, without gloo's greetings."""
  outputs = [process.communicate(timeout=250) for process in processes]
  for process, (_, err) in zip(processes, outputs, strict=True):
    assert process.returncode == status, err
  return [
    ("".join(x for x in out.splitlines(True) if not GLOO.search(x)), err)
    for out, err in outputs
  ]


@pytest.fixture(scope="module")
def one_device(folder):
  return test_sharding.train(test_sharding.config_of(folder), folder / "one")


@pytest.fixture(scope="module")
def two_processes(folder):
  """A finished run of 20 steps on 2 processes x 4 devices."""
  mesh = [f"--config.mesh.{axis}=2" for axis in sharding.AXES]
  (out, err), (out_1, err_1) = finish(train(folder, "two", *mesh, devices=4))
  assert out == out_1 == ""
  assert "20/20" in err and "/20" not in err_1  # one progress bar
  return folder / "two" / "voco"


@pytest.mark.slow
def test_two_processes_train_as_one_device(one_device, two_processes):
  lines = runs.metrics(two_processes)
  assert [line["step"] for line in lines if "loss" in line] == list(
    range(1, 21)
  )
  assert sum("validation_loss" in line for line in lines) == 2
  test_sharding.assert_same_curve(lines, one_device[0])


@pytest.mark.slow
def test_tensor_axis_across_hosts(folder, one_device):
  """Then both hosts hold, and load, the same rows."""
  finish(
    train(folder, "tensor", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
  )
  phase = folder / "tensor" / "voco"
  test_sharding.assert_same_curve(runs.metrics(phase), one_device[0])
  data = checkpoint.read_json(phase / "checkpoints" / "20", "data")
  assert data["shares"] == [{"next_record": 160}]


@pytest.mark.slow
def test_each_process_sums_and_compares_files(folder, two_processes):
  """What one of them finds damaged, all refuse, in one line each."""
  step = two_processes / "checkpoints" / "20"
  sums = json.loads((step / checksums.FILE).read_text())["files"]
  files = {str(p.relative_to(step)) for p in step.glob("*/**/*") if p.is_file()}
  assert sums.keys() == files
  for item in ("params", "optimizer"):
    for i in range(2):
      assert any(x.startswith(f"{item}/ocdbt.process_{i}/d/") for x in files)
  mesh = [f"--config.mesh.{axis}=2" for axis in sharding.AXES]
  for i in range(2):
    shutil.copytree(two_processes, folder / f"damaged{i}" / "voco")
    params = folder / f"damaged{i}/voco/checkpoints/20/params"
    path = max(
      params.glob(f"ocdbt.process_{i}/d/*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    processes = train(folder, f"damaged{i}", *mesh, devices=4)
    for j, (_, err) in enumerate(finish(processes, 2)):
      assert err.startswith(
        f"error: process {j} of 2: {path}: got damaged content, expected "
      )
      assert err.count("\n") == 1


def rows(batch) -> list[bytes]:
  """Every row of a batch, in an order that says nothing of hosts."""
  arrays = [np.asarray(batch[key]) for key in sorted(batch)]
  return sorted(
    b"".join(x[i].tobytes() for x in arrays) for i in range(len(arrays[0]))
  )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2)])
def test_resumes_on_other_devices(folder, two_processes, sizes):
  """Bit for bit what two processes wrote, and the batch that would follow."""
  config = test_sharding.config_of(folder)
  phase = runs.phase(config, folder / f"again_{sizes}", sizes)
  checkpoints = checkpoint.Checkpointer(two_processes, config, phase.tokenizer)
  optimizer = loop.make_optimizer(config.optimizer, phase.steps)
  with jax.set_mesh(phase.mesh):
    abstract = loop.abstract_state(config, phase.model, phase.mesh, optimizer)
    feed, straight = loop._feed(phase), loop._feed(phase)
    found, shares, _ = checkpoints.restore(20, abstract, feed.shard_count)
  checkpoints.close()
  _, arrays, _, _ = test_resume.saved(two_processes)
  kinds = {"params": [], "optimizer": []}
  for path, x in arrays.items():
    kinds[re.match(r"\w+", path)[0]].append((x.shape, x.tobytes()))
  optimizer = {"step": found.step, "state": found.opt_state}
  for tree, expected in (
    (found.params, kinds["params"]),
    (optimizer, kinds["optimizer"]),
  ):
    leaves = map(np.asarray, jax.tree.leaves(tree))
    assert sorted((x.shape, x.tobytes()) for x in leaves) == sorted(expected)
  for path, x in jax.tree_util.tree_leaves_with_path(found.params):
    y = arrays["params" + jax.tree_util.keystr(path)]
    assert np.asarray(x).tobytes() == y.tobytes()
    assert x.sharding.mesh == phase.mesh
  assert int(found.step) == 20
  feed.go_to(shares)
  for _ in range(20):
    next(straight)
  assert rows(next(feed)) == rows(next(straight))
  feed.close()
  straight.close()


@pytest.fixture(scope="module")
def uninterrupted(broken):
  finish(train(broken, "uninterrupted"))
  return broken / "uninterrupted" / "voco"


def saved(phase):
  """What two runs that end the same have in common, bit for bit."""
  (step,) = test_resume.steps(phase)
  _, arrays, data, progress = test_resume.saved(phase)
  arrays = {path: x.tobytes() for path, x in arrays.items()}
  return step, arrays, data, progress, runs.metrics(phase)


def wait_for_step(processes, phase, step: int) -> None:
  def reached():
    assert processes[1].poll() is None, processes[1].communicate()
    return max(test_resume.steps(phase), default=0) >= step

  test_resume.wait_for(processes[0], reached)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "name"),
  [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")],
)
def test_a_signal_to_one_stops_both(broken, number, name):
  phase = broken / f"stopped_{name}" / "voco"
  # Long enough to be stopped: JAX looks for the signal once a second.
  long = "--config.training.steps=100000"
  with runs.interruptible():
    processes = train(broken, phase.parent.name, long)
  wait_for_step(processes, phase, 3)
  processes[1].send_signal(number)
  (out, _), (out_1, _) = finish(processes, 128 + number)
  (step,) = test_resume.steps(phase)
  assert out == (
    f"voco: stopped by {name} after step {step}, saved as "
    f"{phase}/checkpoints/{step}; the same command resumes from there\n"
  )
  assert out_1 == ""
  short = f"--config.training.steps={step + 3}"
  straight = f"straight_{name}"
  for workdir in (phase.parent.name, straight):
    finish(train(broken, workdir, short))
  assert saved(phase) == saved(broken / straight / "voco")


LOST = (
  r"error: process \d of 2: another process died or cannot be reached \(.*\); "
  r"its own output says why; the same command resumes from the last checkpoint"
)
ABRUPT = (
  r"error: process {} of 2 ended abruptly: another process is gone, which the "
  "lines above tell, or this one was killed or out of memory; the same command "
  "resumes from the last checkpoint"
)


def kill_one(processes, victim: int) -> None:
  """SIGKILL; the other one must end within a minute and say why."""
  processes[victim].kill()
  killed = time.monotonic()
  other = processes[1 - victim]
  _, err = other.communicate(timeout=60)
  print(f"the other ended after {time.monotonic() - killed:.1f} s")
  assert other.returncode != 0
  # JAX's own watch over the coordinator, process 0, may be faster than we.
  said = LOST if victim else f"{LOST}|{ABRUPT.format(1)}"
  assert re.search(f"(?m)^({said})$", err), err
  _, err = processes[victim].communicate(timeout=10)
  assert re.search(f"(?m)^{ABRUPT.format(victim)}$", err), err


@pytest.mark.slow
def test_sigkill_of_one_ends_both(broken, uninterrupted):
  """Once during a save, once between; then it goes on bit for bit."""
  phase = broken / "killed" / "voco"
  # A save lasts some milliseconds, so a kill or two may come too late.
  for attempt in range(4):
    processes = train(broken, "killed")
    test_resume.wait_for(processes[1], lambda: test_resume.half_written(phase))
    kill_one(processes, 1)
    if half := test_resume.half_written(phase):
      break
    assert attempt < 3
  print("killed while writing", half)
  processes = train(broken, "killed")
  wait_for_step(processes, phase, max(test_resume.steps(phase), default=0) + 3)
  kill_one(processes, 0)
  assert test_resume.steps(phase)[-1] < 21
  _, err = finish(train(broken, "killed"))[0]
  assert re.search(r"voco: resuming after step \d+ of 21", err)
  assert not test_resume.half_written(phase)
  assert saved(phase) == saved(uninterrupted)
  assert saved(phase)[4][-1]["bad_records"] > 0


@pytest.mark.slow
def test_all_processes_end_where_another_run_writes(folder):
  workdir = folder / "held"
  workdir.mkdir()
  with lock.held(workdir, "training"):
    outputs = finish(train(folder, "held"), 2)
  for i, (out, err) in enumerate(outputs):
    assert out == ""
    line = f"error: process {i} of 2: {workdir}: got training by process "
    assert err.startswith(line) and err.count("\n") == 1, err


@pytest.mark.slow
def test_evaluation_on_two_hosts(folder, one_device):
  """Each answers half of the questions; the answers are those of one."""
  for name in ("alone", "shared"):
    shutil.copytree(folder / "one", folder / name / "voco")
    config = test_sharding.config_of(folder).to_json()
    (folder / name / "voco" / "config.json").write_text(config)
  checkpoint_of = "--checkpoint={}/{}/voco".format
  alone = runs.start_cached(
    folder, "vocojax.evaluate", checkpoint_of(folder, "alone")
  )
  finish([alone])
  (out, err), (out_1, err_1) = finish(
    start(folder, "vocojax.evaluate", checkpoint_of(folder, "shared"))
  )
  assert "of 15 answers right" in out and "report: " in out
  assert out_1 == "" and "5/5" in err and "/5" not in err_1
  found, expected = (
    test_evaluate.results(folder / name) for name in ("shared", "alone")
  )
  assert found == expected
  answers = expected["voco"][1]
  assert len(answers) == 15  # five of ten conversations have two turns
  assert len({x["prediction"] for x in answers}) >= 2


@pytest.mark.slow
def test_error_of_one_host_ends_both(folder):
  """A bad record, which only one of the two reads."""
  bad = folder / "bad"
  bad.mkdir()
  runs.write_data(bad)
  (bad / "5.png").write_bytes(b"not an image")
  runs.write_config(bad, "one.py", TAIL + runs.ONE_PHASE)
  processes = start(
    folder,
    "vocojax.train",
    f"--config={bad / 'one.py'}",
    f"--workdir={bad / 'run'}",
  )
  errors = {p: p.communicate(timeout=250)[1] for p in processes}
  (failed,) = [p for p in processes if p.returncode == 2]
  (other,) = [p for p in processes if p is not failed]
  assert re.search(
    rf"(?m)^error: process {processes.index(failed)} of 2: record r5: .*5.png.*"
    r"leave such records out with config.data.on_bad_record=skip$",
    errors[failed],
  ), errors
  assert other.returncode not in (0, 2)
  assert re.search(f"(?m)^({LOST}|{ABRUPT.format(1)})$", errors[other]), errors
