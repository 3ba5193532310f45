"""One writer at a time, with real processes that die; see core/lock.py."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from vocojax.core import lock
from vocojax.errors import UserError

# Holds the lock until its input ends. With a number of seconds after which a
# file is stale, it is on a file system without locks.
HOLD = """
import errno, sys
from vocojax.core import lock
from vocojax.errors import UserError

if len(sys.argv) > 2:
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  lock.fcntl.flock = flock
  lock.STALE_SECONDS = float(sys.argv[2])
  lock.BEAT_SECONDS = lock.SETTLE_SECONDS = lock.STALE_SECONDS / 6
try:
  with lock.held(sys.argv[1], "training"):
    print("held", flush=True)
    sys.stdin.read()
except UserError as e:
  print(e.got, flush=True)
"""
# Takes and frees the lock again and again; nobody else may be in between.
AGAIN = """
import os, sys
from vocojax.core import lock
from vocojax.errors import UserError

folder, times = sys.argv[1], 0
while times < 200:
  try:
    with lock.held(folder, "training"):
      os.mkdir(f"{folder}/alone")
      os.rmdir(f"{folder}/alone")
      times += 1
  except UserError:
    pass
"""


@pytest.fixture
def start():
  """Starts processes, and ends them with the test."""
  started = []

  def start(*arguments: str, script: str = HOLD) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, "-c", script, *map(str, arguments)],
      cwd=pathlib.Path(__file__).parents[2],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


def held_by(process: subprocess.Popen) -> str:
  return f"training by process {process.pid} on {socket.gethostname()} since "


def test_the_second_is_told_who_writes(tmp_path, start):
  first = start(tmp_path)
  assert first.stdout.readline() == "held\n"
  with pytest.raises(UserError) as e, lock.held(tmp_path, "training"):
    pass
  assert e.value.where == str(tmp_path)
  assert e.value.got.startswith(held_by(first))
  assert e.value.expected == "no other training in this folder"
  with lock.held(tmp_path, "evaluation"):  # another kind of writer
    pass
  assert first.communicate("", timeout=20) == ("", "")
  with lock.held(tmp_path, "training"):
    pass
  assert not list(tmp_path.iterdir())


def test_a_killed_process_frees_it_at_once(tmp_path, start):
  first = start(tmp_path)
  assert first.stdout.readline() == "held\n"
  first.kill()
  first.wait()
  assert list(tmp_path.iterdir())  # its file stays
  before = time.monotonic()
  with lock.held(tmp_path, "training"):
    assert time.monotonic() - before < 1
  assert not list(tmp_path.iterdir())


def test_never_two_at_a_time(tmp_path, start):
  processes = [start(tmp_path, script=AGAIN) for _ in range(3)]
  for process in processes:
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_file_that_its_holder_removes_meanwhile(tmp_path, monkeypatch):
  """What is locked must be what the next process finds."""
  flock = lock.fcntl.flock

  def late(descriptor, how):
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    (tmp_path / ".training.lock").unlink()
    flock(descriptor, how)

  monkeypatch.setattr(lock.fcntl, "flock", late)
  with lock.held(tmp_path, "training"):
    with pytest.raises(UserError), lock.held(tmp_path, "training"):
      pass


def test_a_process_that_writes_the_same_folder_elsewhere(
  tmp_path, start, monkeypatch
):
  """The record of another host is watched, though the lock was to be had."""
  monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
  path = tmp_path / ".training.lock"
  record = {"pid": 7, "host": "elsewhere", "since": "then", "token": "1"}
  path.write_text(json.dumps(record))
  before = time.monotonic()
  with lock.held(tmp_path, "training"):
    assert 1 <= time.monotonic() - before < 3
  path.write_text(json.dumps(record))
  beat = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch {path}"])
  with pytest.raises(UserError) as e, lock.held(tmp_path, "training"):
    pass
  beat.wait()
  assert e.value.got == "training by process 7 on elsewhere since then"
  assert json.loads(path.read_text()) == record


def test_heartbeat_where_there_are_no_locks(tmp_path, start):
  first = start(tmp_path, 3)
  assert first.stdout.readline() == "held\n"
  assert start(tmp_path, 3).stdout.readline().startswith(held_by(first))
  time.sleep(3.5)  # it lives on
  assert start(tmp_path, 3).stdout.readline().startswith(held_by(first))
  first.send_signal(signal.SIGKILL)
  first.wait()
  before = time.monotonic()
  second = start(tmp_path, 3)
  assert second.stdout.readline() == "held\n"
  assert time.monotonic() - before >= 3
  second.communicate("", timeout=20)
  assert not list(tmp_path.iterdir())


def test_one_of_two_at_once_where_there_are_no_locks(tmp_path, start):
  both = [start(tmp_path, 6), start(tmp_path, 6)]
  said = sorted(process.stdout.readline() for process in both)
  assert said[0] == "held\n" and "training by process " in said[1]


def test_a_process_that_has_lost_the_lock_ends(tmp_path, start):
  """As one that was suspended until another took over."""
  first = start(tmp_path, 1.2)
  assert first.stdout.readline() == "held\n"
  os.kill(first.pid, signal.SIGSTOP)
  second = start(tmp_path, 1.2)
  assert second.stdout.readline() == "held\n"
  os.kill(first.pid, signal.SIGCONT)
  assert first.wait(timeout=20) == 2
  err = first.stderr.read()
  assert err.startswith(f"error: {tmp_path}: got {held_by(second)}")
  assert err.count("\n") == 1
  assert second.poll() is None
