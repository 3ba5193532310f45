"""The processes of one run: start, talk, end together. Read next: `loop.py`.

A run on several hosts is the same program on each of them. Whatever happens to
one process ends all: a process that fails leaves at once, without the barrier
at the end of JAX programs, so that the others notice by their connections to it
within a second, or by missed heartbeats within `HEARTBEAT_SECONDS`.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from vocojax.core import files, lock
from vocojax.errors import UserError, one_line, shorten

JOIN_SECONDS = 300  # in which all processes must have started
HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
# A variable of each scheduler that JAX finds the other processes with: SLURM,
# Open MPI, Cloud TPU (JAX sets it where there are chips), Kubernetes jobs.
_SCHEDULERS = (
  "SLURM_JOB_ID",
  "OMPI_MCA_orte_hnp_uri",
  "TPU_ML_PLATFORM",
  "JOB_COMPLETION_INDEX",
)
_FLAGS = ("coordinator_address", "num_processes", "process_id")
# What errors of collectives and barriers speak of when a process has died; JAX
# raises some as ValueError.
_LOST = re.compile(
  "gloo|nccl|heartbeat|coordination ?service|barrier|"
  "connection (closed|reset|refused)|socket closed",
  re.I,
)
_AGAIN = "the same command resumes from the last checkpoint"


def define_flags() -> None:
  """Defines the flags that name the processes of a plain list of hosts."""
  flags.DEFINE_string(
    _FLAGS[0],
    None,
    "HOST:PORT of process 0, for a run on several hosts. On TPU pods, SLURM, "
    "Open MPI and Kubernetes jobs JAX knows; leave these three out there.",
  )
  flags.DEFINE_integer(_FLAGS[1], None, "How many processes, one a host.", 1)
  flags.DEFINE_integer(_FLAGS[2], None, "Which of them this is, from 0.")


@contextlib.contextmanager
def joined():
  """Joins the processes of a run, if there are several, until it ends.

  Raises:
    UserError: the flags do not go together, or the others do not come.
  """
  if not _join():
    yield
    return
  _last_words(
    f"error: {name()} ended abruptly: another process is gone, which the lines "
    f"above tell, or this one was killed or out of memory; {_AGAIN}"
  )
  try:
    yield
  except BaseException as e:
    leave(e)
    raise  # this process had parted from the others
  if _watcher is not None:
    _last_words("")


_watcher: subprocess.Popen | None = None
_WATCH = """
while read -r line; do
  [ "$line" ] || exit 0
  words=$line
done
echo "$words" >&2
"""


def _last_words(words: str) -> None:
  """What shall be on stderr if this process ends from now on; '' for nothing.

  JAX's own watch over the processes ends them without a chance for Python to
  say why. A shell says it, once this process is gone.
  """
  global _watcher
  if _watcher is None:
    _watcher = subprocess.Popen(
      ["sh", "-c", _WATCH], stdin=subprocess.PIPE, start_new_session=True
    )
  if words:
    assert _watcher.stdin
    _watcher.stdin.write(f"{words}\n".encode())
    _watcher.stdin.flush()
  else:
    _watcher.communicate(b"\n")
    _watcher = None


def part() -> None:
  """Ends the run of several processes; all of them are to call it.

  What each does then is its own affair and may take any time. At the end of a
  program the others would be waited for, but not for long.
  """
  if _watcher is None:
    return
  jax.distributed.shutdown()
  _last_words("")


def leave(e: BaseException) -> None:
  """Reports an error and ends this process, if it is one of several.

  To be called before anything that waits for the other processes, such as the
  end of a checkpoint: they may be gone, or wait for us elsewhere.
  """
  if _watcher is None:
    return
  status = _report(e, name())
  _last_words("")
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _report(e: BaseException, who: str) -> int:
  """Says on stderr what ended this process; its exit status."""
  if isinstance(e, UserError):
    print(f"error: {who}: {e}", file=sys.stderr)
    return 2
  words = one_line(e)
  if isinstance(e, KeyboardInterrupt):
    print(f"error: {who}: {words or 'interrupted'}", file=sys.stderr)
    return 130
  errors = (jax.errors.JaxRuntimeError, ValueError)
  if isinstance(e, errors) and _LOST.search(words):
    print(
      f"error: {who}: another process died or cannot be reached ("
      f"{words[:200]}); its own output says why; {_AGAIN}",
      file=sys.stderr,
    )
    return 1
  print(f"error: {who}:", file=sys.stderr)
  traceback.print_exception(e)
  return 1


def _join() -> bool:
  """Whether this process now is one of several, or could be."""
  values = flags.FLAGS.flag_values_dict()
  address, count, index = (values[name] for name in _FLAGS)
  missing = [name for name in _FLAGS if values[name] is None]
  if len(missing) == len(_FLAGS):
    scheduled = any(name in os.environ for name in _SCHEDULERS)
    # Of a single SLURM task JAX would take all GPUs but one away.
    if not scheduled or os.environ.get("SLURM_NTASKS") == "1":
      return False
  elif missing:
    raise UserError(
      f"--{missing[0]}",
      "nothing",
      f"a value, since --{', --'.join(_FLAGS)} are given together",
      "give all three on each host, each with its own --process_id",
    )
  elif not 0 <= index < count:
    raise UserError(
      "--process_id",
      str(index),
      f"0 to {count - 1}",
      "count processes from 0, or raise --num_processes",
    )
  elif not re.fullmatch(r".+:\d+", address):
    raise UserError(
      "--coordinator_address",
      shorten(address),
      "HOST:PORT of process 0",
      "write it like 10.0.0.1:8476",
    )
  _last_words(f"error: {_alone('none, which the lines above explain')}")
  try:
    jax.distributed.initialize(
      address,
      count,
      index,
      initialization_timeout=JOIN_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as e:
    _last_words("")
    if missing and str(e) == "coordinator_address should be defined.":
      _check_pod()
      return False  # no scheduler that JAX knows: one process
    raise _alone(f"none ({one_line(e)[:200]})") from e
  return True


def _alone(found: str) -> UserError:
  return UserError(
    "the other processes of this run",
    found,
    f"all of them within {JOIN_SECONDS} s",
    "start each with its own --process_id, and let --coordinator_address name "
    "a host and port that all can reach",
  )


def _check_pod() -> None:
  pod = os.environ.get("JOB_COMPLETION_INDEX", "0")
  if pod != "0":
    raise UserError(
      f"JOB_COMPLETION_INDEX={pod}",
      "a pod of a Kubernetes job of several, of which JAX finds only this one",
      "all pods",
      f"run pip install kubernetes, or give --{', --'.join(_FLAGS)}",
    )


def name() -> str:
  """What messages call this process."""
  return f"process {jax.process_index()} of {jax.process_count()}"


def gather(value: Any) -> list[Any]:
  """What each process gave, in their order; anything that JSON can hold."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


@contextlib.contextmanager
def held(folder: pathlib.Path, kind: str) -> Iterator[None]:
  """`lock.held` by process 0, for all processes; all of them call it.

  Raises:
    UserError: on all of them; see there.
  """
  with contextlib.ExitStack() as stack:
    refused = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(lock.held(folder, kind))
      except UserError as e:
        refused = [e.where, e.got, e.expected, e.fix]
    if refused := gather(refused)[0]:
      raise UserError(*refused)
    yield


def check_shared(folder: pathlib.Path) -> None:
  """Whether all hosts see the same folder.

  Raises:
    UserError: a host does not see what the first one writes there.
  """
  probe = folder / ".shared-test"
  if jax.process_index() == 0:
    with files.storage(folder):
      probe.touch()
  gather(None)  # wait for it
  seen = gather(probe.exists())
  if jax.process_index() == 0:
    probe.unlink()
  if not all(seen):
    raise UserError(
      folder,
      f"a folder in which process {seen.index(False)} does not see what "
      "process 0 writes",
      "a folder that all hosts share",
      "choose one on a file system that all hosts share",
    )


class Preemption:
  """Whether SIGTERM or Ctrl-C came, to be asked once after each step.

  With several processes it is enough that one gets it, and all learn of it
  after the same step. JAX's coordination service sees to that in the
  background: it takes SIGTERM, which a process with Ctrl-C sends itself, and
  has the processes agree on the first step that none has begun. A step costs no
  communication for it.

  A second Ctrl-C is the KeyboardInterrupt that it would be elsewhere.
  """

  _step = itertools.count()  # one count for all phases: it must never go back

  def __enter__(self):
    self._arrived = self._interrupted = False
    self._together = jax.distributed.is_initialized()
    self._before = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    # A shell's background job ignores it.
    if self._before[signal.SIGINT] is not signal.SIG_IGN:
      signal.signal(signal.SIGINT, self._interrupt)
    if not self._together:
      self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
    return self

  def arrived(self) -> bool:
    """Whether to save and stop after this step."""
    if self._together:
      step = next(self._step)
      return multihost_utils.reached_preemption_sync_point(step)
    return self._arrived

  def cause(self) -> signal.Signals:
    """What came, once it has arrived: SIGINT or SIGTERM, of any process."""
    interrupted = any(gather(self._interrupted))
    return signal.SIGINT if interrupted else signal.SIGTERM

  def _note(self, *_):
    self._arrived = True

  def _interrupt(self, *_):
    signal.signal(signal.SIGINT, self._before[signal.SIGINT])
    # Not print(), which the handler may have interrupted.
    os.write(2, b"\nCtrl-C: saving after this step; once more stops at once\n")
    self._arrived = self._interrupted = True
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def ignore_preemption() -> None:
  """Lets SIGTERM end the program again, where nothing is to be saved.

  JAX takes it from the moment that the processes join.
  """
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
