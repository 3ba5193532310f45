"""The data of a run: slow and failing records and workers; see feed.py."""

import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from vocojax.config import load_module, phases
from vocojax.errors import DataError
from vocojax.training import feed, loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("feed")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  return folder


@dataclasses.dataclass
class Slow:
  """A source that takes its time once."""

  source: object
  seconds: float

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    seconds, self.seconds = self.seconds, 0
    time.sleep(seconds)
    return self.source[index]


def phase_of(folder, name, **data):
  (config,) = phases(load_module(str(folder / "one.py")))
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )
  return runs.phase(config, folder / name)


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_slow_data_is_named(folder, monkeypatch, caplog, seconds):
  monkeypatch.setattr(feed, "SLOW_SECONDS", 0.4)
  phase = phase_of(folder, f"slow_{seconds}")
  phase = dataclasses.replace(phase, source=Slow(phase.source, seconds))
  data = loop._feed(phase)
  with caplog.at_level(logging.WARNING):
    next(data)
    next(data)
  data.close()
  said = [r.getMessage() for r in caplog.records]
  expected = (
    "process 0 of 1 has waited 0.4 s for data, the batch after record 0 of its "
    "share; its data workers, disk or network are slow, and all hosts wait for "
    "it"
  )
  assert said == ([expected] if seconds else [])


# A run's data with two workers: says when they start and when a batch came.
FEED = """
import os, pathlib, sys, threading, time
from tests import runs
from tests.training import test_feed
from vocojax.training import loop

def say():
  while len(runs.children(os.getpid())) < 3:  # and the resource tracker
    time.sleep(0.001)
  print("started", flush=True)

def main(folder, name):
  phase = test_feed.phase_of(pathlib.Path(folder), name, num_workers=2)
  data = loop._feed(phase)
  threading.Thread(target=say).start()
  for _ in range(20):
    next(data)
    print("batch", flush=True)
    sys.stdin.readline()
  data.close()

main(*sys.argv[1:])
"""


@pytest.fixture
def start(folder):
  """Starts a process with workers; all of them end with the test."""
  process = None

  def start(name: str) -> subprocess.Popen:
    nonlocal process
    process = subprocess.Popen(
      [sys.executable, "-c", FEED, folder, name],
      cwd=runs.ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    return process

  yield start
  with process:
    for pid in runs.children(process.pid):
      os.kill(pid, signal.SIGKILL)
    process.kill()


@pytest.mark.parametrize("moment", ["started", "batch"])
def test_data_workers_end_with_a_killed_run(start, moment):
  memory = runs.shared_memory()
  process = start(f"killed_{moment}")
  while process.stdout.readline() != f"{moment}\n":
    assert process.poll() is None, process.stderr.read()
  workers = runs.children(process.pid)
  assert len(workers) == 3
  memory = runs.shared_memory() - memory
  process.kill()
  process.wait()
  runs.wait_until(lambda: not runs.running(workers), 60)
  runs.wait_until(lambda: not memory & runs.unused_memory(), 300)


def test_data_workers_leave_signals_to_the_run(start):
  """From their first moment on."""
  process = start("signals")
  while process.stdout.readline() != "started\n":
    assert process.poll() is None, process.stderr.read()
  for pid in runs.children(process.pid):
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
  out, err = process.communicate("\n" * 20, timeout=100)
  assert not err, err
  assert process.returncode == 0
  assert out.count("batch\n") >= 19


def test_dead_data_worker_is_named(folder):
  data = loop._feed(phase_of(folder, "dead", num_workers=1))
  before = set(multiprocessing.active_children())
  next(data)
  (worker,) = set(multiprocessing.active_children()) - before
  worker.kill()
  with pytest.raises(DataError) as e:
    for _ in range(100):
      next(data)
  assert re.fullmatch(
    r"process 0 of 1: the batch after record \d+ of its share", e.value.where
  )
  assert re.fullmatch(
    r"a data worker that died \(.*exit code -9.*\)", e.value.got
  )
  data.close()
