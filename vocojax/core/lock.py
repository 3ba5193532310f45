"""One writer at a time of a folder. Read next: core/files.py.

A lock is a file `.KIND.lock` in the folder, which names the process that holds
it. The operating system locks the file (flock) and frees it when that process
dies, however it dies. Where the file system has no locks, or none that other
hosts see, the modification time of the file is a heartbeat: a file that does
not change for `STALE_SECONDS` was left by a process that died.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

from absl import logging

from vocojax.core import files
from vocojax.errors import UserError

BEAT_SECONDS = 10
STALE_SECONDS = 60
# In which of two processes that start at once both have written their names.
SETTLE_SECONDS = 2


@contextlib.contextmanager
def held(
  folder: str | os.PathLike, kind: str, wait_seconds: float = 0.0
) -> Iterator[None]:
  """Holds the lock of one kind of writer of a folder.

  The processes of one run call `distributed.held`. Readers need no lock.

  Args:
    folder: an existing folder.
    kind: what writes, such as 'training'; part of a file name.
    wait_seconds: for another process that holds it.

  Raises:
    UserError: another process holds it, or the folder cannot be written.
  """
  path = pathlib.Path(folder, f".{kind}.lock")
  me = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    "token": os.urandom(8).hex(),  # two containers may share the above
  }
  end = time.monotonic() + wait_seconds
  while True:
    try:
      descriptor = _acquire(path, kind, me)
      break
    except UserError:
      if time.monotonic() >= end:
        raise
      time.sleep(0.2)
  stop = threading.Event()
  heart = threading.Thread(target=_beat, args=(path, kind, me, stop))
  heart.daemon = True
  try:
    heart.start()
    yield
  finally:
    stop.set()
    heart.join()
    if _holder(path) == me:
      path.unlink(missing_ok=True)  # while it is locked
    os.close(descriptor)


def _acquire(path: pathlib.Path, kind: str, me: dict) -> int:
  """The open file, locked if the file system can do so, with `me` in it."""
  while True:
    with files.storage(path):
      # Not inherited by programs that this one starts: they may outlive it.
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      locked = _flock(descriptor, path, kind)
      before = _holder(path)
      # A file system may keep its locks from other hosts.
      if before and not (locked and before["host"] == me["host"]):
        _wait_until_stale(path, kind, before)
      if not _is_open(descriptor, path):
        os.close(descriptor)  # the holder before removed it meanwhile
        continue
      with files.storage(path):
        _write(descriptor, path, json.dumps(me).encode())
      if not locked:
        time.sleep(SETTLE_SECONDS)
        if _holder(path) != me:
          raise _taken(path, kind)
      return descriptor
    except BaseException:
      os.close(descriptor)
      raise


def _flock(descriptor: int, path: pathlib.Path, kind: str) -> bool:
  """Whether the file is locked now; False if its file system has no locks."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
      raise _taken(path, kind) from e
    return False
  return True


def _is_open(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except FileNotFoundError:
    return False


def _write(descriptor: int, path: pathlib.Path, data: bytes) -> None:
  try:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
  except OSError:
    path.unlink(missing_ok=True)
    raise


def _wait_until_stale(path: pathlib.Path, kind: str, holder: dict) -> None:
  """Waits until the file was removed, or not changed for `STALE_SECONDS`.

  Raises:
    UserError: it was changed, so its process lives.
  """
  logging.warning(
    "%s: waiting up to %g s to see whether process %s on %s still lives",
    path.parent,
    STALE_SECONDS,
    holder["pid"],
    holder["host"],
  )
  end = time.monotonic() + STALE_SECONDS
  with contextlib.suppress(FileNotFoundError):
    # Its times are compared with each other, not with the clock of this host.
    before = path.stat().st_mtime_ns
    while time.monotonic() < end:
      time.sleep(STALE_SECONDS / 60)
      if path.stat().st_mtime_ns != before:
        raise _taken(path, kind)


def _beat(
  path: pathlib.Path, kind: str, me: dict, stop: threading.Event
) -> None:
  """Shows others that this process lives; ends it if it has lost the lock.

  As when it was suspended for longer than `STALE_SECONDS` and another process
  took over: whatever it writes now would be mixed with what that one writes.
  """
  while not stop.wait(BEAT_SECONDS):
    with contextlib.suppress(OSError):
      os.utime(path)
    if _holder(path) not in (me, {}):
      print(f"error: {_taken(path, kind)}", file=sys.stderr, flush=True)
      os._exit(2)


def _holder(path: pathlib.Path) -> dict:
  """Who wrote the file; {} if it does not say so, or not yet."""
  try:
    holder = files.read_json(path, limit=4096)
    files.get_field(holder, "pid", int, path)
    for key in ("host", "since", "token"):
      files.get_field(holder, key, str, path)
    return holder
  except UserError:
    return {}


def _taken(path: pathlib.Path, kind: str) -> UserError:
  holder = _holder(path)
  who = "another process"
  if holder:
    who = f"process {holder['pid']} on {holder['host']}"
    who += f" since {holder['since']}"
  return UserError(
    path.parent,
    f"{kind} by {who}",
    f"no other {kind} in this folder",
    "wait until it ends, or stop it, or choose another folder",
  )
