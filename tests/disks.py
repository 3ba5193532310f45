"""Small disks of their own, to be filled or made read-only."""

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def mounted(path: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """A file system at `path`, of a size such as '2M', until the end."""
  if shutil.which("mount") is None or os.geteuid():
    pytest.skip("only root can mount a small disk")
  path.mkdir(parents=True, exist_ok=True)
  done = _mount(path, f"size={size}")
  if done.returncode:
    pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
  try:
    yield path
  finally:
    subprocess.run(["umount", str(path)], check=True)


def remount(path: pathlib.Path, options: str) -> None:
  """Changes a mounted disk, such as to 'ro' or 'size=4M'."""
  done = _mount(path, f"remount,{options}")
  assert done.returncode == 0, done.stderr


def fill(path: pathlib.Path, leave: int = 0) -> pathlib.Path:
  """A file that takes all room but for about `leave` bytes."""
  file = path / "fill"
  with contextlib.suppress(OSError), file.open("wb", buffering=0) as f:
    while f.write(bytes(4096)):
      pass
  os.truncate(file, max(0, file.stat().st_size - leave))
  return file


def _mount(path: pathlib.Path, options: str) -> subprocess.CompletedProcess:
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
  return subprocess.run(command, capture_output=True, text=True, check=False)
