"""One writer at a time of a folder. Read next: core/files.py.

A lock is a file `.KIND.lock` in the folder, which names the process that holds
it. The operating system locks the file (flock) and frees it when that process
dies, however it dies. Where the file system has no locks, or none that other
hosts see, the modification time of the file is a heartbeat, and in a bucket its
content: a file that does not change for `STALE_SECONDS` was left by a process
that died.
"""

import contextlib
import errno
import fcntl
import itertools
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
  bucket = files.in_bucket(folder)
  folder = files.to_path(folder) if bucket else pathlib.Path(folder)
  path = folder / f".{kind}.lock"
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
    if _token(path) == me["token"]:
      path.unlink(missing_ok=True)  # while it is locked
    if descriptor is not None:
      os.close(descriptor)


def _acquire(path: pathlib.Path, kind: str, me: dict) -> int | None:
  """The open file, locked if the file system can do so, with `me` in it."""
  if files.in_bucket(path):
    if before := _holder(path):
      _wait_until_stale(path, kind, before)
    files.write_atomic(path, json.dumps(me))
    _settle(path, kind, me)
    return None
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
        _settle(path, kind, me)
      return descriptor
    except BaseException:
      os.close(descriptor)
      raise


def _settle(path: pathlib.Path, kind: str, me: dict) -> None:
  """Raises if another process has written its name at the same time."""
  time.sleep(SETTLE_SECONDS)
  if _token(path) != me["token"]:
    raise _taken(path, kind)


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
  before = now = _pulse(path)
  while now is not None and time.monotonic() < end:
    time.sleep(STALE_SECONDS / 60)
    now = _pulse(path)
    if now not in (before, None):
      raise _taken(path, kind)


def _pulse(path: pathlib.Path) -> int | dict | None:
  """What changes while the holder lives; None if the file is gone.

  Times are compared with each other, not with the clock of this host.
  """
  if files.in_bucket(path):
    return _holder(path) or None
  with contextlib.suppress(FileNotFoundError):
    return path.stat().st_mtime_ns


def _beat(
  path: pathlib.Path, kind: str, me: dict, stop: threading.Event
) -> None:
  """Shows others that this process lives; ends it if it has lost the lock.

  As when it was suspended for longer than `STALE_SECONDS` and another process
  took over: whatever it writes now would be mixed with what that one writes.
  """
  for beat in itertools.count():
    if stop.wait(BEAT_SECONDS):
      return
    if _token(path) not in (me["token"], None):
      print(f"error: {_taken(path, kind)}", file=sys.stderr, flush=True)
      os._exit(2)
    if files.in_bucket(path):
      with contextlib.suppress(UserError):
        files.write_atomic(path, json.dumps(me | {"beat": beat}))
    else:
      with contextlib.suppress(OSError):
        os.utime(path)


def _holder(path: pathlib.Path) -> dict:
  """Who wrote the file; {} if it does not say so, or not yet."""
  try:
    if files.in_bucket(path):
      with files.listing(path):
        holder = files.parse_json(path.read_bytes(), path)
    else:
      holder = files.read_json(path, limit=4096)
    files.get_field(holder, "pid", int, path)
    for key in ("host", "since", "token"):
      files.get_field(holder, key, str, path)
    return holder
  except UserError:
    return {}


def _token(path: pathlib.Path) -> str | None:
  return _holder(path).get("token")


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
