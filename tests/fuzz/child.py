"""One input in a forked child, watched. Read next: __main__.py."""

import os
import pathlib
import pickle
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from typing import NamedTuple

from tests.fuzz.kinds import Input, Kind, Parts, judge

MAX_BYTES = 4 * 2**30
MAX_SECONDS = 60.0
FAULTS = (
  *("trace", "hang", "memory", "crash", "wrote"),
  *("wrong", "taken", "rejected", "message"),
)


class Outcome(NamedTuple):
  """What came of an input.

  Attributes:
    name: 'read' or 'refused'; else the fault: those of `kinds.judge`, 'trace',
      'hang', 'memory', 'crash', or 'wrote' for files outside of the input.
    text: more in words.
    seconds: how long it took.
    nbytes: peak memory, with what the parent had before the fork.
  """

  name: str
  text: str
  seconds: float
  nbytes: int


def run(
  kind: Kind, case: str, seed: int, sound: pathlib.Path, room: pathlib.Path
) -> Outcome:
  """Mutates a copy of a sound input and reads it, in a child.

  Args:
    kind: of the input.
    case: which mutation.
    seed: of what the mutation draws.
    sound: the sound input; what must be read of it is in a pickle beside it.
    room: an empty folder; on return `room/input` is the input.
  """
  shutil.copytree(sound, room / "input", symlinks=True)
  (room / "tmp").mkdir()
  right = pickle.loads(sound.with_suffix(".pickle").read_bytes())
  answer = pathlib.Path(f"{room}.answer")
  answer.write_bytes(pickle.dumps(("crash", "")))
  began = time.monotonic()
  if not (child := os.fork()):
    found = _read(kind, case, seed, right, room)
    answer.write_bytes(pickle.dumps(found))
    os._exit(0)
  fault, nbytes = _watch(child, began)
  name, text = pickle.loads(answer.read_bytes())
  name = fault or name
  # Whoever runs a program or writes outside leaves something.
  wrote = {p.name for p in room.iterdir()} - {"input", "tmp"}
  if name not in ("hang", "memory", "crash"):  # else it could not clean up
    wrote |= {f"tmp/{p.name}" for p in (room / "tmp").iterdir()}
  if wrote:
    name, text = "wrote", f"{sorted(wrote)}; {text}"
  return Outcome(name, text, time.monotonic() - began, nbytes)


def _read(
  kind: Kind, case: str, seed: int, right: Parts, room: pathlib.Path
) -> tuple[str, str]:
  """What the child does."""
  os.setsid()
  log = os.open(f"{room}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for file in (1, 2):
    os.dup2(log, file)
  gs = room / "tmp/bin/gs"
  gs.parent.mkdir()
  gs.write_text(f"#!/bin/sh\ntouch '{room}/ran-gs'\n")
  gs.chmod(0o755)
  path = f"{gs.parent}:{os.environ['PATH']}"
  os.environ |= {"HOME": f"{room}/home", "TMPDIR": f"{room}/tmp", "PATH": path}
  tempfile.tempdir = None  # it was looked up before
  os.chdir(room / "tmp")
  given = Input(room / "input", random.Random(f"{case}:{seed}"), right)
  try:
    return judge(kind, case, given)
  except BaseException as e:
    where = traceback.extract_tb(e.__traceback__)
    ours = [x for x in where if "/vocojax/" in x.filename] or where
    at = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return "trace", f"{type(e).__name__} at {at}: {e!s:.200}"
  finally:
    shutil.rmtree(gs.parent)


def _watch(child: int, began: float) -> tuple[str, int]:
  """Waits for a child; the fault if it had to be killed, and peak memory."""
  fault, ended = "", select.poll()
  descriptor = os.pidfd_open(child)
  ended.register(descriptor, select.POLLIN)
  while not fault and not ended.poll(20):
    status = pathlib.Path(f"/proc/{child}/status").read_text()
    peak = status.partition("VmHWM:")[2].split()
    if peak and int(peak[0]) * 1024 > MAX_BYTES:
      fault = "memory"
    elif time.monotonic() - began > MAX_SECONDS:
      fault = "hang"
  if fault:
    os.killpg(child, signal.SIGKILL)
  os.close(descriptor)
  _, status, usage = os.wait4(child, 0)
  nbytes = usage.ru_maxrss * 1024
  if not fault and (status or nbytes > MAX_BYTES):
    fault = "crash" if status else "memory"
  return fault, nbytes
