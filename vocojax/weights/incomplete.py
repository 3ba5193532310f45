"""Folders that are written whole or not at all. Read next: `stream.py`.

OUT is written as OUT.incomplete-PID and renamed when all of it is there. What
goes wrong or stops the program removes that folder. SIGKILL cannot, so the next
run does, as soon as it is sure that nobody writes there any more.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator

from vocojax.core import files
from vocojax.core.orbax_calls import signals_later
from vocojax.errors import WeightsError

STOPPED = 143  # exit status after SIGTERM, as a shell has it: 128 + 15
# In the folder: which host writes it, locked until that process ends.
_WRITER = ".writer"


class Terminated(KeyboardInterrupt):
  """SIGTERM came."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
  """Raises Terminated where SIGTERM would have ended the program at once."""

  def stop(number, frame):
    raise Terminated("stopped by SIGTERM")

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def complete(
  target: pathlib.Path, beside: pathlib.Path
) -> Iterator[pathlib.Path]:
  """A folder to write to, that becomes `target` when all went well.

  Until then it lies beside `beside`, under a name that says so; if something
  goes wrong it is removed. So is what a process that is dead left there.

  Raises:
    WeightsError: for an OSError, such as a full disk.
    KeyboardInterrupt: Ctrl-C, or SIGTERM inside `terminable`.
  """
  beside = beside.absolute()
  temporary = beside.with_name(f"{beside.name}.incomplete-{os.getpid()}")
  writer, left = None, f"nothing of {beside} is left"
  try:
    _remove_leftovers(beside)
    temporary.mkdir(parents=True)
    writer = _sign(temporary)
    yield temporary
    _flush(temporary)
    with signals_later():
      (temporary / _WRITER).unlink()
      target.parent.mkdir(parents=True, exist_ok=True)
      temporary.rename(target)
      left = f"{beside} is complete"
  except KeyboardInterrupt as e:
    raise type(e)(f"{str(e) or 'interrupted'}; {left}") from e
  except OSError as e:
    raise files.storage_error(beside, e, WeightsError) from e
  finally:
    with signals_later():
      shutil.rmtree(temporary, ignore_errors=True)
      if writer is not None:
        os.close(writer)


def require_empty(folder: pathlib.Path) -> None:
  """Raises a WeightsError if there is anything where `complete` is to write."""
  with files.storage(folder, WeightsError):
    empty = folder.is_dir() and not any(folder.iterdir())
    if empty or not os.path.lexists(folder):
      return
  raise WeightsError(
    folder,
    "a path that exists",
    "a new or empty folder",
    "choose another --out",
  )


def _sign(folder: pathlib.Path) -> int:
  """Says which host writes a folder, and locks that until we end."""
  descriptor = os.open(folder / _WRITER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
  os.write(descriptor, socket.gethostname().encode())
  with contextlib.suppress(OSError):  # a file system without locks
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  return descriptor


def _remove_leftovers(beside: pathlib.Path) -> None:
  """Removes what dead processes left of `beside`, and says so."""
  pattern = re.compile(re.escape(beside.name) + r"\.incomplete-(\d+)")
  if not beside.parent.is_dir():
    return
  for folder in sorted(beside.parent.iterdir()):
    match = pattern.fullmatch(folder.name)
    if match and folder.is_dir() and not folder.is_symlink():
      if _is_dead(folder, int(match[1])):
        shutil.rmtree(folder, ignore_errors=True)
        done = "removed, as the process that wrote it is dead"
      else:
        done = "left as it is, since its process may still write it"
      print(f"{folder}: {done}", file=sys.stderr)


def _is_dead(folder: pathlib.Path, pid: int) -> bool:
  """Whether the process that wrote a folder has surely ended."""
  try:
    with open(folder / _WRITER, "rb") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except BlockingIOError:
        return False  # locked, maybe by a process of another container
      except OSError:
        pass
      host = file.read(1000).decode(errors="replace")
  except OSError:  # killed before it signed
    host = socket.gethostname()
  if host != socket.gethostname():
    return False
  if pid == os.getpid():  # it had the number that is ours now
    return True
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False


def _flush(folder: pathlib.Path) -> None:
  """Until it is on disk: some file systems only then find that it is full."""
  for path in folder.rglob("*"):
    if path.is_file():
      with open(path, "rb") as f:
        os.fsync(f.fileno())
