"""One input in a forked child, watched. Read next: __main__.py."""

import dataclasses
import os
import pathlib
import pickle
import random
import select
import shutil
import signal
import sys
import time
import traceback

from tests.fuzz.kinds import Input, Kind, Parts, judge

MAX_BYTES = 4 * 2**30
MAX_SECONDS = 10.0
FAULTS = (
  *("trace", "hang", "memory", "crash", "wrote"),
  *("wrong", "taken", "rejected", "message"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
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
  kind: Kind,
  case: str,
  seed: int,
  sound: pathlib.Path,
  right: Parts,
  room: pathlib.Path,
) -> Outcome:
  """Mutates a copy of a sound input and reads it, in a child.

  Args:
    kind: of the input.
    case: which mutation.
    seed: of what the mutation draws.
    sound: folder of the sound input.
    right: what must be read of it.
    room: a folder that is there; on return `room/input` is the input.
  """
  shutil.copytree(sound, room / "input", symlinks=True)
  (room / "tmp").mkdir()
  began = time.monotonic()
  child = os.fork()
  if not child:
    _begin(room)
    given = Input(room / "input", random.Random(f"{case}:{seed}"), right)
    _finish(room, kind, case, given)
  name, nbytes = _watch(child, began)
  seconds = time.monotonic() - began
  log = pathlib.Path(f"{room}.log")
  text = log.read_text(errors="replace")[-2000:]
  answer = pathlib.Path(f"{room}.answer")
  if not name and answer.is_file():
    name, text = pickle.loads(answer.read_bytes())
  answer.unlink(missing_ok=True)
  log.unlink()
  wrote = {p.name for p in room.iterdir()} - {"input", "tmp"}
  if name not in ("hang", "memory", ""):  # else it could not clean up
    wrote |= {f"tmp/{p.name}" for p in (room / "tmp").iterdir()}
  if wrote:
    name, text = "wrote", f"{sorted(wrote)}; {text}"
  return Outcome(name or "crash", text, seconds, nbytes)


def _begin(room: pathlib.Path) -> None:
  """Makes a child one whose traces can be seen and undone."""
  os.setsid()
  log = os.open(f"{room}.log", os.O_WRONLY | os.O_CREAT)
  for file in (1, 2):
    os.dup2(log, file)
  # Whoever runs a program or writes outside leaves something in `room`.
  (room / "tmp/bin").mkdir()
  for program in ("gs", "gswin64c", "convert"):
    path = room / f"tmp/bin/{program}"
    path.write_text(f"#!/bin/sh\ntouch '{room}/ran-{program}'\n")
    path.chmod(0o755)
  os.environ |= {
    "HOME": f"{room}/home",
    "TMPDIR": f"{room}/tmp",
    "PATH": f"{room}/tmp/bin:{os.environ['PATH']}",
  }
  os.chdir(room / "tmp")


def _finish(room: pathlib.Path, kind: Kind, case: str, given: Input) -> None:
  """Mutates, reads, leaves the answer behind; does not return."""
  try:
    declared, mutate = kind.cases[case]
    mutate(given)
    answer = judge(kind, declared, given)
  except BaseException as e:
    where = traceback.extract_tb(e.__traceback__)
    ours = [x for x in where if "/vocojax/" in x.filename] or where
    at = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
    answer = "trace", f"{type(e).__name__} at {at}: {e!s:.200}"
  shutil.rmtree(room / "tmp/bin")
  with open(f"{room}.answer", "wb") as file:
    pickle.dump(answer, file)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)


def _watch(child: int, began: float) -> tuple[str, int]:
  """Waits for a child; the fault if it had to be killed, and peak memory."""
  fault, ended = "", select.poll()
  descriptor = os.pidfd_open(child)
  ended.register(descriptor, select.POLLIN)
  while not ended.poll(20):
    if _peak(child) > MAX_BYTES:
      fault = "memory"
    elif time.monotonic() - began > MAX_SECONDS:
      fault = "hang"
    if fault:
      os.killpg(child, signal.SIGKILL)
      break
  os.close(descriptor)
  _, status, usage = os.wait4(child, 0)
  nbytes = usage.ru_maxrss * 1024
  if not fault and nbytes > MAX_BYTES:
    fault = "memory"
  if not fault and status:
    fault = "crash"
  return fault, nbytes


def _peak(process: int) -> int:
  """Bytes that a process had at most; 0 when it is gone."""
  try:
    with open(f"/proc/{process}/status") as file:
      lines = [x for x in file if x.startswith("VmHWM")]
  except OSError:
    return 0
  return int(lines[0].split()[1]) * 1024 if lines else 0
